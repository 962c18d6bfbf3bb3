"""The arithmetic of a layer of leaky integrate-and-fire neurons over all T steps, as pure functions.

    u_t = leak * v_{t-1} + c_t        s_t = [u_t >= threshold]
    v_t = u_t - threshold * s_t  (soft reset)     or     v_t = (1 - s_t) * u_t  (hard reset)

The input current c_t arrives as pending terms (see `models.spiketrain`), so that batch norm, residual sum,
firing and all means over time happen in one traversal of the stream. Membranes are at least float32
whatever the type of the stream.

Shapes: T steps, B images, S stored steps (1 or T); a term is (S, B, C, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NeuronConfig:
    """A leaky integrate-and-fire neuron. The defaults are those of Yu et al., NeurIPS 2024, appendix."""

    leak: float = 0.2
    """What is left of the membrane after one step, in (0, 1]; 1 is an integrate-and-fire neuron."""
    threshold: float = 1.0
    """Membrane at which the neuron fires, above 0."""
    reset: Literal["soft", "hard"] = "soft"
    """soft: a spike subtracts the threshold from the membrane; hard: it sets the membrane to 0."""
    detach_reset: bool = True
    """Whether gradients ignore the path through the reset."""
    alpha: float = 4.0
    """Slope of the sigmoid whose derivative stands in for the derivative of the spike, above 0."""

    def __post_init__(self) -> None:
        if not 0 < self.leak <= 1:
            raise ValueError(f"neuron.leak must be in (0, 1], found {self.leak}")
        if not self.threshold > 0:
            raise ValueError(f"neuron.threshold must be above 0, found {self.threshold}")
        if self.reset not in ("soft", "hard"):
            raise ValueError(f"neuron.reset must be one of 'soft', 'hard', found {self.reset!r}")
        if not self.alpha > 0:
            raise ValueError(f"neuron.alpha must be above 0, found {self.alpha}")


@dataclass(frozen=True, slots=True, eq=False)
class Current:
    """One addend of the input current: ``stream * scale + shift``.

    Args:
        stream: (S, B, C, ...).
        scale, shift: broadcast against one step, or None for 1 and 0.
    """

    stream: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def at(self, t: int, dtype: torch.dtype) -> Tensor:
        x = self.stream[t if self.stream.shape[0] > 1 else 0].to(dtype)
        return x if self.scale is None else torch.addcmul(self.shift, x, self.scale)  # type: ignore[arg-type]


def fire(currents: Sequence[Current], timesteps: int, neuron: NeuronConfig) -> Tensor:
    """The spikes of all steps, (T, B, C, ...) in {0, 1}, in the type of the first current."""
    return _run(currents, timesteps, neuron, with_rate=False)[0]


def fire_with_rate(
    currents: Sequence[Current], timesteps: int, neuron: NeuronConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The spikes, their mean over time r, and kappa = dr/dcbar (Yu et al., NeurIPS 2024, section 4.2).

    With h_t the surrogate derivative alpha g (1 - g), g = sigmoid(alpha (u_t - threshold)),

        e_1 = 1,  e_{t+1} = 1 + a_t e_t,  a_t = du_{t+1}/du_t        kappa = mean_t e_t h_t

    Returns:
        spikes (T, B, C, ...), r and kappa (B, C, ...), all in the type of the first current.
    """
    return _run(currents, timesteps, neuron, with_rate=True)  # type: ignore[return-value]


def _run(currents: Sequence[Current], timesteps: int, neuron: NeuronConfig, with_rate: bool):
    first = currents[0].stream
    dtype = torch.promote_types(first.dtype, torch.float32)
    like = max((c.stream for c in currents), key=lambda s: s.shape[0])  # gives memory format and device
    spikes = _empty_stream(like, timesteps, first.dtype)
    membrane = rate = kappa = eligibility = carried = 0.0  # tensors from the first step on
    for t in range(timesteps):
        current = currents[0].at(t, dtype)
        for term in currents[1:]:
            current = current + term.at(t, dtype)
        u = neuron.leak * membrane + current
        s = (u >= neuron.threshold).to(dtype)
        spikes[t] = s
        membrane = u - neuron.threshold * s if neuron.reset == "soft" else u * (1 - s)
        if with_rate:
            h = surrogate_derivative(u, neuron)
            eligibility = 1 + carried * eligibility
            rate, kappa = rate + s, kappa + eligibility * h
            carried = membrane_derivative(u, s, h, neuron)
    if not with_rate:
        return (spikes,)
    return spikes, (rate / timesteps).to(first.dtype), (kappa / timesteps).to(first.dtype)


def _empty_stream(like: Tensor, timesteps: int, dtype: torch.dtype) -> Tensor:
    """(T, B, C, ...) in the memory format of `like` (S, B, C, ...), so that it folds without a copy."""
    folded = like.flatten(0, 1)
    channels_last = folded.ndim == 4 and folded.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    sizes = (timesteps * like.shape[1], *like.shape[2:])
    spikes = torch.empty(sizes, dtype=dtype, device=like.device, memory_format=memory_format)
    return spikes.unflatten(0, (timesteps, -1))


def surrogate_derivative(u: Tensor, neuron: NeuronConfig) -> Tensor:
    """h = alpha g (1 - g) with g = sigmoid(alpha (u - threshold)), same shape as the membrane `u`."""
    g = torch.sigmoid(neuron.alpha * (u - neuron.threshold))
    return neuron.alpha * g * (1 - g)


def membrane_derivative(u: Tensor, s: Tensor, h: Tensor, neuron: NeuronConfig) -> Tensor | float:
    """a_t = du_{t+1}/du_t: what a change of the membrane `u` before the reset does to the next one."""
    if neuron.reset == "soft":
        return neuron.leak if neuron.detach_reset else neuron.leak * (1 - neuron.threshold * h)
    through_reset = 1 - s if neuron.detach_reset else 1 - s - u * h
    return neuron.leak * through_reset
