"""Folders of runs as the scripts leave them, with numbers that are made up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
TAPS = ("layer1", "layer2")
LAYERS = ("act1", "layer1.0.act1", "layer2.0.act1")
CONFIG = {
    "run": {"name": "toy", "seed": 0},
    "teacher": {"name": "resnet18"},
    "student": {"name": "twin", "timesteps": 4, "algorithm": "rate_m"},
    "data": {"name": "digits", "root": None},
    "schedule": {"name": "joint"},
    "train": {"epochs": 3, "lr": 0.1},
    "eval_timesteps": [1, 2, 4],
}


def line(stage: str, epoch: int, progress: float, taps: Sequence[str], layers: Sequence[str]) -> dict[str, Any]:
    """An epoch's line of the metrics; `progress` in [0, 1]."""
    loss = 2.5 * math.exp(-3 * progress)
    student = stage == "student"
    parts = {"student_ce": loss, "student_kd": 2 * loss} if student else {}
    for i, tap in enumerate(taps):
        parts |= {f"hybrid_ce/{tap}": loss * (1 + 0.1 * i), f"hybrid_kd/{tap}": loss * (2 + 0.1 * i)}
    top1 = {f"hybrid_top1/{tap}": 80 * progress + 10 - i for i, tap in enumerate(taps)}
    return {
        "stage": stage, "epoch": epoch, "steps": 22 * epoch, "lr": 0.1 * (1 - progress) + 0.001,
        **{f"loss/{name}": value for name, value in {"total": sum(parts.values()), **parts}.items()},
        "teacher_top1": 92.5, **top1, **({"student_top1": 75 * progress + 10} if student else {}),
        **{f"firing_rate/{layer}": 0.3 * (i + 1) / len(layers) * progress for i, layer in enumerate(layers)},
        "images": 1408, "train_seconds": 2.5, "images_per_second": 563.2, "seconds": 3.0,
    }  # fmt: skip


def joint(epochs: int = 3, taps: Sequence[str] = TAPS, layers: Sequence[str] = LAYERS) -> list[dict[str, Any]]:
    """Lines of a run whose teacher was trained on the spot, for two epochs."""
    teacher = [
        {"stage": "teacher", "epoch": e, "steps": 22 * e, "lr": 0.01, "loss/total": 2.0 / e, "teacher_top1": 40.0 * e,
         "images": 1408, "train_seconds": 2.0, "images_per_second": 704.0, "seconds": 2.1} for e in (1, 2)
    ]  # fmt: skip
    return teacher + [line("student", e, e / epochs, taps, layers) for e in range(1, epochs + 1)]


def progressive() -> list[dict[str, Any]]:
    """Lines of two stages of hybrids and one of the student; layers behind a stage's tap do not run in it."""
    return [
        line(stage, epoch, epoch / 2, taps, LAYERS[:ran])
        for stage, taps, ran in (("stage1_layer1", TAPS[:1], 2), ("stage2_layer2", TAPS[1:], 3), ("student", (), 3))
        for epoch in (1, 2)
    ]


def alone(epochs: int = 2) -> list[dict[str, Any]]:
    """Lines of a network that learned from labels alone."""
    return [
        {
            "stage": "student", "epoch": e, "steps": 22 * e, "lr": 0.1 / e, "loss/total": 2.0 / e,
            "student_top1": 40.0 * e, "firing_rate/conv0": 0.1 * e, "images": 10, "train_seconds": 1.0,
            "images_per_second": 10.0, "seconds": 1.0,
        }
        for e in range(1, epochs + 1)
    ]  # fmt: skip


def row(network: str, timesteps: int | None, top1: float, compute: float) -> dict[str, Any]:
    return {
        "network": network, "timesteps": timesteps, "top1": top1, "compute_uj": compute, "memory_uj": 3 * compute,
        "macs": 1e6 * compute, "acs": 0.0 if timesteps is None else 2e6 * timesteps, "mac_share_of_layers": 0.25,
    }  # fmt: skip


def summary(taps: Sequence[str] = TAPS, layers: Sequence[str] = LAYERS) -> dict[str, Any]:
    """Of a run of `joint`."""
    rows = [row("teacher", None, 92.5, 40.0)]
    rows += [row(f"hybrid/{tap}", t, 90.0 - i - 8 / t, 30.0 - 9 * i + t) for i, tap in enumerate(taps) for t in (1, 4)]
    rows += [row("student", t, 85.0 - 30 / t + 7.5, 2.0 * t) for t in (1, 2, 4)]
    return {
        "teacher_top1": 92.5, "hybrid_top1": {tap: 90.0 - i for i, tap in enumerate(taps)},
        "hybrid_agreement": {tap: 91.0 for tap in taps}, "student_agreement": 86.0, "schedule": "joint",
        "student_top1": 85.0, "student_top1_by_timesteps": {"1": 62.5, "2": 77.5, "4": 85.0}, "timesteps": 4,
        "algorithm": "rate_m", "parameters": 12345, "mean_firing_rate": 0.2,
        "firing_rates": {layer: 0.3 * (i + 1) / len(layers) for i, layer in enumerate(layers)},
        "train_seconds": 7.5, "images_per_second": 563.2, "versions": {"python": "3.11.7", "torch": "9.9"},
        "skipped_images": [], "seconds": 93.0, "frontier": rows,
        "energy_assumptions": ["4.6 pJ for a MAC", "0.9 pJ for an AC"], "confidence": {"ece": 0.0213},
    }  # fmt: skip


def raster(labels: Sequence[str] = ("cat", "dog"), layers: Sequence[str] = LAYERS, t: int = 4) -> dict[str, Any]:
    """Two neurons of each layer: the first fires in every step, the second in the last."""
    return {
        "timesteps": t,
        "layers": [{"name": name, "shape": [8, 4, 4], "fired": 50, "neurons": [3, 100]} for name in layers],
        "images": [
            {"index": i, "label": label, "picture": PNG, "predictions": [labels[0]] * (t - 1) + [label],
             "confidences": [0.5] * (t - 1) + [0.75], "spikes": [[list(range(1, t + 1)), [t]] for _ in layers]}
            for i, label in enumerate(labels)
        ],
    }  # fmt: skip


def write_run(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    found: Mapping[str, Any] | None = None,
    spikes: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] = CONFIG,
) -> Path:
    """A run's folder; without a summary it has not ended."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    if found is not None:
        (folder / "summary.json").write_text(json.dumps(found))
    if spikes is not None:
        (folder / "raster.json").write_text(json.dumps(spikes))
    return folder
