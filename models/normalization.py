"""Batch norm of a spike train, as a pending affine map with the statistics that made it.

rate_M (Yu et al., NeurIPS 2024, section 4.3): mean and variance are those of all T steps together,
over T*B*H*W. The backward pass is the ordinary batch-norm backward at the mean over time of the
stream, with the stream's statistics and N = B*H*W, which is what PyTorch's own
`native_batch_norm_backward` computes when it is handed them.

Where the statistics are those of several processes together (`models.sync`), so are the two sums of the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models.ranks import sums_over_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """y = (x - mean) * invstd * weight + bias, per channel (axis 1).

    Args:
        mean, invstd: (C,), at least float32, without a graph.
        weight, bias: (C,) parameters or None.
        of_batch: whether mean and invstd come from this batch (their gradient then counts) or are constants.
        group: the processes whose batches they come from, together; None for this process's own.
    """

    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    of_batch: bool
    group: ProcessGroup | None = None

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The map as x * scale + shift, (C,) each, without a graph."""
        scale = self.invstd if self.weight is None else self.invstd * self.weight.detach()
        shift = -self.mean * scale
        return scale, shift if self.bias is None else shift + self.bias.detach()

    def on_stream(self, x: Tensor) -> Tensor:
        """Applies the map to a tensor (N, C, ...) without a graph; the numbers keep the type of `x`."""
        scale, shift = self.scale_and_shift()
        # rounded as it is written; and autocast, which on CUDA would copy the stream to float32 first, minds no out=
        return torch.addcmul(per_channel(shift, x), x, per_channel(scale, x), out=torch.empty_like(x))

    def on_rate(self, rate: Tensor) -> Tensor:
        """Applies the map to a rate (B, C, ...) with the graph of the rate rule."""
        return _NormRate.apply(rate, self.weight, self.bias, self)

    def backward(
        self, grad: Tensor, rate: Tensor, weight: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients with respect to the rate before the map, the weight and the bias.

        Args:
            grad: gradient of the rate after the map, (B, C, ...).
            rate: the rate before the map, same shape.
            needs: which of the three are wanted.
        """
        if self.of_batch and self.group is not None:
            return backward_over_ranks(grad, rate, self.mean, self.invstd, weight, needs, self.group)
        # constant statistics are given twice: a CPU takes the running ones, and CUDA's kernels for channels_last, for
        # vectors and for a gradient of the rate alone refuse to run without the saved ones
        running_mean, running_var = (None, None) if self.of_batch else (self.mean, self.invstd.pow(-2))
        # beside a weight in half precision a CPU's kernel would take the statistics to be of its type, too
        weight = None if weight is None else weight.to(self.mean.dtype)
        return torch.ops.aten.native_batch_norm_backward(
            *(grad, rate, weight, running_mean, running_var, self.mean, self.invstd),
            train=self.of_batch,
            eps=0.0,
            output_mask=list(needs),
        )


class _NormRate(Function):
    @staticmethod
    def forward(ctx, rate, weight, bias, norm):
        ctx.save_for_backward(rate, weight)
        ctx.norm = norm
        return norm.on_stream(rate)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rate, weight = ctx.saved_tensors
        return (*ctx.norm.backward(grad, rate, weight, ctx.needs_input_grad[:3]), None)


def backward_over_ranks(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    needs: tuple[bool, bool, bool],
    group: ProcessGroup,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward pass of batch norm with the statistics of several processes.

        db = sum g      dw = invstd sum g (x - mu)
        dx = w invstd (g - [SUM g + (x - mu) invstd^2 SUM g (x - mu)] / N)

    sum goes over this process's numbers, SUM over those of all, and N counts those of all: DDP averages the gradients
    of parameters over processes by itself, so that theirs stay local, as in `torch.nn.SyncBatchNorm`.

    Args:
        grad: gradient of the output, (N, C, ...).
        x: the input, same shape.
        mean, invstd: of all processes, (C,), at least float32.
        weight: (C,) or None.
        needs: whether the gradients of x, weight and bias are wanted; the same on all processes.
    """
    axes = [axis for axis in range(x.ndim) if axis != 1]
    g = grad.to(mean.dtype)
    deviation = x.to(mean.dtype) - per_channel(mean, x)
    total, product = g.sum(axes), (g * deviation).sum(axes)
    of_weight = (invstd * product).to(weight.dtype) if weight is not None and needs[1] else None
    of_bias = total.to(total.dtype if weight is None else weight.dtype) if needs[2] else None
    if not needs[0]:
        return None, of_weight, of_bias
    count = total.new_full((1,), x.numel() // x.shape[1])
    total, product, count = sums_over_ranks([total, product, count], group)
    scale = invstd if weight is None else invstd * weight.detach()
    slope = per_channel(invstd.square() * product / count, x)
    dx = per_channel(scale, x) * (g - per_channel(total / count, x) - deviation * slope)
    return dx.to(x.dtype), of_weight, of_bias


def per_channel(v: Tensor, like: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, ...), to broadcast over a tensor (N, C, ...)."""
    return v.view(1, -1, *[1] * (like.ndim - 2))


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int | Tensor
) -> None:
    """Moves the running statistics as `torch.nn.BatchNorm2d` does, in place.

    Args:
        var: the biased variance of the batch, (C,).
        count: how many numbers a channel has, T*B*H*W: the running variance is the unbiased one. An input
            that is constant over time counts T times, so that laziness changes no number. A scalar tensor where
            several processes counted together.
    """
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
