"""In what numbers sums over many images are kept."""

from __future__ import annotations

import torch


def widest_float(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple's GPUs (MPS), which have no float64: whole numbers are exact there up to 2^24."""
    return torch.float32 if device.type == "mps" else torch.float64
