"""Runs and networks of seconds: what the tests of `distill` share."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import Tensor

from distill import DataConfig, DistillConfig, RunConfig, StudentConfig, TeacherConfig, TrainConfig, distillation
from distill import session as sessions
from distill.schedule_config import ScheduleConfig

TEACHER = dict(
    kwargs={"channels": [8, 8, 8, 8]}, cifar_stem=True, input_size=[1, 8, 8], mean=[0.3], std=[0.4], min_top1=0.0
)  # a ResNet-18 of 15,066 parameters; with 4 channels PyTorch 2.15 crashes in 1x1 convolutions of stride 2 on a CPU
IMAGES, BATCH, EPOCHS = 64, 16, 2


def forget_accelerate() -> None:
    """Accelerate keeps one state for the whole process; a run of its own wants a fresh one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


def tiny(folder: Path, **parts: dict[str, Any]) -> DistillConfig:
    """64 digits of 8x8 pixels, two epochs of four steps each; `parts` are changes by section."""
    train = dict(epochs=EPOCHS, batch_size=BATCH, lr=0.05)
    defaults: dict[str, tuple[type, dict[str, Any]]] = {
        "run": (RunConfig, dict(dir=str(folder), trackers=[], compile=False, threads=1)),
        "data": (DataConfig, dict(max_train_samples=IMAGES, max_eval_samples=30, crop_padding=1)),
        "teacher": (TeacherConfig, TEACHER),
        "teacher_train": (TrainConfig, train),
        "student": (StudentConfig, dict(timesteps=2)),
        "train": (TrainConfig, train),
        "schedule": (ScheduleConfig, {}),
    }
    made = {name: cls(**{**values, **parts.pop(name, {})}) for name, (cls, values) in defaults.items()}
    return DistillConfig(**made, **{"eval_timesteps": [1, 2], **parts})


def resolved(config: Any) -> str:
    """As a run keeps it: its precision is said even where the launcher chose it."""
    values = dataclasses.asdict(config)
    values["run"]["mixed_precision"] = values["run"]["mixed_precision"] or "no"
    return yaml.safe_dump(values, sort_keys=False)


def start(config: Any, resume: bool = False) -> sessions.Session:
    forget_accelerate()
    return sessions.start(config.run, resume, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def distil(config: DistillConfig, resume: bool = False) -> dict[str, Any]:
    """One run in this process; returns its summary."""
    return distillation.run(config, start(config, resume), resume)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock said."""
    clock = ("images_per_second", "train_seconds", "seconds")
    return [{k: v for k, v in line.items() if k not in clock} for line in metrics_of(folder)]


def weights_of(folder: Path, network: str = "student") -> dict[str, Tensor]:
    return load_file(folder / network / "model.safetensors")


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """As if the run that wrote it had been another one."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}))


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    assert left.keys() == right.keys() and left
    return all(torch.equal(left[name], right[name]) for name in left)
