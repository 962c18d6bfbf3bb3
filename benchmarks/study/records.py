"""Figures of finished runs, one compact line of JSON each: run folders stay where they were made, these lines add up.

A file holds one scale and one precision: figures of different ones share no table.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study.ablations import ALL_ROWS
from benchmarks.study.running import is_done, read_record

Record = dict[str, Any]
"""row, seed, scale, precision: which run it was.
ended, commit, cpu, gpu, threads, versions: when, of what code, and on what.
settings: those of `SETTINGS`.
timesteps, top1, top1_by_timesteps, hybrid_top1, teacher_top1: in percent; None or empty where a row has none.
agreement: with the teacher's classes, in percent; runs of before it was kept lack it.
firing_rate, firing_rates: mean over the layers, and each, in [0, 1].
compute_uj, memory_uj, teacher_compute_uj, teacher_memory_uj: per image.
train_seconds, images_per_second, wall_seconds, peak_mb, processes: of training; of all the processes that it took.
curve: [epoch, top-1, seconds of training so far] of each epoch at whose end the row's own network was evaluated.
"""

SETTINGS = (
    *("train.epochs", "train.batch_size", "train.lr", "train.warmup_steps"),
    *("data.max_train_samples", "data.max_eval_samples"),
)
"""What all rows of a table share: without it figures cannot be compared."""


def file_of(results: Path, scale: str, precision: str) -> Path:
    return results / f"{scale}_{precision}.jsonl"


def collect(runs: Path, scale: str, results: Path) -> None:
    """Adds the finished runs of a scale to the files; of two of the same row, seed and machine the newer counts."""
    folders = [f for f in sorted((runs / scale).glob("*/seed*")) if re.fullmatch(r"seed\d+", f.name) and is_done(f)]
    for folder in folders:
        if folder.parent.name not in ALL_ROWS:
            print(f"{folder} is left out: no row has this name", file=sys.stderr)
    found = [record_of(folder) for folder in folders if folder.parent.name in ALL_ROWS]
    for precision in sorted({record["precision"] for record in found}):
        file = file_of(results, scale, precision)
        new = [record for record in found if record["precision"] == precision]
        lines = [json.dumps(record) + "\n" for record in newest([*read(file), *new])]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines))


def read(file: Path) -> list[Record]:
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line]


def newest(records: Iterable[Record]) -> list[Record]:
    """Of each row, seed and machine the record that ended last, in the order of the rows."""
    kept: dict[tuple, Record] = {}
    for record in sorted(records, key=lambda r: r["ended"]):
        kept[record["row"], record["seed"], record.get("gpu") or "", record["cpu"]] = record
    order = list(ALL_ROWS)
    known = {name: order.index(name) if name in order else len(order) for name, *_ in kept}
    return [kept[key] for key in sorted(kept, key=lambda key: (known[key[0]], *key))]


def record_of(folder: Path) -> Record:
    """The figures of a finished run."""
    run: Any = read_record(folder)
    summary = json.loads((folder / "summary.json").read_text())
    metrics = folder / "metrics.jsonl"  # a conversion has no epochs
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    ended = datetime.datetime.fromtimestamp((folder / "summary.json").stat().st_mtime, datetime.UTC)
    spiking = "student_top1" in summary
    seconds, images = (sum(line[name] for line in lines) for name in ("train_seconds", "images"))
    record = {
        **{name: run[name] for name in ("row", "seed", "scale", "precision")},
        "ended": ended.isoformat(timespec="seconds"),
        **_cost(run),
        **{name: run[name] for name in ("cpu", "threads")},
        "gpu": run.get("gpu"),  # runs of before GPUs were looked for lack it
        "settings": _settings(folder),
        "versions": summary["versions"],
        "timesteps": summary.get("timesteps"),
        "top1": summary["student_top1"] if spiking else summary["teacher_top1"],
        "top1_by_timesteps": summary.get("student_top1_by_timesteps", {}),
        "hybrid_top1": summary.get("hybrid_top1", {}),
        "teacher_top1": summary.get("teacher_top1") if spiking else None,
        "agreement": summary.get("student_agreement"),
        "firing_rate": summary.get("mean_firing_rate"),
        "firing_rates": summary.get("firing_rates", {}),
        **_energies(summary),
        "train_seconds": seconds if lines else None,
        "images_per_second": images / seconds if lines else None,
        "curve": _curve(lines, "student_top1" if spiking else "teacher_top1"),
    }
    return _rounded(record)


def _settings(folder: Path) -> dict[str, Any]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    pairs = {name: name.split(".") for name in SETTINGS}
    return {name: config[section][field] for name, (section, field) in pairs.items()}


def _cost(run: dict[str, Any]) -> Record:
    """Commit, wall time and peak memory of all processes."""
    if "processes" not in run:  # as the study's first runs wrote it, at their end alone, in kibibytes / 1000
        return {
            "commit": run["commit"],
            "wall_seconds": None if run["resumed"] else run["last_process_seconds"],
            "peak_mb": run["peak_rss_mb"] * 1.024,
            "processes": 1,
        }
    processes = run["processes"]
    whole = not processes[0]["resumed"]  # else there were others before, of which nothing is known
    return {
        "commit": ", ".join(dict.fromkeys(process["commit"] for process in processes)),
        "wall_seconds": run["wall_seconds"] if whole else None,
        "peak_mb": run["peak_rss_mb"],
        "processes": len(processes),
    }


def _energies(summary: dict[str, Any]) -> Record:
    """Per image, of the network at its own T, and of the teacher."""
    rows = {(row["network"], row["timesteps"]): row for row in summary.get("frontier", [])}
    found = {"": rows.get(("student", summary.get("timesteps"))), "teacher_": rows.get(("teacher", None))}
    return {
        f"{who}{kind}_uj": None if row is None else row[f"{kind}_uj"]
        for who, row in found.items()
        for kind in ("compute", "memory")
    }


def _curve(lines: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    points, seconds = [], 0.0
    for epoch, line in enumerate(lines, start=1):
        seconds += line["train_seconds"]
        if name in line:
            points.append([epoch, line[name], seconds])
    return points


def _rounded(value: Any) -> Any:
    """Six digits of each number are more than any of them means."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
