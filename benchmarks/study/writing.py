"""Writes what is made of a file of records beside it: tables as Markdown, plots as SVG."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.study import ablation_tables, plots, tables
from benchmarks.study.ablations import ABLATION_ROWS
from benchmarks.study.comparing import alike
from benchmarks.study.records import read
from benchmarks.study.rows import ROWS, SCALES

PLOTS = {"epochs": ("accuracy over epochs", plots.over_epochs), "time": ("accuracy against time", plots.over_time)}


def write_study(file: Path) -> list[Path]:
    """The table of the rows and its plots; nothing where no row was run.

    Args:
        file: of records (`benchmarks.study.records`).

    Returns:
        what was written.
    """
    records = read(file)
    rows = [record for record in records if record["row"] in ROWS]
    if not rows:
        return []
    written, shown = [], []
    for name, (what, draw) in PLOTS.items():
        path = file.with_name(f"{file.stem}_{name}.svg")
        if (svg := draw(alike(rows)[0])) is not None:
            path.write_text(svg)
            written.append(path)
            shown.append((what, path.name))
    table = file.with_suffix(".md")
    command = f"python -m benchmarks.study table --scale {rows[0]['scale']}"
    table.write_text(tables.study(records, _ratios(file, rows[0]["scale"]), shown, command))
    return [table, *written]


def write_ablations(file: Path) -> list[Path]:
    """The tables of the ablations; nothing where none was run."""
    records = read(file)
    if not any(record["row"] in ABLATION_ROWS for record in records):
        return []
    path = file.with_name(f"{file.stem}_ablations.md")
    command = f"python -m benchmarks.study table --ablations --scale {records[0]['scale']}"
    path.write_text(ablation_tables.ablations(records, command))
    return [path]


def _ratios(file: Path, scale: str) -> dict[str, float]:
    """What `benchmarks.study.timing` found at the same precision, of networks as wide."""
    path = file.with_name(f"timing_{file.stem.rpartition('_')[2]}.json")
    found = json.loads(path.read_text()) if path.is_file() else {}
    # before it was kept, only networks of width 32 had been timed
    return found["ratios"] if found and found.get("width", 32) == SCALES[scale].width else {}
