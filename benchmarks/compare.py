"""Runs the rows of a comparison, each in a process of its own, and writes what came out as it goes.

Imports neither PyTorch nor `models`: on Linux the peak memory of a child starts at that of the process that forks it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, plan, table

_ERROR_LINE = re.compile(r"(training_step\.py: error: |([\w.]*(Error|Exception|Interrupt)\b))")


def compare(options: argparse.Namespace, root: Path) -> str:
    """Measures what is missing in the .jsonl file and writes it and the table.

    Args:
        options: the command line of training_step.py.
        root: of this repository.

    Returns:
        where the table is and how many rows failed, for people.

    Raises:
        ValueError: for an unknown group, precision, algorithm or format, naming the known ones.
    """
    groups = _listed("--only", options.only, plan.GROUPS)
    default = plan.default_precisions(options.device)
    options.precisions = _listed("--precisions", options.precisions, plan.PRECISIONS, default)
    options.algorithms = _listed("--algorithms", options.algorithms, plan.ALGORITHMS)
    options.formats = _listed("--formats", options.formats, plan.FORMATS)
    if options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, found {options.repeats}")
    today = datetime.date.today().isoformat()
    out = options.out or root / "benchmarks" / "results" / f"{today}_training_step.md"
    raw = out.with_suffix(".jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    records = read(raw)
    if options.fresh:  # the other groups keep their rows
        records = {key: record for key, record in records.items() if record["group"] not in groups}
    for group in groups:
        todo = plan.rows(group, options, list(records.values()))
        for number, row in enumerate(todo, start=1):
            key = _key(row, options)
            if "result" in records.get(key, {}):
                continue
            print(f"{group} {number}/{len(todo)}: {key}", file=sys.stderr, flush=True)
            records[key] = _measure(row, key, options, root)
            raw.write_text("".join(json.dumps(record) + "\n" for record in records.values()))
            out.write_text(table.markdown(list(records.values()), _own_command(options)))
    out.write_text(table.markdown(list(records.values()), _own_command(options)))
    failed = sum("error" in record for record in records.values())
    return f"{out}: {len(records)} rows, {failed} failed"


def read(raw: Path) -> dict[str, dict[str, Any]]:
    """The records of a .jsonl file by key; of two with the same key the later."""
    lines = raw.read_text().splitlines() if raw.exists() else []
    records = [json.loads(line) for line in lines if line.strip()]
    return {record["key"]: record for record in records}


def _key(row: plan.Row, options: argparse.Namespace) -> str:
    return " ".join([row.group, *([f"#{row.repeat + 1}"] if row.group == "headline" else []), *row.arguments(options)])


def _measure(row: plan.Row, key: str, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    arguments = row.arguments(options)
    paths = {"AUTHORS": options.authors_path, "SJ14": options.sj14_path} if row.peer == "authors" else {}
    named = {"AUTHORS": "--authors-path", "SJ14": "--sj14-path"}
    given = {name: path for name, path in paths.items() if path is not None}
    script = str(root / "benchmarks" / "training_step.py")
    command = [sys.executable, script, *arguments, *(f"{named[name]}={path}" for name, path in given.items())]
    shown = ["python", "benchmarks/training_step.py", *arguments, *(f"{named[name]}={name}" for name in given)]
    record: dict[str, Any] = {
        "key": key,
        "group": row.group,
        "repeat": row.repeat,
        "command": " ".join([*(f"{k}={v}" for k, v in row.environment.items()), shlex.join(shown)]),
        "measured": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": machine.commit(root),
        "platform": platform.platform(terse=True),
    }
    environment = {**os.environ, **row.environment}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=options.timeout
        )
    except subprocess.TimeoutExpired:
        return record | {"error": f"took longer than {options.timeout:g} s"}
    if done.returncode != 0:
        error = f"killed by signal {-done.returncode}" if done.returncode < 0 else _last_error(done.stderr)
        for name, path in given.items():
            error = error.replace(str(path), name)
        return record | {"error": error}
    return record | {"result": json.loads(done.stdout)}


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    return (errors or lines or ["no message"])[-1].removeprefix("training_step.py: error: ")


def _listed(option: str, text: str | None, allowed: tuple[str, ...], default: Sequence[str] | None = None) -> list[str]:
    """Those that an option names; without it the default, or all."""
    return _chosen(option, text, allowed) if text else list(allowed if default is None else default)


def _chosen(option: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    """Words of a list with commas, in its order."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in allowed:
            raise ValueError(f"{option} takes {', '.join(allowed)} with commas between, found {word!r}")
    if not words:
        raise ValueError(f"{option} takes {', '.join(allowed)} with commas between, found {text!r}")
    return words


def _own_command(options: argparse.Namespace) -> str:
    """What was typed, without the paths of this machine."""
    words = []
    names = iter(sys.argv[1:])
    for word in names:
        option, equals, _ = word.partition("=")
        if option in ("--authors-path", "--sj14-path", "--out"):
            words += [option, {"--authors-path": "AUTHORS", "--sj14-path": "SJ14", "--out": "FILE"}[option]]
            if not equals:
                next(names, None)
        else:
            words.append(word)
    return shlex.join(["python", "benchmarks/training_step.py", *words])
