"""The Markdown of a comparison, from its records. A megabyte is 10^6 bytes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.plan import EAGER_TO_RETURN, LARGE, SMALL

Record = dict[str, Any]
_WHO = {None: "SpikeSwap", "authors": "authors' code", "spikingjelly": "SpikingJelly 2"}
_METHOD = """A step is zero_grad, forward, cross-entropy, backward and SGD with momentum 0.9, on random images and
labels, each row in a process of its own. Times are medians over the steps, with quartiles. *Saved* are the distinct
storages that the graph keeps for the backward pass, without parameters; *peak* is the process's largest resident
memory (`ru_maxrss`; on a GPU `torch.cuda.max_memory_allocated`), interpreter, libraries and compiler included; *outside
products* is the share of a profiled step outside PyTorch's convolutions and matrix products; *CPU* is the processor
time of the timed steps over their wall time and threads: below 100 % something else had the processor. Ours runs in
channels_last, with fused passes compiled unless a row's command says `--no-compile`; peers run in both memory formats
and their faster one stands in the headline and memory tables. *CUDA graphs*: as training on one GPU runs; what a graph
keeps and what its kernels belong to cannot be seen from outside. On a GPU ours in the headline table are such.
*Checkpointed*: each block runs a second time in the backward pass; what it keeps, autograd does not save. On a CPU
large tensors are asked to be in pages of 2 MB and, but for the rows of memory, freed ones are kept for the next step
(`distill.allocator`, unless the environment says otherwise), as `scripts/` do, the peers', too. A megabyte is 10^6
bytes."""


def markdown(records: Sequence[Record], command: str) -> str:
    """The whole file.

    Args:
        records: one for each row: key, group, command, measured, commit, platform and either result or error.
        command: what made the file.
    """
    done = [record for record in records if "result" in record]
    sections = [
        "# One training step, side by side",
        _rows(("", ""), _header(done, command)),
        _METHOD,
        *_section("Time and memory", _speed(_group(done, "speed"))),
        *_section("Ours and the authors' rate-based in alternation", _headline(_group(done, "headline"))),
        *_section("Peak memory for each image", _memory(_group(done, "memory"))),
        *_section("Growth with T, rate_m", _growth(_group(done, "growth"))),
        *_section("Rows that failed", "\n".join(f"- `{r['key']}`: {r['error']}" for r in records if "error" in r)),
        *_section("Commands", "```\n" + "\n".join(record["command"] for record in records) + "\n```"),
    ]
    return "\n\n".join(sections) + "\n"


def ratio(value: float, base: float | None) -> str:
    """`value` as a multiple of `base`, or a dash where there is none."""
    return f"{value / base:.2f}" if base else "-"


def number(value: float | None, digits: int, factor: float = 1.0) -> str:
    """A dash for what cannot be measured."""
    return "-" if value is None else f"{factor * value:.{digits}f}"


def slope_mb(small: Record, large: Record) -> float:
    """Peak memory that one more image costs, in MB, between two results of different batch."""
    return (large["peak_memory_mb"] - small["peak_memory_mb"]) / (large["batch"] - small["batch"])


def _header(done: Sequence[Record], command: str) -> list[tuple[str, ...]]:
    def each(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    def versions(result: Record) -> str:
        names = (item for item in result["versions"].items() if item[0] not in ("cpu", "amx_bf16", "avx512_bf16"))
        return f"{_WHO[result['peer']]}: " + ", ".join(f"{name} {value}" for name, value in names)

    def machine(result: Record) -> str:
        v = result["versions"]
        native = [name for name in ("amx_bf16", "avx512_bf16") if v[name]]
        gpu = "" if result["device"] == "cpu" else f", {result['device']}"
        return f"{v['cpu']}, {' and '.join(native) or 'no native bfloat16'}{gpu}, {result['threads']} thread(s)"

    results = [record["result"] for record in done]
    times = sorted(record["measured"] for record in done)
    return [
        ("command", f"`{command}`"),
        ("machine", each(machine(result) for result in results)),
        ("system", each(record["platform"] for record in done)),
        ("versions", each(versions(result) for result in results)),
        ("code", each(record["commit"] for record in done)),
        ("date", f"{times[0]} to {times[-1]}" if times else "nothing measured"),
        ("steps", each(f"{r['warmup']} + {r['steps']} timed" for r in results)),
    ]


def _speed(records: Sequence[Record]) -> str:
    results = [record["result"] for record in records]
    base = max((r["images_per_second"] for r in results if _is_authors_rate(r)), default=None)
    head = (
        *("who", "rule", "precision", "format", "T", "batch", "images/s", "x authors' rate", "step (ms)"),
        *("forward (ms)", "backward (ms)", "saved (MB)", "peak (MB)", "outside products (%)", "CPU (%)"),
    )
    body = []
    for r in results:
        spread = r["step_ms_spread"]
        d = 0 if r["device"] == "cpu" else 1
        body.append(
            (
                *(_who(r), r["algorithm"], r["precision"], r["memory_format"]),
                *(str(r["timesteps"]), str(r["batch"]), f"{r['images_per_second']:.1f}"),
                ratio(r["images_per_second"], base),
                f"{r['step_ms']:.{d}f} [{spread['quartile_1']:.{d}f}, {spread['quartile_3']:.{d}f}]",
                *(f"{r['forward_ms']:.{d}f}", f"{r['backward_ms']:.{d}f}"),
                *(number(r["saved_activation_mb"], 1), number(r["peak_memory_mb"], 0)),
                *(number(r["non_convolution_share"], 0, 100), f"{100 * r['cpu_share']:.0f}"),
            )
        )
    return _rows(head, body) if body else ""


def _headline(records: Sequence[Record]) -> str:
    """images/s of each repeat, the share of ours outside products, and the median of the ratios within the repeats."""
    turns: dict[str | None, dict[str, dict[int, Record]]] = {None: {}, "authors": {}}  # by who, precision and repeat
    for record in records:
        result = record["result"]
        turns[result["peer"]].setdefault(result["precision"], {})[record["repeat"]] = result
    body = []
    for ours, authors in itertools.product(turns[None].values(), turns["authors"].values()):
        pairs = [(ours[i], authors[i]) for i in sorted(ours) if i in authors]
        if not pairs:
            continue
        ratios = [own["images_per_second"] / peer["images_per_second"] for own, peer in pairs]
        own, peer = pairs[0]
        body.append(
            (
                own["precision"],
                ", ".join(f"{own['images_per_second']:.1f}" for own, _ in pairs),
                ", ".join(number(own["non_convolution_share"], 0, 100) for own, _ in pairs),
                f"{peer['precision']}, {peer['memory_format']}",
                ", ".join(f"{peer['images_per_second']:.1f}" for _, peer in pairs),
                ", ".join(f"{value:.2f}" for value in ratios),
                f"**{statistics.median(ratios):.2f}**",
            )
        )
    head = ("ours", "images/s", "outside products (%)", "authors'", "images/s", "ratio of each pair", "median")
    return _rows(head, body) if body else ""


def _memory(records: Sequence[Record]) -> str:
    pairs: dict[tuple, dict[int, Record]] = {}
    for record in records:
        r = record["result"]
        key = (_who(r), r["algorithm"], r["timesteps"], r["precision"], r["memory_format"])
        pairs.setdefault(key, {})[r["batch"]] = r
    whole = {key: pair for key, pair in pairs.items() if {SMALL, LARGE} <= set(pair)}
    slopes = {key: slope_mb(pair[SMALL], pair[LARGE]) for key, pair in whole.items()}
    base = min((slopes[key] for key, pair in whole.items() if _is_authors_rate(pair[LARGE])), default=None)
    body = [
        (
            *(str(part) for part in key),
            *(f"{pair[batch]['peak_memory_mb']:.0f}" for batch in (SMALL, LARGE)),
            f"{slopes[key]:.2f}",
            ratio(slopes[key], base),
            number(pair[LARGE]["saved_activation_mb"], 2, 1 / LARGE),
        )
        for key, pair in whole.items()
    ]
    if not body:
        return ""
    head = (
        *("who", "rule", "T", "precision", "format", f"peak at {SMALL} (MB)", f"at {LARGE} (MB)"),
        *("peak (MB/image)", "x authors' rate", "saved (MB/image)"),
    )
    settings = " ".join(f"{name}={value}" for name, value in EAGER_TO_RETURN.items())
    note = f"Slope of the peak between batches of {SMALL} and {LARGE}; all rows ran with `{settings}`."
    return f"{note}\n\n{_rows(head, body)}"


def _growth(records: Sequence[Record]) -> str:
    """Each figure, and in brackets its multiple of that at the smallest T."""
    results = sorted((record["result"] for record in records), key=lambda r: r["timesteps"])
    names = ("forward_ms", "backward_ms", "saved_activation_mb", "peak_memory_mb")
    body = [
        (
            str(r["timesteps"]),
            r["precision"],
            *(f"{r[name]:.1f} ({ratio(r[name], results[0][name])})" for name in names),
        )
        for r in results
    ]
    head = ("T", "precision", "forward (ms)", "backward (ms)", "saved (MB)", "peak (MB)")
    return _rows(head, body) if body else ""


def _who(result: Record) -> str:
    ways = {"cuda_graphs": ", CUDA graphs", "grad_checkpointing": ", checkpointed"}
    return _WHO[result["peer"]] + "".join(what for way, what in ways.items() if result.get(way))


def _is_authors_rate(result: Record) -> bool:
    return result["peer"] == "authors" and result["algorithm"] == "rate_m"


def _group(records: Sequence[Record], group: str) -> list[Record]:
    return [record for record in records if record["group"] == group]


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}\n\n{text}"] if text else []


def _rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
