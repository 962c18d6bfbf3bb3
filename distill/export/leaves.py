"""The modules of a plain network that torch has no equal of: neurons, gates, and a scale and shift of each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.dynamics import NeuronConfig
from models.dynamics import step as neuron_step


class Neuron(nn.Module):
    """A layer of neurons as a pure step: the membrane comes in and goes out.

    Args:
        config: its constants.
        leak: the leak, the value of a learned one.
        start: the membrane before the first step.
    """

    def __init__(self, config: NeuronConfig, leak: float, start: float = 0.0) -> None:
        super().__init__()
        self.config, self.leak, self.start = config, leak, start

    def forward(self, current: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Spikes and the membrane after the reset, of the current and of the membrane before; None at the start."""
        _, spikes, v = neuron_step(current, self.start if v is None else v, self.leak, self.config)
        return spikes, v

    @property
    def tau(self) -> float:
        """SpikingJelly's time constant, without input decay: 1 - 1/tau is the leak; inf for integrate-and-fire."""
        rest = 1 - self.leak
        # SpikingJelly wants more than 1, which the leak of a layer without any memory rounds to
        return max(1 / rest, 1 + torch.finfo(torch.float64).eps) if rest > 0 else float("inf")

    def extra_repr(self) -> str:
        start = f", start={self.start}" if self.start else ""
        return f"leak={self.leak}, threshold={self.config.threshold}, reset={self.config.reset}{start}"


class Gate(nn.Module):
    """An analogue activation that is computed on the firing rate of all steps."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, rate: Tensor) -> Tensor:
        return self.activation(rate)


class ChannelAffine(nn.Module):
    """x * scale + shift of each channel, (B, C, ...): a batch norm in evaluation mode, before it is folded."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach())
        self.register_buffer("shift", shift.detach())
