"""The distillation loss (Yang et al., CVPR 2025, arXiv 2503.16572, section 3.3).

    L = w1 CE(y_S) + w2 KL(y_A, y_S) + mean over taps of [w3 CE(y_Mi) + w4 KL(y_A, y_Mi)]

with y_A the teacher's, y_S the student's and y_Mi the hybrids' logits. Shapes: B images, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config import LossConfig
from distill.hybrid import HybridOutput


def kd_loss(teacher_logits: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(logits / tau)), mean over images (Hinton et al., arXiv 1503.02531).

    Args:
        teacher_logits, logits: (B, K).
        temperature: tau, above 0. Its square keeps the gradient's size when tau changes.

    Returns:
        A scalar, in nats per image.
    """
    target = F.log_softmax(teacher_logits / temperature, dim=1)
    prediction = F.log_softmax(logits / temperature, dim=1)
    return F.kl_div(prediction, target, log_target=True, reduction="batchmean") * temperature**2


def distillation_losses(outputs: HybridOutput, labels: Tensor, weights: LossConfig) -> dict[str, Tensor]:
    """The weighted loss as "total", and its parts without their weights, each a scalar in nats per image.

    Args:
        outputs: of a `HybridDistiller`; logits (B, K).
        labels: (B,) class indices.
    """
    teacher, tau = outputs.teacher_logits, weights.temperature
    parts = {
        "student_ce": F.cross_entropy(outputs.student_logits, labels),
        "student_kd": kd_loss(teacher, outputs.student_logits, tau),
    }
    hybrids = outputs.hybrid_logits
    for tap, logits in hybrids.items():
        parts[f"hybrid_ce/{tap}"] = F.cross_entropy(logits, labels)
        parts[f"hybrid_kd/{tap}"] = kd_loss(teacher, logits, tau)
    total = weights.student_ce * parts["student_ce"] + weights.student_kd * parts["student_kd"]
    if hybrids:
        ce = torch.stack([parts[f"hybrid_ce/{tap}"] for tap in hybrids]).mean()
        kd = torch.stack([parts[f"hybrid_kd/{tap}"] for tap in hybrids]).mean()
        total = total + weights.hybrid_ce * ce + weights.hybrid_kd * kd
    return {"total": total, **parts}
