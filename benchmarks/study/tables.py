"""The table of the study's rows, and what it says, as Markdown, from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from benchmarks.study.comparing import accuracies, alike, by_row, equals, spread, targets
from benchmarks.study.records import Record
from benchmarks.study.rows import AS_THEY_ARE, ROWS
from distill.report import SATURATED, SILENT

COLUMNS = """Top-1 and the other figures are means over the seeds; in brackets the smallest and the largest. *Hybrids*:
top-1 of the hybrid up to each tap, in the order of the taps, when its training ended. *Firing*: share of the neurons
that fire in a step, mean over the layers. *Compute* and *memory*: estimated energy of an image's arithmetic and memory
traffic, in percent of the teacher's. *Agreement*: share of the images that are given the class that the teacher gives
them. *Training*: of the steps alone; *wall*: of all processes of the run, evaluations, compilation and what a cut-off
run repeated included. *Peak*: largest resident memory of the process, 10^6 bytes, without that of a GPU."""


def study(
    records: Sequence[Record], ratios: Mapping[str, float], plots: Sequence[tuple[str, str]], command: str
) -> str:
    """The whole file.

    Args:
        records: of one scale and precision; ablations among them are left to their own file, but for a target's.
        ratios: see `comparing.targets`.
        plots: what each shows, and its file.
        command: what makes this file.
    """
    shown, settings, others = alike([record for record in records if record["row"] in ROWS])
    judged, *_ = alike([record for record in records if record["row"] in (*ROWS, AS_THEY_ARE)])
    machines = machines_of(shown)
    parts = [
        f"# The study, {shown[0]['scale']}: CIFAR-10 (JPEG q75), {PRECISIONS[shown[0]['precision']]}",
        about(shown, settings, others, command),
        _main_table(shown, machines),
        COLUMNS,
        machines_text(shown, machines),
        "## Which rows are equal",
        _equal(shown),
        "## Targets",
        _targets(judged, ratios),
    ]
    if lines := _odd_layers(shown):
        parts += ["## Layers that are almost silent, or fire almost always", lines]
    if len(steps := _steps(shown)) > 1:
        parts += ["## At other numbers of time steps", _by_timesteps(shown, steps)]
    if plots:
        parts += ["## Curves", *(f"![{what}]({file})" for what, file in plots)]
    return "\n\n".join([*parts, made_of(shown)]) + "\n"


def _of_machines(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The seeds of each row on each machine."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record["row"], machine_of(record)), []).append(record)
    return found


def _main_table(records: Sequence[Record], machines: Mapping[str, str]) -> str:
    head = [
        *("row", "name", "machine", "seeds", "top-1 (%)", "hybrids (%)", "T", "firing (%)", "compute (%)"),
        *("memory (%)", "agreement (%)", "training (min)", "wall (min)", "images/s", "peak (MB)", "commit"),
    ]
    reference = {kind: reference_energy(records, kind) for kind in ("compute", "memory")}
    body = []
    for (name, machine), each in _of_machines(records).items():
        body.append(
            [
                ROWS[name].title,
                f"`{name}`",
                machines[machine],
                str(len(each)),
                mean_text(each, lambda r: r["top1"], 2),
                hybrids(each),
                NONE if each[0]["timesteps"] is None else str(each[0]["timesteps"]),
                mean_text(each, lambda r: r["firing_rate"], 1, 100),
                *(_energy(name, each, kind, reference[kind]) for kind in reference),
                mean_text(each, lambda r: r.get("agreement"), 2),
                mean_text(each, lambda r: r["train_seconds"], 1, 1 / 60),
                mean_text(each, lambda r: r["wall_seconds"], 1, 1 / 60) + ("*" if _cut_off(each) else ""),
                mean_text(each, lambda r: r["images_per_second"], 1),
                mean_text(each, lambda r: r["peak_mb"], 0),
                commits(each),
            ]
        )
    text = rows_text(head, body, words=3)
    return text + ("\n\n\\* cut off and gone on with" if any(map(_cut_off, _of_machines(records).values())) else "")


def _cut_off(records: Sequence[Record]) -> bool:
    return any(record["processes"] > 1 for record in records)


def _energy(name: str, records: Sequence[Record], kind: str, reference: float | None) -> str:
    if reference is None:
        return NONE
    if ROWS[name].script == "train_teacher":
        return "100.0"  # the teacher's own network
    return mean_text(records, lambda r: r[f"{kind}_uj"], 1, 100 / reference)


def _equal(records: Sequence[Record]) -> str:
    found = accuracies(records)
    said = f"Spread of the seeds: {spread_text(records)}."
    if spread(found) is None:
        return said
    pairs = equals(found)
    lines = [f"- `{name}` and {', '.join(f'`{o}`' for o in others)}" for name, others in pairs.items()]
    return "\n".join(
        [f"{said} Differences below it count as none, so that these are equal:", "", *(lines or ["- no two rows"])]
    )


def _targets(records: Sequence[Record], ratios: Mapping[str, float]) -> str:
    words = {True: "yes", False: "**no**", None: NONE}
    body = [
        [target.what, target.found, words[target.met] + ", within chance" * target.by_chance]
        for target in targets(records, ratios)
    ]
    note = (
        "*Within chance*: nearer to the target than the spread of the seeds or, where no row has several, than the "
        "standard error of a difference on as many test images."
    )
    return f"{note}\n\n" + rows_text(["target", "found", "met"], body, words=3)


def _odd_layers(records: Sequence[Record]) -> str:
    """A line for each run that has such layers: they hardly pass information on."""
    lines = []
    for record in records:
        rates = record["firing_rates"].items()
        if odd := [f"{layer} {100 * rate:.2f} %" for layer, rate in rates if not SILENT <= rate <= SATURATED]:
            lines.append(f"- `{record['row']}`, seed {record['seed']}: {', '.join(odd)}")
    return "\n".join(lines)


def _steps(records: Sequence[Record]) -> list[str]:
    return sorted({steps for record in records for steps in record["top1_by_timesteps"]}, key=int)


def _by_timesteps(records: Sequence[Record], steps: Sequence[str]) -> str:
    body = []
    for name, each in by_row(records).items():
        if each[0]["top1_by_timesteps"]:
            cells = [mean_text(each, lambda r, t=t: r["top1_by_timesteps"].get(t), 2) for t in steps]
            own = str(each[0]["timesteps"])
            cells = [f"**{c}**" if t == own else c for t, c in zip(steps, cells, strict=True)]
            body.append([ROWS[name].title, *cells])
    note = (
        "Top-1 in percent; the network's own T is bold. Batch norms were not recalibrated at the others; a converted "
        "twin was converted anew for each."
    )
    return f"{note}\n\n" + rows_text(["row", *(f"T = {t}" for t in steps)], body)
