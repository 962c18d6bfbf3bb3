"""The arithmetic of `benchmarks.inference`, and one measured row."""

import argparse

import pytest

from benchmarks import inference
from benchmarks.inference import FORMS, FormMissing, measure, plan, report


def row(form, speed, timesteps=4, batch=64, **versions):
    return {
        "network": "digits", "form": form, "timesteps": timesteps, "batch": batch, "images_per_second": speed,
        "ms": 1000 * batch / speed, "ms_quartile_1": 1.0, "ms_quartile_3": 2.0, "peak_mb": 300.4, "repeats": 20,
        "threads": 1, "versions": {"torch": "9.9"} | versions,
    }  # fmt: skip


def test_the_report_compares_each_row_with_the_teacher_at_its_batch():
    rows = [row("teacher", 1000, None), row("teacher", 100, None, 1), row("twin", 250), row("twin", 10, batch=1)]
    text = report([*rows, row("onnx", 500, onnxruntime="1.2")], ["nir: no such package"], "python -m x")
    assert "| digits | teacher | - | 64 | 64.00 | 1.00 to 2.00 | 1000.0 | 1.000 | 300 |" in text
    assert "| digits | twin | 4 | 64 | 256.00 | 1.00 to 2.00 | 250.0 | 0.250 | 300 |" in text
    assert "| digits | twin | 4 | 1 | 100.00 | 1.00 to 2.00 | 10.0 | 0.100 | 300 |" in text
    assert "onnxruntime 1.2" in text and "Left out: nir: no such package" in text and "`python -m x`" in text
    assert "| 250.0 | - | 300 |" in report([row("twin", 250)], [], "")


def test_the_teacher_has_one_row_for_all_t():
    options = argparse.Namespace(networks=["digits"], forms=["teacher", "twin"], timesteps=[1, 4], batches=[1, 8])
    assert plan(options) == [
        *(("digits", "teacher", 1, 1), ("digits", "twin", 1, 1), ("digits", "twin", 4, 1)),
        *(("digits", "teacher", 1, 8), ("digits", "twin", 1, 8), ("digits", "twin", 4, 8)),
    ]


@pytest.mark.parametrize("form", ["teacher", "twin", "twin_steps"])
def test_a_row_is_measured(form):
    found = measure("digits", form, timesteps=2, batch=3, threads=1, repeats=2, warmup=0)
    assert found["ms_quartile_1"] <= found["ms"] <= found["ms_quartile_3"]
    assert found["images_per_second"] == pytest.approx(3000 / found["ms"])
    assert found["timesteps"] == (None if form == "teacher" else 2) and found["peak_mb"] > 10


def test_a_form_that_is_not_there_is_said_by_name(monkeypatch):
    monkeypatch.setitem(inference.EXPORTED, "onnx", "nothing_of_this_name")
    with pytest.raises(FormMissing, match=r"onnx: .*nothing_of_this_name"):
        measure("digits", "onnx", timesteps=2, batch=1, threads=1, repeats=2)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_measured(form):
    try:
        found = measure("digits", form, timesteps=2, batch=3, threads=1, repeats=2)
    except FormMissing as missing:
        pytest.skip(str(missing))
    assert found["images_per_second"] > 0
