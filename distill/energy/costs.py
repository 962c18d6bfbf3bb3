"""What an operation and a bit of memory cost, and what one image costs in a network.

The constants are the field's usual ones, for 45 nm and 32-bit floating point (Horowitz, *Computing's energy problem*,
ISSCC 2014: 3.7 pJ a multiplication, 0.9 pJ an addition). They are also SpikingJelly's (`SimpleEnergyCostConfig`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

PJ_PER_MAC = 4.6
"""Of a multiplication and the addition of its product (MAC)."""
PJ_PER_AC = 0.9
"""Of an addition (AC): what a spike costs at each synapse."""
PJ_PER_BIT = 3.12
"""Of a bit that is read from memory or written to it: 24.96 pJ a byte."""
WORD = 32
"""Bits of a weight, an analogue activation or a membrane."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One image in one convolution, linear layer or matrix product, over all time steps.

    Args:
        name: the module; with " (call 2)" where a step calls it again.
        spiking: whether its input is spikes, so that it adds and does not multiply.
        macs: multiply-accumulates; 0 in a spiking layer.
        acs: accumulates, the synaptic operations of a spiking layer; 0 in another.
        bits: of weights that are read, and of inputs that are written and read.
    """

    name: str
    spiking: bool
    macs: float
    acs: float
    bits: float


@dataclass(frozen=True, slots=True)
class Cost:
    """One image in a network, over all time steps.

    Args:
        membrane_bits: read and written for the membranes of all neurons.
    """

    layers: tuple[LayerCost, ...]
    membrane_bits: float = 0.0

    @property
    def macs(self) -> float:
        return sum(layer.macs for layer in self.layers)

    @property
    def acs(self) -> float:
        return sum(layer.acs for layer in self.layers)

    @property
    def mac_share(self) -> float:
        """Share of the layers whose input is not spikes, in [0, 1]."""
        return sum(not layer.spiking for layer in self.layers) / len(self.layers)

    @property
    def compute_uj(self) -> float:
        """Of the arithmetic, in microjoule."""
        return 1e-6 * (PJ_PER_MAC * self.macs + PJ_PER_AC * self.acs)

    @property
    def memory_uj(self) -> float:
        """Of the memory traffic, in microjoule."""
        return 1e-6 * PJ_PER_BIT * (self.membrane_bits + sum(layer.bits for layer in self.layers))

    def named(self, prefix: str) -> Cost:
        """The same with the prefix and a dot before each layer's name."""
        return replace(self, layers=tuple(replace(layer, name=f"{prefix}.{layer.name}") for layer in self.layers))

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.layers + other.layers, self.membrane_bits + other.membrane_bits)

    def figures(self) -> dict[str, float]:
        """As summary.json has them, per image."""
        return {
            "compute_uj": self.compute_uj,
            "memory_uj": self.memory_uj,
            "macs": self.macs,
            "acs": self.acs,
            "mac_share_of_layers": self.mac_share,
        }

    def by_layer(self) -> list[dict[str, Any]]:
        """In JSON types, per image."""
        return [
            {"name": e.name, "spiking": e.spiking, "macs": e.macs, "acs": e.acs, "memory_bits": e.bits}
            for e in self.layers
        ]


def assumptions(images: int) -> list[str]:
    """What the figures rest on, to be printed beside them.

    Args:
        images: that synaptic operations were counted on.
    """
    return [
        f"45 nm, 32-bit floating point: {PJ_PER_MAC} pJ a multiply-accumulate (MAC), {PJ_PER_AC} pJ an accumulate (AC)",
        "a convolution or linear layer whose input is spikes does one AC for each synapse that a spike reaches "
        "(borders, strides, groups exact); a sum of n spikes counts as n; DSR's thresholds are folded into the weights",
        "every other one (its input an image, a linear bottleneck, an average pool, a gate) does all its MACs at every "
        "step, also where its input is the same at every step",
        "MACs of the padding count, as is usual, though no spike lies there: that favours the SNN where maps are small",
        "batch norms are folded into weights and thresholds; biases, neurons, pooling, residual sums, resizing and the "
        "products of gates are not counted as arithmetic",
        "of a hybrid the adapter and the teacher's blocks behind it run once an image, on rates; a teacher with class "
        "tokens runs once as a whole",
        f"memory: {PJ_PER_BIT} pJ a bit; at every step each weight and bias is read once, each of these layers' inputs "
        f"written and read once ({WORD} bits a number; 1 bit a spike, n bits for sums below 2^n), each membrane read "
        f"and written once ({WORD} bits); nothing is kept from step to step or image to image",
        f"spikes are counted on {images} of the evaluation images, evenly spread; figures are per image",
    ]
