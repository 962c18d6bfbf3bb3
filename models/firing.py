"""How a layer of neurons fires: norm, residual sum, spikes, their bits and all means over time in one pass.

Pure functions of folded tensors, which bring them into the layout in which their memory lies, time first: (S, rows, C)
for channels_last and for vectors, (S, B, C, pixels) otherwise. The passes over them are `models.firing_passes`.

Shapes: T steps, S stored steps (1 or T), B images, C channels, K = ceil(T / 8) bytes of spikes as bits
(`models.spike_bits`). Numbers are computed at least in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models import firing_passes as passes
from models.compiling import is_compiling
from models.dynamics import Leak, NeuronConfig
from models.layout import dense, from_layout, in_memory_format_of, is_channels_last, layout, mean_over_steps

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
    return from_layout(passes.fire(streams, maps, timesteps, neuron, leak), like)


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
    # as written it would be a pass for each step
    in_the_loop = [i for i, wanted in enumerate(averaged) if wanted] if is_compiling() else []
    spikes, bits, *means = passes.fire_with_rate(streams, maps, timesteps, neuron, leak, in_the_loop)
    rate, kappa, chi, counts, *found = (x if x is None else from_layout(x[None], like) for x in means)
    addends: list[Tensor | None] = [None] * len(averaged)
    for i, wanted in enumerate(averaged):
        if wanted:
            addends[i] = found[in_the_loop.index(i)] if in_the_loop else mean_over_steps(folded[i], steps[i])
    return from_layout(spikes, like), from_layout(bits, like), Means(rate, kappa, chi, counts, addends)  # type: ignore[arg-type]  # only chi and counts may be None


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
    spikes, state = passes.fire_once(streams, maps, state, neuron, leak)
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
    spikes, v = passes.fire_next(streams, maps, state[0], neuron, leak)
    return from_layout(spikes[None], like), [v]


def means_of_steps(state: list[Tensor], timesteps: int, like: Tensor) -> Means:
    """The means of `fire_with_rate` from the state after T steps; `like` is a step's spikes."""
    sums = [state[2], state[3], *state[5:]]
    rate, kappa, *chi = (from_layout((x / timesteps).to(like.dtype)[None], like) for x in sums)
    counts = from_layout(state[2].to(torch.uint8)[None], like) if timesteps <= passes.MAX_COUNT else None
    return Means(rate, kappa, chi[0] if chi else None, counts)


def _prepare(folded: list[Tensor], steps: list[int], affine: list[Affine]) -> tuple[Tensor, list[Tensor], list[Affine]]:
    """Brings all addends into the layout of the first; the maps broadcast against one step of it."""
    like = dense(folded[0])
    streams = [layout(in_memory_format_of(like, x), s) for x, s in zip(folded, steps, strict=True)]
    column = like.ndim > 2 and not is_channels_last(like)
    maps = [m and tuple(v[:, None] if column else v for v in m) for m in affine]
    return like, streams, maps  # type: ignore[return-value]
