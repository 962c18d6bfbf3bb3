"""What every format is given (`Job`) and what it gives back (`Check`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.export.config import ExportConfig
from distill.hybrid_network import Hybrid
from models import SpikingNetwork


@dataclass(frozen=True)
class Job:
    """One network to write.

    Attributes:
        network: in evaluation mode on the CPU, at the T of the export; formats leave it as it is.
        samples: images (N, C, H, W) of the check, normalised as the network expects, or frames (T, N, C, H, W) where
            the written network takes frames.
        folder: an empty folder to write to. It takes its final place when the check has passed and is removed
            otherwise: nothing that is written may name it.
        config: the whole command line.
    """

    network: SpikingNetwork | Hybrid
    samples: Tensor
    folder: Path
    config: ExportConfig

    @property
    def takes_frames(self) -> bool:
        return self.samples.ndim == 5


@dataclass(frozen=True)
class Check:
    """Whether what was written gives the network's logits.

    Attributes:
        passed: if not, all that was written is removed and `line` is the error.
        line: what was compared, with the figures and their bounds; printed.
        figures: the same in JSON types; written to check.json.
    """

    passed: bool
    line: str
    figures: dict[str, Any]
