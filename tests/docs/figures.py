"""Figures of the pages, each with the file of benchmarks/results/ that has it, and where in it (an expression)."""

import re


def top1(row: str) -> str:
    """Where the study's tables have the accuracy of a row."""
    return rf"`{re.escape(row)}` (?:\| [^|]+){{2}}\| ([\d.]+) "


def last_epoch(row: str) -> str:
    """Where the table of six epochs on a GPU has the last accuracy of a row."""
    return (
        rf"^\| {re.escape(row)} \| [\d.]+ \| (?:[^|]+\| )*?([\d.]+)(?: \([\d.]+\))? (?:\| - )*\| [\d.]+ \| [\d,]+ \|$"
    )


def at_steps(title: str, column: int) -> str:
    """Where a table of the study has a row's accuracy at the T of a column."""
    return rf"^\| {re.escape(title)} (?:\| [^|]+){{{column}}}\| \**([\d.]+)"


def closeness(rule: str, weights: str, column: int) -> str:
    """Where the table of gradients has a cosine."""
    return rf"^\| {rule} \| {weights} (?:\| [^|]+){{{column}}}\| (\S+)"


STUDY = "study/short_no.md"
BF16 = "study/short_bf16.md"
SETTINGS = "study/short_bf16_ablations.md"
FIRST = "study/short_no_ablations.md"
MEDIUM = "study/medium_no.md"
FULL = "study/full_bf16.md"
FULL_SETTINGS = "study/full_bf16_ablations.md"
WIDE = "study/wide_bf16.md"
TIMING = "study/timing_bf16.md"
TIMING_32 = "study/timing_no.md"
TRIALS = "2026-11-26_starting_small.md"
FIDELITY = "2026-11-27_gradient_fidelity.md"
FIDELITY_BEFORE = "2026-11-25_gradient_fidelity.md"
CALIBRATION = "2026-11-22_calibration.md"
ONE_EPOCH = "2026-11-22_cifar10_resnet18_one_epoch.md"
DIGITS = "2026-11-22_digits.md"
FEEDBACK = "2026-11-25_feedback.md"
GPU = "2026-11-26_study_h200.md"
GPU_ROWS = "2026-11-27_study_h200.md"
GPU_STEP = "2026-11-26_training_step_h200.md"
BITS = "2026-11-26_spikes_as_bits.md"
STEP = "2026-11-22_training_step.md"
AMX = "2026-11-26_training_step_amx.md"
AMX_NOW = "2026-11-27_training_step_amx_b19bef7.md"
SMALL_MAPS = "2026-11-27_small_maps.md"
HYBRID_STEP = "2026-11-22_distillation_step.md"

FIGURES = {  # on the front page and in docs/measurements.md: file, and where in it the figure is, unrounded
    "teacher 98.96 %": (DIGITS, r"^\| mean \| (\S+) \|"),
    "99.34 %": (DIGITS, r"^\| mean (?:\| \S+ ){4}\| (\S+) \|"),
    "82.25 % at T = 4": (STUDY, top1("convert_lif")),
    "86.50 % at T = 16": (STUDY, r"^\| calibrated twin, leak 1 \(IF\)(?:[^|]*\|){5} ([\d.]+) \|"),
    "87.65 % at T = 32": (STUDY, r"^\| calibrated twin, leak 1 \(IF\).*\| ([\d.]+) \|$"),
    "87.77 %": (FULL, r"on the same images is ([\d.]+) %"),
    "89.66 %": (WIDE, r"on the same images is ([\d.]+) %"),
    "82.83 %": (BF16, top1("teacher_weights")),
    "83.57 %": (BF16, top1("kd")),
    "84.65 %": (BF16, top1("joint")),
    "85.59 %": (FULL, r"teacher_weights ([\d.]+): \+"),
    "85.69 %": (FULL, r"kd ([\d.]+): \+"),
    "86.19 %": (FULL, r"^\| \+ hybrids, joint \| .*\*\*([\d.]+) \["),
    "89.08 %": (WIDE, top1("teacher_weights")),
    "89.03 %": (WIDE, top1("kd")),
    "89.18 %": (WIDE, top1("joint")),
    "1.66 times": (STEP, r"\*\*(\S+)\*\*"),
    "0.55 of": (
        STEP,
        r"^\| SpikeSwap \| rate_m \| 4 \| fp32 \| channels_last \| 1136 \| 1504 \| 7\.67 \| (\S+) \|",
    ),
    "5.65 times": (AMX_NOW, r"^\| bf16 (?:\| [^|]+){2}\| fp32, .*\*\*(\S+)\*\*"),
    "4.13 times theirs": (AMX_NOW, r"^\| bf16 (?:\| [^|]+){2}\| bf16, .*\*\*(\S+)\*\*"),
    "1.82 times theirs": (AMX_NOW, r"^\| fp32 (?:\| [^|]+){2}\| fp32, .*\*\*(\S+)\*\*"),
    "5.18 MB": (BITS, r"c57f7dc \| `rate_m` (?:\| [^|]+){2}\| (\S+) \|"),
    "0.84 to 0.92 over": (FIDELITY, closeness("rate_m", "trained", 1) + r" ± 0\.039"),
    "1.47 times as long": (HYBRID_STEP, r"^\| joint (?:\| [^|]+){3}\| (\S+) \["),
}

MEASURED = {  # in docs/measurements.md
    "gave 79.8 %": (ONE_EPOCH, r"^\| SNN, T = 4 \| (\S+) \|"),
    "82.98 %": (STUDY, top1("teacher_weights")),
    "83.60 %": (STUDY, top1("kd")),
    "83.97 %": (STUDY, top1("joint")),
    "AMX was [5.42]": ("2026-11-27_training_step_amx.md", r"^\| bf16 (?:\| [^|]+){1}\| fp32, .*\*\*(\S+)\*\*"),
    "and 4.03 with": (BITS, r"checkpointed blocks (?:\| [^|]+){2}\| (\S+) \|"),
    "2.79 [since]": (SMALL_MAPS, r"is (\S+)\nMB an image"),
}

ADVICE = {  # in docs/results.md; the tables of the study's rows have tests of their own (test_study_figures.py)
    "of 87.75 % (87.80": (STUDY, r"on the same images is ([\d.]+) %"),
    "1.60 points at the short": (BF16, r"^Spread of the seeds: (\S+) points"),
    "0.93 at the full": (FULL, r"^Spread of the seeds: (\S+) points"),
    "82.25 % at T = 4, integrate-and-fire 86.50": (STUDY, top1("convert_lif")),
    "84.65 % (bfloat16": (BF16, top1("joint")),
    "labels alone 82.83 %": (BF16, top1("teacher_weights")),
    "86.19 % (three seeds)": (FULL, r"^\| \+ hybrids, joint \| .*\*\*([\d.]+) \["),
    "labels alone 85.59 %": (FULL, r"teacher_weights ([\d.]+): \+"),
    "but labels alone 89.08 %": (WIDE, top1("teacher_weights")),
    "| logit distillation | 78.80 |": (FIRST, top1("kd-kd_remedies-first")),
    "| three hybrids, `joint` | 75.70 |": (FIRST, top1("joint-remedies-first")),
    "labels alone | - | 82.98 |": (STUDY, top1("teacher_weights")),
    "[83.40 %]": (FIRST, top1("joint-labels-adamw_at_0.0002")),
    "end at [84.13 %]": (MEDIUM, top1("kd")),
    "84.58 | 84.89 |": (
        GPU,
        r"^\| labels alone, from the calibrated twin \|.* ([\d.]+) \| 84\.89 \| [\d.]+ \| [\d,]+ \|$",
    ),
    "| 84.07 |": (GPU, last_epoch("logit distillation, `rate_m`")),
    "84.16 | - |": (GPU, last_epoch("+ hybrids, `joint`")),
    "85.90 | - | - |": (GPU, last_epoch("logit distillation with BPTT, statistics of the batch")),
    "end at [81.88 %]": (FULL_SETTINGS, top1("teacher_weights-labels_init-teacher")),
    "and 1.58 behind": (FULL, r"the teacher [\d.]+: -([\d.]+)"),
    "is 0.48 points behind": (WIDE, r"the teacher [\d.]+: -([\d.]+)"),
    "at 10.2 % of the energy": (WIDE, r"`joint` (?:\| [^|]+){6}\| ([\d.]+) "),
    "on 89.90 in": (STUDY, r"`joint` (?:\| [^|]+){8}\| ([\d.]+) \["),
    "place of 89.23 %": (STUDY, r"`kd` (?:\| [^|]+){8}\| ([\d.]+) \["),
    "[1.47 times as long]": (HYBRID_STEP, r"^\| joint (?:\| [^|]+){3}\| (\S+) \["),
    "at [49.10 %]": (BF16, top1("joint_sew")),
    "labels alone, at 30.90 %": (BF16, top1("scratch")),
    "on labels at 46.05 %": (BF16, top1("ann")),
    "| 76.80 % | 78.80 %": (FIRST, top1("convert_lif-converted-0.2")),
    "81.95 % | 79.70 % |": (FIRST, top1("convert_lif-converted-0.7")),
    "[82.50 % at T = 4": (BF16, top1("convert_lif")),
    "fire 78.50,": (BF16, top1("convert_if")),
    "leaves of the same teacher 10.00 %": (BF16, top1("convert_spikingjelly")),
    "and 43.60 % at": (BF16, r"^\| SpikingJelly's converter .*\| ([\d.]+) \|$"),
    "[took 77.4 %": (CALIBRATION, r"^\| 1\.0 \| 4 \| search \| (\S+) \|"),
    "[52.2 % of": (CALIBRATION, r"^\| 1\.0 \| 4 \| search, norms recalibrated \| (\S+) \|"),
    "[99.34 % beside": (DIGITS, r"^\| mean (?:\| \S+ ){4}\| (\S+) \|"),
    "| 30.80 | 30.25 |": (STUDY, top1("scratch")),
    "| 30.25 |": (STUDY, top1("bptt")),
    "| 30.90 | 30.15,": (BF16, top1("scratch")),
    "loss 28.85 |": (BF16, top1("tet")),
    "| 66.92 | 67.29 |": (FULL, top1("scratch")),
    "| 67.29 |": (FULL, top1("bptt")),
    "| 84.60 |": (FIRST, top1("kd-kd_algorithm-bptt")),
    "60.77 in place": (FULL, at_steps("BPTT from scratch", 1)),
    "of 42.74 %": (FULL, at_steps("rate_m from scratch", 1)),
    "[0.807 at": (TRIALS, r"^\| 0\.5 \| (\S+) \("),
    "without it 0.229": (TRIALS, r"^\| 1 \| (\S+) \("),
    "statistics 0.938": (TRIALS, r"^\| 0\.5 \| [^|]+ \| \*\*(\S+) \("),
    "0.81 to 0.96": (FIDELITY_BEFORE, closeness("rate_m", "trained", 1)),
    "0.91 to 0.98": (FIDELITY_BEFORE, closeness("rate_s", "trained", 1)),
    "[0.247 of BPTT's time": (TIMING, r"takes (\S+) of BPTT's time"),
    "time and 0.172 of its memory": (TIMING, r"takes (\S+) of BPTT's memory"),
    "[0.347 of the time": (TIMING_32, r"takes (\S+) of BPTT's time"),
    "time and 0.222 of the memory": (TIMING_32, r"takes (\S+) of BPTT's memory"),
}

ELSEWHERE = {  # in docs/how-to/feedback.md
    "both end at 98.59 %": (FEEDBACK, r"^\| `\w+` \| (\S+) \|"),
    "`ide` has 93.7 %": (FEEDBACK, r"^\| mean \| \*\*(\S+)\*\* \|"),
}
