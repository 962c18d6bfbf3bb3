"""What each torch function does to a spike train: one small rule per operation.

The stream's part of a rule runs on time folded into the batch; the rate's part is the same map where
the map is affine for each image, and one of the functions of `models.linear_rate` where its value is
known already. Importing this module fills `models.spiketrain.RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import moments_and_mean
from models.linear_rate import ConvRate, LinearRate, WithValue
from models.normalization import Norm, update_running
from models.spiketrain import RULES, SpikeTrain, Term, UnsupportedOperationError


def rate_rule(*functions: Any) -> Callable[[Callable], Callable]:
    """Registers a rule for torch functions and for the `torch.Tensor` methods of the same meaning."""

    def register(rule: Callable) -> Callable:
        for function in functions:
            RULES[function] = rule
        return rule

    return register


def affine(x: SpikeTrain, function: Callable[[Tensor], Tensor]) -> SpikeTrain:
    """Applies a map that is affine for each image by itself, on the stream and on the rate."""
    stream = x.on_streams(function, x.folded)
    return x.derive(stream, x.steps, rate=function(x.rate) if x.kind == "rate" else None)


# -- convolutions and linear layers -------------------------------------------------------------------


def _convolution(function: Callable, spatial: int) -> None:
    @rate_rule(function)
    def rule(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        stride, dilation = _ints(stride, spatial), _ints(dilation, spatial)
        x, padding = _explicit_padding(x, weight, padding, dilation, spatial)
        geometry = (stride, padding, dilation, groups)
        stream = x.on_streams(lambda folded: function(folded, weight, bias, *geometry), x.folded)
        rate = x.rate if x.kind == "rate" else None
        return x.derive(stream, x.steps, link=lambda value: ConvRate.apply(rate, weight, bias, value, geometry))


def _explicit_padding(x, weight, padding, dilation, spatial) -> tuple[SpikeTrain, list[int]]:
    """ "same" and "valid" in numbers; where "same" is lopsided, the train is padded first, as PyTorch does."""
    if padding == "valid":
        return x, [0] * spatial
    if padding != "same":
        return x, _ints(padding, spatial)
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if all(t % 2 == 0 for t in total):
        return x, [t // 2 for t in total]
    pad = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    return affine(x, lambda v: F.pad(v, pad)), [0] * spatial


def _ints(value: int | Sequence[int], count: int) -> list[int]:
    values = [value] * count if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


for _function, _spatial in ((F.conv1d, 1), (F.conv2d, 2), (F.conv3d, 3)):
    _convolution(_function, _spatial)


@rate_rule(F.linear)
def linear(x, weight, bias=None):
    stream = x.on_streams(lambda folded: F.linear(folded, weight, bias), x.folded)
    rate = x.rate if x.kind == "rate" else None
    return x.derive(stream, x.steps, link=lambda value: LinearRate.apply(rate, weight, bias, value))


# -- batch norm ---------------------------------------------------------------------------------------


@rate_rule(F.batch_norm)
def batch_norm(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> SpikeTrain:
    """rate_M: the statistics of all steps together; the affine map itself stays pending."""
    if x.kind == "graph":
        return _batch_norm_with_graph(x, running_mean, running_var, weight, bias, training, momentum, eps)
    term, value = x.single(), None
    if training:
        if _count(x) == 1:
            raise ValueError(f"batch norm in training takes more than 1 value per channel, found {tuple(x.shape)}")
        mean, var, value = moments_and_mean(term.stream, term.steps)
        if running_mean is not None:
            update_running(running_mean, running_var, mean, var, momentum, _count(x))
    else:
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, var = running_mean.to(dtype, copy=True), running_var.to(dtype)
    norm = Norm(mean, torch.rsqrt(var + eps), weight, bias, of_batch=training)
    rate = term.rate_before_norm(value) if x.kind == "rate" else None
    return SpikeTrain([Term(term.stream, term.steps, norm=norm, _rate=rate)], x.timesteps, x.kind)


def _batch_norm_with_graph(x, running_mean, running_var, weight, bias, training, momentum, eps) -> SpikeTrain:
    folded = x.folded
    if not training or running_mean is None:
        return x.derive(F.batch_norm(folded, running_mean, running_var, weight, bias, training, 0.0, eps), x.steps)
    mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    stream = F.batch_norm(folded, mean, var, weight, bias, True, 1.0, eps)  # leaves this batch's moments in both
    stored = folded.numel() // folded.shape[1]
    update_running(running_mean, running_var, mean, var * ((stored - 1) / stored), momentum, _count(x))
    return x.derive(stream, x.steps)


def _count(x: SpikeTrain) -> int:
    """How many numbers a channel has over all T steps."""
    return x.timesteps * math.prod(x.shape) // x.shape[1]


# -- pooling ------------------------------------------------------------------------------------------


def _max_pool(function: Callable) -> Callable:
    def rule(x, *args, **kwargs):
        """Each step's spikes are pooled; the gradient goes through the argmax of the rate."""
        if kwargs.get("return_indices"):
            raise UnsupportedOperationError("no rule for max pooling with return_indices=True on a spike train")
        stream = x.on_streams(lambda folded: function(folded, *args, **kwargs), x.folded)
        rate = x.rate if x.kind == "rate" else None
        return x.derive(stream, x.steps, link=lambda value: WithValue.apply(function(rate, *args, **kwargs), value))

    return rule


_POOLS: tuple[Callable, ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
for _pool in (*_POOLS, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d):
    rate_rule(_pool)(_max_pool(_pool))  # type: ignore[arg-type]  # mypy knows no common type of overloads


def _affine_function(*functions: Any) -> None:
    """Functions whose first argument is the train and whose other arguments never name the batch axis."""
    for function in functions:
        rate_rule(function)(lambda x, *args, _f=function, **kwargs: affine(x, lambda v: _f(v, *args, **kwargs)))


_affine_function(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_affine_function(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_affine_function(F.interpolate, F.pixel_shuffle, F.pixel_unshuffle)


@rate_rule(F.pad, torch._C._nn.pad)
def pad(x, pad, mode="constant", value=None):
    if len(pad) // 2 >= x.ndim:
        raise UnsupportedOperationError("no rule for padding of the batch axis on a spike train")
    return affine(x, lambda v: F.pad(v, pad, mode, value))


# -- sums and products --------------------------------------------------------------------------------


@rate_rule(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def add(x, other, *, alpha=1):
    """Sums stay pending; a plain tensor or number is the same at each step."""
    if alpha != 1:
        other = other * alpha
    if not isinstance(x, SpikeTrain):
        x, other = other, x
    if not isinstance(other, SpikeTrain):
        other = _constant_like(x, other)
    if x.shape == other.shape and x.kind != "graph":
        return SpikeTrain(x.terms + other.terms, x.timesteps, x.kind)
    return _elementwise(torch.add, x, other)


@rate_rule(torch.sub, torch.Tensor.sub, torch.Tensor.__sub__, torch.Tensor.__rsub__)
def sub(x, other, *, alpha=1):
    return add(x, -alpha * other)


@rate_rule(torch.neg, torch.Tensor.neg, torch.Tensor.__neg__)
def neg(x):
    return mul(x, -1)


@rate_rule(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def mul(x, other):
    """Products with what is the same at each step: a number, a parameter, a mask, a constant train."""
    if not isinstance(x, SpikeTrain):
        x, other = other, x
    if not isinstance(other, SpikeTrain):
        other = _constant_like(x, other)
    if x.steps > 1 and other.steps > 1:
        raise UnsupportedOperationError("no rule for the product of two spike trains (a gate?)")
    return _elementwise(torch.mul, x, other)


@rate_rule(torch.div, torch.Tensor.div, torch.Tensor.__truediv__, torch.true_divide)
def div(x, other):
    if isinstance(other, SpikeTrain):
        raise UnsupportedOperationError("no rule for the division by a spike train")
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


def _constant_like(x: SpikeTrain, value: Tensor | float) -> SpikeTrain:
    """A tensor or number that broadcasts against (B, C, ...), as a constant train of the same pass."""
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    tensor = value.to(x.dtype) if value.ndim == 0 else value
    tensor = tensor.reshape((1,) * (x.ndim - tensor.ndim) + tuple(tensor.shape))
    return SpikeTrain.constant(tensor, x.timesteps, x.kind)


def _elementwise(function: Callable, x: SpikeTrain, y: SpikeTrain) -> SpikeTrain:
    """A function of two trains that broadcast, at most bilinear, and linear in those that change over time."""
    x_steps, y_steps = x.folded.unflatten(0, (x.steps, -1)), y.folded.unflatten(0, (y.steps, -1))
    stream = x.on_streams(lambda *streams: function(*streams).flatten(0, 1), x_steps, y_steps)
    rate = function(x.rate, y.rate) if x.kind == "rate" else None
    return x.derive(stream, max(x.steps, y.steps), rate=rate)


# -- dropout: one mask for all steps and the rate -----------------------------------------------------


def _dropout(function: Callable, mask_shape: Callable[[torch.Size], tuple[int, ...]]) -> None:
    @rate_rule(function)
    def rule(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        return mul(x, function(x.new_ones(mask_shape(x.shape)), p, True))


_dropout(F.dropout, lambda shape: tuple(shape))
for _channelwise in (F.dropout1d, F.dropout2d, F.dropout3d):
    _dropout(_channelwise, lambda shape: (*shape[:2], *[1] * (len(shape) - 2)))


# -- shapes: the batch axis stays the first -----------------------------------------------------------


def _axis_check(x: SpikeTrain, name: str, *axes: int) -> None:
    if any(axis % x.ndim == 0 for axis in axes):
        raise UnsupportedOperationError(f"no rule for {name} over the batch axis of a spike train")


@rate_rule(torch.flatten, torch.Tensor.flatten)
def flatten(x, start_dim=0, end_dim=-1):
    _axis_check(x, "flatten", start_dim)
    return affine(x, lambda v: v.flatten(start_dim, end_dim))


@rate_rule(torch.reshape, torch.Tensor.reshape, torch.Tensor.view)
def reshape(x, *shape):
    sizes = list(shape[0] if isinstance(shape[0], (tuple, list)) else shape)
    rest = math.prod(sizes[1:])
    if rest < 0:  # one of the others is -1: then the first must be the batch
        keeps_batch = sizes[0] == x.shape[0]
    else:
        keeps_batch = rest * x.shape[0] == math.prod(x.shape) and sizes[0] in (-1, x.shape[0])
    if not keeps_batch:
        raise UnsupportedOperationError(f"no rule for reshape of a spike train {tuple(x.shape)} to {tuple(sizes)}")
    return affine(x, lambda v: v.reshape(v.shape[0], *sizes[1:]))


def _reduction(*functions: Any) -> None:
    for function in functions:

        @rate_rule(function)
        def rule(x, dim=None, keepdim=False, *, dtype=None, _f=function):
            if dim is None:
                raise UnsupportedOperationError(f"no rule for {_f.__name__} over the batch axis of a spike train")
            _axis_check(x, _f.__name__, *([dim] if isinstance(dim, int) else dim))
            return affine(x, lambda v: _f(v, dim, keepdim, dtype=dtype))


_reduction(torch.mean, torch.Tensor.mean, torch.sum, torch.Tensor.sum)


@rate_rule(torch.permute, torch.Tensor.permute)
def permute(x, *dims):
    dims = tuple(dims[0]) if isinstance(dims[0], (tuple, list)) else dims
    if dims[0] % x.ndim != 0:
        raise UnsupportedOperationError("no rule for permute that moves the batch axis of a spike train")
    return affine(x, lambda v: v.permute(dims))


@rate_rule(torch.transpose, torch.Tensor.transpose)
def transpose(x, dim0, dim1):
    _axis_check(x, "transpose", dim0, dim1)
    return affine(x, lambda v: v.transpose(dim0, dim1))


@rate_rule(torch.unsqueeze, torch.Tensor.unsqueeze)
def unsqueeze(x, dim):
    dim = dim % (x.ndim + 1)
    if dim == 0:
        raise UnsupportedOperationError("no rule for unsqueeze before the batch axis of a spike train")
    return affine(x, lambda v: v.unsqueeze(dim))


@rate_rule(torch.squeeze, torch.Tensor.squeeze)
def squeeze(x, dim=None):
    if dim is None:
        raise UnsupportedOperationError("no rule for squeeze without an axis on a spike train")
    _axis_check(x, "squeeze", *([dim] if isinstance(dim, int) else dim))
    return affine(x, lambda v: v.squeeze(dim))


@rate_rule(torch.Tensor.__getitem__)
def getitem(x, index):
    index = index if isinstance(index, tuple) else (index,)
    axes = sum(part is not None and part is not Ellipsis for part in index)
    whole_batch = axes < x.ndim if index[0] is Ellipsis else isinstance(index[0], slice) and index[0] == slice(None)
    if not whole_batch:
        raise UnsupportedOperationError("no rule for indexing the batch axis of a spike train")
    return affine(x, lambda v: v[index])


@rate_rule(torch.cat, torch.concat)
def cat(trains, dim=0):
    first = next(t for t in trains if isinstance(t, SpikeTrain))
    trains = [t if isinstance(t, SpikeTrain) else _constant_like(first, t) for t in trains]
    _axis_check(first, "cat", dim)
    steps = max(t.steps for t in trains)
    parts = [t.folded if t.steps == steps else t.stream.flatten(0, 1) for t in trains]
    stream = first.on_streams(lambda *streams: torch.cat(streams, dim), *parts)
    rate = torch.cat([t.rate for t in trains], dim) if first.kind == "rate" else None
    return first.derive(stream, steps, rate=rate)


def _pieces(name: str, size_name: str) -> None:
    function = getattr(torch, name)

    @rate_rule(function, getattr(torch.Tensor, name))
    def rule(x, *args, dim=0, **kwargs):
        size = kwargs[size_name] if size_name in kwargs else args[0]
        dim = args[1] if len(args) > 1 else dim
        _axis_check(x, name, dim)
        rates = function(x.rate, size, dim) if x.kind == "rate" else None
        streams = x.on_streams(lambda folded: function(folded, size, dim), x.folded)
        return tuple(x.derive(s, x.steps, rate=rates and rates[i]) for i, s in enumerate(streams))


_pieces("chunk", "chunks")
_pieces("split", "split_size")


@rate_rule(torch.Tensor.contiguous)
def contiguous(x, memory_format=torch.contiguous_format):
    return affine(x, lambda v: v.contiguous(memory_format=memory_format))


@rate_rule(torch.clone, torch.Tensor.clone)
def clone(x, *, memory_format=torch.preserve_format):
    return x  # a train is never changed in place


@rate_rule(torch.Tensor.to)
def to(x, *args, **kwargs):
    return affine(x, lambda v: v.to(*args, **kwargs))


_affine_function(torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16)


def constant_of_rate(x: SpikeTrain, function: Callable[[Tensor], Tensor]) -> SpikeTrain:
    """A train that holds ``function(rate)`` at each step: how analogue gates see a spike train."""
    rate = function(x.rate)
    return SpikeTrain.constant(rate, x.timesteps, x.kind)
