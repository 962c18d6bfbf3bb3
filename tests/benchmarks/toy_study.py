"""A study of a test: where it is, and run folders as finished runs leave them."""

import json

from benchmarks.study import running
from benchmarks.study.ablations import ALL_ROWS
from benchmarks.study.conversion import ConversionConfig
from benchmarks.study.running import Place, command
from distill import cli
from distill.config import DistillConfig, SnnTrainingConfig, TeacherTrainingConfig

CONFIGS = {
    "train_snn": SnnTrainingConfig,
    "distill": DistillConfig,
    "train_teacher": TeacherTrainingConfig,
    "convert": ConversionConfig,
}


def place_in(tmp_path):
    return Place(
        runs=tmp_path / "runs",
        data=tmp_path / "data",
        teacher=tmp_path / "teacher.safetensors",
        scale="short",
        precision="no",
        threads=1,
    )


def config_of(name, place, seed=0):
    words = command(place, ALL_ROWS[name], seed, place.folder(name, seed))
    words = words[words.index("--config") :]
    words[1] = str(running.REPOSITORY / words[1])
    return cli.parse(CONFIGS[ALL_ROWS[name].script], words).config


def arguments(place, *more):
    return [
        *("run", *more, "--data", str(place.data), "--teacher", str(place.teacher), "--runs", str(place.runs)),
        *("--scale", "short", "--precision", "no", "--threads", "1"),
    ]


def leave(runs, row, seed=0, top1=50.0, cpu="a processor", old=False, lr=None, **summary):
    """A run folder as a finished run leaves it; without `lr` with the row's own, else 0.001."""
    said = ALL_ROWS[row].said("short") if row in ALL_ROWS else {}
    lr = lr or float(said.get("train.lr", 0.001))
    folder = runs / "short" / row / f"seed{seed}"
    folder.mkdir(parents=True)
    values = {
        "student_top1": top1,
        "timesteps": 4,
        "student_top1_by_timesteps": {"1": top1 - 30, "4": top1},
        "mean_firing_rate": 0.125,
        "firing_rates": {"act1": 0.244, "layer1.0.act1": 0.006},
        "frontier": [
            {"network": "student", "timesteps": 1, "compute_uj": 7.0, "memory_uj": 70.0},
            {"network": "student", "timesteps": 4, "compute_uj": 20.0, "memory_uj": 300.0},
        ],
        "versions": {"python": "3.11", "torch": "2.9"},
    }
    (folder / "summary.json").write_text(json.dumps(values | summary))
    train = {"epochs": 2, "batch_size": 32, "lr": lr, "warmup_steps": 5}
    config = {"train": train, "data": {"max_train_samples": 1200, "max_eval_samples": None}}
    (folder / "config.yaml").write_text(json.dumps(config))
    lines = [
        {"stage": "student", "train_seconds": 60.0, "images": 1200, "student_top1": top1 - 10},
        {"stage": "student", "train_seconds": 90.0, "images": 1200, "student_top1": top1},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"row": row, "seed": seed, "scale": "short", "precision": "no", "threads": 1, "cpu": cpu}
    if old:
        record |= {"last_process_seconds": 240.0, "resumed": False, "peak_rss_mb": 1000.0, "commit": "old1234"}
    else:
        processes = [
            {"commit": "abc1234", "resumed": False, "seconds": 100.0, "peak_rss_mb": 900.0, "status": 75},
            {"commit": "def5678", "resumed": True, "seconds": 200.0, "peak_rss_mb": 800.0, "status": 0},
        ]
        record |= {"processes": processes, "wall_seconds": 300.0, "peak_rss_mb": 900.0, "finished": True}
    (folder / "study.json").write_text(json.dumps(record))
    return folder


TAUGHT = {
    "teacher_top1": 87.5,
    "hybrid_top1": {"layer1": 81.0, "layer2": 72.0},
    "frontier": [
        {"network": "teacher", "timesteps": None, "compute_uj": 80.0, "memory_uj": 200.0},
        {"network": "hybrid/layer1", "timesteps": 4, "compute_uj": 60.0, "memory_uj": 210.0},
        {"network": "student", "timesteps": 4, "compute_uj": 10.0, "memory_uj": 400.0},
    ],
}


def line_with(text, *parts):
    (line,) = [line for line in text.splitlines() if line.startswith("|") and all(part in line for part in parts)]
    return [cell.strip() for cell in line.strip("|").split("|")]
