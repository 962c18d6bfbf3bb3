"""Where adapters start: at the linear regression of the teacher's features on the student's rates.

    W, b = argmin E |W r + b - a|^2 + ridge |W|^2        r: rate (c,), a: feature (C,), over images and places

The convolution takes W, one of 3x3 at its centre; the batch norm takes the statistics of W r and gives back its spread
and the mean of a, so that in evaluation mode the adapter is W r + b, then the teacher's activation. An adapter without
a convolution has each channel regressed on its own one: W is diagonal, and the batch norm takes it, too. Shapes: B
images, c and C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.adapters import Adapter
from distill.data.event_frames import summed
from distill.hybrid import HybridDistiller
from distill.precision import widest_float
from distill.tails import look
from models.network import probing

RIDGE = 1e-3
"""Added to the rates' covariance, as a share of its mean diagonal: silent channels make it singular."""


class _Moments:
    """Sums over images and places of r, a, r r^T, r a^T and a^2, in `widest_float`."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, rate: Tensor, feature: Tensor) -> None:
        r, a = (x.to(widest_float(x.device)).movedim(1, -1).flatten(0, -2) for x in (rate, feature))
        new = [r.sum(0), a.sum(0), r.T @ r, r.T @ a, a.square().sum(0)]
        self.sums = [old + more for old, more in zip(self.sums, new, strict=True)] if self.sums else new
        self.count += len(r)

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Means (c,) and (C,), covariances (c, c) and (c, C), variances (C,), none of them below 0 by a rounding."""
        r, a, rr, ra, aa = (total / self.count for total in self.sums)
        covariance = rr - torch.outer(r, r)
        covariance.diagonal().clamp_min_(0)
        return r, a, covariance, ra - torch.outer(r, a), (aa - a.square()).clamp_min(0)


@torch.no_grad()
def start_adapters(distiller: HybridDistiller, names: Sequence[str], batches: Iterable[Tensor]) -> dict[str, float]:
    """Sets the adapters of some taps, in place, for the student as it is.

    Args:
        names: of the taps.
        batches: images, each (B, C, H, W), or event frames.

    Returns:
        for each tap the share of the feature's variance that its adapter explains, at most 1.

    Raises:
        ValueError: for no images.
    """
    pairs = [
        (tap, adapter) for tap, adapter in zip(distiller.taps, distiller.adapters, strict=True) if tap.name in names
    ]
    taps = [tap for tap, _ in pairs]
    moments = {tap.name: _Moments() for tap in taps}
    with probing(distiller.student, distiller.student.timesteps):
        for images in batches:
            _, features = look(distiller.teacher, taps, summed(images), maps=True)
            rates = distiller.rates(images, [tap.name for tap in taps])
            for name, moment in moments.items():
                feature = features[name].map
                assert feature is not None, "maps were asked for"
                rate = rates[name]
                if rate.shape[2:] != feature.shape[2:]:
                    rate = F.interpolate(rate, feature.shape[2:], mode="bilinear", align_corners=False)
                moment.add(rate, feature)
    if any(moment.count == 0 for moment in moments.values()):
        raise ValueError("adapters take at least one image to start from, found none in the batches")
    return {tap.name: _write(adapter, moments[tap.name]) for tap, adapter in pairs}  # type: ignore[arg-type]


def _write(adapter: Adapter, moments: _Moments) -> float:
    """Sets an adapter to the regression; returns the share of the variance that it explains."""
    r, a, rr, ra, aa = moments.centred()
    ridge = RIDGE * rr.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    if adapter.form == "norm":
        weight = torch.diag(ra.diagonal() / (rr.diagonal() + ridge))
    else:
        weight = torch.linalg.solve(rr + ridge * torch.eye(len(rr), dtype=rr.dtype, device=rr.device), ra).T  # (C, c)
    variance = torch.einsum("oi,ij,oj->o", weight, rr, weight).clamp_min(0)
    norm = adapter.bn
    assert norm.running_mean is not None and norm.running_var is not None
    norm.bias.copy_(a)
    if isinstance(adapter.conv, nn.Conv2d):
        centre = adapter.conv.kernel_size[0] // 2
        adapter.conv.weight.zero_()[:, :, centre, centre] = weight
        norm.running_mean.copy_(weight @ r)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
    else:
        norm.running_mean.copy_(r)
        norm.running_var.copy_(rr.diagonal())
        norm.weight.copy_(weight.diagonal() * (rr.diagonal() + norm.eps).sqrt())
    residual = aa - 2 * torch.einsum("oi,io->o", weight, ra) + variance
    return (1 - residual.sum() / aa.sum().clamp_min(torch.finfo(torch.float32).tiny)).item()
