"""How many synapses a spike reaches: with borders, strides, dilation, groups and padding, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def axis_fan_out(size: int, outputs: int, kernel: int, stride: int, before: int, dilation: int) -> Tensor:
    """For each place of one axis, how many pairs of output and kernel element see it, int64 (size,).

    Output o sees place o * stride - before + k * dilation through kernel element k.

    Args:
        before: zeros in front of the first place.
    """
    seen = torch.arange(outputs)[:, None] * stride - before + torch.arange(kernel)[None] * dilation
    inside = seen[(seen >= 0) & (seen < size)]
    return torch.bincount(inside, minlength=size)


def transposed_axis_fan_out(size: int, outputs: int, kernel: int, stride: int, before: int, dilation: int) -> Tensor:
    """For each place of one axis of a transposed convolution, how many outputs it reaches, int64 (size,).

    Place i reaches output i * stride - before + k * dilation through kernel element k.

    Args:
        before: outputs that are cut off in front of the first.
    """
    reached = torch.arange(size)[:, None] * stride - before + torch.arange(kernel)[None] * dilation
    return ((reached >= 0) & (reached < outputs)).sum(1)


def fan_out(
    places: Sequence[int],
    outputs: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
) -> Tensor:
    """Synapses from each place of a map to one output channel, float64, of shape `places`: axes multiply.

    Args:
        transposed: whether it is a transposed convolution.
    """
    axes = zip(places, outputs, kernel, stride, before, dilation, strict=True)
    of_axis = transposed_axis_fan_out if transposed else axis_fan_out
    counts = [of_axis(*axis).double() for axis in axes]
    shapes = [[-1 if i == axis else 1 for i in range(len(counts))] for axis in range(len(counts))]
    return math.prod(c.reshape(shape) for c, shape in zip(counts, shapes, strict=True))  # type: ignore[return-value]


def padding_before(
    padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Zeros in front of the first place of each axis; "same" puts the odd one behind, as PyTorch does."""
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return per_axis(padding, len(kernel))  # type: ignore[arg-type]


def per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One number for each axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
