"""A spike train in little memory: what gradient checkpointing keeps of the input of a block.

To run a block a second time takes its input's T steps, which the backward pass of the rates does not keep. Spikes are
a bit each: a byte of T <= 8 steps, in place of T numbers. Sums of spikes are a byte each; whatever else a stream holds
(currents, averages) is kept as it is. Rates that are the mean of the stream to the last bit are not kept at all.

Shapes: T time steps, S stored steps (1 or T), B images, C channels.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.layout import mean_over_steps
from models.linear_rate import Counts
from models.normalization import Norm
from models.spiketrain import SpikeTrain
from models.term import Term

BITS = 8
"""Steps of a spike train that one byte holds."""

Restore = Callable[[Iterator[Tensor]], Tensor]
"""Takes what it needs from the kept tensors, in their order, and makes the tensor that was."""


def keep(train: SpikeTrain) -> tuple[list[Tensor], Callable[[list[Tensor]], SpikeTrain]]:
    """What a train is made of, without a graph, and a function that makes it again from these tensors.

    The train that comes back has the same pending terms and the same numbers, bit for bit; its tensors want gradients
    where those of the train do, but are leaves: rules that run on it save what they saved before.

    Args:
        train: of a "rate" or "graph" pass. Rates that are still to be computed are computed now.
    """
    tensors: list[Tensor] = []
    terms = [_keep_term(term, train, tensors) for term in train.terms]
    rate = None  # of one term without a norm it is the term's; of others it may be known already
    if train.has_rate and train._rate is not None and not (len(terms) == 1 and terms[0].norm is None):
        tensors.append(train._rate.detach())
        rate = train._rate.requires_grad
    timesteps, kind = train.timesteps, train.kind

    def restored(kept: list[Tensor]) -> SpikeTrain:
        given = iter(kept)
        copy = SpikeTrain([_restore_term(term, timesteps, given) for term in terms], timesteps, kind)
        if rate is not None:
            copy._rate = _leaf(next(given), rate)
        return copy

    return tensors, restored


class _KeptTerm(NamedTuple):
    """All of a term but its tensors."""

    steps: int
    norm: Norm | None
    stream: Restore
    stream_needs_grad: bool
    rate: Restore | None
    """None where it is the mean of the stream."""
    rate_dtype: torch.dtype | None
    """None where the pass has no rates."""
    rate_needs_grad: bool
    counted: bool


def _keep_term(term: Term, train: SpikeTrain, tensors: list[Tensor]) -> _KeptTerm:
    spikes = term.counts is not None
    packed, stream = ([term.stream.detach()], next) if term.norm else pack(term.stream, term.steps, spikes)
    tensors += packed
    rate = term.rate_before_norm() if train.has_rate else None
    kept: Restore | None = None
    if rate is not None:
        of_stream = term.counts.rate(rate.dtype) if term.counts else mean_over_steps(term.stream, term.steps)
        if of_stream.dtype != rate.dtype or of_stream.stride() != rate.stride() or not torch.equal(of_stream, rate):
            tensors.append(rate.detach())
            kept = next
    return _KeptTerm(
        steps=term.steps,
        norm=term.norm,
        stream=stream,
        stream_needs_grad=train.streams_have_graph and term.stream.requires_grad,
        rate=kept,
        rate_dtype=None if rate is None else rate.dtype,
        rate_needs_grad=rate is not None and rate.requires_grad,
        counted=term.counts is not None,
    )


def _restore_term(term: _KeptTerm, timesteps: int, given: Iterator[Tensor]) -> Term:
    stream = term.stream(given)
    counts = rate = None
    if term.counted:
        counts = Counts(stream.unflatten(0, (term.steps, -1)).sum(0).to(torch.uint8), timesteps)
    if term.rate is not None:
        rate = term.rate(given)
    elif term.rate_dtype is not None:
        rate = counts.rate(term.rate_dtype) if counts else mean_over_steps(stream, term.steps)
    rate = None if rate is None else _leaf(rate, term.rate_needs_grad)
    return Term(_leaf(stream, term.stream_needs_grad), term.steps, norm=term.norm, _rate=rate, counts=counts)


def _leaf(x: Tensor, needs_grad: bool) -> Tensor:
    return x.detach().requires_grad_(needs_grad)  # an alias: what is kept may be asked for again


def pack(stream: Tensor, steps: int, spikes: bool = False) -> tuple[list[Tensor], Restore]:
    """The stream (S*B, C, ...) in as few bytes as it fits in, and what unpacks it, bit for bit.

    It looks at the numbers, which on a GPU waits for them, once or twice.

    Args:
        spikes: whether they are known to be 0 and 1: then it need not look.
    """
    like = torch.empty_like(stream, device="meta")
    whole: list[Tensor] = []
    facts = []  # of each step whether it is whole numbers that fit a byte, and the largest
    for step in stream.detach().unflatten(0, (steps, -1)):  # one at a time: T steps are a lot of memory
        number = step.to(torch.uint8)
        if not spikes:
            again = number.to(step.dtype)
            if step.numel() == 0 or (not whole and not torch.equal(again, step)):  # of currents the first step tells
                return [stream.detach()], next
            facts.append(torch.stack([(again == step).all().to(torch.uint8), number.max()]))
        whole.append(number)
    if not spikes:
        same_numbers, largest = torch.stack(facts, 1).tolist()
        if not all(same_numbers):
            return [stream.detach()], next
        if max(largest) > 1:
            return whole, functools.partial(_unpack, steps=steps, like=like, bits=1)
    packed = []
    for start in range(0, steps, BITS):
        shifted = (number << t for t, number in enumerate(whole[start : start + BITS]))
        packed.append(functools.reduce(operator.or_, shifted))
    return packed, functools.partial(_unpack, steps=steps, like=like, bits=BITS)


def _unpack(given: Iterator[Tensor], steps: int, like: Tensor, bits: int) -> Tensor:
    """The stream from bytes of that many steps each."""
    packed = next(given)
    stream = torch.empty_like(like, device=packed.device)
    for t, step in enumerate(stream.unflatten(0, (steps, -1))):
        if t and t % bits == 0:
            packed = next(given)
        step.copy_(packed if bits == 1 else (packed >> (t % bits)) & 1)
    return stream
