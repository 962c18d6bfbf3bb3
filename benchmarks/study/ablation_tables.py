"""A table for each setting that was changed alone, as Markdown, from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.ablations import ABLATIONS, Ablation
from benchmarks.study.cells import (
    NONE,
    PRECISIONS,
    about,
    commits,
    hybrids,
    machine_of,
    machines_of,
    machines_text,
    made_of,
    mean_text,
    reference_energy,
    rows_text,
    spread_text,
)
from benchmarks.study.comparing import alike, by_row, mean
from benchmarks.study.records import Record


def ablations(records: Sequence[Record], command: str) -> str:
    """A table for each setting of which a row was run."""
    there = by_row(records).keys()
    begun = {group: ablation for group, ablation in ABLATIONS.items() if there & ablation.rows(group).keys()}
    used = {name for group, ablation in begun.items() for name in (ablation.base, *ablation.rows(group))}
    shown, settings, others = alike([record for record in records if record["row"] in used])
    found = by_row(shown)
    machines = machines_of(shown)
    parts = [
        f"# Ablations, {records[0]['scale']}: CIFAR-10 (JPEG q75), {PRECISIONS[records[0]['precision']]}",
        about(shown, settings, others, command),
        "Each row differs from the default, the first of its table, in that setting alone, where nothing else is said. "
        f"A difference smaller than the spread of the seeds is none: {spread_text(alike(records)[0])}.",
    ]
    for group, ablation in begun.items():
        if found.keys() & ablation.rows(group).keys():
            note = [ablation.note] if ablation.note else []
            parts += [f"## {ablation.title}", *note, _ablation(group, ablation, found, machines)]
    return "\n\n".join([*parts, machines_text(shown, machines), made_of(shown)]) + "\n"


def _ablation(group: str, ablation: Ablation, found: Mapping[str, list[Record]], machines: Mapping[str, str]) -> str:
    labels = {ablation.base: f"{ablation.default} (default)", **ablation.rows(group)}
    reference = reference_energy([r for each in found.values() for r in each], "compute")
    body = []
    for name, label in labels.items():
        for machine in dict.fromkeys(machine_of(r) for r in found.get(name, [])):
            each = [r for r in found[name] if machine_of(r) == machine]
            own: Any = mean([r["top1"] for r in each])
            body.append(
                [
                    label,
                    f"`{name}`",
                    machines[machine],
                    str(len(each)),
                    own.text(),
                    _against(found.get(ablation.base, []), each),
                    hybrids(each),
                    mean_text(each, lambda r: r["firing_rate"], 1, 100),
                    NONE if reference is None else mean_text(each, lambda r: r["compute_uj"], 1, 100 / reference),
                    mean_text(each, lambda r: r.get("agreement"), 2),
                    mean_text(each, lambda r: r["train_seconds"], 1, 1 / 60),
                    commits(each),
                ]
            )
    head = [
        *("setting", "name", "machine", "seeds", "top-1 (%)", "against the default", "hybrids (%)", "firing (%)"),
        *("compute (%)", "agreement (%)", "training (min)", "commit"),
    ]
    return rows_text(head, body, words=3)


def _against(base: Sequence[Record], records: Sequence[Record]) -> str:
    """By how many points a row is above the base, over the seeds that both have."""
    seeds = {r["seed"] for r in base} & {r["seed"] for r in records}
    ours, theirs = (mean([r["top1"] for r in each if r["seed"] in seeds]) for each in (records, base))
    return NONE if ours is None or theirs is None else f"{ours.value - theirs.value:+.2f}"
