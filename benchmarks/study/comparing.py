"""What the figures say: means and spreads over seeds, which rows are equal, which targets are met."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from benchmarks.study.ablations import ALL_ROWS
from benchmarks.study.records import Record
from benchmarks.study.rows import AS_THEY_ARE, BEST, HYBRIDS

NOT_MEASURED = "not measured"
HYBRIDS_OVER_LABELS = 2.0
"""Points that the best hybrids must be above the same network trained on labels alone, at least."""
HYBRIDS_OVER_KD = 0.5
"""And above logit distillation."""
BELOW_TEACHER = 1.5
"""Points that they may be below the teacher."""
BELOW_BPTT = 1.0
"""Points that rate_m may be below BPTT, both from scratch."""
TEST_IMAGES = 10_000
"""Of CIFAR-10."""
OF_BPTT_TIME, OF_BPTT_MEMORY = 0.55, 0.2
"""Shares of BPTT's time and memory that rate_m may take."""


@dataclass(frozen=True)
class Mean:
    """Of the seeds of a row."""

    value: float
    low: float
    high: float
    count: int

    @property
    def range(self) -> float | None:
        """Largest less smallest; None for one seed."""
        return self.high - self.low if self.count > 1 else None

    def text(self, digits: int = 2) -> str:
        """The mean and, where they differ, smallest and largest."""
        shown, low, high = (f"{value:.{digits}f}" for value in (self.value, self.low, self.high))
        return shown if low == high else f"{shown} [{low}, {high}]"


def mean(values: Sequence[float | None]) -> Mean | None:
    """None where a value is not known."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Mean(statistics.fmean(known), min(known), max(known), len(known))


def alike(records: Sequence[Record]) -> tuple[list[Record], dict[str, Any], list[Record]]:
    """Records of the settings that most have, these settings, and the other records.

    Where a row itself says one of the settings, that is the one that counts.
    """
    newest = sorted(records, key=lambda r: r["ended"], reverse=True)
    plain = [r["settings"] for r in newest if not _own(r)] or [r["settings"] for r in newest]
    common = max(plain, key=plain.count)  # of as many the newest

    def fits(record: Record) -> bool:
        return record["settings"] == {**common, **_own(record)}

    return [r for r in records if fits(r)], common, [r for r in records if not fits(r)]


def _own(record: Record) -> dict[str, Any]:
    """Those of the settings that the record's row says itself."""
    said = ALL_ROWS[record["row"]].said(record["scale"])
    return {name: yaml.safe_load(value) for name, value in said.items() if name in record["settings"]}


def by_row(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["row"], []).append(record)
    return found


def accuracies(records: Sequence[Record]) -> dict[str, Mean]:
    """Top-1 of each row, of all machines: a seed that ran on two counts twice."""
    found = {name: mean([r["top1"] for r in each]) for name, each in by_row(records).items()}
    return {name: value for name, value in found.items() if value is not None}


def spread(found: Mapping[str, Mean]) -> float | None:
    """The largest range of a row's seeds; None where no row has several."""
    return max((value.range for value in found.values() if value.range is not None), default=None)


def equals(found: Mapping[str, Mean]) -> dict[str, list[str]]:
    """Of each row those behind it, in the order of accuracy, that differ by less than the spread of the seeds."""
    least = spread(found)
    if least is None:
        return {}
    order = sorted(found, key=lambda name: -found[name].value)
    pairs = {
        name: [other for other in order[place + 1 :] if found[name].value - found[other].value < least]
        for place, name in enumerate(order)
    }
    return {name: others for name, others in pairs.items() if others}


def chance(found: Mapping[str, Mean], one: float, other: float, images: int) -> float:
    """Points by which two accuracies may differ by chance.

    The spread of the seeds; where no row has several, the standard error of the difference, as if the two had seen
    different test images: the same ones make it smaller, and what seeds do is not in it.
    """
    least = spread(found)
    return math.sqrt(sum(p * (100 - p) for p in (one, other)) / images) if least is None else least


@dataclass(frozen=True)
class Target:
    """
    Args:
        found: the figure, for people; or what is missing for one.
        met: None where it was not measured.
        by_chance: whether the figure is nearer to the target than rows differ by chance (`chance`).
    """

    what: str
    found: str
    met: bool | None
    by_chance: bool = False


def targets(records: Sequence[Record], ratios: Mapping[str, float]) -> list[Target]:
    """The issue's targets, judged; that against the teacher's weights also without their calibration, where it was run.

    The best hybrids are of the rows with the most seeds.

    Args:
        ratios: "time" and "memory" of rate_m over those of BPTT, where they were measured (`benchmarks.study.timing`).
    """
    means = accuracies(records)
    found = {name: value.value for name, value in means.items()}
    images = next((r["settings"]["data.max_eval_samples"] for r in records), None) or TEST_IMAGES
    seeds = {name: len({r["seed"] for r in each}) for name, each in by_row(records).items()}
    # a lucky seed beside the means of several would win too often
    hybrids = [name for name in HYBRIDS if name in means]
    best = max(hybrids, key=lambda name: (seeds[name], means[name].value), default=BEST)
    who = "the best of joint, progressive, stochastic with the most seeds"
    teachers = [r["teacher_top1"] for r in records if r["row"] == best and r["teacher_top1"] is not None]
    if teachers:
        found["the teacher"] = statistics.fmean(teachers)

    def points(what: str, one: str, other: str, least: float) -> Target:
        if missing := [name for name in dict.fromkeys((one, other)) if name not in found]:
            return Target(what, f"{NOT_MEASURED}: {', '.join(missing)}", None)
        difference = round(found[one] - found[other], 6)  # a mean of seeds is off by a rounding
        said = f"{one} {found[one]:.2f}, {other} {found[other]:.2f}: {difference:+.2f}"
        near = abs(difference - least) < chance(means, found[one], found[other], images)
        return Target(what, said, difference >= least, near)

    def share(what: str, name: str, most: float) -> Target:
        if name not in ratios:
            return Target(what, f"{NOT_MEASURED}: benchmarks.study.timing", None)
        return Target(what, f"{ratios[name]:.3f}", ratios[name] <= most)

    over_labels = f"{who}: at least {HYBRIDS_OVER_LABELS} points above rate_m from the teacher's weights"
    plain = [points(f"{over_labels} as they are", best, AS_THEY_ARE, HYBRIDS_OVER_LABELS)]
    return [
        points(f"{over_labels}, calibrated", best, "teacher_weights", HYBRIDS_OVER_LABELS),
        *(plain if AS_THEY_ARE in found else []),
        points(f"{who}: at least {HYBRIDS_OVER_KD} above logit KD", best, "kd", HYBRIDS_OVER_KD),
        points(f"{who}: within {BELOW_TEACHER} of the teacher", best, "the teacher", -BELOW_TEACHER),
        points(f"rate_m within {BELOW_BPTT} of BPTT", "scratch", "bptt", -BELOW_BPTT),
        share(f"rate_m at no more than {OF_BPTT_TIME} of BPTT's time", "time", OF_BPTT_TIME),
        share(f"rate_m at no more than {OF_BPTT_MEMORY} of BPTT's memory", "memory", OF_BPTT_MEMORY),
    ]  # fmt: skip
