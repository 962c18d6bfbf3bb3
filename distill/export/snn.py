"""The format `snn`: the folder that `models.load_snn` (of a hybrid `distill.load_hybrid`) and the hub read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from distill.export.job import Check, Job
from distill.hybrid_network import Hybrid, check_hybrid, load_hybrid, save_hybrid
from distill.random_numbers import repeatable
from distill.report import hybrid_card
from models import load_snn
from models.card import CARD
from models.hub import kept_card

IMAGES = 64
"""Of the samples that the check runs on."""


def export(job: Job) -> Check:
    """Writes weights, configuration and model card, loads them again and compares logits bit for bit."""
    if isinstance(job.network, Hybrid):
        _save_hybrid(job.network, job)
        loaded: Any = load_hybrid(job.folder)
    else:
        job.network.save_pretrained(job.folder)
        loaded = load_snn(job.folder)
    axis = 1 if job.takes_frames else 0
    samples = job.samples.narrow(axis, 0, min(IMAGES, job.samples.shape[axis]))
    logits = []
    for network in (job.network, loaded):
        with torch.no_grad(), repeatable(samples.device):  # Poisson input is drawn alike for both
            logits.append(network(samples.to(next(network.parameters()).dtype)))
    different = int((logits[0] != logits[1]).any(1).sum())
    count = len(logits[0])
    line = f"loaded again, the logits of {count - different} of {count} images are equal bit for bit"
    return Check(passed=different == 0, line=line, figures={"images": count, "equal_bit_for_bit": count - different})


def _save_hybrid(hybrid: Hybrid, job: Job) -> None:
    extra = hybrid.spec.get("extra", {})
    if "input_size" not in extra:
        raise ValueError(f"the hybrid in {job.config.model} does not say how large its images are (extra.input_size)")
    save_hybrid(hybrid, job.folder, tuple(extra["input_size"]), extra)
    _card(hybrid, Path(job.config.model)).save(job.folder / CARD)


def _card(hybrid: Hybrid, folder: Path) -> ModelCard:
    """The one that it came with, or one of the run that has left it; it says so where its figures are of another T."""
    own = hybrid.timesteps
    if hybrid.card:
        return kept_card(hybrid.card, own, hybrid.student.spec.get("timesteps", own))
    summary, config = _of_run(folder)
    measured_with = summary.get("timesteps", own)
    text = hybrid_card(hybrid.tap.name, check_hybrid(hybrid)["teacher"]["name"], measured_with, summary, config)
    return kept_card(text, own, measured_with)


def _of_run(folder: Path) -> tuple[dict[str, Any], str]:
    """The summary and the configuration of the run that has left the hybrid in ``hybrids/TAP``; empty without it."""
    run = folder.absolute().parent.parent
    summary, config = run / "summary.json", run / "config.yaml"
    if folder.absolute().parent.name != "hybrids" or not (summary.is_file() and config.is_file()):
        return {}, ""
    return json.loads(summary.read_text()), config.read_text()
