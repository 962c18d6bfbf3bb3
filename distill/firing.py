"""Firing rates of each image, layer by layer, beside whatever else a pass is made for."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from distill.meters import neuron_layers
from distill.taps import hooks
from models import SpikeTrain


class ImageRates:
    """Share of the neurons that fire in a step, of each layer that runs, in [0, 1], by module name, image by image.

    A layer that runs more than once (at several places, or a time step at a time) has the mean over all steps of all
    its calls. Image by image, because several processes are given some images twice to have batches of one size.

    Args:
        network: a spiking network, or a hybrid of one.
    """

    def __init__(self, network: nn.Module) -> None:
        self._neurons = neuron_layers(network)
        self._fired: dict[str, Tensor] = {}
        self._steps: Counter[str] = Counter()

    @property
    def names(self) -> list[str]:
        """The layers that ran in the last pass, in their order."""
        return list(self._fired)

    def of_images(self) -> Tensor:
        """Of the last pass, (B, layers)."""
        return torch.stack([fired / self._steps[name] for name, fired in self._fired.items()], dim=1)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Records one forward pass, and forgets the one before."""
        self._fired.clear()
        self._steps.clear()
        with hooks([(module, self._record(name)) for name, module in self._neurons.items()]):
            yield

    def _record(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: SpikeTrain) -> None:
            fired = output.folded != 0  # a spike of DSR is as large as its threshold
            of_steps = fired.flatten(1).mean(1, dtype=torch.float32).unflatten(0, (-1, len(output)))
            shares = of_steps.sum(0) * (output.timesteps // len(of_steps))  # of what is constant, one step is stored
            self._fired[name] = shares if name not in self._fired else self._fired[name] + shares
            self._steps[name] += output.timesteps

        return hook
