"""A tensor that knows the units of its channels, and what each operation makes of them.

What is linear in the spikes (convolution, linear layer, batch norm) can absorb their values, so that real numbers come
out of it; a layer whose output only one site reads can have that output divided by any scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from models.scale_trace import Refusal, Tag, Trace


class Traced(Tensor):
    tag: Tag
    its_trace: Trace

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*plain_args, **plain_kwargs)
        several = isinstance(result, (tuple, list)) and any(isinstance(part, Tensor) for part in result)
        if not isinstance(result, Tensor) and not several:
            return result  # a shape and the like
        if func not in _RULES:
            raise Refusal(f"{_name(func)} is not known to keep the scale of spikes")
        tags = _RULES[func](result, *args, **kwargs)
        trace = next(x for x in _flat(args) + list(kwargs.values()) if isinstance(x, Traced)).its_trace
        if several:
            return type(result)(traced(part, tag, trace) for part, tag in zip(result, tags, strict=True))
        return traced(result, tags, trace)


def _plain(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Traced) else x


def _flat(args: tuple) -> list:
    return [part for arg in args for part in (arg if isinstance(arg, (tuple, list)) else (arg,))]


def traced(x: Tensor, tag: Tag, trace: Trace) -> Traced:
    result = x.as_subclass(Traced)
    result.tag, result.its_trace = tag, trace
    return result


def _name(func: Any) -> str:
    return f"{getattr(func, '__module__', None) or 'torch.Tensor'}.{getattr(func, '__name__', repr(func))}"


_RULES: dict[Any, Callable[..., Any]] = {}
"""The tag of the result of each function, or those of its results, given the result and the arguments."""


def _rule(*functions: Any) -> Callable:
    def register(rule: Callable) -> Callable:
        _RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


@_rule(F.conv1d, F.conv2d, F.conv3d, F.linear)
def _linear(result, x, weight, bias=None, *args, **kwargs):
    return x.its_trace.layer(weight, x.tag, "linear map")


@_rule(F.batch_norm)
def _batch_norm(result, x, running_mean, running_var, weight=None, bias=None, *args, **kwargs):
    if weight is None or running_mean is None:
        raise Refusal("a batch norm without weights or running statistics takes no scale")
    return x.its_trace.layer(weight, x.tag, "batch norm")


@_rule(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
@_rule(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
@_rule(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
@_rule(F.interpolate, F.pad, torch._C._nn.pad, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
@_rule(torch.clone, Tensor.clone, Tensor.contiguous, Tensor.to, Tensor.float, Tensor.double, Tensor.detach)
def _keeps(result, x, *args, **kwargs):
    """Commutes with a scale above 0 of each channel."""
    return x.tag


@_rule(torch.mean, Tensor.mean, torch.sum, Tensor.sum, torch.amax, Tensor.amax)
def _reduces_pixels(result, x, dim=None, *args, **kwargs):
    dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    if {d % x.ndim for d in dims} & {0, 1}:
        raise Refusal("a reduction over images or channels is not known to keep the scale of spikes")
    return x.tag


@_rule(torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view, Tensor.squeeze, torch.squeeze)
def _reshapes(result, x, *args, **kwargs):
    if result.shape[:2] == x.shape[:2]:
        return x.tag
    if result.shape != (x.shape[0], x.shape[1:].numel()):
        raise Refusal(
            f"a change of shape from {tuple(x.shape)} to {tuple(result.shape)} is not known to keep the scale of spikes"
        )
    x.tag.read_by("a flatten")
    return Tag(x.tag.units.repeat_interleave(x.shape[2:].numel()))


@_rule(torch.cat, torch.concat)
def _cat(result, tensors, dim=0):
    if dim % result.ndim != 1:
        raise Refusal("a concatenation of other than channels is not known to keep the scale of spikes")
    parts = []
    for tensor in tensors:
        if isinstance(tensor, Traced):
            tensor.tag.read_by("a concatenation")
        parts.append(tensor.tag.units if isinstance(tensor, Traced) else torch.zeros(tensor.shape[1], dtype=torch.long))
    return Tag(torch.cat(parts))


@_rule(torch.chunk, Tensor.chunk, torch.split, Tensor.split)
def _split(result, x, size, dim=0):
    if dim % x.ndim != 1:
        raise Refusal("a split of other than channels is not known to keep the scale of spikes")
    x.tag.read_by("a split")
    return [Tag(part) for part in x.tag.units.split([r.shape[1] for r in result])]


@_rule(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def _add(result, x, other):
    if not isinstance(x, Traced):
        x, other = other, x
    if not isinstance(other, Traced):
        return x.tag if isinstance(other, (int, float)) and other == 0 else _add_tags(x.tag, _constant(x.tag))
    return _add_tags(x.tag, other.tag)


def _constant(tag: Tag) -> Tag:
    return Tag(torch.zeros_like(tag.units))


def _add_tags(a: Tag, b: Tag) -> Tag:
    if torch.equal(a.units, b.units):
        return Tag(a.units, tuple(dict.fromkeys(a.layers + b.layers)), a.fixed or b.fixed)
    spikes, currents = (a, b) if b.free else (b, a)
    if not currents.free:
        raise Refusal("a sum of spikes of different values, or with real numbers of a given scale")
    currents.read_by("a sum with spikes")
    for layer in currents.layers:
        layer.output_units = spikes.units
    return Tag(spikes.units, tuple(dict.fromkeys(spikes.layers + currents.layers)))


@_rule(torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__)
def _mul(result, x, other):
    """A product with a gate or a constant in real numbers keeps the scale of the other factor."""
    if not isinstance(x, Traced) or (isinstance(other, Traced) and x.tag.real and not other.tag.real):
        x, other = other, x
    if isinstance(other, Traced):
        if x.tag.free < other.tag.free and x.tag.real:
            x, other = other, x
        if not other.tag.real:
            raise Refusal("a product of two spike trains")
        other.tag.read_by("a product")
    for layer in x.tag.layers:
        layer.can_shift = False
    return x.tag
