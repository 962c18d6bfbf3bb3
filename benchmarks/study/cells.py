"""What the study's tables have in common: how rows, figures, machines and settings are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.study.comparing import accuracies, mean, spread
from benchmarks.study.records import Record
from benchmarks.study.rows import ROWS, SCALES

NONE = "-"
PRECISIONS = {"no": "float32", "bf16": "bfloat16"}


def machine_of(record: Record) -> str:
    if gpu := record.get("gpu"):
        return f"{gpu}, {record['cpu']}"
    threads = record["threads"]
    return f"{record['cpu']}, {threads} thread{'s' * (threads > 1)}"


def machines_of(records: Sequence[Record]) -> dict[str, str]:
    """A letter for each machine, in the order of first use."""
    names = dict.fromkeys(machine_of(record) for record in records)
    return {name: chr(ord("A") + number) for number, name in enumerate(names)}


def rows_text(head: Sequence[str], body: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table whose first columns, so many, are words and the others numbers."""
    marks = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, marks, *body))


def about(records: Sequence[Record], settings: Mapping[str, Any], others: Sequence[Record], command: str) -> str:
    """What all rows of a table share, and what was left out of it.

    Args:
        settings: see `comparing.alike`, as the other records.
        command: what makes the file.
    """
    train, test = (settings[f"data.max_{split}_samples"] for split in ("train", "eval"))
    teachers = mean([r["teacher_top1"] for r in records if r["teacher_top1"] is not None])
    width = SCALES[records[0]["scale"]].width
    teacher = "" if teachers is None else f", whose top-1 on the same images is {teachers.text()} %"
    said = (
        f"Made by `{command}`. Every row: {settings['train.epochs']} epochs of {_count(train)} images in batches of "
        f"{settings['train.batch_size']}, learning rate {settings['train.lr']} after {settings['train.warmup_steps']} "
        f"steps of warm-up, evaluated on {_count(test)} test images; the same augmentation and seeds "
        f"(`benchmarks/study/common.yaml`, `rows.py`). {_own_rates(records, settings['train.lr'])}"
        f"Teacher: timm's ResNet-18 of width {width}{teacher}. "
        "Student: its spiking twin, T = 4, where the row does not say otherwise. Rows that were not run are absent. "
        "Settings were chosen on test images that the short study evaluates on."
    )
    if others:
        names = dict.fromkeys(f"`{record['row']}`" for record in others)
        said += f"\n\nLeft out, because they were run with other settings: {', '.join(names)}."
    return said


def _own_rates(records: Sequence[Record], common: float) -> str:
    """A sentence for each learning rate that rows of the main table have besides that of all."""
    found: dict[float, dict[str, None]] = {}
    for record in records:
        if record["row"] in ROWS and (rate := record["settings"]["train.lr"]) != common:
            found.setdefault(rate, {})[f"`{record['row']}`"] = None
    return "".join(f"Of {', '.join(names)} the learning rate is {rate}. " for rate, names in found.items())


def _count(images: int | None) -> str:
    return "all" if images is None else f"{images:,}"


def mean_text(
    records: Sequence[Record], value: Callable[[Record], float | None], digits: int, factor: float = 1.0
) -> str:
    """Mean, smallest and largest of a figure, times a factor; `NONE` where it is not known of all."""
    found = [value(record) for record in records]
    if (over := mean([None if v is None else factor * v for v in found])) is None:
        return NONE
    return over.text(digits)


def commits(records: Sequence[Record]) -> str:
    """Each commit once, in the order of the runs."""
    return ", ".join(dict.fromkeys(commit for r in records for commit in r["commit"].split(", ")))


def hybrids(records: Sequence[Record]) -> str:
    """Means of the hybrids' top-1, in the order of the taps."""
    taps = records[0]["hybrid_top1"]
    found = [mean([r["hybrid_top1"].get(tap) for r in records]) for tap in taps]
    return " / ".join(NONE if value is None else f"{value.value:.2f}" for value in found) or NONE


def reference_energy(records: Sequence[Record], kind: str) -> float | None:
    """The teacher's energy, the same for all rows: its network's shapes say what it is."""
    known = [r[f"teacher_{kind}_uj"] for r in records if r[f"teacher_{kind}_uj"] is not None]
    return known[-1] if known else None


def machines_text(records: Sequence[Record], machines: Mapping[str, str]) -> str:
    """A line for each machine, with its versions, and what cannot be compared."""
    lines = []
    for name, letter in machines.items():
        of_it = [r["versions"].items() for r in records if machine_of(r) == name]
        versions = dict.fromkeys(", ".join(f"{package} {version}" for package, version in each) for each in of_it)
        lines.append(f"Machine {letter}: {name}; {'; '.join(versions)}.")
    if len(machines) > 1:
        lines.append("Times, images/s and peaks of different machines cannot be compared.")
    lines.append(
        "Rows did not run in turns, and other work may have shared the machine: for times side by side see "
        "`benchmarks/study/timing.py`."
    )
    return "\n".join(lines)


def spread_text(records: Sequence[Record]) -> str:
    """The spread of the seeds, and whose it is."""
    found = accuracies(records)
    least = spread(found)
    if least is None:
        return "unknown, since no row has several seeds"
    name = max((n for n in found if found[n].range is not None), key=lambda n: found[n].range or 0.0)
    return f"{least:.2f} points, the largest range of a row's seeds (`{name}`)"


def made_of(records: Sequence[Record]) -> str:
    """When the runs ended."""
    times = sorted(record["ended"] for record in records)
    return f"Runs ended between {times[0]} and {times[-1]}."
