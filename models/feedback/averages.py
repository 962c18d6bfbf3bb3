"""Averages over time that weigh a step by the leak, lambda^(T - t): what the equilibrium equations hold for.

Sum the membrane's equation, v_t = lambda v_{t-1} + c_t - theta s_t, with these weights, w_T = sum_t lambda^(T - t):

    theta a = cbar - v_T / w_T        a = sum_t lambda^(T - t) s_t / w_T,  cbar likewise

so that the averages of spikes and currents obey a = clip(cbar / theta, 0, 1) as the membrane's share vanishes. For
integrate-and-fire neurons, lambda = 1, they are plain means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.layout import at_least_float32


class RunningAverage:
    """The average of the steps so far, at least in float32.

    Args:
        leak: lambda.
    """

    def __init__(self, leak: float) -> None:
        self._leak = leak
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, x: Tensor) -> None:
        wide = at_least_float32(x)
        self._sum = wide if self._sum is None else wide.add(self._sum, alpha=self._leak)
        self._weight = 1 + self._leak * self._weight

    @property
    def value(self) -> Tensor:
        assert self._sum is not None, "no step was added"
        return self._sum / self._weight


class Readout:
    """Gives each step a number whose plain mean over the steps so far is the weighted average of what came in.

    x_k = k A_k - (k - 1) A_{k-1}, with A_k the average of the first k steps: spikes as they are where neurons do not
    leak, and under a leak what makes logits, means over time of a linear readout, those of the average.
    """

    def __init__(self, leak: float) -> None:
        self._leak = leak
        self._average = RunningAverage(leak)
        self._steps = 0
        self._before: Tensor | None = None

    def next(self, spikes: Tensor) -> Tensor:
        if self._leak == 1:
            return spikes
        self._average.add(spikes)
        self._steps += 1
        total = self._steps * self._average.value
        x = total if self._before is None else total - self._before
        self._before = total
        return x.to(spikes.dtype)


def average_over_steps(folded: Tensor, steps: int, leak: float) -> Tensor:
    """The weighted average over time of a folded stream: (S*B, ...) -> (B, ...)."""
    if steps == 1:
        return folded
    stream = folded.unflatten(0, (steps, -1))
    if leak == 1:
        return stream.mean(0)
    dtype = torch.promote_types(folded.dtype, torch.float32)
    weights = leak ** torch.arange(steps - 1, -1, -1, dtype=dtype, device=folded.device)
    return torch.tensordot(weights / weights.sum(), stream.to(dtype), 1).to(folded.dtype)
