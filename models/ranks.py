"""What the batch norms of several processes tell one another: moments in the forward pass, sums in the backward pass.

Two processes with half the batch each then have the statistics, and the gradients, of one process with all of it.

Shapes: K processes, C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # a build of PyTorch without processes has no such name
    from torch.distributed import ProcessGroup

Moments = tuple[Tensor, Tensor, Tensor]
"""Mean, biased variance and count of the numbers that all processes hold."""

_group: ProcessGroup | None = None
_remembered: list[Moments] | None = None
_recalled: Iterator[Moments] | None = None
_alone = False


def active_group() -> ProcessGroup | None:
    """The processes whose batches batch norm takes together now; None where each normalises its own."""
    return _group


@contextlib.contextmanager
def taking_together(group: ProcessGroup | None) -> Iterator[None]:
    """Batch norms that run in here have the statistics of these processes' batches together; of None each its own."""
    global _group
    kept, _group = _group, group
    try:
        yield
    finally:
        _group = kept


@contextlib.contextmanager
def remembering(moments: list[Moments]) -> Iterator[None]:
    """What `moments_over_ranks` finds in here is appended, too."""
    global _remembered
    kept, _remembered = _remembered, moments
    try:
        yield
    finally:
        _remembered = kept


@contextlib.contextmanager
def recalling(moments: list[Moments]) -> Iterator[None]:
    """`moments_over_ranks` gives these in here, one after the other, and exchanges nothing."""
    global _recalled
    kept, _recalled = _recalled, iter(moments)
    try:
        yield
    finally:
        _recalled = kept


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """`largest_over_ranks` asks no other process in here: they may make other passes, or none."""
    global _alone
    kept, _alone = _alone, True
    try:
        yield
    finally:
        _alone = kept


def group_of_several(group: ProcessGroup | None) -> ProcessGroup | None:
    """This group, or that of all processes for None; None where it has a single process or none was started."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) < 2:
        return None
    return dist.group.WORLD if group is None else group


def moments_over_ranks(mean: Tensor, var: Tensor, count: int, group: ProcessGroup) -> Moments:
    """Mean and biased variance, (C,) each, and the count, a scalar, of the numbers that all processes hold.

        N = sum_k n_k        mu = sum_k n_k mu_k / N        sigma^2 = sum_k n_k (sigma_k^2 + (mu_k - mu)^2) / N

    the pairwise formula of Chan, Golub and LeVeque, 1979, for K parts: squares are taken about means, so that a large
    mean cancels nothing. One collective; all processes compute the same bits.

    Args:
        mean, var: of this process, (C,) each, the variance biased.
        count: n_k, how many numbers a channel has on this process.
    """
    if _recalled is not None:
        mean, var, total = next(_recalled)
        return mean.detach(), var.detach(), total.detach()
    moments = _gathered(mean, var, count, group)
    if _remembered is not None:
        _remembered.append(moments)
    return moments


def _gathered(mean: Tensor, var: Tensor, count: int, group: ProcessGroup) -> Moments:
    own = torch.cat([mean, var, mean.new_full((1,), count)])
    table = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather(list(table), own, group=group)
    means, variances, counts = table.split([mean.numel(), var.numel(), 1], dim=1)
    total = counts.sum()
    share = counts / total
    offsets = means - means[0]  # about one of the means, for the same reason
    offset = (share * offsets).sum(0)
    return means[0] + offset, (share * (variances + (offsets - offset).square())).sum(0), total


def sums_over_ranks(sums: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """These tensors of one type, each summed over all processes, in one collective."""
    packed = torch.cat([x.flatten() for x in sums])
    dist.all_reduce(packed, group=group)
    pieces = packed.split([x.numel() for x in sums])
    return [piece.view(x.shape) for piece, x in zip(pieces, sums, strict=True)]


def largest_over_ranks(value: Tensor) -> Tensor:
    """The largest of the numbers that the processes hold, in place; a single process keeps its own."""
    if not _alone and group_of_several(None) is not None:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value
