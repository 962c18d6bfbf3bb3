"""Figures of the front page, docs/measurements.md and docs/results.md are those of the files in benchmarks/results/."""

import json
import re
import statistics
from pathlib import Path

import pytest
from figures import ADVICE, AMX, AMX_NOW, ELSEWHERE, FIGURES, GPU_ROWS, GPU_STEP, MEASURED
from pages import README, ROOT, prose

RESULTS = ROOT / "benchmarks" / "results"
PAGES = [README, ROOT / "docs" / "measurements.md"]
OF_ONE_PAGE = {"measurements.md": MEASURED, "results.md": ADVICE, "how-to/feedback.md": ELSEWHERE}


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


@pytest.mark.parametrize("page, figure", [(page, figure) for page in OF_ONE_PAGE for figure in OF_ONE_PAGE[page]])
def test_a_pages_own_figure_is_that_of_its_results_file(page, figure):
    check_figure(figure, *OF_ONE_PAGE[page][figure], [ROOT / "docs" / page])


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
    for page in PAGES:
        assert all(words in " ".join(prose(page).split()) for words in said), page.name


def test_ratios_of_the_alternation_and_of_many_steps():
    (pairs,) = [row for row in rows(AMX_NOW, "| bf16") if len(row) == 7 and row[3].startswith("fp32")]
    ratios = sorted(map(float, pairs[5].split(", ")))
    between = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    for page in PAGES:
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


def test_growth_with_the_number_of_time_steps():
    growth = [[cell.split()[0] for cell in row[:4]] for row in rows(AMX_NOW, "|") if len(row) == 6 and row[1] == "bf16"]
    steps, _, forward, backward = zip(*growth, strict=True)
    assert steps == ("2", "4", "8", "16")
    times = ", ".join(f"{float(value):.0f}" for value in forward[:3]) + f" and {float(forward[3]):.0f} ms"
    spread = max(map(float, backward)) / min(map(float, backward)) - 1
    assert times == "83, 135, 260 and 538 ms" and f"{spread:.2f}" == "0.03"
    text = " ".join((ROOT / "docs" / "measurements.md").read_text().split())
    assert times in text and "16 within 3 %" in text


def test_memory_beside_bptt_and_cosines_beside_it():
    found = rows("2026-11-22_training_step.md", "| SpikeSwap") + rows("2026-11-22_training_step.md", "| authors")
    by_row = {(row[0], row[1], row[2]): float(row[7]) for row in found if len(row) == 10}
    ours, bptt = by_row["SpikeSwap", "rate_m", "4"], by_row["authors' code", "bptt", "4"]
    assert f"{ours / bptt:.2f}" == "0.26" and "0.26 of the authors' BPTT" in README.read_text()
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
    assert min(rate_m) >= 0.955 and max(rate_m) <= 0.985 and "0.96 to 0.98" in README.read_text()
