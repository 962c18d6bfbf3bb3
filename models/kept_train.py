"""A spike train in little memory: what gradient checkpointing keeps of the input of a block.

To run a block a second time takes its input's T steps, which the backward pass of the rates does not keep. Spikes are
a bit each: a byte of T <= 8 steps, in place of T numbers (those of a rate pass are at hand so: `models.spike_bits`).
Sums of spikes are a byte each; whatever else a stream holds (currents, averages) is kept as it is. Rates that are the
mean of the stream to the last bit are not kept at all.

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
from models.spike_bits import BITS, SpikeBits
from models.spiketrain import SpikeTrain
from models.term import Term

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
    bits_of: torch.dtype | None
    """The type of the spikes whose bits are kept; None where the stream is."""
    stream: Restore
    stream_needs_grad: bool
    rate: Restore | None
    """None where it is the mean of the stream."""
    rate_dtype: torch.dtype | None
    """None where the pass has no rates."""
    rate_needs_grad: bool
    counted: bool


def _keep_term(term: Term, train: SpikeTrain, tensors: list[Tensor]) -> _KeptTerm:
    stream: Restore = next
    if term.bits is not None:
        tensors.append(term.bits.bytes)
    elif term.norm is not None:
        tensors.append(term.stream.detach())
    else:
        packed, stream = pack(term.stream, term.steps)
        tensors += packed
    rate: Tensor | None = None
    kept: Restore | None = None
    if train.has_rate:
        of_stream = None if term.counts else mean_over_steps(term.stream, term.steps)
        rate = term.rate_before_norm(of_stream)
        if term.counts:
            of_stream = term.counts.rate(rate.dtype)
        assert of_stream is not None
        if of_stream.dtype != rate.dtype or of_stream.stride() != rate.stride() or not torch.equal(of_stream, rate):
            tensors.append(rate.detach())
            kept = next
    return _KeptTerm(
        steps=term.steps,
        norm=term.norm,
        bits_of=None if term.bits is None else term.bits.dtype,
        stream=stream,
        stream_needs_grad=train.streams_have_graph and term.stream.requires_grad,
        rate=kept,
        rate_dtype=None if rate is None else rate.dtype,
        rate_needs_grad=rate is not None and rate.requires_grad,
        counted=term.counts is not None,
    )


def _restore_term(term: _KeptTerm, timesteps: int, given: Iterator[Tensor]) -> Term:
    kept = term.stream(given)
    if term.bits_of is None:
        again = Term(_leaf(kept, term.stream_needs_grad), term.steps, norm=term.norm)
    else:
        bits = SpikeBits(kept, timesteps, term.bits_of)
        counts = Counts(bits.counts(), timesteps) if term.counted else None
        again = Term(None, term.steps, norm=term.norm, counts=counts, bits=bits)
    if term.rate_dtype is not None:
        if term.rate is not None:
            rate = term.rate(given)
        else:
            rate = again.counts.rate(term.rate_dtype) if again.counts else mean_over_steps(again.stream, term.steps)
        again._rate = _leaf(rate, term.rate_needs_grad)
    return again


def _leaf(x: Tensor, needs_grad: bool) -> Tensor:
    return x.detach().requires_grad_(needs_grad)  # an alias: what is kept may be asked for again


def pack(stream: Tensor, steps: int) -> tuple[list[Tensor], Restore]:
    """The stream (S*B, C, ...) in as few bytes as it fits in, and what unpacks it, bit for bit.

    It looks at the numbers, which on a GPU waits for them, once or twice.
    """
    like = torch.empty_like(stream, device="meta")
    whole: list[Tensor] = []
    facts = []  # of each step whether it is whole numbers that fit a byte, and the largest
    for step in stream.detach().unflatten(0, (steps, -1)):  # one at a time: T steps are a lot of memory
        number = step.to(torch.uint8)
        again = number.to(step.dtype)
        if step.numel() == 0 or (not whole and not torch.equal(again, step)):  # of currents the first step tells
            return [stream.detach()], next
        facts.append(torch.stack([(again == step).all().to(torch.uint8), number.max()]))
        whole.append(number)
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
