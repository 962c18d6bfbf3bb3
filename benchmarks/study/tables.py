"""The tables of the study, as Markdown, from records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.study.ablations import ABLATIONS, Ablation
from benchmarks.study.comparing import accuracies, alike, by_row, equals, mean, spread, targets
from benchmarks.study.records import Record
from benchmarks.study.rows import AS_THEY_ARE, ROWS, SCALES
from distill.report import SATURATED, SILENT

NONE = "-"
PRECISIONS = {"no": "float32", "bf16": "bfloat16"}
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
        records: of one scale and precision; ablations among them are left to their own file.
        ratios: see `comparing.targets`.
        plots: what each shows, and its file.
        command: what makes this file.
    """
    shown, settings, others = alike([record for record in records if record["row"] in ROWS])
    judged, *_ = alike([record for record in records if record["row"] in (*ROWS, AS_THEY_ARE)])
    machines = machines_of(shown)
    parts = [
        f"# The study, {shown[0]['scale']}: CIFAR-10 (JPEG q75), {PRECISIONS[shown[0]['precision']]}",
        _about(shown, settings, others, command),
        _main_table(shown, machines),
        COLUMNS,
        _machines(shown, machines),
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
    return "\n\n".join([*parts, _made_of(shown)]) + "\n"


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
        _about(shown, settings, others, command),
        "Each row differs from the default, the first of its table, in that setting alone, where nothing else is said. "
        f"A difference smaller than the spread of the seeds is none: {_spread_text(alike(records)[0])}.",
    ]
    for group, ablation in begun.items():
        if found.keys() & ablation.rows(group).keys():
            note = [ablation.note] if ablation.note else []
            parts += [f"## {ablation.title}", *note, _ablation(group, ablation, found, machines)]
    return "\n\n".join([*parts, _machines(shown, machines), _made_of(shown)]) + "\n"


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


def _about(records: Sequence[Record], settings: Mapping[str, Any], others: Sequence[Record], command: str) -> str:
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
    reference = {kind: _reference(records, kind) for kind in ("compute", "memory")}
    body = []
    for (name, machine), each in _of_machines(records).items():
        body.append(
            [
                ROWS[name].title,
                f"`{name}`",
                machines[machine],
                str(len(each)),
                _mean(each, lambda r: r["top1"], 2),
                _hybrids(each),
                NONE if each[0]["timesteps"] is None else str(each[0]["timesteps"]),
                _mean(each, lambda r: r["firing_rate"], 1, 100),
                *(_energy(name, each, kind, reference[kind]) for kind in reference),
                _mean(each, lambda r: r.get("agreement"), 2),
                _mean(each, lambda r: r["train_seconds"], 1, 1 / 60),
                _mean(each, lambda r: r["wall_seconds"], 1, 1 / 60) + ("*" if _cut_off(each) else ""),
                _mean(each, lambda r: r["images_per_second"], 1),
                _mean(each, lambda r: r["peak_mb"], 0),
                _commits(each),
            ]
        )
    text = rows_text(head, body, words=3)
    return text + ("\n\n\\* cut off and gone on with" if any(map(_cut_off, _of_machines(records).values())) else "")


def _cut_off(records: Sequence[Record]) -> bool:
    return any(record["processes"] > 1 for record in records)


def _mean(records: Sequence[Record], value: Callable[[Record], float | None], digits: int, factor: float = 1.0) -> str:
    found = [value(record) for record in records]
    if (over := mean([None if v is None else factor * v for v in found])) is None:
        return NONE
    return over.text(digits)


def _commits(records: Sequence[Record]) -> str:
    return ", ".join(dict.fromkeys(commit for r in records for commit in r["commit"].split(", ")))


def _hybrids(records: Sequence[Record]) -> str:
    taps = records[0]["hybrid_top1"]
    found = [mean([r["hybrid_top1"].get(tap) for r in records]) for tap in taps]
    return " / ".join(NONE if value is None else f"{value.value:.2f}" for value in found) or NONE


def _reference(records: Sequence[Record], kind: str) -> float | None:
    """The teacher's energy, the same for all rows: its network's shapes say what it is."""
    known = [r[f"teacher_{kind}_uj"] for r in records if r[f"teacher_{kind}_uj"] is not None]
    return known[-1] if known else None


def _energy(name: str, records: Sequence[Record], kind: str, reference: float | None) -> str:
    if reference is None:
        return NONE
    if ROWS[name].script == "train_teacher":
        return "100.0"  # the teacher's own network
    return _mean(records, lambda r: r[f"{kind}_uj"], 1, 100 / reference)


def _machines(records: Sequence[Record], machines: Mapping[str, str]) -> str:
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


def _spread_text(records: Sequence[Record]) -> str:
    found = accuracies(records)
    least = spread(found)
    if least is None:
        return "unknown, since no row has several seeds"
    name = max((n for n in found if found[n].range is not None), key=lambda n: found[n].range or 0.0)
    return f"{least:.2f} points, the largest range of a row's seeds (`{name}`)"


def _equal(records: Sequence[Record]) -> str:
    found = accuracies(records)
    said = f"Spread of the seeds: {_spread_text(records)}."
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
            cells = [_mean(each, lambda r, t=t: r["top1_by_timesteps"].get(t), 2) for t in steps]
            own = str(each[0]["timesteps"])
            cells = [f"**{c}**" if t == own else c for t, c in zip(steps, cells, strict=True)]
            body.append([ROWS[name].title, *cells])
    note = (
        "Top-1 in percent; the network's own T is bold. Batch norms were not recalibrated at the others; a converted "
        "twin was converted anew for each."
    )
    return f"{note}\n\n" + rows_text(["row", *(f"T = {t}" for t in steps)], body)


def _ablation(group: str, ablation: Ablation, found: Mapping[str, list[Record]], machines: Mapping[str, str]) -> str:
    labels = {ablation.base: f"{ablation.default} (default)", **ablation.rows(group)}
    reference = _reference([r for each in found.values() for r in each], "compute")
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
                    _hybrids(each),
                    _mean(each, lambda r: r["firing_rate"], 1, 100),
                    NONE if reference is None else _mean(each, lambda r: r["compute_uj"], 1, 100 / reference),
                    _mean(each, lambda r: r.get("agreement"), 2),
                    _mean(each, lambda r: r["train_seconds"], 1, 1 / 60),
                    _commits(each),
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


def _made_of(records: Sequence[Record]) -> str:
    times = sorted(record["ended"] for record in records)
    return f"Runs ended between {times[0]} and {times[-1]}."
