"""What scripts/export.py is told (`ExportConfig`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from distill.checks import check
from distill.data import DataConfig

FormatName = Literal["snn", "spikingjelly", "torch_export", "onnx", "nir"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a network that a run has left in a form that others read, and checks it against the network."""

    model: str
    """Folder of the network: runs/NAME/student, or any that models.save_snn wrote."""
    out: str
    """Folder for what is written; it must be new or empty, but for overwrite."""
    format: FormatName = "snn"
    """snn: a folder that models.load_snn reads, with a model card; spikingjelly: a Python file and weights that need
    only torch and SpikingJelly; torch_export: an ExportedProgram; onnx: an ONNX file; nir: a NIR graph."""
    overwrite: bool = False
    """Replace what an earlier export has left in out; refused where anything else lies there."""
    timesteps: int | None = None
    """T of what is written; None: the network's own."""
    input: Literal["images", "frames"] | None = None
    """What the written network takes: images (B, C, H, W), the same at each step, or frames (T, B, C, H, W), one for
    each; None: frames with event data or an encoder, whose spikes they are (snn keeps the encoder), else images."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images of the check; their size and normalisation are the network's."""
    check_images: Literal["data", "random"] = "data"
    """Images of the check: data, or random for normalised noise, where the data is not at hand."""
    samples: int = 500
    """Images of the check of equal predictions, at least 100; fewer where the data has fewer."""
    threads: int | None = None
    """CPU threads; None: all cores."""

    def __post_init__(self) -> None:
        check(self.format in get_args(FormatName), "format", self.format, f"one of {get_args(FormatName)}")
        check(self.timesteps is None or self.timesteps >= 1, "timesteps", self.timesteps, "at least 1, or none")
        check(self.input in (None, "images", "frames"), "input", self.input, "images, frames or none")
        check(self.check_images in ("data", "random"), "check_images", self.check_images, "data or random")
        check(self.samples >= 100, "samples", self.samples, "at least 100")
        check(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1, or none")
