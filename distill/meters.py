"""What is counted while an epoch trains: parts of the loss, firing rates, and what networks say of their backward
passes. It travels in checkpoints, as JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.taps import hooks
from models import DSRNeuron, SpikeTrain, SpikingNeuron


class Means:
    """Means of named scalars, each over the images of the batches that had it."""

    def __init__(self, sums: Mapping[str, float] | None = None, counts: Mapping[str, int] | None = None) -> None:
        self._sums = {name: torch.tensor(value, dtype=torch.float32) for name, value in (sums or {}).items()}
        self._counts = dict(counts or {})

    def add(self, parts: Mapping[str, Tensor], images: int) -> None:
        for name, value in parts.items():
            weighted = value.float() * images
            self._sums[name] = self._sums[name].to(value.device) + weighted if name in self._sums else weighted
            self._counts[name] = self._counts.get(name, 0) + images

    def over_all(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the images of all processes, which have all had the same parts."""
        if not self._sums:
            return {}
        device = accelerator.device
        counts = torch.tensor([float(self._counts[name]) for name in self._sums], device=device)
        sums = torch.stack([value.to(device) for value in self._sums.values()])
        sums, counts = accelerator.reduce(torch.stack([sums, counts]), "sum").cpu()
        return dict(zip(self._sums, (sums / counts).tolist(), strict=True))

    def plain(self) -> dict[str, Any]:
        """The same in JSON types, exactly: every float32 is a Python float."""
        return {"sums": {name: value.item() for name, value in self._sums.items()}, "counts": self._counts}


@dataclass
class Progress:
    """How far a stage is, on one process."""

    epochs: int = 0
    """Finished ones, their evaluation included."""
    batches: int = 0
    """Of the epoch that runs."""
    images: int = 0
    """Trained on in the epoch that runs, by this process."""
    seconds: float = 0.0
    """Of training in the epoch that runs."""
    skipped: int = 0
    """Steps of the epoch that runs whose loss or gradient was no number."""
    skipped_in_a_row: int = 0
    overflowed_in_a_row: int = 0
    """Skipped by the scaler of float16's gradients, though their loss was a number."""
    averaged: int = 0
    """Steps that the average of the weights has seen."""
    losses: Means = field(default_factory=Means)
    rates: Means = field(default_factory=Means)
    backward: Means = field(default_factory=Means)
    """What `BackwardFigures` found."""

    def next_epoch(self) -> Progress:
        """The progress between this epoch and the next."""
        kept = ("skipped_in_a_row", "overflowed_in_a_row", "averaged")
        return Progress(self.epochs + 1, **{name: getattr(self, name) for name in kept})

    def plain(self) -> dict[str, Any]:
        """The same in JSON types."""
        numbers = {n: v for n, v in vars(self).items() if not isinstance(v, Means)}
        return numbers | {n: getattr(self, n).plain() for n in _MEANS}

    @staticmethod
    def of_plain(values: dict[str, Any]) -> Progress:
        # a checkpoint of an older version has no figures of backward passes and no overflows
        return Progress(**values | {name: Means(**values.get(name, {})) for name in _MEANS})


_MEANS = ("losses", "rates", "backward")


def neuron_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of neurons by module name."""
    return {name: m for name, m in network.named_modules() if isinstance(m, (SpikingNeuron, DSRNeuron))}


class BackwardFigures:
    """What the modules of a network want logged of each backward pass, by names as "residual/MODULE".

    A module that has something to say has a method `take_backward_figures`, which gives scalars by name once, "KIND" or
    "KIND/PART" for a part of it (`models.FeedbackLoop`). Which they are is looked up once, not in each step.
    """

    def __init__(self, network: nn.Module) -> None:
        found = ((path, getattr(m, "take_backward_figures", None)) for path, m in network.named_modules())
        self._sources: list[tuple[str, Callable[[], dict[str, Tensor]]]] = [(p, take) for p, take in found if take]

    def take(self) -> dict[str, Tensor]:
        """Of the backward pass just made."""
        figures = {}
        for path, take in self._sources:
            for name, value in take().items():
                kind, _, part = name.partition("/")
                figures[f"{kind}/{'.'.join(filter(None, (path, part)))}"] = value
        return figures


@contextlib.contextmanager
def recorded_rates(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Share of the neurons that fire in a step of each layer that runs while this is open, in [0, 1], by name.

    A layer that runs more than once (at each step of the online rules, at several places) has the mean over its calls.
    """
    rates: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: SpikeTrain | Tensor) -> None:
            if isinstance(output, SpikeTrain) and output.kind == "replay":
                return  # the rates of rate_s, whose steps have all been here
            spikes = output.folded if isinstance(output, SpikeTrain) else output
            rate = (spikes.detach() != 0).mean(dtype=torch.float32)  # a spike of DSR is as large as its threshold
            calls[name] = calls.get(name, 0) + 1
            rates[name] = rate if name not in rates else rates[name] + (rate - rates[name]) / calls[name]

        return hook

    with hooks([(module, record(name)) for name, module in neuron_layers(network).items()]):
        yield rates
