"""The leaky integrate-and-fire neuron: its constants and the equations of one step, as pure functions.

u_t = leak * v_{t-1} + c_t        s_t = [u_t >= threshold]
v_t = u_t - threshold * s_t  (soft reset)     or     v_t = (1 - s_t) * u_t  (hard reset)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NeuronConfig:
    """A leaky integrate-and-fire neuron. The defaults are those of Yu et al., NeurIPS 2024, appendix."""

    leak: float = 0.2
    """What is left of the membrane after one step, in (0, 1]; 1 is an integrate-and-fire neuron."""
    learnable_leak: bool = False
    """Learn one leak for each layer (PLIF; Fang et al., ICCV 2021), starting at `leak`, which must then be below 1."""
    threshold: float = 1.0
    """Membrane at which the neuron fires, above 0."""
    reset: Literal["soft", "hard"] = "soft"
    """soft: a spike subtracts the threshold from the membrane; hard: it sets the membrane to 0."""
    detach_reset: bool = True
    """Whether gradients ignore the path through the reset. Under the rate rules say false for leaks of 0.5 or more: the
    effect of a current then adds up over the steps, and the gradient grows from layer to layer (docs/maths.md)."""
    alpha: float = 4.0
    """Slope of the sigmoid whose derivative stands in for the derivative of the spike, above 0."""

    def __post_init__(self) -> None:
        if not 0 < self.leak <= 1:
            raise ValueError(f"leak must be in (0, 1], found {self.leak}")
        if self.learnable_leak and self.leak == 1:
            raise ValueError("leak must be below 1 where it is learned, found 1.0: 1 - sigmoid(w) never reaches it")
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0, found {self.threshold}")
        if self.reset not in ("soft", "hard"):
            raise ValueError(f"reset must be one of 'soft', 'hard', found {self.reset!r}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, found {self.alpha}")


Leak = Tensor | float
"""The leak of a layer: a number, or a scalar tensor where it is learned."""


def step(current: Tensor, v: Tensor | float, leak: Leak, neuron: NeuronConfig) -> tuple[Tensor, Tensor, Tensor]:
    """One step from the input current and the membrane that the step before left, same shapes.

    Returns:
        the membrane u before the reset, the spikes in {0, 1} and the membrane v after the reset.
    """
    u = leak * v + current
    s = (u >= neuron.threshold).to(u.dtype)
    return u, s, u - neuron.threshold * s if neuron.reset == "soft" else u * (1 - s)


def surrogate_derivative(u: Tensor, neuron: NeuronConfig) -> Tensor:
    """h = alpha g (1 - g) with g = sigmoid(alpha (u - threshold)), same shape as the membrane `u`."""
    g = torch.sigmoid(neuron.alpha * (u - neuron.threshold))
    return neuron.alpha * g * (1 - g)


def surrogate_derivative_in_a_loop(u: Tensor, neuron: NeuronConfig) -> Tensor:
    """`surrogate_derivative` in float32 without an exponential, whose calls take most of a compiled loop on a CPU.

    With z = alpha (u - threshold), h = alpha / (2 + c) for c = 2 cosh z, and c^2 - 2 is that of twice the argument: it
    begins with the series at z / 8. To 4e-6 of h for abs(z) <= 8 and to 1e-8 alpha beyond; the sigmoid, whose 1 - g has
    few digits, to 3e-4 and 1e-7.
    """
    y = ((u - neuron.threshold) * (neuron.alpha / 8)).square()
    c = 2 + y * (1 + y * (1 / 12 + y * (1 / 360 + y * (1 / 20160))))  # a compiler computes y anew for each use of it
    for _ in range(3):
        c = c.square() - 2
    return neuron.alpha / (2 + c)


def membrane_derivative(u: Tensor, s: Tensor, h: Tensor, leak: Leak, neuron: NeuronConfig) -> Leak:
    """a_t = du_{t+1}/du_t: what a change of the membrane `u` before the reset does to the next one."""
    if neuron.reset == "soft":
        return leak if neuron.detach_reset else leak * (1 - neuron.threshold * h)
    through_reset = 1 - s if neuron.detach_reset else 1 - s - u * h
    return leak * through_reset
