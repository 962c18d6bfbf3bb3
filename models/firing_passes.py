"""The passes of `models.firing` over the addends of a layer's current, which `torch.compile` makes into loops.

Here tensors are in the layout of their memory, time first: (S, rows, C) or (S, B, C, pixels); scale and shift broadcast
against one step of it. Shapes: T steps, S stored steps (1 or T; K bytes for spikes as bits).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from models.compiling import compilable, is_compiling
from models.dynamics import (
    Leak,
    NeuronConfig,
    membrane_derivative,
    step,
    surrogate_derivative,
    surrogate_derivative_in_a_loop,
)
from models.layout import at_least_float32
from models.spike_bits import BITS, bytes_of, spikes_of_step

MAX_COUNT = 255
"""The most spikes that a uint8 can count."""
ONE_LOOP = 4
"""The most steps that a CPU goes through in one loop, which keeps no membrane in between (in float32 another one sums
the spikes up): with each more it takes about twice as long to compile, seven seconds at 4, up to half a minute at 6."""

PIECE = 2**18
"""Numbers of a step that a CPU works on at a time: what the compiled pass keeps in between then stays in its cache."""


@compilable
def fire(streams: list[Tensor], maps: list, timesteps: int, neuron: NeuronConfig, leak: Leak) -> Tensor:
    """The spikes of all steps, (T, ...)."""
    v: Any = 0.0
    spikes = []
    for t in range(timesteps):
        _, s, v = step(_current(streams, maps, t), v, leak, neuron)
        spikes.append(s.to(streams[0].dtype))
    return torch.stack(spikes)


def fire_with_rate(
    streams: list[Tensor], maps: list, timesteps: int, neuron: NeuronConfig, leak: Leak, averaged: list[int]
):
    """All steps of a layer, by whichever way is fastest and keeps little in between.

    Returns:
        spikes (T, ...), bits (K, ...), rate, kappa, chi or None, counts or None, and the mean over time of the addends
        with the numbers in `averaged`; all but the first two of the shape of one step.
    """
    way = _fire_whole
    if is_compiling() and streams[0].device.type == "cpu":
        if timesteps <= ONE_LOOP:
            way = _fire_in_one_loop
        elif not _leaves_little_in_between(neuron, leak):
            way = _fire_in_pieces
    return way(streams, maps, timesteps, neuron, leak, averaged)


def _leaves_little_in_between(neuron: NeuronConfig, leak: Leak) -> bool:
    """Whether the compiler keeps next to nothing of its own accord: of the papers' neurons, whose a_t is a number.

    PyTorch 2.14 makes one loop of eight such steps and two of sixteen (benchmarks/results/2026-11-27_many_steps.md).
    """
    return neuron.reset == "soft" and neuron.detach_reset and not isinstance(leak, Tensor)


@compilable
def _fire_whole(
    streams: list[Tensor], maps: list, timesteps: int, neuron: NeuronConfig, leak: Leak, averaged: list[int]
):
    """`_as_written` in one call: in pieces, writing into given tensors is another pass over the spikes."""
    return _as_written(streams, maps, timesteps, neuron, leak, averaged)


def _fire_in_pieces(
    streams: list[Tensor], maps: list, timesteps: int, neuron: NeuronConfig, leak: Leak, averaged: list[int]
):
    """`_as_written`, compiled, on a CPU, a piece of the rows (or images) at a time.

    The compiler keeps a membrane of every step in between, but for the neurons of `_leaves_little_in_between`; in
    pieces they need no memory to speak of. One loop would keep none, but with many steps takes long to compile
    (`ONE_LOOP`).
    """
    shape, rows = streams[0].shape[1:], streams[0].shape[1]
    spikes = streams[0].new_empty(timesteps, *shape)
    bits = spikes.new_empty(bytes_of(timesteps), *shape, dtype=torch.uint8)
    means = [spikes.new_empty(shape) for _ in range(3 if isinstance(leak, Tensor) else 2)]
    counts = spikes.new_empty(shape, dtype=torch.uint8) if timesteps <= MAX_COUNT else None
    averages = [streams[i].new_empty(shape) for i in averaged]
    outputs = [*means, *([] if counts is None else [counts]), *averages]
    numbers = max(1, math.prod(shape))  # an empty batch has none
    piece = max(1, PIECE * rows // numbers)
    for start in range(0, rows, piece):
        part = slice(start, start + piece)
        written = [spikes[:, part], bits[:, part], *(x[part] for x in outputs)]
        _fire_into([s[:, part] for s in streams], maps, timesteps, neuron, leak, averaged, written)
    return spikes, bits, *means, *[None] * (3 - len(means)), counts, *averages


@compilable
def _fire_into(
    streams: list[Tensor],
    maps: list,
    timesteps: int,
    neuron: NeuronConfig,
    leak: Leak,
    averaged: list[int],
    written: list[Tensor],
) -> None:
    """`fire_with_rate` that writes what it finds into tensors."""
    found = [x for x in _as_written(streams, maps, timesteps, neuron, leak, averaged) if x is not None]
    for tensor, value in zip(written, found, strict=True):
        tensor.copy_(value)


def _as_written(
    streams: list[Tensor], maps: list, timesteps: int, neuron: NeuronConfig, leak: Leak, averaged: list[int]
):
    """Spikes, bits, rate, kappa, chi, counts, and the mean over time of the addends with these numbers."""
    learned = isinstance(leak, Tensor)
    dtype = streams[0].dtype
    v: Any = 0.0
    rate: Any = 0.0
    e: Any = 1.0
    kappa: Any = 0.0
    p: Any = 0.0
    chi: Any = 0.0
    byte: Any = 0.0
    spikes, packed = [], []
    sums: list[Any] = [0.0 for _ in averaged]
    for t in range(timesteps):
        addends = _addends(streams, t)
        sums = [total + addends[i] for total, i in zip(sums, averaged, strict=True)]
        u, s, v = step(_total(addends, maps), v, leak, neuron)
        h = _surrogate_derivative(u, neuron)
        a = membrane_derivative(u, s, h, leak, neuron)
        spikes.append(s.to(dtype))
        # the sum in the type of the membrane, of the spikes as they are given: of half-precision ones that nothing else
        # reads, the compiler for GPUs would run all steps before anew for each step of the stack
        given = spikes[t].to(v.dtype) if t else s
        rate, kappa, e = rate + given, kappa + e * h, 1 + a * e
        byte = byte + given * 2.0 ** (t % BITS)
        if learned:
            chi, p = chi + p * h, v + a * p
        if t % BITS == BITS - 1 or t == timesteps - 1:
            packed.append(byte.to(torch.uint8))
            byte = 0.0
    means = [(rate / timesteps).to(dtype), (kappa / timesteps).to(dtype)]
    means += [(chi / timesteps).to(dtype) if learned else None]
    bits = packed[0][None] if len(packed) == 1 else torch.stack(packed)
    means += [rate.to(torch.uint8) if timesteps <= MAX_COUNT else None]
    averages = [(total / timesteps).to(streams[i].dtype) for total, i in zip(sums, averaged, strict=True)]
    return torch.stack(spikes), bits, *means, *averages


_fire_in_one_loop = compilable(_as_written, inlined=True)


@compilable
def fire_once(streams: list[Tensor], maps: list, state: list[Tensor], neuron: NeuronConfig, leak: Leak):
    """One step of `fire_with_rate`: the spikes, and the state after it."""
    v, e, rate, kappa, *of_leak = state
    u, s, v = step(_current(streams, maps, 0), v, leak, neuron)
    h = _surrogate_derivative(u, neuron)
    a = membrane_derivative(u, s, h, leak, neuron)
    new = [v, 1 + a * e, rate + s, kappa + e * h]
    if of_leak:
        p, chi = of_leak
        new += [v + a * p, chi + p * h]
    return s.to(streams[0].dtype), new


@compilable
def fire_next(streams: list[Tensor], maps: list, v: Tensor, neuron: NeuronConfig, leak: Leak):
    """One step of `fire`: the spikes, and the membrane after it."""
    _, s, v = step(_current(streams, maps, 0), v, leak, neuron)
    return s.to(streams[0].dtype), v


def _surrogate_derivative(u: Tensor, neuron: NeuronConfig) -> Tensor:
    in_a_loop = torch.compiler.is_compiling() and u.dtype == torch.float32 and u.device.type == "cpu"
    return (surrogate_derivative_in_a_loop if in_a_loop else surrogate_derivative)(u, neuron)


def _current(streams: list[Tensor], maps: list, t: int) -> Tensor:
    """The input current of step t."""
    return _total(_addends(streams, t), maps)


def _addends(streams: list[Tensor], t: int) -> list[Tensor]:
    """Those of step t, at least in float32; uint8 is spikes as bits."""
    return [
        spikes_of_step(stream, t)
        if stream.dtype == torch.uint8
        else at_least_float32(stream[t if stream.shape[0] > 1 else 0])
        for stream in streams
    ]


def _total(addends: list[Tensor], maps: list) -> Tensor:
    """The sum of the addends, each scaled and shifted."""
    return functools.reduce(
        torch.add, [x if m is None else x * m[0] + m[1] for x, m in zip(addends, maps, strict=True)]
    )
