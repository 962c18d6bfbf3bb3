"""The job of scripts/export.py: load, write, check, and leave nothing where the check fails."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from distill.export import FORMATS
from distill.export.agreement import dtype_of
from distill.export.config import ExportConfig
from distill.export.job import Check, Job
from distill.export.samples import samples_for
from distill.hybrid_network import Hybrid
from distill.report import versions
from distill.saved_evaluation import load_network
from models import SpikingNetwork
from models.card import CARD
from models.io import CONFIG, WEIGHTS, replace_text

log = logging.getLogger(__name__)

CHECK, NETWORK = "check.json", "network.json"
OURS = {
    *(CHECK, NETWORK, WEIGHTS, CONFIG, CARD),
    *("network.py", "network.safetensors", "network.pt2", "network.onnx", "network.nir", "__pycache__"),
}
"""What an export of any format leaves, and Python where network.py is imported: all that overwrite may remove."""

_INSIDE = "name a folder inside of it, or another"


class CheckError(ValueError):
    """What was written does not give the network's logits; it was removed."""


def run(config: ExportConfig) -> dict[str, Any]:
    """
    Returns:
        what check.json holds.

    Raises:
        FileNotFoundError: if the folder holds no network.
        ValueError: for a folder that is taken, a network that the format cannot hold, or a package that is missing.
        OSError: if the folder cannot be replaced after all.
        UnsupportedOperationError: names the operation and the module that has no plain form.
        CheckError: with the figures, if the check fails.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("distill").setLevel(logging.INFO)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    out = Path(config.out).resolve()  # of a link the folder that it points to
    _check_folder(out, config)
    network = load_network(config.model)
    if config.timesteps is not None:
        network.timesteps = config.timesteps
    if dtype_of(network) not in (torch.float32, *(() if config.format == "onnx" else (torch.float64,))):
        network.float()  # onnxruntime convolves no float64
    samples = samples_for(config, network)
    folder, earlier = (out.with_name(f".{out.name}.{kind}{os.getpid()}") for kind in ("", "earlier."))
    folder.mkdir(parents=True)
    try:
        check = FORMATS[config.format](Job(network, samples, folder, config))
        if not check.passed:
            raise CheckError(f"the check of format {config.format} failed, nothing is left of it: {check.line}")
        result = _write_records(folder, config, network, samples.ndim == 5, check)
        _check_folder(out, config)  # of others, who may have written meanwhile
        _replace(out, folder, earlier)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        if earlier.exists() and not out.exists():
            earlier.rename(out)
        shutil.rmtree(folder, ignore_errors=True)
    log.info("check passed: %s", check.line)
    log.info("format %s, T = %s, is in %s", config.format, network.timesteps, config.out)
    return result


def _check_folder(out: Path, config: ExportConfig) -> None:
    if Path(config.model).resolve().is_relative_to(out):
        raise ValueError(f"out must be another folder than the model's, found {out}, where {config.model} lies")
    if out.is_mount():
        raise ValueError(f"out must be a folder that can be replaced, found the mount point {out}: {_INSIDE}")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not config.overwrite:
        raise ValueError(f"out must be a new or empty folder, found {out}: use --overwrite true to replace an export")
    if not (out / CHECK).is_file():
        raise ValueError(f"overwrite replaces what an earlier export has left, found none in {out}: {CHECK} is missing")
    if others := sorted({path.name for path in out.iterdir()} - OURS):
        raise ValueError(
            f"overwrite replaces what an earlier export has left, and {out} holds {len(others)} other things, too: "
            f"{others[:3]}. Move them, or name another folder"
        )


def _replace(out: Path, folder: Path, earlier: Path) -> None:
    """Moves `folder` to the place of `out`, and what lies there to `earlier`."""
    try:
        if out.exists():
            out.rename(earlier)
        folder.rename(out)
    except OSError as error:  # a mount point that is_mount does not see, rights of the folder above
        raise OSError(f"{out} cannot be replaced: {error}; {_INSIDE}") from error


def _write_records(
    folder: Path, config: ExportConfig, network: SpikingNetwork | Hybrid, frames: bool, check: Check
) -> dict[str, Any]:
    """check.json, and network.json where the format has no place of its own for how images are made."""
    result = {
        "format": config.format,
        "model": config.model,
        "timesteps": network.timesteps,
        "passed": check.passed,
        "check": check.line,
        **check.figures,
        "versions": versions(),
    }
    replace_text(folder / CHECK, json.dumps(result, indent=2) + "\n")
    if config.format != "snn":
        encoder = network.input_encoder if isinstance(network, SpikingNetwork) else None
        drawn = None if encoder is None else {"kind": "poisson", **dataclasses.asdict(encoder)}
        about = {"timesteps": network.timesteps, "input": "frames" if frames else "images", "encoder": drawn}
        replace_text(folder / NETWORK, json.dumps(about | network.spec.get("extra", {}), indent=2) + "\n")
    return result
