"""The tables of docs/results.md are those of the study's records."""

import json
import re
import statistics

import pytest
from pages import ROOT

from benchmarks.study.comparing import alike, mean, targets
from benchmarks.study.rows import AS_THEY_ARE, ROWS

RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "results.md").read_text()


def records(name):
    lines = (RESULTS / "study" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def seeds_of(name, row):
    found = [record for record in records(name) if record["row"] == row]
    assert found, f"{row} is not in {name}.jsonl"
    return found


def section(heading):
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def lines_of(heading):
    """The cells of all tables' lines of a section, without marks of bold type."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")] for line in lines]


def line(heading, *start):
    (found,) = [cells for cells in lines_of(heading) if tuple(cells[: len(start)]) == start]
    return found


def of_seeds(name, row, value="top1"):
    """Mean, least and most, as the tables of the page have it."""
    return mean([record[value] for record in seeds_of(name, row)]).text()


CHANGED = {
    "`student.init`": ["init-teacher"],
    "`student.neuron.leak`": ["leak-0.2", "leak-1.0"],
    "`student.neuron.threshold`": ["threshold-0.5", "threshold-2"],
    "`student.neuron.detach_reset`": ["reset-no"],
    "`init.adapters`": ["adapters-random"],
    "`adapter`": ["adapter-conv3x3", "adapter-norm"],
    "`taps`": ["taps-blocks"],
    "`loss.student_ce`": ["loss-student_ce_1"],
    "`loss.hybrid_ce`": ["loss-hybrid_ce_1"],
    "`loss.hybrid_kd`": ["loss-hybrid_kd_0.3", "loss-hybrid_kd_3"],
    "`loss.feature`": ["loss-feature_mse"],
    "`loss.temperature`": ["temperature-1", "temperature-2", "temperature-8"],
    "`train.freeze_norms`": ["norms-of_the_batch"],
}
"""The settings of the page's table, and the ablations that changed them."""
SETTINGS = "What each setting is worth"


@pytest.mark.parametrize("setting", CHANGED)
def test_what_a_setting_is_worth(setting):
    (default,) = [record["top1"] for record in seeds_of("short_bf16", "joint") if record["seed"] == 0]
    found = [record for name in CHANGED[setting] for record in seeds_of("short_bf16", f"joint-{name}")]
    cells = line(SETTINGS, setting)
    assert cells[3] == "; ".join(f"{record['top1']:.2f}" for record in found)
    assert cells[4] == "; ".join(f"{record['top1'] - default:+.2f}" for record in found)
    assert lines_of(SETTINGS)[0][4] == f"against {default:.2f}"


def test_each_ablation_of_one_setting_is_in_the_table():
    rows = {record["row"] for record in records("short_bf16") if record["row"].startswith("joint-")}
    told = {f"joint-{name}" for names in CHANGED.values() for name in names}
    assert rows - told == {row for row in rows if row.startswith("joint-remedies-")}


@pytest.mark.parametrize(
    "label, row",
    [
        ("labels alone", "teacher_weights"),
        ("logit distillation", "kd"),
        ("three hybrids, `joint`", "joint"),
        ("one of them a step, `stochastic`", "stochastic"),
        ("the hybrids in turn, then three epochs of the student: `progressive`", "progressive"),
    ],
)
def test_where_six_epochs_of_all_images_end(label, row):
    (cells,) = [cells for cells in lines_of("Longer trainings") if cells[0] == label and len(cells) == 4]
    found = seeds_of("full_bf16", row)
    assert cells[1:3] == [str(len(found)), of_seeds("full_bf16", row)]
    agreements = [record["agreement"] for record in found]
    assert cells[3] == ("-" if None in agreements else f"{statistics.fmean(agreements):.2f}")


@pytest.mark.parametrize("row", ["teacher_weights", "kd", "joint", "stochastic", "progressive"])
def test_the_short_study_in_both_precisions(row):
    labels = {
        "teacher_weights": "labels alone",
        "kd": "logit distillation",
        "joint": "three hybrids, `joint`",
        "stochastic": "one of them a step, `stochastic`, one seed",
        "progressive": "first the hybrid up to `layer2`, then the student: `progressive`, one seed",
    }
    cells = line("Logit distillation or hybrids", labels[row])
    assert cells[1:] == [of_seeds("short_no", row), of_seeds("short_bf16", row)]


def test_hybrids_beside_logit_distillation_seed_by_seed():
    text = " ".join(section("Logit distillation or hybrids").split())
    for name in ("short_no", "short_bf16", "full_bf16"):
        kd, joint = ({r["seed"]: r["top1"] for r in seeds_of(name, row)} for row in ("kd", "joint"))
        differences = [f"{joint[seed] - kd[seed]:.2f}" for seed in sorted(kd)]
        assert len(differences) == 3 and "{}, {} and {}".format(*differences) in text


STEPS = {  # of the table's lines: row, and file
    "[short](../benchmarks/results/study/short_bf16.md), trained at T = 1": ("joint_t1", "short_bf16"),
    "short, trained at T = 2": ("joint_t2", "short_bf16"),
    "short, trained at T = 4, mean of three seeds": ("joint", "short_bf16"),
    "short, trained at T = 8": ("joint_t8", "short_bf16"),
    "short, calibrated at each T, no training": ("convert_lif", "short_bf16"),
    "[full](../benchmarks/results/study/full_bf16.md), trained at T = 2": ("joint_t2", "full_bf16"),
    "full, trained at T = 4, mean of three seeds": ("joint", "full_bf16"),
    "full, trained at T = 8": ("joint_t8", "full_bf16"),
    "full, calibrated at each T, no training": ("convert_lif", "full_bf16"),
}


@pytest.mark.parametrize("label", STEPS)
def test_networks_at_other_time_steps(label):
    row, name = STEPS[label]
    found = seeds_of(name, row)
    cells = line("Time steps", label)
    for steps, cell in zip("1248", cells[1:5], strict=True):
        values = [record["top1_by_timesteps"].get(steps) for record in found]
        assert cell == ("-" if None in values else f"{statistics.fmean(values):.2f}")
    whole = [record for record in records(name) if record["teacher_compute_uj"]][-1]
    for kind, cell in zip(("compute", "memory"), cells[5:], strict=True):
        share = statistics.fmean(record[f"{kind}_uj"] for record in found) / whole[f"teacher_{kind}_uj"]
        assert cell.split()[0] == f"{100 * share:.1f}"


@pytest.mark.parametrize("column, name", [(1, "short_bf16"), (2, "full_bf16")])
def test_targets_are_those_of_the_tables(column, name):
    rows = [record for record in records(name) if record["row"] in (*ROWS, AS_THEY_ARE)]
    found = [target for target in targets(alike(rows)[0], {}) if ": " in target.found and "not" not in target.found]
    cells = [cells[column].replace(", within chance", "") for cells in lines_of("Targets")[1:]]
    said = [cell.partition(":")[0] for cell in cells if re.match(r"[+-]\d", cell)]
    assert said == [target.found.rpartition(": ")[2] for target in found]
    missed = [": missed" in cell for cell in cells if re.match(r"[+-]\d", cell)]
    assert missed == [not target.met for target in found]


@pytest.mark.parametrize("label, row", [("labels alone", "teacher_weights"), ("logit distillation", "kd"),
                                        ("three hybrids, `joint`", "joint"),
                                        ("calibrated, without training", "convert_lif")])  # fmt: skip
def test_thirty_epochs_of_full_width(label, row):
    (record,) = seeds_of("wide_bf16", row)
    expected = [f"{record['top1']:.2f}", f"{record['top1_by_timesteps']['2']:.2f}"]
    assert line("Full width, thirty epochs", label)[1:] == expected


def test_calibrated_twins_at_each_t():
    for label, row, steps in (
        ("0.5", "convert_lif", ["1", "2", "4"]),
        ("1 (integrate-and-fire)", "convert_if", ["4", "8", "16", "32"]),
    ):
        (record,) = seeds_of("short_no", row)
        expected = [f"{record['top1_by_timesteps'][t]:.2f} %" for t in steps]
        assert [cell for cell in line("Without training", label)[1:] if cell != "-"] == expected


def test_gradients_beside_those_of_bptt():
    text = (RESULTS / "2026-11-27_gradient_fidelity.md").read_text()
    batch, running = (
        {tuple(cells[:2]): cells[2:] for cells in table}
        for table in (
            [[cell.strip() for cell in row.strip("|").split("|")] for row in part.splitlines() if row.startswith("| r")]
            for part in text.partition("## rate_m, by weight")[0].split("## All parameters")[1:]
        )
    )

    def short(cells):
        pairs = [re.match(r"([\d.]+) ± [\d.]+ \(([\d.]+) ±", cell).groups() for cell in cells]
        return [f"{float(cosine):.2f} ({length})" for cosine, length in pairs]

    expected = {
        "`rate_m`, calibrated": batch["rate_m", "given"],
        "`rate_m`, trained": batch["rate_m", "trained"],
        "`rate_s`, trained": batch["rate_s", "trained"],
        "both, calibrated, running statistics": running["rate_m", "given"],
        "both, trained, running statistics": running["rate_m", "trained"],
    }
    for label, cells in expected.items():
        assert line("Gradient", label)[1:] == short(cells), label
    assert running["rate_m", "given"] == running["rate_s", "given"]


def test_the_remedies_one_after_the_other():
    steps = ["first", "then_calibrated", "then_lr_0.003", "then_regression", "then_leak_0.5", "then_frozen_norms"]
    rows = [f"joint-remedies-{step}" for step in steps] + ["joint"]
    told = [cells for cells in lines_of("Where to start") if len(cells) == 4][1:]
    assert len(told) == len(rows)
    for cells, row in zip(told, rows, strict=True):
        (record,) = [record for record in seeds_of("short_bf16", row) if record["seed"] == 0]
        hybrids = " / ".join(f"{top1:.2f}" for top1 in record["hybrid_top1"].values())
        assert cells[1:] == [f"{record['top1']:.2f}", hybrids, f"{100 * record['firing_rate']:.1f}"], row
