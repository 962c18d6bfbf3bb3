"""Layers in the shape that NIR has them in: square convolutions without groups, padded alike on both sides."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


def square_kernel(conv: nn.Conv2d, around: tuple[int, int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The weight of a convolution without groups, its kernel with zeros around it until it is square and its padding
    the same on both sides.

    A kernel that begins with f zeros and a padding that is f larger on both sides give the same numbers, as many as
    before if the kernel ends in f zeros, too, or if there was that much less padding there.

    Args:
        around: padding on the (left, right, top, bottom).

    Returns:
        the weight (out, in, K, K) and the padding (of rows, of columns).

    Raises:
        ValueError: where no such kernel exists.
    """
    weight = without_groups(conv)
    left, right, top, bottom = around
    (rows, row_padding), (columns, column_padding) = _even(top, bottom), _even(left, right)
    heights, widths = sum(rows) + weight.shape[2], sum(columns) + weight.shape[3]
    side = max(heights, widths)
    more_rows, more_columns = side - heights, side - widths
    if more_rows % 2 or more_columns % 2:
        raise ValueError(f"a convolution with kernel {conv.kernel_size} and padding {around}")
    zeros = [
        *(columns[0] + more_columns // 2, columns[1] + more_columns // 2),
        *(rows[0] + more_rows // 2, rows[1] + more_rows // 2),
    ]
    if any(zeros) and conv.dilation != (1, 1):
        raise ValueError(f"a convolution with dilation {conv.dilation}, kernel {conv.kernel_size} and padding {around}")
    return F.pad(weight, zeros), (row_padding + more_rows // 2, column_padding + more_columns // 2)


def _even(before: int, after: int) -> tuple[tuple[int, int], int]:
    """Zeros in front of and behind a kernel, and the padding of both sides, for a padding that is lopsided."""
    padding = max(before, after)
    return (padding - before, padding - after), padding


def without_groups(conv: nn.Conv2d) -> Tensor:
    """The weight (out, in, K, K) of a convolution with zeros from each group to the others."""
    weight, groups = conv.weight.detach(), conv.groups
    if groups == 1:
        return weight
    out_channels, per_group = weight.shape[0] // groups, weight.shape[1]
    dense = weight.new_zeros(weight.shape[0], per_group * groups, *weight.shape[2:])
    for group in range(groups):
        rows = slice(group * out_channels, (group + 1) * out_channels)
        dense[rows, group * per_group : (group + 1) * per_group] = weight[rows]
    return dense


def select_channels(node: fx.Node, channels: int) -> tuple[Tensor, ...]:
    """Which channels each part of a split or chunk has: the same function, of their numbers."""
    _, *args = node.args
    numbers: Any = torch.arange(channels)[None]
    if isinstance(node.target, str):
        parts = getattr(numbers, node.target)(*args, **node.kwargs)
    else:
        parts = node.target(numbers, *args, **node.kwargs)
    return tuple(part[0] for part in parts)
