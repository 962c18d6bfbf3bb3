"""How the logits of what was written are held against the network's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.export.extras import versions_of
from distill.export.job import Check, Job

EXACT = 1e-9
"""Largest difference of a logit in float64, in units of the largest logit where that is above 1."""
EXACT_IMAGES = 16
"""Images of that comparison."""
EQUAL_SHARE = 0.99
"""Least share of the samples with the same prediction, where runtimes round differently and spikes flip."""
MEAN_DIFFERENCE = 0.05
"""Largest mean difference of a logit then, in units of the standard deviation of the network's own logits."""
BATCH = 50

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """One comparison: its outcome, in words and in JSON types."""

    passed: bool
    line: str
    figures: dict[str, Any]


def check_of(*parts: Part, packages: Sequence[str] = ()) -> Check:
    """
    Args:
        packages: of the format alone, whose versions belong to the check.
    """
    figures: dict[str, Any] = {name: value for part in parts for name, value in part.figures.items()}
    if packages:
        figures["packages"] = versions_of(*packages)
    return Check(all(part.passed for part in parts), "; ".join(part.line for part in parts), figures)


def dtype_of(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def in_float64(network: Any) -> Any:
    return copy.deepcopy(network).double()


def exact(job: Job, double: nn.Module, theirs: Logits) -> Part:
    """In float64, where a rounding flips no spike.

    Args:
        double: the network in float64.
        theirs: what was written, in float64.
    """
    images = _part(job.samples, slice(EXACT_IMAGES)).double()
    ours, found = logits(double, images), logits(theirs, images)
    bound = EXACT * max(1.0, ours.abs().max().item())
    difference = (ours - found).abs().max().item()
    passed = found.dtype == torch.float64 and difference <= bound  # a NaN is no pass
    line = f"float64: largest difference of a logit {difference:.1e} on {len(ours)} images (at most {bound:.1e})"
    figures = {"images": len(ours), "largest_difference": difference, "bound": bound}
    return Part(passed, line, {"float64": figures})


def close(job: Job, theirs: Logits, name: str) -> Part:
    """In the network's own type, by predictions.

    Args:
        theirs: what was written, read back.
        name: of the runtime that runs it.
    """
    images = job.samples.to(dtype_of(job.network))
    ours, found = logits(job.network, images).double(), logits(theirs, images).double()
    equal = (ours.argmax(1) == found.argmax(1)).double().mean().item()
    difference, deviation = (ours - found).abs().mean().item(), ours.std().item()
    bound = MEAN_DIFFERENCE * deviation
    passed = equal >= EQUAL_SHARE and difference <= bound
    line = (
        f"{name}: {100 * equal:.1f} % equal predictions on {len(ours)} images (at least {100 * EQUAL_SHARE:.0f} %), "
        f"mean difference of a logit {difference:.1e} (at most {bound:.1e}, {MEAN_DIFFERENCE} of the logits' standard "
        "deviation)"
    )
    figures = {
        "images": len(ours),
        "equal_predictions": equal,
        "least_equal_predictions": EQUAL_SHARE,
        "mean_difference": difference,
        "bound": bound,
        "logits_std": deviation,
    }
    return Part(passed, line, {name: figures})


@torch.no_grad()
def logits(network: Logits, samples: Tensor) -> Tensor:
    """(N, classes) of samples (N, C, H, W) or (T, N, C, H, W), in batches, the last of which may be smaller."""
    count = samples.shape[samples.ndim - 4]
    return torch.cat([network(_part(samples, slice(i, i + BATCH))) for i in range(0, count, BATCH)])


def _part(samples: Tensor, images: slice) -> Tensor:
    return samples[:, images] if samples.ndim == 5 else samples[images]
