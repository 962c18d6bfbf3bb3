"""Firing rates of each image, layer by layer, beside whatever else a pass is made for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from distill.meters import neuron_layers
from distill.taps import hooks
from models import SpikeTrain


class ImageRates:
    """Share of the neurons that fire in a step, of each layer that runs, in [0, 1], by module name, image by image.

    Image by image, because several processes are given some images twice to have batches of one size.

    Args:
        network: a spiking network, or a hybrid of one.
    """

    def __init__(self, network: nn.Module) -> None:
        self._neurons = neuron_layers(network)
        self._calls = {name: getattr(m, "calls_per_step", 1) for name, m in self._neurons.items()}
        self._rates: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """The layers that ran in the last pass, in their order."""
        return list(self._rates)

    def of_images(self) -> Tensor:
        """Of the last pass, (B, layers)."""
        return torch.stack(list(self._rates.values()), dim=1)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Records one forward pass, and forgets the one before."""
        self._rates.clear()
        with hooks([(module, self._record(name)) for name, module in self._neurons.items()]):
            yield

    def _record(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: SpikeTrain) -> None:
            fired = output.folded != 0  # a spike of DSR is as large as its threshold
            of_steps = fired.flatten(1).mean(1, dtype=torch.float32).unflatten(0, (-1, len(output)))
            rate = of_steps.mean(0) / self._calls[name]
            self._rates[name] = rate if name not in self._rates else self._rates[name] + rate

        return hook
