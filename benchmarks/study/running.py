"""Runs the rows of the study, one at a time, each in a run folder of its own that is resumed where it was cut off.

Imports nothing of PyTorch: on Linux the peak memory of a child starts at that of the process that forks it.
"""

from __future__ import annotations

import datetime
import fcntl
import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks import machine
from benchmarks.study.ablations import ALL_ROWS
from benchmarks.study.rows import SCALES, Row, network_of

REPOSITORY = Path(__file__).resolve().parents[2]
COMMON = "benchmarks/study/common.yaml"
RECORD = "study.json"
"""What a run folder says of the processes that it took, beside what every run writes."""
POLL = 1.0
"""Seconds between two looks at a run."""
NOTE = 30.0
"""Seconds between two notes of what it took so far, for the case that nobody is left to write the last one."""
TAIL = 6
"""Lines of the log that are shown when a run fails."""


class RowFailed(Exception):
    """A run ended with an error; says which, where its log is and how that ends."""


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

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            if not (self.data / split).is_dir() and not (self.data / f"{split}.tar").is_file():
                raise ValueError(f"--data {self.data} must hold {split}.tar, or a folder {split}")
        if not self.teacher.is_file():
            raise ValueError(f"--teacher {self.teacher} is no file")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1, found {self.threads}")

    def folder(self, row: str, seed: int) -> Path:
        return self.runs / self.scale / row / f"seed{seed}"

    def is_done(self, row: str, seed: int) -> bool:
        """
        Raises:
            ValueError: for a run of another precision, or of a row that was another then, which this one would be taken
                for.
        """
        folder = self.folder(row, seed)
        record = read_record(folder)
        if record is not None and record["precision"] != self.precision:
            raise ValueError(
                f"{folder} holds a run of precision {record['precision']}, found --precision {self.precision}: give "
                "--runs another folder"
            )
        if record is not None and (found := self._other_settings(row, record["command"])):
            raise ValueError(
                f"{folder} holds a run of other settings than the row now has: {', '.join(found)}; give --runs another "
                "folder"
            )
        return is_done(folder)

    def _other_settings(self, row: str, words: list[str]) -> list[str]:
        """What differs between a run's command line and the row, for people."""
        wanted = {**SCALES[self.scale].arguments, **ALL_ROWS[row].said(self.scale)}
        had = {name.removeprefix("--"): value for name, value in itertools.pairwise(words) if name.startswith("--")}
        ours = {name for name in had if name.partition(".")[0] not in ("run", "data", "teacher", "ann", "config")}
        return [
            f"{name} {had.get(name, 'not given')}, now {wanted.get(name, 'not given')}"
            for name in sorted(ours | wanted.keys())
            if had.get(name) != wanted.get(name)
        ]


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a run folder says of its processes; None where it says nothing yet."""
    path = folder / RECORD
    return json.loads(path.read_text()) if path.is_file() else None


def is_done(folder: Path) -> bool:
    record = read_record(folder)
    # files of the study's first runs were written at the end alone, and have no such entry
    return record is not None and record.get("finished", True) and (folder / "summary.json").is_file()


def command(place: Place, row: Row, seed: int, folder: Path) -> list[str]:
    """The command line of a row, without the interpreter."""
    network = {f"{row.network}.{name}": value for name, value in network_of(SCALES[place.scale].width).items()}
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
        **row.said(place.scale),
    }
    words = [
        *(["-m", "benchmarks.study.conversion"] if row.script == "convert" else [f"scripts/{row.script}.py"]),
        "--config",
        COMMON,
        *(word for name, value in values.items() for word in (f"--{name}", value)),
    ]
    return [*words, "--resume"] if folder.is_dir() else words


def run_row(place: Place, name: str, seed: int) -> None:
    """Runs, or resumes, one row. Whatever ends this process (but SIGKILL) makes the run save a checkpoint and end, too.

    Raises:
        RowFailed: if the run fails, or another process runs it.
    """
    folder = place.folder(name, seed)
    log = folder.parent / f"seed{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        try:  # the run inherits the lock: it lasts as long as one of the two lives
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RowFailed(f"row {name}, seed {seed}: another process runs it in {folder}") from None
        status = _Process(place, name, seed, command(place, ALL_ROWS[name], seed, folder), file).wait()
    if status != 0:
        end = "\n".join(f"    {line}" for line in _last_lines(log))
        raise RowFailed(f"row {name}, seed {seed}, ended with status {status}; {log} ends with\n{end}")


class _Process:
    """A process of a run, whose cost is noted in the run's folder while it lasts."""

    def __init__(self, place: Place, name: str, seed: int, words: list[str], log: TextIO) -> None:
        self.folder = place.folder(name, seed)
        earlier = read_record(self.folder) or {}
        self.record: dict[str, Any] = {
            "row": name,
            "seed": seed,
            "scale": place.scale,
            "precision": place.precision,
            "threads": place.threads or len(os.sched_getaffinity(0)),
            "cpu": machine.cpu()["cpu"],
            "gpu": machine.gpu(),
            "command": words,
            "processes": earlier.get("processes", []),
        }
        print("$ python", *words, file=log, flush=True)
        self.began = time.perf_counter()
        self.own = {
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "commit": machine.commit(REPOSITORY),
            "resumed": "--resume" in words,
            "seconds": 0.0,
            "peak_rss_mb": 0.0,
            "status": None,
        }
        self.record["processes"].append(self.own)
        # in a session of its own: Ctrl-C reaches this process alone, which asks the run to save and end
        self.child = subprocess.Popen(
            [sys.executable, *words], cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self) -> int:
        """The exit status of the run."""
        try:
            return self._watch()
        except BaseException:
            self.child.terminate()
            self._watch()
            raise

    def _watch(self) -> int:
        noted = time.perf_counter()
        while True:
            pid, status, usage = os.wait4(self.child.pid, os.WNOHANG)
            if pid:
                unit = 1 if sys.platform == "darwin" else 1024  # bytes of one ru_maxrss
                self.child.returncode = os.waitstatus_to_exitcode(status)
                self._note(usage.ru_maxrss * unit / 1e6, self.child.returncode)
                return self.child.returncode
            time.sleep(POLL)
            if time.perf_counter() - noted > NOTE:
                self._note(_peak_mb(self.child.pid), None)
                noted = time.perf_counter()

    def _note(self, peak_mb: float, status: int | None) -> None:
        if not self.folder.is_dir():  # a mistyped command leaves nothing behind
            return
        self.own |= {"seconds": time.perf_counter() - self.began, "peak_rss_mb": peak_mb, "status": status}
        processes = self.record["processes"]
        self.record |= {
            "wall_seconds": sum(process["seconds"] for process in processes),
            "peak_rss_mb": max(process["peak_rss_mb"] for process in processes),
            "finished": status == 0,
        }
        path = self.folder / f"{RECORD}.new"
        path.write_text(json.dumps(self.record, indent=1) + "\n")
        path.replace(self.folder / RECORD)


def _peak_mb(pid: int) -> float:
    """The most memory that a process had resident so far, in MB; 0 where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def _last_lines(log: Path) -> list[str]:
    """A log's last lines, cut at their ends; of a progress bar's states the last."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        text = file.read().decode(errors="replace")
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line[:300] for line in lines if line][-TAIL:]
