"""A moving average of the weights, as timm's ModelEmaV3 keeps it, without a second network.

timm's own copies the module; a distiller would copy its frozen teacher with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class WeightAverage:
    """Averages of all floating-point parameters and buffers, each in its own type.

    After step n, average += (1 - d) (weights - average) with d = min(decay, (1 + n) / (10 + n)): the first weights,
    which are far from good, are soon forgotten (TensorFlow's rule).

    Args:
        network: not wrapped.
        decay: in (0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network, self._decay = network, decay
        self.steps = 0
        self._averages = {name: value.clone() for name, value in self._values().items()}

    def _values(self) -> dict[str, Tensor]:
        state = self._network.state_dict(keep_vars=True)
        return {name: value.detach() for name, value in state.items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights in; call it after each step of the optimizer."""
        self.steps += 1
        share = 1 - min(self._decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self._averages.values()), list(self._values().values()), share)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The network has the averages while this is open."""
        own = {name: value.clone() for name, value in self._values().items()}
        self.give()
        try:
            yield
        finally:
            self._write(own)

    def give(self) -> None:
        """Gives the network the averages for good."""
        self._write(self._averages)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in self._values().items():
            value.copy_(values[name])

    def save(self, path: Path) -> None:
        save_file({name: value.contiguous() for name, value in self._averages.items()}, path)

    def load(self, path: Path, steps: int) -> None:
        """Takes what `save` wrote after so many steps."""
        saved = load_file(path)
        for name, value in self._averages.items():
            value.copy_(saved[name])
        self.steps = steps
