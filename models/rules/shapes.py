"""Rules of shapes and types: the batch axis stays the first, because time is folded into it."""

from __future__ import annotations

import math
from typing import Any

import torch

from models.linear_rate import Counts
from models.rules.arithmetic import constant_like
from models.rules.base import affine, affine_function, on_traces, rate_rule
from models.spike_bits import SpikeBits
from models.spiketrain import SpikeTrain, UnsupportedOperationError
from models.term import Term


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
    trains = [t if isinstance(t, SpikeTrain) else constant_like(first, t) for t in trains]
    _axis_check(first, "cat", dim)
    steps = max(t.steps for t in trains)
    if (spikes := _cat_of_spikes(first, trains, dim)) is not None:
        return spikes
    parts = [t.folded if t.steps == steps else t.stream.flatten(0, 1) for t in trains]
    stream = first.on_streams(lambda *streams: torch.cat(streams, dim), *parts)
    rate = torch.cat([t.rate for t in trains], dim) if first.has_rate else None
    trace = on_traces(lambda *traces: torch.cat(traces, dim), *trains)
    for train in trains:
        train.release()
    return first.derive(stream, steps, rate=rate, trace=trace)


def _cat_of_spikes(first: SpikeTrain, trains: list[SpikeTrain], dim: int) -> SpikeTrain | None:
    """Spikes that are concatenated are spikes: as bits, from which the numbers are made once for all who read them."""
    terms = [train.single() for train in trains]
    bits = [term.bits for term in terms if term.bits is not None]
    if len(bits) < len(terms) or len({each.dtype for each in bits}) > 1:
        return None
    counts = [term.counts for term in terms if term.counts is not None]
    for term in terms:
        term.release()
    whole = SpikeBits(torch.cat([each.bytes for each in bits], dim), first.timesteps, bits[0].dtype)
    term = Term(None, first.timesteps, _rate=torch.cat([train.rate for train in trains], dim), bits=whole)
    if len(counts) == len(terms):
        term.counts = Counts(torch.cat([each.spikes for each in counts], dim), first.timesteps)
    return first.of_terms(term)


@rate_rule(torch.stack)
def stack(trains, dim=0):
    ndim = next(t for t in trains if isinstance(t, SpikeTrain)).ndim
    return cat([torch.unsqueeze(t, dim % (ndim + 1)) for t in trains], dim)


@rate_rule(torch.Tensor.expand)
def expand(x, *sizes):
    sizes = tuple(sizes[0]) if isinstance(sizes[0], (tuple, list)) else sizes
    if len(sizes) != x.ndim or sizes[0] not in (-1, x.shape[0]):
        raise UnsupportedOperationError(f"no rule for expand of a spike train {tuple(x.shape)} to {tuple(sizes)}")
    return affine(x, lambda v: v.expand(-1, *sizes[1:]))


@rate_rule(torch.Tensor.expand_as)
def expand_as(x, other):
    return x.expand(other.shape)


def _pieces(name: str, size_name: str) -> None:
    function = getattr(torch, name)

    @rate_rule(function, getattr(torch.Tensor, name))
    def rule(x, *args, dim=0, **kwargs):
        size = kwargs[size_name] if size_name in kwargs else args[0]
        dim = args[1] if len(args) > 1 else dim
        _axis_check(x, name, dim)

        def pieces(v):
            return function(v, size, dim)

        rates, traces = pieces(x.rate) if x.has_rate else None, on_traces(pieces, x)
        streams = x.on_streams(pieces, x.folded) or rates
        return tuple(
            x.derive(s, x.steps, rate=rates and rates[i], trace=traces and traces[i]) for i, s in enumerate(streams)
        )


_pieces("chunk", "chunks")
_pieces("split", "split_size")


@rate_rule(torch.Tensor.contiguous)
def contiguous(x, memory_format=torch.contiguous_format):
    return affine(x, lambda v: v.contiguous(memory_format=memory_format))


@rate_rule(torch.clone, torch.Tensor.clone)
def clone(x, *, memory_format=torch.preserve_format):
    return x.of_terms(*x.terms)  # shares the tensors, which no rule changes in place


@rate_rule(torch.Tensor.to)
def to(x, *args, **kwargs):
    return affine(x, lambda v: v.to(*args, **kwargs))


affine_function(torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16)
