"""What is kept between traversals of a network that run a step each: a record for each place where a rule needs one.

rate_s (Yu et al., NeurIPS 2024, section 4.3) runs one time step at a time, T traversals without a graph, and then one
traversal of the rates that builds the graph. Its memory does not grow with T: a record holds running means, not steps.
A place is known by its order: the code of a network calls the rules in the same order in each traversal. Inference a
step at a time (`models.stepping`) keeps the membranes of its neurons in the same way.

Shapes: T time steps, B images, C channels.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")


_CHANGED = "the network's code ran otherwise than at the step before: going on needs the same layers in the same order"


class Tape:
    """The records of one training step of a network, or of one inference, in the order of the rules that made them.

    Args:
        timesteps: T.
    """

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps
        self.traversals = 0
        """How many have begun, each with `rewind`."""
        self._records: list[Any] = []
        self._next = 0

    def rewind(self) -> None:
        """The next rule is the network's first again.

        Raises:
            RuntimeError: if the last traversal was another than the one before.
        """
        if self._next != len(self._records):
            raise RuntimeError(_CHANGED)
        self._next = 0
        self.traversals += 1

    def record(self, make: type[Record]) -> Record:
        """The record of this place, which is made in the first traversal.

        Raises:
            RuntimeError: if this place had another kind of record in the traversal before.
        """
        if self._next == len(self._records):
            self._records.append(make())
        record = self._records[self._next]
        if type(record) is not make:
            raise RuntimeError(_CHANGED)
        self._next += 1
        return record

    def take(self) -> Any:
        """The record of this place, for the last time: the tape lets go of it."""
        record, self._records[self._next] = self._records[self._next], None
        self._next += 1
        return record


class Mean:
    """The mean over time of a tensor (B, C, ...), at least in float32."""

    def __init__(self) -> None:
        self.sum: Any = None
        self.dtype: torch.dtype = torch.float32
        """Of what was added."""

    def add(self, x: Tensor) -> None:
        if self.sum is None:
            self.dtype = x.dtype
            self.sum = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        elif self.sum.shape != x.shape:
            raise RuntimeError(_CHANGED)
        else:
            self.sum += x

    def value(self, timesteps: int) -> Tensor:
        return self.sum / timesteps


class Moments:
    """A batch norm's statistics over T steps, (C,) each: the mean of mu_t and of 1 / (sigma_t^2 + eps).

    Yu et al., NeurIPS 2024, section 4.3: the backward pass uses mu = mean_t mu_t and
    1/sigma = sqrt(mean_t 1/(sigma_t^2 + eps)).
    """

    def __init__(self) -> None:
        self.mean, self.inverse = Mean(), Mean()

    def add(self, mean: Tensor, var: Tensor, eps: float) -> None:
        self.mean.add(mean)
        self.inverse.add(1 / (var + eps))

    def value(self, timesteps: int) -> tuple[Tensor, Tensor]:
        """mu and 1/sigma."""
        return self.mean.value(timesteps), self.inverse.value(timesteps).sqrt()


class Membrane:
    """The state of a layer of neurons between two steps and the sums of its rate rule; None before the first step."""

    def __init__(self) -> None:
        self.state: list[Tensor] | None = None
        self.like: Tensor | None = None
        """A step's spikes without their numbers: shape, type and memory format of the state."""
