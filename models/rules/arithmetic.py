"""Rules of sums, products and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.rules.base import affine, on_traces, rate_rule
from models.spiketrain import SpikeTrain, UnsupportedOperationError


@rate_rule(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def add(x, other, *, alpha=1):
    """Sums stay pending; a plain tensor or number is the same at each step."""
    if alpha != 1:
        other = other * alpha
    if not isinstance(x, SpikeTrain):
        x, other = other, x
    if not isinstance(other, SpikeTrain):
        other = constant_like(x, other)
    if x.shape == other.shape and not x.streams_have_graph:
        return x.of_terms(*x.terms, *other.terms)
    return _elementwise(torch.add, x, other)


@rate_rule(torch.sub, torch.Tensor.sub, torch.Tensor.__sub__)
def sub(x, other, *, alpha=1):
    return add(x, -alpha * other)


@rate_rule(torch.rsub, torch.Tensor.__rsub__)
def rsub(x, other):
    return sub(other, x)


@rate_rule(torch.neg, torch.Tensor.neg, torch.Tensor.__neg__)
def neg(x):
    return mul(x, -1)


@rate_rule(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def mul(x, other):
    """Products with what is the same at each step: a number, a parameter, a mask, a constant train."""
    if not isinstance(x, SpikeTrain):
        x, other = other, x
    if isinstance(other, (int, float)):  # in half precision a tensor of it would be rounded, as PyTorch's number is not
        return affine(x, lambda v: v * other)
    both_spike = isinstance(other, SpikeTrain)
    if not isinstance(other, SpikeTrain):
        other = constant_like(x, other)
    if both_spike and (x.knows_one_step or (x.steps > 1 and other.steps > 1)):
        raise UnsupportedOperationError("no rule for the product of two spike trains (a gate?)")
    return _elementwise(torch.mul, x, other)


@rate_rule(torch.div, torch.Tensor.div, torch.Tensor.__truediv__, torch.true_divide)
def div(x, other):
    if isinstance(other, SpikeTrain):
        raise UnsupportedOperationError("no rule for the division by a spike train")
    if isinstance(other, (int, float)):
        return affine(x, lambda v: v / other)
    return mul(x, 1 / other)


def _in_place(function: Any, rule: Callable) -> None:
    """The rule of an in-place method: the train is changed for all who hold it, as a tensor would be."""

    @rate_rule(function)
    def changed(x, *args, **kwargs):
        result = rule(x, *args, **kwargs)
        x.terms, x._rate = result.terms, result._rate
        return x


for _method, _rule in (("add_", add), ("sub_", sub), ("mul_", mul), ("div_", div)):
    _in_place(getattr(torch.Tensor, _method), _rule)
for _method, _rule in (("__iadd__", add), ("__isub__", sub), ("__imul__", mul), ("__itruediv__", div)):
    _in_place(getattr(torch.Tensor, _method), _rule)


def constant_like(x: SpikeTrain, value: Tensor | float) -> SpikeTrain:
    """A tensor or number that broadcasts against (B, C, ...), as a constant train of the same pass."""
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=x.dtype, device=x.device)  # filled there: a copy would wait for a GPU
    tensor = value.to(x.dtype) if value.ndim == 0 else value
    tensor = tensor.reshape((1,) * (x.ndim - tensor.ndim) + tuple(tensor.shape))
    return SpikeTrain.constant(tensor, x.timesteps, x.kind, x.tape)


def _elementwise(function: Callable, x: SpikeTrain, y: SpikeTrain) -> SpikeTrain:
    """A function of two trains that broadcast, at most bilinear, and linear in those that change over time."""
    x_steps, y_steps = x.folded.unflatten(0, (x.steps, -1)), y.folded.unflatten(0, (y.steps, -1))
    stream = x.on_streams(lambda *streams: function(*streams).flatten(0, 1), x_steps, y_steps)
    rate = function(x.rate, y.rate) if x.has_rate else None
    return x.derive(stream, max(x.steps, y.steps), rate=rate, trace=on_traces(function, x, y))


def _dropout(function: Callable, mask_shape: Callable[[torch.Size], tuple[int, ...]]) -> None:
    @rate_rule(function)
    def rule(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        return mul(x, function(x.new_ones(mask_shape(x.shape)), p, True))


_dropout(F.dropout, lambda shape: tuple(shape))
for _channelwise in (F.dropout1d, F.dropout2d, F.dropout3d):
    _dropout(_channelwise, lambda shape: (*shape[:2], *[1] * (len(shape) - 2)))
