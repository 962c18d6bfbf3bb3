"""Batch norm with the statistics of all processes: `synchronised_batch_norm`, around forward passes of training.

Without it each process of a data-parallel training normalises with its own share of the batch. `nn.SyncBatchNorm` is
no way out: it refuses CPU tensors, knows no spike train, and its converter drops the activation of timm's
`BatchNormAct2d` and the step mode of SpikingJelly's layers. So modules stay as they are, and what they call, PyTorch's
`F.batch_norm`, is looked up here: a spike train's rule reduces its own sums (`models.rules.layers`), plain tensors
(adapters, gates, analogue networks, the streams of BPTT and of the online rules) go through `batch_norm_over_ranks`.

Shapes: N numbers of the batch axis, C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from models.normalization import backward_over_ranks, update_running
from models.ranks import active_group, group_of_several, moments_over_ranks, taking_together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextlib.contextmanager
def synchronised_batch_norm(enabled: bool = True, group: ProcessGroup | None = None) -> Iterator[None]:
    """Batch norms in training that run in here have the statistics of all processes' batches together.

        with synchronised_batch_norm(config.sync_bn):
            loss = loss_of(model(images), labels)
        loss.backward()  # inside or behind: what the forward pass left knows its processes

    K processes with equal shares of a batch then have, averaged as DDP averages them, the gradients and the running
    statistics of one process with the whole batch: for every algorithm of `models.ALGORITHMS`, for plain batch norms
    (`nn.BatchNorm2d`, timm's `BatchNormAct2d`, SpikingJelly's), eager and compiled. Shares of unequal size count by
    their size. Norms that use their running statistics are none of it.

    A norm costs one collective in the forward pass and one in the backward pass (the norms of a layer of neurons one
    together; under rate_s one a step in the forward pass). All processes must run the same passes in here, in the same
    order, each with at least one image: a pass of one process alone waits for the others for ever.

    Args:
        enabled: False changes nothing, and neither does a single process.
        group: the processes; None for all.
    """
    several = group_of_several(group) if enabled else None
    if several is None:
        yield
        return
    with batch_norm_of(several):
        yield


@contextlib.contextmanager
def batch_norm_of(group: ProcessGroup | None) -> Iterator[None]:
    """`synchronised_batch_norm` of these processes, however many they are; of None each process's own."""
    with taking_together(group), contextlib.nullcontext() if group is None else _SynchronisedFunctions():
        yield


class _SynchronisedFunctions(TorchFunctionMode):
    """Sends the batch norm of plain tensors to `batch_norm_over_ranks`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.batch_norm and isinstance(args[0], Tensor):  # a spike train has a rule of its own
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """`F.batch_norm`, with the statistics of all processes where it takes those of the batch."""
    group = active_group()
    # timm's StdConv2d standardises its weight, (1, out, -1), with this function: it is the same on all processes
    of_weight = running_mean is None and momentum == 0 and len(x) == 1
    if not training or group is None or of_weight:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return batch_norm_over_ranks(x, running_mean, running_var, weight, bias, momentum, eps, group=group)


def batch_norm_over_ranks(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    *,
    group: ProcessGroup,
    copies: int = 1,
) -> Tensor:
    """`F.batch_norm` in training with the statistics of the batches of several processes.

    Forward and backward pass are those of `torch.nn.SyncBatchNorm` (Ioffe and Szegedy, ICML 2015, with N over all
    processes), on any device. Sums are at least float32; numbers keep the type of `x`, so that autocast may be on.

    Args:
        x: (N, C, ...).
        running_mean, running_var: moved in place, or None.
        group: the processes.
        copies: how often each number counts in the running variance (T for an input that is constant over time).
    """
    y, mean, var, count = _BatchNormOverRanks.apply(x, weight, bias, eps, group)
    if running_mean is not None:
        assert running_var is not None
        update_running(running_mean, running_var, mean, var, momentum, count * copies)
    return y


class _BatchNormOverRanks(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any):
        unused = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        own = torch.batch_norm_update_stats(x, unused, unused.clone(), 0.0)  # as in models.moments
        mean, var, count = moments_over_ranks(*own, x.numel() // x.shape[1], group)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, count)
        weight, bias = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, weight, mean, invstd = ctx.saved_tensors
        return *backward_over_ranks(grad, x, mean, invstd, weight, ctx.needs_input_grad[:3], ctx.group), None, None
