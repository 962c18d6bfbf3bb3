"""The graph of a feedback loop: one application of it at the measured averages, and the gradient at the equilibrium.

Nothing in it depends on the number of time steps.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class AtAverage(Function):
    """a = clip(c / theta, 0, 1), with the measured average for its value: da/dc = [0 < a < 1] / theta.

    Args:
        current: c, the mean current, with its graph; (B, C, ...).
        average: a, same shape.
        threshold: theta.
    """

    @staticmethod
    def forward(ctx, current, average, threshold):
        ctx.save_for_backward((average > 0) & (average < 1))
        ctx.threshold, ctx.dtype = threshold, current.dtype
        return average

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return (grad * mask / ctx.threshold).to(ctx.dtype), None, None


class AtEquilibrium(Function):
    """The average of the loop's last layer; backward, each layer's share of its gradient at the equilibrium.

    Args:
        solve: from dL/da_n to the gradients of a_1 to a_n that the whole loop adds up to.
        averages: a_1 to a_n, each as one application of its layer at the averages before it.
    """

    @staticmethod
    def forward(ctx, solve: Callable[[Tensor], list[Tensor]], *averages):
        ctx.solve = solve
        return averages[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, *ctx.solve(grad)
