"""Figures of the front page, docs/measurements.md and docs/results.md are those of the files in benchmarks/results/."""

import json
import re
import statistics
from pathlib import Path

import pytest
from pages import README, ROOT, prose

RESULTS = ROOT / "benchmarks" / "results"
PAGES = [README, ROOT / "docs" / "measurements.md"]


def top1(row: str) -> str:
    """Where the study's tables have the accuracy of a row."""
    return rf"`{re.escape(row)}` (?:\| [^|]+){{2}}\| ([\d.]+) "


FIGURES = {  # on both pages: file, and where in it the figure is, unrounded
    "teacher 98.96 %": ("2026-11-22_digits.md", r"^\| mean \| (\S+) \|"),
    "99.34 %": ("2026-11-22_digits.md", r"^\| mean (?:\| \S+ ){4}\| (\S+) \|"),
    "of 87.8 %": ("2026-11-22_cifar10_resnet18_one_epoch.md", r"^\| teacher \| (\S+) \|"),
    "79.8 % top-1": ("2026-11-22_cifar10_resnet18_one_epoch.md", r"^\| SNN, T = 4 \| (\S+) \|"),
    "82.25 % at T = 4": ("study/short_no.md", top1("convert_lif")),
    "86.69 %": ("study/full_bf16.md", top1("stochastic")),
    "89.18 %": ("study/wide_bf16.md", top1("joint")),
    "1.66 times": ("2026-11-22_training_step.md", r"\*\*(\S+)\*\*"),
    "0.55 of": (
        "2026-11-22_training_step.md",
        r"^\| SpikeSwap \| rate_m \| 4 \| fp32 \| channels_last \| 1136 \| 1504 \| 7\.67 \| (\S+) \|",
    ),
    "1.47 times as long": ("2026-11-22_distillation_step.md", r"^\| joint (?:\| [^|]+){3}\| (\S+) \["),
}

STUDY = "study/short_no.md"
FULL = "study/full_bf16.md"
WIDE = "study/wide_bf16.md"
MEDIUM = "study/medium_no.md"
FIRST = "study/short_no_ablations.md"
TRIALS = "2026-11-26_starting_small.md"
FIDELITY = "2026-11-25_gradient_fidelity.md"
CALIBRATION = "2026-11-22_calibration.md"

GPU = "2026-11-26_study_h200.md"
GPU_STEP = "2026-11-26_training_step_h200.md"
BITS = "2026-11-26_spikes_as_bits.md"
BF16 = "study/short_bf16.md"
AMX = "2026-11-26_training_step_amx.md"
AMX_NOW = "2026-11-27_training_step_amx_b19bef7.md"
SMALL_MAPS = "2026-11-27_small_maps.md"
GPU_ROWS = "2026-11-27_study_h200.md"
TIMING = "study/timing_bf16.md"
ONE_LOOP = "2026-11-26_one_loop.md"


def last_epoch(row: str) -> str:
    """Where the table of six epochs on a GPU has the last accuracy of a row."""
    return (
        rf"^\| {re.escape(row)} \| [\d.]+ \| (?:[^|]+\| )*?([\d.]+)(?: \([\d.]+\))? (?:\| - )*\| [\d.]+ \| [\d,]+ \|$"
    )


ADVICE = {  # in docs/results.md
    "| logit distillation | 78.80 |": (FIRST, top1("kd-kd_remedies-first")),
    "| three hybrids, `joint` | 75.70 |": (FIRST, top1("joint-remedies-first")),
    "ended at 75.10 %": (FIRST, top1("joint-remedies-then_calibrated")),
    "is 1.12 points above": (STUDY, r"teacher_weights [\d.]+: \+([\d.]+)"),
    "labels alone | - | 82.98 |": (STUDY, top1("teacher_weights")),
    "and 3.65 and 2.95": (STUDY, r"the teacher [\d.]+: -([\d.]+)"),
    "(the papers') has 76.80 %": (FIRST, top1("convert_lif-converted-0.2")),
    "has 79.70 %": (FIRST, top1("convert_lif-converted-1.0")),
    "81.95 % |": (FIRST, top1("convert_lif-converted-0.7")),
    "ends at [96.34 %]": (TRIALS, r"SNN\s(\S+) %"),
    "[1.62, 1.41": ("study/timing_no.md", r"^\| joint (?:\| [^|]+){2}\| (\S+) \["),
    "| 83.60 [82.95": (STUDY, top1("kd")),
    "[82.95, 83.95]": (STUDY, r"`kd` (?:\| [^|]+){2}\| [\d.]+ \[([\d.]+),"),
    "ends at [84.13 %": (MEDIUM, top1("kd")),
    "| 83.97 [83.85": (STUDY, top1("joint")),
    "one seed | 84.10": (STUDY, top1("stochastic")),
    "([83.15 %]": (FIRST, top1("kd-kd_remedies-all_but_the_last")),
    "hybrids 1.10 points (82.90 %)": (FIRST, r"`joint-remedies-then_frozen_norms` (?:\| [^|]+){3}\| -([\d.]+) \|"),
    "0.80 points above one with labels": (FIRST, r"`kd-kd_remedies-all_but_the_last` (?:\| [^|]+){3}\| -([\d.]+) \|"),
    "place of 89.23 %": (STUDY, r"`kd` (?:\| [^|]+){8}\| ([\d.]+) \["),
    "place of 88.65 %": (FIRST, r"`kd-kd_remedies-all_but_the_last` (?:\| [^|]+){7}\| ([\d.]+) \|"),
    "on 89.90 in": (STUDY, r"`joint` (?:\| [^|]+){8}\| ([\d.]+) \["),
    "short study at [84.60 %]": (FIRST, top1("kd-kd_algorithm-bptt")),
    "0.65 points above `rate_m`": (FIRST, r"`kd-kd_algorithm-bptt` (?:\| [^|]+){3}\| \+([\d.]+) \|"),
    "82.75 %** |": (STUDY, top1("progressive")),
    "its hybrid, 85.95 %": (STUDY, r"`progressive` (?:\| [^|]+){3}\| ([\d.]+) \|"),
    "ended at 30.80 %": (STUDY, top1("scratch")),
    "BPTT at 30.25 %": (STUDY, top1("bptt")),
    "(integrate-and-fire) | - | - | 79.70 %": (STUDY, top1("convert_if")),
    "| 86.50 % | **87.65 %** |": (STUDY, r"^\| calibrated twin, leak 1 \(IF\)(?:[^|]*\|){5} ([\d.]+) \|"),
    "**87.65 %**": (STUDY, r"^\| calibrated twin, leak 1 \(IF\).*\| ([\d.]+) \|$"),
    "84.15 and 83.05 %": (
        TRIALS,
        r"^\| hybrids, joint, epochs 1 / 2 / 3 \| [\d.]+ / [\d.]+ / ([\d.]+) \|",
    ),
    "82.25 % at T = 4": (STUDY, top1("convert_lif")),
    "to 74.08 % at T = 2": (STUDY, r"^\| \+ hybrids, joint \| [^|]+\| ([\d.]+) \["),
    "of the rate had 79.00": (
        TRIALS,
        r"^\| hybrids \| 0\.2 \| detached \| of the batch \| random \| SGD, 0\.003 \| ([\d.]+)",
    ),
    "(logit distillation 77.50 %)": (
        TRIALS,
        r"^\| logit distillation \| 0\.2 \| detached \| of the batch \| - \| SGD, 0\.003 \| ([\d.]+)",
    ),
    "no difference either (83.40 %": (FIRST, top1("joint-labels-adamw_at_0.0002")),
    "else 0.807": (TRIALS, r"^\| 0\.5 \| (\S+) \("),
    "neurons 0.229": (TRIALS, r"^\| 1 \| (\S+) \("),
    "10.30 % at T = 1": (STUDY, r"^\| \+ hybrids, joint \| ([\d.]+) \["),
    "has 74.90": (STUDY, r"^\| calibrated twin, leak 0\.5, no training (?:\| [\d.]+ ){1}\| ([\d.]+) \|"),
    "and 63.75 %": (STUDY, r"^\| calibrated twin, leak 0\.5, no training \| ([\d.]+) \|"),
    "cosine of 0.938": (TRIALS, r"^\| 0\.5 \| [^|]+ \| \*\*(\S+) \("),
    "images falls from 79.8": ("2026-11-22_cifar10_resnet18_one_epoch.md", r"^\| SNN, T = 4 \| (\S+) \|"),
    "that took 77.4 %": (CALIBRATION, r"^\| 1\.0 \| 4 \| search \| (\S+) \|"),
    "reached [81.7 % at T = 8]": (CALIBRATION, r"^\| 1\.0 \| 8 \| search \| (\S+) \|"),
    "to 52.2 %": (CALIBRATION, r"^\| 1\.0 \| 4 \| search, norms recalibrated \| (\S+) \|"),
    "[99.34 % beside": ("2026-11-22_digits.md", r"^\| mean (?:\| \S+ ){4}\| (\S+) \|"),
    "[1.47 times as long]": ("2026-11-22_distillation_step.md", r"^\| joint (?:\| [^|]+){3}\| (\S+) \["),
    "| `rate_m` | 0.81": (FIDELITY, r"^\| rate_m \| trained (?:\| [^|]+){1}\| (\S+)"),
    "| `rate_s` | 0.91": (FIDELITY, r"^\| rate_s \| trained (?:\| [^|]+){1}\| (\S+)"),
    "both end at 98.59 %": ("2026-11-25_feedback.md", r"^\| `\w+` \| (\S+) \|"),
    "at 84.07 %; its loss": (GPU, last_epoch("logit distillation, `rate_m`")),
    "84.58 | 84.89 |": (
        GPU,
        r"^\| labels alone, from the calibrated twin \|.* ([\d.]+) \| 84\.89 \| [\d.]+ \| [\d,]+ \|$",
    ),
    "85.90 | - | - |": (GPU, last_epoch("logit distillation with BPTT, statistics of the batch")),
    "| 86.19 [86.08": (FULL, r"^\| \+ hybrids, joint \| .*\*\*([\d.]+) \["),
    "| 85.59 [85.30": (FULL, r"teacher_weights ([\d.]+): \+"),
    "| 85.69 [85.49": (FULL, r"kd ([\d.]+): \+"),
    "| 86.69 | 91.07": (FULL, top1("stochastic")),
    "| 85.55 | 90.75": (FULL, top1("progressive")),
    "1.00 above and": (FULL, r"kd [\d.]+: \+([\d.]+)"),
    "and 1.08 behind it": (FULL, r"the teacher [\d.]+: -([\d.]+)"),
    "is missed, 1.10 are there": (FULL, r"teacher_weights [\d.]+: \+([\d.]+)"),
    "end at [81.88 %]": ("study/full_bf16_ablations.md", top1("teacher_weights-labels_init-teacher")),
    "ends at [66.92 %]": (FULL, top1("scratch")),
    "BPTT at 67.29 %": (FULL, top1("bptt")),
    "60.77 in place": (FULL, r"^\| BPTT from scratch \| [\d.]+ \| ([\d.]+) \|"),
    "of 42.74 %": (FULL, r"^\| rate_m from scratch \| [\d.]+ \| ([\d.]+) \|"),
    "without training, 83.85 %": (WIDE, top1("convert_lif")),
    "labels alone 89.08 %": (WIDE, top1("teacher_weights")),
    "logit distillation 89.03 %": (WIDE, top1("kd")),
    "hybrids **89.18 %**": (WIDE, top1("joint")),
    "0.48 points behind the teacher": (WIDE, r"the teacher [\d.]+: -([\d.]+)"),
    "arithmetic is 10.2 %": (WIDE, r"`joint` (?:\| [^|]+){6}\| ([\d.]+) "),
    "alone keep 76.87 %": (WIDE, r"^\| rate_m from the teacher's weights, labels alone \| [\d.]+ \| ([\d.]+) \|"),
    "hybrids 81.31 %": (WIDE, r"^\| \+ hybrids, joint \| [\d.]+ \| ([\d.]+) \|"),
    "84.16 | - |": (GPU, last_epoch("+ hybrids, `joint`")),
    "`rate_m` takes 9.0 ms": (GPU_STEP, r"^\| SpikeSwap, CUDA graphs (?:\| [^|]+){7}\| (\S+) \["),
    "82.83 [82.25": (BF16, top1("teacher_weights")),
    "83.57 [83.20": (BF16, top1("kd")),
    "**84.65** [84.45": (BF16, top1("joint")),
    "| 84.85 |": (BF16, top1("stochastic")),
    "82.75 | 83.45 |": (STUDY, top1("progressive")),
    "| 83.45 |": (BF16, top1("progressive")),
    "[82.50 % at T = 4": (BF16, top1("convert_lif")),
    "fire 78.50,": (BF16, top1("convert_if")),
    "leaves of the same teacher 10.00 %": (BF16, top1("convert_spikingjelly")),
    "and 43.60 % at T = 32": (BF16, r"^\| SpikingJelly's converter .*\| ([\d.]+) \|$"),
    "[30.90 and": (BF16, top1("scratch")),
    "30.15 %](": (BF16, top1("bptt")),
    "loss 28.85 %": (BF16, top1("tet")),
    "network 46.05 %": (BF16, top1("ann")),
    "at [49.10 %]": (BF16, top1("joint_sew")),
    "and 2.02 in bfloat16": (BF16, r"teacher_weights [\d.]+: \+([\d.]+)"),
    "2.95 points behind": (BF16, r"the teacher [\d.]+: -([\d.]+)"),
    "by up to 1.60 points": (BF16, r"^Spread of the seeds: (\S+) points"),
    "hybrids end at [80.80 %]": (BF16, top1("joint_t2")),
    "78.05 %, where they": (BF16, top1("joint_t1")),
    "85.80 % (one seed)": (BF16, top1("joint_t8")),
    "have 74.32 % there": (BF16, r"^\| \+ hybrids, joint \| [^|]+\| ([\d.]+) \["),
    "they have 10.07 %": (BF16, r"^\| \+ hybrids, joint \| ([\d.]+) \["),
    "[5.65 times]": (AMX_NOW, r"^\| bf16 (?:\| [^|]+){2}\| fp32, .*\*\*(\S+)\*\*"),
    "4.13 times theirs": (AMX_NOW, r"^\| bf16 (?:\| [^|]+){2}\| bf16, .*\*\*(\S+)\*\*"),
    "1.82 times theirs": (AMX_NOW, r"^\| fp32 (?:\| [^|]+){2}\| fp32, .*\*\*(\S+)\*\*"),
    "takes [0.247 of BPTT's": (TIMING, r"takes (\S+) of BPTT's time"),
    "time and 0.172 of": (TIMING, r"takes (\S+) of BPTT's memory"),
    "[1.40, 1.19": (TIMING, r"^\| joint (?:\| [^|]+){2}\| (\S+) \["),
    "[0.421 of the time]": ("study/timing_no.md", r"takes (\S+) of BPTT's time"),
    "takes [2.79 MB]": (SMALL_MAPS, r"is (\S+)\nMB an image"),
    "AMX 5.18 MB": (BITS, r"c57f7dc \| `rate_m` (?:\| [^|]+){2}\| (\S+) \|"),
    "blocks [4.03 MB]": (BITS, r"checkpointed blocks (?:\| [^|]+){2}\| (\S+) \|"),
    "graphs it takes 52 ms": (GPU_STEP, r"^\| SpikeSwap \| rate_m \| bf16 (?:\| [^|]+){3}\| 2455.6 \| \S+ \| (\S+) \["),
    "`ide` has 93.7 %": ("2026-11-25_feedback.md", r"^\| mean \| \*\*(\S+)\*\* \|"),
}


def at(file: str, pattern: str) -> str:
    (value,) = set(re.findall(pattern, (RESULTS / file).read_text(), re.MULTILINE))
    return value


def rows(file: str, start: str) -> list[list[str]]:
    lines = [line for line in (RESULTS / file).read_text().splitlines() if line.startswith(start)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def check_figure(figure: str, file: str, pattern: str, pages: list[Path]) -> None:
    number = re.search(r"[\d.]+", figure)[0]
    decimals = len(number.partition(".")[2])
    assert f"{float(at(file, pattern)):.{decimals}f}" == number
    for page in pages:
        text = " ".join(prose(page).split())
        assert figure in text and file in text, page.name


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_is_that_of_its_results_file(figure):
    check_figure(figure, *FIGURES[figure], PAGES)


@pytest.mark.parametrize("figure", ADVICE)
def test_advice_stands_on_the_figure_of_its_results_file(figure):
    check_figure(figure, *ADVICE[figure], [ROOT / "docs" / "results.md"])


def curve(scale: str, row: str, seed: int) -> list[str]:
    """Top-1 of each epoch of a run of the study."""
    lines = (RESULTS / "study" / f"{scale}_bf16.jsonl").read_text().splitlines()
    (found,) = [r["curve"] for r in map(json.loads, lines) if (r["row"], r["seed"]) == (row, seed)]
    return [f"{top1:.2f}" for _, top1, _ in found]


def test_the_epochs_of_the_larger_steps():
    text = (ROOT / "docs" / "results.md").read_text()
    labels = {
        "larger steps: labels alone": "teacher_weights",
        "labels and logits: logit distillation": "kd",
        "+ hybrids, `stochastic`": "stochastic",
    }
    for label, row in labels.items():
        (line,) = re.findall(rf"^\| {re.escape(label)} \| (.*) \|$", text, re.MULTILINE)
        assert line.replace("*", "").split(" | ") == curve("full", row, 0)
    assert f"| {' | '.join(curve('full', 'joint', 0))} |" in text


@pytest.mark.parametrize("row", ["teacher_weights", "kd", "joint"])
def test_the_epochs_of_the_rows_on_a_gpu(row):
    text = (RESULTS / GPU_ROWS).read_text()
    assert f"| {' | '.join(curve('wide', row, 0)[i] for i in (0, 4, 9, 14, 19, 24, 29))} |" in text
    assert f"| 2 | {' | '.join(curve('full', row, 2))} |" in text


def test_the_table_of_the_digits_is_that_of_seed_0():
    ((_, teacher, *hybrids, snn, at_2, at_1, _),) = rows("2026-11-22_digits.md", "| 0 ")
    expected = [teacher, *hybrids, snn, at_1, at_2, snn]
    for page in (README, ROOT / "docs" / "tutorial.md"):
        table = re.search(r"^network  .*?^```", page.read_text(), re.MULTILINE | re.DOTALL)[0]
        assert re.findall(r"\d+\.\d\d", table) == expected


def test_the_step_on_a_gpu_beside_the_authors():
    lines = (RESULTS / GPU_STEP).with_suffix(".jsonl").read_text().splitlines()
    second = [record["result"] for record in map(json.loads, lines) if record["session"] == 2]
    rates = {(r["peer"], r["precision"], r.get("cuda_graphs", False)): r["images_per_second"] for r in second}
    ours = rates[None, "bf16", True]
    said = [
        f"{ours:,.0f}",
        *(f"{ours / rates['authors', precision, False]:.1f} times" for precision in ("bf16", "fp32")),
    ]
    assert said == ["14,182", "6.7 times", "6.4 times"]
    for page in (README, ROOT / "docs" / "measurements.md", ROOT / "docs" / "results.md"):
        assert all(words in " ".join(prose(page).split()) for words in said), page.name


def test_ratios_of_the_alternation_and_of_many_steps():
    (pairs,) = [row for row in rows(AMX_NOW, "| bf16") if len(row) == 7 and row[3].startswith("fp32")]
    ratios = sorted(map(float, pairs[5].split(", ")))
    between = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    for page in (*PAGES, ROOT / "docs" / "results.md"):
        text = " ".join(page.read_text().split())
        assert between in text and pairs[6].strip("*") + " times" in text, page.name
    speeds = {(row[0], row[2], row[1]): row[3] for row in rows("2026-11-27_many_steps.md", "| ") if len(row) == 7}
    log = " ".join((ROOT / "CHANGELOG.md").read_text().split())
    for steps in ("8", "16"):
        before, now = (
            statistics.mean(map(float, speeds[steps, kept, code].split(", ")))
            for kept, code in (("no", "2e6272b, in pieces"), ("yes", "the same"))
        )
        assert re.search(rf"{now / before:.2f} times( as fast)? at T = {steps}", log)


def test_one_setting_at_a_time():
    text = (ROOT / "docs" / "results.md").read_text()
    section = text.partition("## One setting at a time")[2].partition("\n## ")[0]
    found = [row for row in rows("study/short_bf16_ablations.md", "| ") if row[1].startswith("`joint-")]
    assert len(found) == 13
    for _, name, _, _, accuracy, against, hybrids, *_ in found:
        assert re.search(rf"\b{accuracy}\b", section) and against.lstrip("+-") in section, name
        if name == "`joint-adapters-random`":
            assert "{}, {} and {} %".format(*hybrids.split(" / ")) in section


def test_growth_with_the_number_of_time_steps():
    growth = [[cell.split()[0] for cell in row[:4]] for row in rows(AMX_NOW, "|") if len(row) == 6 and row[1] == "bf16"]
    steps, _, forward, backward = zip(*growth, strict=True)
    assert steps == ("2", "4", "8", "16")
    times = ", ".join(f"{float(value):.0f}" for value in forward[:3]) + f" and {float(forward[3]):.0f} ms"
    spread = max(map(float, backward)) / min(map(float, backward)) - 1
    assert times == "83, 135, 260 and 538 ms" and f"{spread:.2f}" == "0.03"
    for page in (ROOT / "docs" / "results.md", ROOT / "docs" / "measurements.md"):
        text = " ".join(page.read_text().split())
        assert times in text and "16 within 3 %" in text, page.name


def test_memory_beside_bptt_and_cosines_beside_it():
    found = rows("2026-11-22_training_step.md", "| SpikeSwap") + rows("2026-11-22_training_step.md", "| authors")
    by_row = {(row[0], row[1], row[2]): float(row[7]) for row in found if len(row) == 10}
    ours, bptt = by_row["SpikeSwap", "rate_m", "4"], by_row["authors' code", "bptt", "4"]
    assert f"{ours / bptt:.2f}" == "0.26" and "BPTT | 0.26" in README.read_text()
    ((_, *cosines),) = rows("2026-11-22_gradient_cosine.md", "| all ")
    rate_m = [float(value) for value in cosines[:4]]
    found = [
        row for row in rows(AMX, "| SpikeSwap") + rows(AMX, "| authors") + rows(AMX, "| SpikingJelly") if len(row) == 10
    ]
    by_row = {
        (row[0], row[1], row[3]): float(row[7]) for row in found if row[2] == "4" and "checkpointed" not in row[0]
    }
    ours = by_row["SpikeSwap", "rate_m", "bf16"]
    peers = [
        *(by_row["authors' code", "rate_m", precision] for precision in ("fp32", "bf16")),
        *(by_row[who, "bptt", "fp32"] for who in ("authors' code", "SpikingJelly 2")),
        *(by_row[who, "bptt", "bf16"] for who in ("authors' code", "SpikingJelly 2")),
    ]
    assert ours == 3.01 and [f"{ours / peer:.2f}" for peer in peers] == ["0.22", "0.23", "0.10", "0.10", "0.14", "0.20"]
    for page in PAGES:
        text = " ".join(prose(page).split())
        assert "3.01 MB" in text and "0.22 of the authors' in float32, 0.23 of theirs in bfloat16" in text, page.name
        assert "0.14 and 0.20 of" in text, page.name
    assert min(rate_m) >= 0.955 and max(rate_m) <= 0.985 and "cosine 0.96 to 0.98" in README.read_text()
