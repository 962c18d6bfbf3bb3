"""How a rule is registered, and the rule of every map that is affine for each image by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from models.spiketrain import RULES, SpikeTrain


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


def affine_function(*functions: Any) -> None:
    """Functions whose first argument is the train and whose other arguments never name the batch axis."""
    for function in functions:
        rate_rule(function)(lambda x, *args, _f=function, **kwargs: affine(x, lambda v: _f(v, *args, **kwargs)))


def constant_of_rate(x: SpikeTrain, function: Callable[[Tensor], Tensor]) -> SpikeTrain:
    """A train that holds ``function(rate)`` at each step: how analogue gates see a spike train."""
    rate = function(x.rate)
    return SpikeTrain.constant(rate, x.timesteps, x.kind)
