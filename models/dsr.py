"""Differentiation on spike representation (DSR; Meng et al., CVPR 2022, arXiv 2205.00459), with SpikingJelly's nodes.

The gradient of a layer is that of its representation, a clipped linear map of the mean input. It needs neurons of its
own: spikes as large as a learned threshold, which a membrane fires on reaching a share of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from spikingjelly.activation_based.neuron import DSRIFNode, DSRLIFNode
from torch import nn

from models.layout import at_least_float32
from models.spiketrain import SpikeTrain, UnsupportedOperationError


@dataclass(frozen=True, kw_only=True)
class DSRConfig:
    """The neurons of DSR, which replace all other settings of a neuron. The defaults are SpikingJelly's."""

    model: Literal["if", "lif"] = "if"
    """if: integrate-and-fire; lif: with a leak of exp(-delta_t / tau) and an input scaled by 1 - leak."""
    threshold: float | None = None
    """Where the learned threshold of each layer starts; None: 6 for if, 1 for lif."""
    alpha: float | None = None
    """Share of the threshold at which the membrane fires, in (0, 1]; None: 0.5 for if, 0.3 for lif."""
    learn_threshold: bool = True
    """Whether the threshold is a parameter."""
    grad_scaling: float = 1.0
    """Factor of the threshold's gradient, above 0."""
    lower_bound: float | None = None
    """Smallest threshold, above 0; None: 0.01 for if, 0.1 for lif."""
    tau: float = 2.0
    """Time constant of a lif neuron, above 0."""
    delta_t: float = 0.05
    """Length of a time step of a lif neuron, above 0."""

    def __post_init__(self) -> None:
        if self.model not in ("if", "lif"):
            raise ValueError(f"model must be one of 'if', 'lif', found {self.model!r}")
        start = self.resolved
        above = {"grad_scaling": self.grad_scaling, "tau": self.tau, "delta_t": self.delta_t}
        for name, value in {**above, "lower_bound": start["lower_bound"]}.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, found {value}")
        if not start["threshold"] >= start["lower_bound"]:
            least = f"lower_bound ({start['lower_bound']})"
            raise ValueError(f"threshold must be at least {least}, found {start['threshold']}")
        if not 0 < start["alpha"] <= 1:
            raise ValueError(f"alpha must be in (0, 1], found {start['alpha']}")

    @property
    def resolved(self) -> dict[str, float]:
        """Threshold, alpha and lower bound, with the defaults of the model filled in."""
        defaults = {"if": (6.0, 0.5, 0.01), "lif": (1.0, 0.3, 0.1)}[self.model]
        given = {"threshold": self.threshold, "alpha": self.alpha, "lower_bound": self.lower_bound}
        return {
            name: float(default if value is None else value)
            for (name, value), default in zip(given.items(), defaults, strict=True)
        }


class DSRNeuron(nn.Module):
    """A layer of SpikingJelly's DSR neurons that runs on a `SpikeTrain` (B, C, ...) of all T steps.

    Its spikes are not 0 or 1 but multiples of the threshold (and of 1 / delta_t for lif).
    """

    def __init__(self, config: DSRConfig) -> None:
        super().__init__()
        self.config = config
        resolved = config.resolved
        settings = {
            "T": 1,  # set to that of the train at each call
            "v_threshold": resolved["threshold"],
            "alpha": resolved["alpha"],
            "v_threshold_training": config.learn_threshold,
            "v_threshold_grad_scaling": float(config.grad_scaling),
            "v_threshold_lower_bound": resolved["lower_bound"],
        }
        times = {"tau": float(config.tau), "delta_t": float(config.delta_t)}
        self.node = DSRLIFNode(**settings, **times) if config.model == "lif" else DSRIFNode(**settings)

    def forward(self, x: SpikeTrain) -> SpikeTrain:
        if not isinstance(x, SpikeTrain):
            raise ValueError("DSR looks at all time steps at once: its networks do not run step by step")
        if x.kind not in ("graph", "plain"):
            raise UnsupportedOperationError(f"DSR's neurons have no rule in a pass of kind {x.kind!r}")
        self.node.T = x.timesteps
        with torch.set_grad_enabled(x.kind == "graph" and torch.is_grad_enabled()):
            # the stream may be an expanded view of one step: the node writes nothing into it
            spikes = self.node(at_least_float32(x.stream))
        return x.derive(spikes.to(x.dtype).flatten(0, 1), x.timesteps)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(self.config).items())
