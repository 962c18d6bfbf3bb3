"""The passes over a spike stream, fused: statistics in one; norm, residual sum, firing and means in another.

Pure functions of tensors in the layout in which their memory lies, time first: (S, rows, C) for channels_last and
for vectors, (S, B, C, pixels) otherwise. `torch.compile` turns each into one loop over the stream (`models.compiling`).

Shapes: T steps, S stored steps (1 or T), B images, C channels, K = ceil(T / 8) bytes of spikes as bits
(`models.spike_bits`). Numbers are computed at least in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from models.layout import (
    at_least_float32,
    channels_are_last,
    dense,
    from_layout,
    images_apart,
    in_memory_format_of,
    is_channels_last,
    layout,
    mean_over_steps,
    sum_of_images,
)
from models.spike_bits import BITS, bytes_of, spikes_of_step

Affine = tuple[Tensor, Tensor] | None
"""Scale and shift of each channel, (C,) each; None for 1 and 0."""


class Means(NamedTuple):
    """What a layer of neurons leaves for its rate rule, (B, C, ...) each."""

    rate: Tensor
    kappa: Tensor
    chi: Tensor | None
    """None where the leak is not learned."""
    counts: Tensor | None
    """The number of spikes, uint8; None for a T that it cannot hold."""
    addends: Sequence[Tensor | None] = ()
    """The mean over time of each addend, before its scale and shift; None where it was not asked for."""


MAX_COUNT = 255
"""The most spikes that a uint8 can count."""


def moments(folded: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel over all steps, (C,), of a folded stream (S*B, C, ...)."""
    if not is_compiling():
        # the statistics of PyTorch's own batch norm, several times as fast as torch.var_mean on a CPU; in the type
        # of the running statistics, which for a bfloat16 stream would otherwise be bfloat16
        unused = folded.new_zeros(folded.shape[1], dtype=torch.promote_types(folded.dtype, torch.float32))
        return torch.batch_norm_update_stats(folded, unused, unused.clone(), 0.0)
    return _moments(images_apart(layout(folded, steps), folded, steps), channels_are_last(folded))


@compilable
def _moments(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    x32 = at_least_float32(x)
    # one pass instead of two: about one of the numbers, so that a large mean cancels nothing
    centre = (x32[0, 0, :1] if channels_last else x32[0, 0, :, :1]) if x.ndim == 4 else x32[0, 0]
    shifted = x32 - centre
    sums = [sum_of_images(part.flatten(0, 1), channels_last) for part in (shifted, shifted * shifted)]
    mean, square = (part / (x.numel() // part.numel()) for part in sums)
    return mean + centre.view(-1), (square - mean * mean).clamp_min(0)


def fire(
    folded: list[Tensor],
    affine: list[Affine],
    steps: list[int],
    timesteps: int,
    neuron: NeuronConfig,
    leak: Leak,
) -> Tensor:
    """The spikes of T steps, (T*B, C, ...) in {0, 1}; the arguments are those of `fire_with_rate`."""
    like, streams, maps = _prepare(folded, steps, affine)
    return from_layout(_fire(streams, maps, timesteps, neuron, leak), like)


def fire_with_rate(
    folded: list[Tensor],
    affine: list[Affine],
    steps: list[int],
    timesteps: int,
    neuron: NeuronConfig,
    leak: Leak,
    averaged: Sequence[bool] = (),
) -> tuple[Tensor, Tensor, Means]:
    """The spikes, also as bits, their mean over time r, kappa = dr/dcbar and, for a learned leak, chi = dr/dleak.

    Yu et al., NeurIPS 2024, section 4.2. With h_t the surrogate derivative alpha g (1 - g),
    g = sigmoid(alpha (u_t - threshold)), and v_t the membrane after the reset,

        a_t = du_{t+1}/du_t
        e_1 = 1,  e_{t+1} = 1 + a_t e_t        kappa = mean_t e_t h_t
        p_1 = 0,  p_{t+1} = v_t + a_t p_t      chi = mean_t p_t h_t

    e_t = du_t/dc for a current that changes alike at all steps; p_t = du_t/dleak, exact for the layer's own currents
    (u_{t+1} = leak v_t + c_{t+1}): our extension of the rule to the learnable leak of Fang et al., ICCV 2021.

    Args:
        folded: the addends of the input current, (S*B, C, ...) each; spikes may be given as bits, uint8 (K*B, C, ...),
            but for the first addend.
        affine: scale and shift of each addend.
        steps: S of each addend, 1 or T; K of bits.
        timesteps: T.
        leak: a tensor where it is learned, for which alone chi is computed.
        averaged: whether the mean over time of each addend is wanted, too, which is to be of T steps of numbers; empty
            for none.

    Returns:
        spikes (T*B, C, ...), in the type of the first addend; the same as bits, uint8 (K*B, C, ...); and the means, in
        that type, too, but for those of the addends, which keep theirs.
    """
    like, streams, maps = _prepare(folded, steps, affine)
    fire_all = _fire_whole
    if is_compiling() and like.device.type == "cpu":
        if timesteps <= ONE_LOOP:
            fire_all = _fire_in_one_loop
        elif not _leaves_little_in_between(neuron, leak):
            fire_all = _fire_in_pieces
    # as written it would be a pass for each step
    in_the_loop = [i for i, wanted in enumerate(averaged) if wanted] if is_compiling() else []
    spikes, bits, *means = fire_all(streams, maps, timesteps, neuron, leak, in_the_loop)
    rate, kappa, chi, counts, *found = (x if x is None else from_layout(x[None], like) for x in means)
    addends: list[Tensor | None] = [None] * len(averaged)
    for i, wanted in enumerate(averaged):
        if wanted:
            addends[i] = found[in_the_loop.index(i)] if in_the_loop else mean_over_steps(folded[i], steps[i])
    return from_layout(spikes, like), from_layout(bits, like), Means(rate, kappa, chi, counts, addends)  # type: ignore[arg-type]  # only chi and counts may be None


ONE_LOOP = 4
"""The most steps that a CPU goes through in one loop, which keeps no membrane in between (in float32 another one sums
the spikes up): with each more it takes about twice as long to compile, seven seconds at 4, up to half a minute at 6."""

PIECE = 2**18
"""Numbers of a step that a CPU works on at a time: what the compiled pass keeps in between then stays in its cache."""


def _leaves_little_in_between(neuron: NeuronConfig, leak: Leak) -> bool:
    """Whether the compiler keeps next to nothing of its own accord: of the papers' neurons, whose a_t is a number.

    PyTorch 2.14 makes one loop of eight such steps and two of sixteen (benchmarks/results/2026-11-27_many_steps.md).
    """
    return neuron.reset == "soft" and neuron.detach_reset and not isinstance(leak, Tensor)


@compilable
def _fire_whole(
    streams: list[Tensor], maps: list, timesteps: int, neuron: NeuronConfig, leak: Leak, averaged: list[int]
):
    """`_fire_with_rate` in one call: in pieces, writing into given tensors is another pass over the spikes."""
    return _fire_with_rate(streams, maps, timesteps, neuron, leak, averaged)


def _fire_in_pieces(
    streams: list[Tensor], maps: list, timesteps: int, neuron: NeuronConfig, leak: Leak, averaged: list[int]
):
    """The compiled `_fire_with_rate` on a CPU, a piece of the rows (or images) at a time.

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


def fire_once(
    folded: list[Tensor],
    affine: list[Affine],
    state: list[Tensor] | None,
    neuron: NeuronConfig,
    leak: Leak,
) -> tuple[Tensor, list[Tensor]]:
    """One step of `fire_with_rate`, for rate_s.

    Args:
        folded: the addends of the input current of this step, (B, C, ...) each.
        state: what the step before returned; None before the first.

    Returns:
        spikes (B, C, ...) and the state: v, e, the sums of s_t and e_t h_t over the steps so far and, for a learned
        leak, p and the sum of p_t h_t; in the layout of the addends' memory.
    """
    like, streams, maps = _prepare(folded, [1] * len(folded), affine)
    if state is None:
        zero = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        state = [zero, zero + 1, zero, zero] + [zero, zero] * isinstance(leak, Tensor)
    spikes, state = _fire_once(streams, maps, state, neuron, leak)
    return from_layout(spikes[None], like), state


def fire_next(
    folded: list[Tensor], affine: list[Affine], state: list[Tensor] | None, neuron: NeuronConfig, leak: Leak
) -> tuple[Tensor, list[Tensor]]:
    """One step of `fire`; the arguments are those of `fire_once`.

    Returns:
        spikes (B, C, ...) and the state: the membrane v alone, in the layout of the addends' memory.
    """
    like, streams, maps = _prepare(folded, [1] * len(folded), affine)
    if state is None:
        state = [torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)]
    spikes, v = _fire_next(streams, maps, state[0], neuron, leak)
    return from_layout(spikes[None], like), [v]


def means_of_steps(state: list[Tensor], timesteps: int, like: Tensor) -> Means:
    """The means of `fire_with_rate` from the state after T steps; `like` is a step's spikes."""
    sums = [state[2], state[3], *state[5:]]
    rate, kappa, *chi = (from_layout((x / timesteps).to(like.dtype)[None], like) for x in sums)
    counts = from_layout(state[2].to(torch.uint8)[None], like) if timesteps <= MAX_COUNT else None
    return Means(rate, kappa, chi[0] if chi else None, counts)


def _prepare(folded: list[Tensor], steps: list[int], affine: list[Affine]) -> tuple[Tensor, list[Tensor], list[Affine]]:
    """Brings all addends into the layout of the first; the maps broadcast against one step of it."""
    like = dense(folded[0])
    streams = [layout(in_memory_format_of(like, x), s) for x, s in zip(folded, steps, strict=True)]
    column = like.ndim > 2 and not is_channels_last(like)
    maps = [m and tuple(v[:, None] if column else v for v in m) for m in affine]
    return like, streams, maps  # type: ignore[return-value]


@compilable
def _fire(streams: list[Tensor], maps: list, timesteps: int, neuron: NeuronConfig, leak: Leak) -> Tensor:
    v: Any = 0.0
    spikes = []
    for t in range(timesteps):
        _, s, v = step(_current(streams, maps, t), v, leak, neuron)
        spikes.append(s.to(streams[0].dtype))
    return torch.stack(spikes)


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
    """`_fire_with_rate` that writes what it finds into tensors."""
    found = [x for x in _fire_with_rate(streams, maps, timesteps, neuron, leak, averaged) if x is not None]
    for tensor, value in zip(written, found, strict=True):
        tensor.copy_(value)


def _fire_with_rate(
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


_fire_in_one_loop = compilable(_fire_with_rate, inlined=True)


@compilable
def _fire_once(streams: list[Tensor], maps: list, state: list[Tensor], neuron: NeuronConfig, leak: Leak):
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
def _fire_next(streams: list[Tensor], maps: list, v: Tensor, neuron: NeuronConfig, leak: Leak):
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
