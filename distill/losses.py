"""The distillation loss (Yang et al., CVPR 2025, arXiv 2503.16572, section 3.3) and the parts that others share.

    L = w1 CE(y_S) + w2 KL(y_A, y_S) + 1/N sum_i v_i [w3 CE(y_Mi) + w4 KL(y_A, y_Mi) + w5 F(f_i, a_i)]

with y_A the teacher's, y_S the student's and y_Mi the hybrids' logits, f_i the student's adapted rate and a_i the
teacher's feature at tap i, v_i the weight of the tap and N the number of taps that are active in the step. So the
weights v_i are not normalised: doubling all of them doubles the hybrids' share, and a tap of weight 0 still counts in
N. F (feature alignment) is an addition of ours, off by default. Shapes: B images, K classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layout import at_least_float32

if TYPE_CHECKING:  # both import this module
    from distill.hybrid import HybridOutput
    from distill.train_config import LossConfig

SMALLEST_NORM = 1e-4
"""Of a feature in the cosine, whose gradient grows with the inverse of the norm: a silent place must not dominate."""


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with class indices or with probabilities, mean over images, in nats per image.

    Args:
        logits: (B, K).
        labels: (B,) class indices, or (B, K) probabilities as `distill.mixing` makes them: it has smoothed them, so
            they are not smoothed again.
        label_smoothing: share of the label that is spread over all classes, in [0, 1).
    """
    if labels.is_floating_point():
        return F.cross_entropy(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def kd_loss(teacher_logits: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(logits / tau)), mean over images (Hinton et al., arXiv 1503.02531).

    Args:
        teacher_logits: (B, K).
        logits: (B, K), of the network that learns.
        temperature: tau, above 0. Its square keeps the gradient's size when tau changes.

    Returns:
        A scalar, in nats per image.
    """
    target = F.log_softmax(teacher_logits / temperature, dim=1)
    prediction = F.log_softmax(logits / temperature, dim=1)
    return F.kl_div(prediction, target, log_target=True, reduction="batchmean") * temperature**2


def feature_loss(kind: str, adapted: Tensor, teacher: Tensor) -> Tensor:
    """How far a student's adapted rate is from the teacher's feature.

        mse       mean over all elements of (f - a)^2
        cosine    mean over images and places of 1 - f.a / (|f| |a|), products and norms over the channels

    Args:
        kind: "mse" or "cosine".
        adapted, teacher: f and a, (B, C, H, W) both; the teacher's without a gradient.

    Returns:
        A scalar without unit, at least float32.

    Raises:
        ValueError: for another kind, or shapes that differ.
    """
    if adapted.shape != teacher.shape:
        found = f"{tuple(adapted.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"feature alignment takes two features of one shape, found {found}")
    adapted, teacher = at_least_float32(adapted), at_least_float32(teacher)
    if kind == "mse":
        return F.mse_loss(adapted, teacher)
    if kind == "cosine":
        return 1 - F.cosine_similarity(adapted, teacher, dim=1, eps=SMALLEST_NORM).mean()
    raise ValueError(f"feature must be 'mse' or 'cosine', found {kind!r}")


def check_tap_weights(weights: LossConfig, taps: Sequence[str]) -> None:
    """
    Raises:
        ValueError: if a weight is given to what is no tap, naming the taps.
    """
    for name in weights.tap_weights:
        if name not in taps:
            close = difflib.get_close_matches(name, taps, n=1)
            hint = f" (close to it: {close[0]!r})" if close else ""
            raise ValueError(f"tap_weights: {name!r} is no tap{hint}; allowed: {list(taps)}")


def distillation_losses(outputs: HybridOutput, labels: Tensor, weights: LossConfig) -> dict[str, Tensor]:
    """The weighted loss as "total", and its parts without their weights, each a scalar.

    Where the student's logits are None, its two parts are missing; so are those of taps that are not active. All
    parts are in nats per image, but `hybrid_feature/TAP`, which has no unit.

    Args:
        outputs: of a `HybridDistiller`; logits (B, K).
        labels: (B,) class indices, or (B, K) probabilities as `distill.mixing` makes them.
    """
    teacher, tau, smoothing = outputs.teacher_logits, weights.temperature, weights.label_smoothing
    parts: dict[str, Tensor] = {}
    terms: list[Tensor] = []
    if outputs.student_logits is not None:
        parts["student_ce"] = cross_entropy(outputs.student_logits, labels, smoothing)
        parts["student_kd"] = kd_loss(teacher, outputs.student_logits, tau)
        terms += [weights.student_ce * parts["student_ce"], weights.student_kd * parts["student_kd"]]
    hybrids = outputs.hybrid_logits
    over_taps = {
        "hybrid_ce": {tap: cross_entropy(logits, labels, smoothing) for tap, logits in hybrids.items()},
        "hybrid_kd": {tap: kd_loss(teacher, logits, tau) for tap, logits in hybrids.items()},
        "hybrid_feature": outputs.feature_losses,
    }
    for name, losses in over_taps.items():
        parts |= {f"{name}/{tap}": loss for tap, loss in losses.items()}
        if losses:
            terms.append(getattr(weights, name) * _mean_over_taps(losses, weights.tap_weights))
    # over nothing: a constant that can still go backward
    total = torch.stack(terms).sum() if terms else teacher.new_zeros((), requires_grad=True)
    return {"total": total, **parts}


def _mean_over_taps(losses: Mapping[str, Tensor], tap_weights: Mapping[str, float]) -> Tensor:
    """1/N sum_i v_i L_i over N active taps."""
    return torch.stack([tap_weights.get(tap, 1.0) * loss for tap, loss in losses.items()]).mean()
