"""The settings of a feedback loop, and what the papers chose for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from models.dynamics import NeuronConfig

FEEDBACK_ALGORITHMS = ("ide", "spide")
"""The gradients of feedback networks. ide: implicit differentiation on the equilibrium state (Xiao et al., NeurIPS
2021); spide: the same system solved by spikes (Xiao et al., Neural Networks 2023).
"""

FEEDBACK_NEURON = NeuronConfig(leak=1.0, threshold=2.0)
"""The neurons of both papers: integrate-and-fire; a spike of SPIDE's, too, removes 2 (see `FeedbackConfig.head_start`).
"""


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """A feedback loop and the backward pass through its equilibrium. None stands for what the algorithm's paper has.

    SPIDE's neurons fire at V_th and rest at u_rest = -V_th: a spike removes V_th - u_rest, and the membrane starts at
    0. Counted from u_rest, v = u - u_rest, they are ordinary neurons of threshold V_th - u_rest with two additions: v
    starts at -u_rest, which is half a threshold, and under a leak, u_t = leak u_{t-1} + c_t, each step adds what the
    leak of the offset would have lost: v_t = leak v_{t-1} + c_t - (1 - leak) u_rest. `head_start` is -u_rest in
    thresholds: 0 for the neurons of IDE, 1/2 for those of SPIDE.
    """

    solver: Literal["fixed_point", "broyden"] = "fixed_point"
    """How ide solves for the gradient at the equilibrium: by iterating the loop, or by Broyden's method."""
    tolerance: float = 1e-4
    """Residual, as a share of the gradient's norm, at which the solver stops; above 0."""
    max_iterations: int = 30
    """Iterations after which the solver gives up, at least 2."""
    patience: int = 20
    """Backward passes in a row that may find that the loop does not contract before training ends with an error."""
    bounded_norm: Literal["spectral", "frobenius"] | None = None
    """Norm of the feedback's weight, as a matrix (C, the rest), that is kept below `bound`; None: spectral with ide,
    frobenius with spide."""
    bound: float | None = None
    """Largest norm of the feedback's weight, above 0; None: 1 with ide, 2 with spide."""
    batch_norm: bool | None = None
    """Batch norm behind each map but the feedback; None: with ide, not with spide."""
    dropout: float = 0.2
    """Probability that a neuron's current is dropped, for all time steps of an image; in [0, 1)."""
    head_start: float | None = None
    """Membrane before the first step in thresholds, in [0, 1); None: 0 with ide, 0.5 with spide."""
    backward_timesteps: int = 100
    """spide: time steps of the backward pass, at least 1."""
    backward_threshold: float = 0.5
    """spide: membrane at which a neuron fires backward, with either sign; a spike removes, and sends, twice as much."""
    gradient_scale: float = 3.0
    """spide: factor of each image's own loss gradient before the backward spikes, divided out after them; above 0."""
    readout_side: int | None = None
    """Height and width of the maps that the classifier sees, to which others are average-pooled; None: the paper's."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("solver", ("fixed_point", "broyden")),
            ("bounded_norm", ("spectral", "frobenius", None)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, found {getattr(self, name)!r}")
        for name in ("tolerance", "bound", "backward_threshold", "gradient_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, found {value}")
        for name, least in (("max_iterations", 2), ("patience", 1), ("backward_timesteps", 1), ("readout_side", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
        for name in ("dropout", "head_start"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), found {value}")

    def resolved(self, algorithm: str) -> FeedbackConfig:
        """With what the algorithm's paper has in place of None (but for the readout's side, which is the network's)."""
        spide = algorithm == "spide"
        papers: dict[str, Any] = {
            "bounded_norm": "frobenius" if spide else "spectral",
            "bound": 2.0 if spide else 1.0,
            "batch_norm": not spide,
            "head_start": 0.5 if spide else 0.0,
        }
        return dataclasses.replace(self, **{name: v for name, v in papers.items() if getattr(self, name) is None})
