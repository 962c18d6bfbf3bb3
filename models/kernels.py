"""The passes over a spike stream, fused: statistics in one, norm, residual sum, firing and means in another.

Pure functions of tensors in the layout in which their memory lies, time first: (S, rows, C) for channels_last and
for vectors, (S, B, C, pixels) otherwise. `torch.compile` turns each into one loop over the stream; without a
compiler they run as they are written, which is said once in the log.

Shapes: T steps, S stored steps (1 or T), B images, C channels. Numbers are computed at least in float32.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from models.dynamics import NeuronConfig, membrane_derivative, step, surrogate_derivative

log = logging.getLogger(__name__)

Affine = tuple[Tensor, Tensor] | None
"""Scale and shift of each channel, (C,) each; None for 1 and 0."""

_compiling = False


def compile_kernels(enabled: bool) -> None:
    """Chooses whether the fused passes are compiled (a few seconds for each kind of layer) or run as written.

    Compiled passes are several times as fast and give the same numbers to rounding.
    """
    global _compiling
    _compiling = enabled
    if enabled:  # one for each combination of steps, terms and types: the default of 8 is soon used up
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(128, limit)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Runs kernels as written: for a probe, compiling costs more than it saves."""
    global _compiling
    kept, _compiling = _compiling, False
    try:
        yield
    finally:
        _compiling = kept


def _compilable(kernel: Callable) -> Callable:
    compiled = None

    @functools.wraps(kernel)
    def call(*args: Any) -> Any:
        nonlocal compiled
        if not _compiling:
            return kernel(*args)
        try:
            compiled = compiled or torch.compile(kernel, dynamic=True)
            return compiled(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # dynamo and inductor raise what their many backends raise
            compile_kernels(False)
            log.warning(
                "fused passes run uncompiled, several times slower: torch.compile failed (%s)", _first_line(error)
            )
            return kernel(*args)

    return call


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def layout(folded: Tensor, steps: int) -> Tensor:
    """A folded tensor (S*B, C, ...) as its memory lies: (S, rows, C) or (S, B, C, pixels); a view."""
    if folded.ndim == 2:
        return rearrange(folded, "(s b) c -> s b c", s=steps)
    if is_channels_last(folded):
        return rearrange(folded, "(s b) c h w -> s (b h w) c", s=steps)
    return rearrange(folded.flatten(2), "(s b) c pixels -> s b c pixels", s=steps)


def from_layout(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `layout` for a tensor made from `like` (any number of steps): (S, ...) -> (S*B, C, ...)."""
    if like.ndim == 2:
        return x.flatten(0, 1)
    if is_channels_last(like):
        return x.view(-1, *like.shape[2:], like.shape[1]).permute(0, 3, 1, 2)
    return x.flatten(0, 1).view(-1, *like.shape[1:])


def is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def mean_over_steps(folded: Tensor, steps: int) -> Tensor:
    """The mean over time of a folded stream: (S*B, ...) -> (B, ...)."""
    return folded if steps == 1 else folded.unflatten(0, (steps, -1)).mean(0)


def moments_and_mean(folded: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel over all steps, (C,), and the mean over time, (B, C, ...)."""
    if not _compiling:
        # the statistics of PyTorch's own batch norm, several times as fast as torch.var_mean on a CPU; in the type
        # of the running statistics, which for a bfloat16 stream would otherwise be bfloat16
        unused = folded.new_zeros(folded.shape[1], dtype=torch.promote_types(folded.dtype, torch.float32))
        mean, var = torch.batch_norm_update_stats(folded, unused, unused.clone(), 0.0)
        return mean, var, mean_over_steps(folded, steps)
    x = layout(folded, steps)
    mean, var, value = _moments_and_mean(x)
    return mean, var, from_layout(value[None], folded)


@_compilable
def _moments_and_mean(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    others = [axis for axis in range(x.ndim) if axis != 2]
    # one pass instead of two: about one of the numbers, so that a large mean cancels nothing
    centre = x32[0, 0] if x.ndim == 3 else x32[0, 0, :, :1]
    shifted = x32 - centre
    mean, square = shifted.mean(others), (shifted * shifted).mean(others)
    return mean + centre.view(-1), (square - mean * mean).clamp_min(0), x32.mean(0).to(x.dtype)


def fire(
    folded: list[Tensor],
    steps: list[int],
    affine: list[Affine],
    timesteps: int,
    neuron: NeuronConfig,
) -> Tensor:
    """The spikes of T steps, (T*B, C, ...) in {0, 1}; the arguments are those of `fire_with_rate`."""
    like, streams, maps = _prepare(folded, steps, affine)
    return from_layout(_fire(streams, maps, timesteps, neuron), like)


def fire_with_rate(
    folded: list[Tensor],
    steps: list[int],
    affine: list[Affine],
    timesteps: int,
    neuron: NeuronConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """The spikes, their mean over time r, and kappa = dr/dcbar (Yu et al., NeurIPS 2024, section 4.2).

    With h_t the surrogate derivative alpha g (1 - g), g = sigmoid(alpha (u_t - threshold)),

        e_1 = 1,  e_{t+1} = 1 + a_t e_t,  a_t = du_{t+1}/du_t        kappa = mean_t e_t h_t

    Args:
        folded: the addends of the input current, (S*B, C, ...) each.
        steps: S of each addend, 1 or T.
        affine: scale and shift of each addend.
        timesteps: T.

    Returns:
        spikes (T*B, C, ...), r and kappa (B, C, ...), all in the type of the first addend.
    """
    like, streams, maps = _prepare(folded, steps, affine)
    spikes, rate, kappa = _fire_with_rate(streams, maps, timesteps, neuron)
    return from_layout(spikes, like), from_layout(rate[None], like), from_layout(kappa[None], like)


def _prepare(folded: list[Tensor], steps: list[int], affine: list[Affine]) -> tuple[Tensor, list[Tensor], list[Affine]]:
    """Brings all addends into the layout of the first; the maps broadcast against one step of it."""
    like = folded[0]
    if like.ndim > 2 and not (is_channels_last(like) or like.is_contiguous()):
        like = like.contiguous()
    memory_format = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    streams = [layout(x.contiguous(memory_format=memory_format), s) for x, s in zip(folded, steps, strict=True)]
    column = like.ndim > 2 and not is_channels_last(like)
    maps = [m and tuple(v[:, None] if column else v for v in m) for m in affine]
    return like, streams, maps  # type: ignore[return-value]


@_compilable
def _fire(streams: list[Tensor], maps: list, timesteps: int, neuron: NeuronConfig) -> Tensor:
    v: Any = 0.0
    spikes = []
    for t in range(timesteps):
        _, s, v = step(_current(streams, maps, t), v, neuron)
        spikes.append(s.to(streams[0].dtype))
    return torch.stack(spikes)


@_compilable
def _fire_with_rate(streams: list[Tensor], maps: list, timesteps: int, neuron: NeuronConfig):
    v: Any = 0.0
    rate: Any = 0.0
    kappa: Any = 0.0
    eligibility: Any = 0.0
    carried: Any = 0.0
    spikes = []
    for t in range(timesteps):
        u, s, v = step(_current(streams, maps, t), v, neuron)
        h = surrogate_derivative(u, neuron)
        eligibility = 1 + carried * eligibility
        rate, kappa = rate + s, kappa + eligibility * h
        carried = membrane_derivative(u, s, h, neuron)
        spikes.append(s.to(streams[0].dtype))
    dtype = streams[0].dtype
    return torch.stack(spikes), (rate / timesteps).to(dtype), (kappa / timesteps).to(dtype)


def _current(streams: list[Tensor], maps: list, t: int) -> Tensor:
    """The input current of step t: the sum of the addends, each scaled and shifted."""
    total: Any = None
    for stream, affine in zip(streams, maps, strict=True):
        x = stream[t if stream.shape[0] > 1 else 0]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x if affine is None else x * affine[0] + affine[1]
        total = x if total is None else total + x
    return total
