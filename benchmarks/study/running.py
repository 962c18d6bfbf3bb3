"""Runs the rows of the study, one at a time, each in a run folder of its own that is resumed where it was cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import cpu
from benchmarks.study.rows import NETWORK, ROWS, SCALES, Row

REPOSITORY = Path(__file__).resolve().parents[2]
COMMON = "benchmarks/study/common.yaml"
RECORD = "study.json"
"""What a run folder says of the processes that it took, beside what every run writes."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the study reads and writes.

    Args:
        runs: parent of the run folders.
        data: folder with train.tar and test.tar, or train/ and test/.
        teacher: the teacher's weights.
        scale: a name of `SCALES`.
        precision: of `run.mixed_precision`.
        threads: of each run; None for all cores.
    """

    runs: Path
    data: Path
    teacher: Path
    scale: str
    precision: str
    threads: int | None

    def folder(self, row: str, seed: int) -> Path:
        return self.runs / self.scale / row / f"seed{seed}"


def is_done(folder: Path) -> bool:
    return (folder / "summary.json").is_file() and (folder / RECORD).is_file()


def command(place: Place, row: Row, seed: int, folder: Path) -> list[str]:
    """The command line of a row, without the interpreter."""
    network = {f"{row.network}.{name}": value for name, value in NETWORK.items()}
    if row.teacher:
        network[f"{row.network}.weights"] = str(place.teacher)
    values = {
        "run.dir": str(folder),
        "run.seed": str(seed),
        "run.mixed_precision": place.precision,
        **({} if place.threads is None else {"run.threads": str(place.threads)}),
        "data.root": str(place.data),
        **network,
        **SCALES[place.scale].arguments,
        **row.arguments,
        **row.at_scale.get(place.scale, {}),
    }
    words = [
        f"scripts/{row.script}.py",
        "--config",
        COMMON,
        *(word for name, value in values.items() for word in (f"--{name}", value)),
    ]
    return [*words, "--resume"] if folder.is_dir() else words


def run_row(place: Place, name: str, seed: int) -> None:
    """Runs, or resumes, one row.

    Raises:
        RuntimeError: if the run fails; names its log.
    """
    folder = place.folder(name, seed)
    log = folder.parent / f"seed{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = command(place, ROWS[name], seed, folder)
    started = time.perf_counter()
    with log.open("a") as file:
        print("$ python", *words, file=file, flush=True)
        child = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        raise RuntimeError(f"row {name}, seed {seed}, ended with status {os.waitstatus_to_exitcode(status)}: see {log}")
    record = folder / RECORD
    record.write_text(json.dumps(_record(place, name, seed, words, time.perf_counter() - started, usage), indent=1))


def _record(place: Place, name: str, seed: int, words: list[str], seconds: float, usage: Any) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return {
        "row": name,
        "seed": seed,
        "scale": place.scale,
        "precision": place.precision,
        "threads": place.threads or os.cpu_count(),
        "command": words,
        "resumed": "--resume" in words,
        "last_process_seconds": seconds,
        "peak_rss_mb": usage.ru_maxrss / 1000,  # of kibibytes: close to 10^6 bytes
        "commit": commit.stdout.strip(),
        "cpu": cpu()["cpu"],
    }
