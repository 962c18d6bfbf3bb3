"""The bound on the feedback's weight, which keeps the loop contracting: a projection before each training pass.

The weight counts as a matrix, its first axis by all others, as in both papers: IDE bounds its spectral norm by 1,
SPIDE its Frobenius norm, which spikes can estimate, by 2. They divide by the norm inside of the graph; projected, the
weight itself obeys, whoever reads it, and the gradient is that of the network that ran.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.layout import at_least_float32

_ROUNDING = 1e-6
"""A weight that was projected is within the bound to this share, and is left alone."""


@torch.no_grad()
def keep_below(weight: Tensor, which: str, bound: float) -> None:
    """Scales a weight (C, ...), in place, so that its norm is at most the bound.

    Args:
        which: "spectral" or "frobenius".
    """
    size = matrix_norm(weight, which)
    if size > bound * (1 + _ROUNDING):
        weight.mul_(bound / size)


@torch.no_grad()
def matrix_norm(weight: Tensor, which: str) -> Tensor:
    """The norm of a weight as a matrix (C, the rest), exactly: every process must find the same."""
    matrix = at_least_float32(weight).flatten(1)
    if which == "frobenius":
        return torch.linalg.vector_norm(matrix)
    # autocast would have the product in its own type, of which CUDA knows no eigenvalues
    with torch.autocast(weight.device.type, enabled=False):
        small = matrix @ matrix.t() if len(matrix) <= matrix.shape[1] else matrix.t() @ matrix
        return torch.linalg.eigvalsh(small)[-1].clamp_min(0).sqrt()
