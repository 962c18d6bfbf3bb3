"""The losses of a spiking network that learns from labels alone. T steps, B images, K classes.

    ce     CE(mean_t o_t, y); of the online algorithms, which see one step at a time: mean_t CE(o_t, y)
    tet    (1 - lambda) mean_t CE(o_t, y) + lambda mean_t MSE(o_t, phi)

with o_t the logits of step t. tet is temporal efficient training (Deng et al., ICLR 2022, arXiv 2202.11946, sec. 4);
phi is one constant for all logits, as in the authors' code, where it and lambda have the defaults taken here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spikingjelly.activation_based.functional import temporal_efficient_training_cross_entropy
from torch import Tensor

from distill.checks import check
from distill.losses import cross_entropy
from models.layout import at_least_float32


@dataclass(frozen=True, kw_only=True)
class SnnLossConfig:
    """The loss on the labels, a mean over images, in nats per image."""

    name: Literal["ce", "tet"] = "ce"
    """ce: cross-entropy of the mean logits (of each step's, mean over the steps, with ottt and sltt); tet: mean of the
    cross-entropies of all steps with a regulariser, for algorithms with a gradient of each step (bptt, ottt, sltt)."""
    label_smoothing: float = 0.0
    """Of ce, in [0, 1); 0 with tet, whose cross-entropy is SpikingJelly's."""
    tet_lambda: float = 0.05
    """Share of tet's regulariser in the loss, in [0, 1]."""
    tet_target: float = 1.0
    """phi, the value that tet's regulariser draws the logits of each step to."""
    gradient_scale: Literal["none", "1/T"] = "none"
    """Multiplies the gradient and leaves the loss as it is; 1/T is what the authors of rate-based backpropagation
    train with (Yu et al., NeurIPS 2024): choose it with their learning rates."""

    def __post_init__(self) -> None:
        check(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        check(self.label_smoothing == 0 or self.name != "tet", "label_smoothing", self.label_smoothing, "0 with tet")
        check(0 <= self.tet_lambda <= 1, "tet_lambda", self.tet_lambda, "in [0, 1]")


def snn_losses(logits: Tensor, labels: Tensor, config: SnnLossConfig, timesteps: int) -> dict[str, Tensor]:
    """The loss as "total" and, of tet, its two parts without their shares, each a scalar.

    Args:
        logits: of ce (B, K), the mean over time or those of one step; of tet (S, B, K), those of S steps.
        labels: (B,) class indices, or (B, K) probabilities as `distill.mixing` makes them, already smoothed.
        timesteps: T, for the scale of the gradient.

    Raises:
        ValueError: for tet of logits without an axis of steps, of which it would be ordinary cross-entropy.
    """
    logits = at_least_float32(logits)
    parts: dict[str, Tensor] = {}
    if config.name == "ce":
        total = cross_entropy(logits, labels, config.label_smoothing)
    else:
        if logits.ndim != 3:
            raise ValueError(f"tet takes the logits of each step (S, B, K), found shape {tuple(logits.shape)}")
        if labels.is_floating_point():  # SpikingJelly's takes class indices alone
            parts["ce"] = cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits), 1))
        else:
            parts["ce"] = temporal_efficient_training_cross_entropy(logits, labels)
        parts["mse"] = (logits - config.tet_target).square().mean()
        total = (1 - config.tet_lambda) * parts["ce"] + config.tet_lambda * parts["mse"]
    if config.gradient_scale == "1/T":
        total = scale_gradient(total, 1 / timesteps)
    return {"total": total, **parts}


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """The same value, with its gradient times `factor`."""
    return value.detach() + factor * (value - value.detach())
