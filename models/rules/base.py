"""How a rule is registered, and the rule of every map that is affine for each image by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.spiketrain import RULES, SpikeTrain, UnsupportedOperationError


def rate_rule(*functions: Any) -> Callable[[Callable], Callable]:
    """Registers a rule for torch functions and for the `torch.Tensor` methods of the same meaning."""

    def register(rule: Callable) -> Callable:
        for function in functions:
            RULES[function] = rule
        return rule

    return register


def affine(x: SpikeTrain, function: Callable[[Tensor], Tensor]) -> SpikeTrain:
    """Applies a map that is affine for each image by itself, on the stream and on the rate (and on OTTT's trace)."""
    read = x.folded
    stream = x.on_streams(function, read)
    rate = function(x.rate) if x.has_rate else None
    if stream is read and (rate is None or rate is x.rate):  # what changes nothing leaves spikes spikes
        return x.of_terms(*x.terms)
    trace = on_traces(function, x)
    if stream is not None and not _is_read_again(stream):
        x.release()
    return x.derive(stream, x.steps, rate=rate, trace=trace)


def _is_read_again(stream: Tensor) -> bool:
    """Whether letting go of what this was made of would only have that made again: a view holds it anyway, and a gate,
    which looks at one number of each map, is about to multiply it."""
    return stream._is_view() or stream.shape[2:].numel() == 1


def on_traces(function: Callable[..., Tensor], *trains: SpikeTrain) -> Tensor | None:
    """The trace of what a function makes of spikes, without a graph; a train without one counts as it is."""
    if all(train.trace is None for train in trains):
        return None
    with torch.no_grad():
        return function(*(train.folded if train.trace is None else train.trace for train in trains))


def affine_function(*functions: Any) -> None:
    """Functions whose first argument is the train and whose other arguments never name the batch axis."""
    for function in functions:
        rate_rule(function)(lambda x, *args, _f=function, **kwargs: affine(x, lambda v: _f(v, *args, **kwargs)))


def constant_of_rate(x: SpikeTrain, function: Callable[[Tensor], Tensor]) -> SpikeTrain:
    """A train that holds ``function(rate)`` at each step: how analogue gates see a spike train."""
    if x.knows_one_step:
        when = "a step at a time" if x.kind == "plain_step" else "under rate_s"
        raise UnsupportedOperationError(
            f"no rule {when} for a gate: it is computed on the rate of all steps, which the first step cannot know"
        )
    return SpikeTrain.constant(function(x.rate), x.timesteps, x.kind)
