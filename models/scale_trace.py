"""What is noted down of scales: sites, layers, and the units of a tensor's channels.

A *site* is one call of an activation that is a neuron in the twin. Each of its channels has a *unit*, a number from 1
on: the value that one of its spikes stands for. Unit 0 is that of ordinary real numbers, whose value is 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


class Refusal(Exception):
    """What becomes an `UnsupportedOperationError`; a TypeError would be taken for "ask the other operand" by ``+``."""


@dataclasses.dataclass(eq=False)
class Layer:
    """A convolution, linear layer or batch norm, called once a step."""

    name: str
    input_units: Tensor
    """Unit of each input channel, (C_in,)."""
    output_units: Tensor | None = None
    """Units of the spikes that are added to its output, (C_out,): the output must be in the same; None for no such."""
    readers: list[str] = dataclasses.field(default_factory=list)
    """What reads the output alone or in a sum of real numbers."""
    sum_readers: list[str] = dataclasses.field(default_factory=list)
    """What reads a sum of the output with something whose scale is given."""
    can_shift: bool = True
    """Whether a constant that is added to the output arrives at its reader as it is."""


@dataclasses.dataclass(eq=False)
class Site:
    """One call of a neuron layer."""

    name: str
    units: Tensor
    """Unit of each channel of its spikes, (C,)."""
    layers: tuple[Layer, ...]
    """Whose sum, with the spikes of `input_units` where there are any, is its input."""
    input_units: Tensor | None
    """Units of its input, (C,), where spikes are in it; None where the input's scale is free."""

    @property
    def shifted(self) -> tuple[Layer, ...]:
        """Those of the layers that may add a constant to the input of this site: no other site reads it."""
        given = self.input_units is not None
        return tuple(a for a in self.layers if a.can_shift and (a.sum_readers if given else a.readers) == [self.name])


@dataclasses.dataclass(frozen=True, eq=False)
class Tag:
    """What is known of a tensor (B, C, ...)."""

    units: Tensor
    layers: tuple[Layer, ...] = ()
    """The addends that are the output of a layer."""
    fixed: bool = True
    """Whether there are other addends: the scale of the sum is then given."""

    @property
    def real(self) -> bool:
        return not self.units.any()

    @property
    def free(self) -> bool:
        return self.real and not self.fixed

    def read_by(self, reader: str) -> None:
        for layer in self.layers:
            (layer.sum_readers if self.fixed else layer.readers).append(reader)


@dataclasses.dataclass(eq=False)
class Trace:
    """Sites and layers in the order of their calls."""

    names: dict[int, str]
    """Name of the module that owns a weight, by the weight's `id`."""
    sites: list[Site] = dataclasses.field(default_factory=list)
    layers: dict[str, Layer] = dataclasses.field(default_factory=dict)
    units: int = 1
    """How many units there are."""

    def layer(self, weight: Any, tag: Tag, kind: str) -> Tag:
        """The output of a layer, whose input has `tag`."""
        name = self.names.get(id(weight))
        if name is None:
            raise Refusal(f"the weight of a {kind} is no parameter of a module: no scale goes into it")
        if name in self.layers:
            raise Refusal(f"{name!r} is called twice in one pass: its weights cannot take two scales")
        tag.read_by(name)
        layer = self.layers[name] = Layer(name, tag.units)
        return Tag(torch.zeros(weight.shape[0], dtype=torch.long), (layer,), fixed=False)

    def site(self, name: str, tag: Tag, channels: int) -> Tag:
        if not tag.free and bool((tag.units == 0).any()):
            raise Refusal(f"nothing before {name!r} can take the scale of its input")
        tag.read_by(name)
        units = torch.arange(self.units, self.units + channels)
        self.units += channels
        self.sites.append(Site(name, units, tag.layers, None if tag.free else tag.units))
        return Tag(units)

    def check(self) -> None:
        """Every output that is scaled must have one reader.

        Raises:
            UnsupportedOperationError: names the layer that has more and those who read it.
        """
        free = {layer for site in self.sites if site.input_units is None for layer in site.layers}
        for layer in self.layers.values():
            if layer not in free and layer.output_units is None:
                continue
            readers = layer.readers + (layer.sum_readers if layer.output_units is None else [])
            if len(readers) > 1:
                raise Refusal(
                    f"the output of {layer.name!r} is read by {', '.join(map(repr, readers))}: it cannot take the "
                    "scale of one of them"
                )
