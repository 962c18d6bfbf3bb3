"""Which rows a comparison has, in four groups.

speed: every rule of ours and every peer in every memory format, side by side. headline: our rate_m and the authors'
rate-based in alternation, since the speed of a shared machine drifts. memory: two batches each, for the slope of peak
memory. growth: our rate_m over T.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import machine

GROUPS = ("speed", "headline", "memory", "growth")
PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
ALGORITHMS = ("rate_m", "rate_s", "bptt", "ottt", "sltt", "dsr")
"""Ours, equal to `models.ALGORITHMS` but for those of feedback networks, which train no other; it cannot be imported
here without PyTorch."""
GRAPHED = ("rate_m", "bptt")
"""Those that `distill.cuda_graphs` serves, which cannot be imported here either."""
CHECKPOINTED = ("rate_m", "bptt")
"""Those of ours that are measured with blocks that run a second time in the backward pass; dsr could, too."""
PEERS = (("authors", "rate_m"), ("authors", "bptt"), ("spikingjelly", "bptt"))
FORMATS = ("contiguous", "channels_last")
SMALL, LARGE = 16, 64
"""Batches of the slope of peak memory."""
GROWTH = (2, 4, 8, 16)
"""T of the growth table."""
EAGER_TO_RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes glibc give freed memory back at once, so that a peak is what is in use; slower, hence only for memory rows."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement of a comparison."""

    group: str
    algorithm: str
    precision: str
    timesteps: int
    batch: int
    peer: str | None = None
    memory_format: str = "channels_last"
    repeat: int = 0
    cuda_graphs: bool = False
    grad_checkpointing: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the child gets on top of the parent's."""
        return EAGER_TO_RETURN if self.group == "memory" else {}

    def arguments(self, options: argparse.Namespace) -> list[str]:
        """Of training_step.py, without the peers' paths."""
        few = self.group == "memory"
        values: dict[str, Any] = {
            "network": options.network,
            "peer": self.peer,
            "algorithm": self.algorithm,
            "timesteps": self.timesteps,
            "batch": self.batch,
            "precision": self.precision,
            "memory-format": self.memory_format,
            "width": options.width,
            "image-size": options.image_size,
            "warmup": min(options.warmup, 1) if few else options.warmup,
            "steps": 2 if few else options.steps,
            "threads": options.threads,
            "device": options.device,
            "seed": options.seed,
        }
        words = [f"--{name}={value}" for name, value in values.items() if value is not None]
        words += ["--cuda-graphs"] * self.cuda_graphs + ["--grad-checkpointing"] * self.grad_checkpointing
        return words if options.compiled else [*words, "--no-compile"]


def rows(group: str, options: argparse.Namespace, records: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows of a group; a peer's memory format in the later groups is the faster one among the records of "speed".

    Args:
        group: "speed", "headline", "memory" or "growth".
        options: the command line of training_step.py, its `precisions`, `algorithms` and `formats` lists.
        records: what was measured so far.
    """
    shape = {"timesteps": options.timesteps, "batch": options.batch}
    ours, theirs = options.precisions, peer_precisions(options)
    on_gpu = options.device == "cuda"  # where training replays graphs
    if group == "speed":
        own = [Row(group=group, algorithm=a, precision=p, **shape) for p in ours for a in options.algorithms]
        if on_gpu:
            own += [replace(row, cuda_graphs=True) for row in own if row.algorithm in GRAPHED]
        return own + [
            Row(group=group, peer=peer, algorithm=a, precision=p, memory_format=f, **shape)
            for peer, a in PEERS
            if a in options.algorithms
            for p in theirs
            for f in options.formats
        ]
    if group == "headline":
        turn = [Row(group=group, algorithm="rate_m", precision=p, cuda_graphs=on_gpu, **shape) for p in ours]
        for p in theirs:  # as their code runs, and as it could
            _, fmt = fastest(records, "authors", "rate_m", [p])
            turn.append(Row(group=group, peer="authors", algorithm="rate_m", precision=p, memory_format=fmt, **shape))
        return [replace(row, repeat=i) for i in range(options.repeats) for row in turn]
    if group == "memory":
        rule_and_steps = [("rate_m", 4), ("rate_s", 4), ("rate_s", 16), ("bptt", 4)]
        pairs = [
            Row(group=group, algorithm=a, precision=p, timesteps=t, batch=0) for p in ours for a, t in rule_and_steps
        ]
        pairs += [replace(row, grad_checkpointing=True) for row in pairs if row.algorithm in CHECKPOINTED]
        for peer, algorithm in PEERS:
            for p in theirs:
                _, fmt = fastest(records, peer, algorithm, [p])
                kind: dict[str, Any] = {"peer": peer, "algorithm": algorithm, "precision": p, "memory_format": fmt}
                pairs.append(Row(group=group, timesteps=4, batch=0, **kind))
        return [replace(row, batch=batch) for row in pairs for batch in (SMALL, LARGE)]
    assert group == "growth", group
    first, batch = ours[0], options.batch
    return [Row(group=group, algorithm="rate_m", precision=first, timesteps=t, batch=batch) for t in GROWTH]


def default_precisions(device: str) -> list[str]:
    return ["fp32", "bf16"] if device == "cuda" or machine.has_native_bfloat16() else ["fp32"]


def peer_precisions(options: argparse.Namespace) -> list[str]:
    """float32, and bfloat16 where ours is measured in it and the machine has it."""
    return [p for p in default_precisions(options.device) if p == "fp32" or p in options.precisions]


def fastest(records: Iterable[dict[str, Any]], peer: str, algorithm: str, precisions: Sequence[str]) -> tuple[str, str]:
    """Precision and memory format of a peer's fastest row in "speed"; contiguous, as it comes, where there is none."""
    results = [r["result"] for r in records if r["group"] == "speed" and "result" in r]
    found = [r for r in results if (r["peer"], r["algorithm"]) == (peer, algorithm) and r["precision"] in precisions]
    if not found:
        return precisions[0], "contiguous"
    best = max(found, key=lambda r: r["images_per_second"])
    return best["precision"], best["memory_format"]
