"""Rules of layers: convolutions, linear layers, batch norm, pooling, padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.linear_rate import ConvRate, LinearRate, WithValue, cast_once
from models.moments import moments
from models.normalization import Norm, update_running
from models.ranks import active_group, moments_over_ranks
from models.rules.base import affine, affine_function, on_traces, rate_rule
from models.small_maps import convolve
from models.spiketrain import SpikeTrain, UnsupportedOperationError
from models.sync import batch_norm_over_ranks
from models.tape import Moments
from models.term import Term


def _convolution(function: Callable, convolve: Callable, spatial: int) -> None:
    @rate_rule(function)
    def rule(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        stride, dilation = _ints(stride, spatial), _ints(dilation, spatial)
        x, padding = _explicit_padding(x, weight, padding, dilation, spatial)
        geometry = (stride, padding, dilation, groups)
        cast = cast_once(weight) if x.kind == "rate" else None
        return linear_map(
            x,
            lambda v: convolve(v, weight if cast is None else cast, bias, *geometry),
            lambda v, value, counts: ConvRate.apply(v, weight, bias, value, (*geometry, None), counts, cast),
        )


def _transposed_convolution(function: Callable, spatial: int) -> None:
    @rate_rule(function)
    def rule(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        stride, padding, output_padding, dilation = (
            _ints(value, spatial) for value in (stride, padding, output_padding, dilation)
        )
        geometry = (stride, padding, dilation, groups, output_padding)
        return linear_map(
            x,
            lambda v: function(v, weight, bias, stride, padding, output_padding, groups, dilation),
            lambda v, value, counts: ConvRate.apply(v, weight, bias, value, geometry, counts),
        )


def linear_map(x: SpikeTrain, function: Callable, at_rate: Callable) -> SpikeTrain:
    """A convolution or linear layer.

    Args:
        function: the layer, on the folded stream.
        at_rate: given the layer's input, the value of its output and the input's counts or None, that value with the
            layer's backward pass.
    """
    if x.trace is not None:
        # OTTT (Xiao et al., NeurIPS 2022, equation 9): the gradient of the weight sees the trace, that of the input
        # the spikes' own graph
        with torch.no_grad():
            value = function(x.folded)
        return x.derive(at_rate(WithValue.apply(x.folded, x.trace), value, None), 1)
    stream = x.on_streams(function, x.folded)
    rate, counts = x.rate if x.has_rate else None, x.single().counts
    x.release()
    return x.derive(stream, x.steps, link=lambda value: at_rate(rate, value, counts))


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


for _function, _convolve, _spatial in ((F.conv1d, F.conv1d, 1), (F.conv2d, convolve, 2), (F.conv3d, F.conv3d, 3)):
    _convolution(_function, _convolve, _spatial)
for _transposed, _spatial in ((F.conv_transpose1d, 1), (F.conv_transpose2d, 2), (F.conv_transpose3d, 3)):
    _transposed_convolution(_transposed, _spatial)


@rate_rule(F.linear)
def linear(x, weight, bias=None):
    return linear_map(
        x,
        lambda v: F.linear(v, weight, bias),
        lambda v, value, counts: LinearRate.apply(v, weight, bias, value, counts),
    )


@rate_rule(F.batch_norm)
def batch_norm(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> SpikeTrain:
    """rate_m: the statistics of all steps together; rate_s: of each step; the affine map itself stays pending.

    In `synchronised_batch_norm` they are those of all processes, and so are the sums of the backward pass.
    """
    if x.streams_have_graph:
        return _batch_norm_with_graph(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if training and x.kind == "plain_step":
        raise UnsupportedOperationError("no rule a step at a time for a batch norm with the statistics of all steps")
    term = x.single()
    group = active_group() if training else None
    if not training:
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, invstd = running_mean.to(dtype, copy=True), torch.rsqrt(running_var.to(dtype) + eps)
    elif x.kind == "replay":
        mean, invstd = x.tape.take().value(x.tape.timesteps)
    else:
        count: int | Tensor = _count(x)
        if group is None and count == 1:
            raise ValueError(f"batch norm in training takes more than 1 value per channel, found {tuple(x.shape)}")
        mean, var = moments(term.stream, term.steps)
        if group is not None:
            mean, var, count = moments_over_ranks(mean, var, _count(x), group)
        if x.kind == "step":
            x.tape.record(Moments).add(mean, var, eps)
        if running_mean is not None:
            update_running(running_mean, running_var, mean, var, momentum, count)
        invstd = torch.rsqrt(var + eps)
    norm = Norm(mean, invstd, weight, bias, of_batch=training, group=group)
    numbers = None if term.bits is not None else term.numbers
    pending = x.has_rate and term.rate_is_pending  # neurons find the mean over time in passing
    rate = term.rate_before_norm() if x.has_rate and not pending else None
    before = term if pending else None
    return x.of_terms(Term(numbers, term.steps, before=before, norm=norm, _rate=rate, bits=term.bits))


def _batch_norm_with_graph(x, running_mean, running_var, weight, bias, training, momentum, eps) -> SpikeTrain:
    folded, group = x.folded, active_group()
    if training and group is not None:
        copies = x.timesteps // x.steps  # an input that is constant over time counts T times
        stream = batch_norm_over_ranks(
            folded, running_mean, running_var, weight, bias, momentum, eps, group=group, copies=copies
        )
        return x.derive(stream, x.steps)
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


def _max_pool(function: Callable) -> Callable:
    def rule(x, *args, **kwargs):
        """Each step's spikes are pooled; the gradient goes through the argmax of the rate."""
        if kwargs.get("return_indices"):
            raise UnsupportedOperationError("no rule for max pooling with return_indices=True on a spike train")

        def pool(v):
            return function(v, *args, **kwargs)

        stream = x.on_streams(pool, x.folded)
        rate = x.rate if x.has_rate else None
        trace = on_traces(pool, x)
        x.release()
        return x.derive(stream, x.steps, link=lambda value: WithValue.apply(pool(rate), value), trace=trace)

    return rule


_POOLS: tuple[Callable, ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
for _pool in (*_POOLS, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d):
    rate_rule(_pool)(_max_pool(_pool))  # type: ignore[arg-type]  # mypy knows no common type of overloads


affine_function(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
affine_function(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
affine_function(F.interpolate, F.pixel_shuffle, F.pixel_unshuffle)


@rate_rule(F.pad, torch._C._nn.pad)
def pad(x, pad, mode="constant", value=None):
    if len(pad) // 2 >= x.ndim:
        raise UnsupportedOperationError("no rule for padding of the batch axis on a spike train")
    return affine(x, lambda v: F.pad(v, pad, mode, value))
