"""In what numbers sums over many images are kept, and products computed where logits are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Products of float32 numbers are those of float32 while it is open.

    NVIDIA's GPUs round the factors of convolutions to ten bits (TF32) unless told otherwise, and take other kernels for
    other numbers of rows: logits of the same images then differ by more than float32's rounding.
    """
    # only one of the two ways to set it: after the other PyTorch refuses to say what it is
    conv: Any = getattr(torch.backends.cudnn, "conv", None)
    matmul: Any = torch.backends.cuda.matmul
    if conv is None:  # before torch 2.9
        settings: list[tuple[Any, str, Any]] = [
            (torch.backends.cudnn, "allow_tf32", False),
            (matmul, "allow_tf32", False),
        ]
    else:
        settings = [(conv, "fp32_precision", "ieee"), (matmul, "fp32_precision", "ieee")]
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


def widest_float(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple's GPUs (MPS), which have no float64: whole numbers are exact there up to 2^24."""
    return torch.float32 if device.type == "mps" else torch.float64
