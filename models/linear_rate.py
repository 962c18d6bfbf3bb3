"""The rate rule of convolutions and linear layers.

A linear map commutes with the mean over time: the mean current is W r + b exactly (Yu et al., NeurIPS
2024, section 4.2). Its value is the mean of the T outputs that the spike pass computed anyway, so no
forward convolution of the rate is ever run; its backward pass is that of the map at the input r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models.compiling import compilable
from models.layout import from_layout, layout
from models.small_maps import convolution_backward


class Counts(NamedTuple):
    """The rate of a layer of neurons as the number of its spikes: what the backward pass keeps of it."""

    spikes: Tensor
    """uint8, (B, C, ...)."""
    timesteps: int

    def rate(self, dtype: torch.dtype) -> Tensor:
        """The rate to the last bit: divided as the neurons divide it."""
        # elsewhere a compiler may divide by a number of steps that it does not know as it does not by one that it knows
        divide = _divided_in_one_pass if self.spikes.device.type == "cpu" else _divided
        return from_layout(divide(layout(self.spikes, 1), self.timesteps, dtype), self.spikes)


def _divided(spikes: Tensor, timesteps: int, dtype: torch.dtype) -> Tensor:
    return (spikes.to(torch.promote_types(dtype, torch.float32)) / timesteps).to(dtype)


_divided_in_one_pass = compilable(_divided)


class ConvRate(Function):
    """The rate after a convolution: `value` forward, the convolution's backward at `rate`.

    Args:
        rate: (B, C_in, ...). weight: (C_out, C_in/groups, ...). bias: (C_out,) or None.
        value: mean over time of the convolved stream, (B, C_out, ...).
        geometry: stride, padding, dilation (a list of ints each), groups, and of a transposed convolution its output
            padding, else None.
        counts: the rate, where it is known as a number of spikes, or None.
        cast: what `cast_once` made of the weight, or None.
    """

    @staticmethod
    def forward(ctx, rate, weight, bias, value, geometry, counts, cast=None):
        _save(ctx, rate, weight if cast is None else cast, counts)
        ctx.weight_dtype = weight.dtype
        ctx.geometry, ctx.bias_shape = geometry, None if bias is None else list(bias.shape)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rate, weight = _saved(ctx)
        stride, padding, dilation, groups, output_padding = ctx.geometry
        # under autocast the stream was convolved in the type of `grad`: so is the backward pass
        grads = convolution_backward(
            grad,
            rate.to(grad.dtype),
            weight.to(grad.dtype),
            ctx.bias_shape,
            stride,
            padding,
            dilation,
            output_padding is not None,
            output_padding or [0] * len(stride),
            groups,
            list(ctx.needs_input_grad[:3]),
            ctx.weight_dtype,
        )
        return (*_as_types(grads, ctx.rate_dtype, ctx.weight_dtype, ctx.weight_dtype), None, None, None, None)


def cast_once(weight: Tensor) -> Tensor | None:
    """The weight in autocast's type for both passes, on a CPU, where making it takes time; None where there is no need.

    Autocast's own copy lives as long as the forward pass.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.is_autocast_enabled("cpu"):
        return None
    return weight.detach().to(torch.get_autocast_dtype("cpu"))


class LinearRate(Function):
    """The rate after a linear layer: `value` (B, ..., out) forward, the layer's backward at `rate` (B, ..., in)."""

    @staticmethod
    def forward(ctx, rate, weight, bias, value, counts):
        _save(ctx, rate, weight, counts)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rate, weight = _saved(ctx)
        needs_rate, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        grads = (
            grad @ weight.to(grad.dtype) if needs_rate else None,
            rows.t() @ rate.to(grad.dtype).flatten(0, -2) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
        return (*_as_types(grads, ctx.rate_dtype, weight.dtype, weight.dtype), None, None)


class WithValue(Function):
    """Gives a tensor another value of the same shape and leaves its gradient alone (max pooling of rates)."""

    @staticmethod
    def forward(ctx, x, value):
        return value

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _save(ctx, rate: Tensor, weight: Tensor, counts: Counts | None) -> None:
    """Keeps the rate as a number of spikes where it can: a byte for each neuron."""
    ctx.save_for_backward(rate if counts is None else counts.spikes, weight)
    ctx.rate_dtype, ctx.timesteps = rate.dtype, counts and counts.timesteps


def _saved(ctx) -> tuple[Tensor, Tensor]:
    kept, weight = ctx.saved_tensors
    return (kept if ctx.timesteps is None else Counts(kept, ctx.timesteps).rate(ctx.rate_dtype)), weight


def _as_types(grads: tuple[Tensor | None, ...], *dtypes: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True))
