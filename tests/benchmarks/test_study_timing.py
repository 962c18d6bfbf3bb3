"""The steps of the rows, timed in turns."""

import argparse

import pytest
import torch
from toy_study import line_with

from benchmarks.study import timing


def test_ratios_of_time_and_memory_by_hand():
    seconds = {"scratch": [1.0, 2.0, 3.0], "bptt": [2.0, 2.0, 4.0]}  # ratios 0.5, 1 and 0.75
    # 0.5, 0.5 and 1, and 2.5 MB an image: ratios 0.2, 0.2 and 0.4
    peaks = {
        "scratch": [[100.0, 124.0], [104.0, 128.0], [102.0, 150.0]],
        "bptt": [[150.0, 270.0], [151.0, 271.0], [150.0, 270.0]],
    }
    assert timing.ratios(seconds, peaks, [16, 64]) == {"time": 0.75, "memory": pytest.approx(0.2)}
    assert timing.ratios({"kd": [1.0]}, {}, [16, 64]) == {}
    result = {
        **{"settings": "", "batch": 32, "memory_batches": [16, 64], "seconds": seconds, "peaks_mb": peaks},
        "ratios": timing.ratios(seconds, peaks, [16, 64]),
    }
    text = timing.markdown(result)
    row = ["bptt", "2000 [2000, 3000]", "16.0", "1.33 [1.17, 1.67]", "150 [150, 151]", "270 [270, 271]", "2.50"]
    assert line_with(text, "| bptt") == row  # ratios 2, 1 and 1.33
    assert line_with(text, "| scratch")[4:] == ["102 [100, 104]", "128 [124, 150]", "0.50 [0.50, 1.00]"]
    assert "rate_m takes 0.750 of BPTT's time (target: at most 0.55)." in text
    assert "rate_m takes 0.200 of BPTT's memory an image (target: at most 0.2)." in text


@pytest.mark.parametrize("name", ["progressive, up to layer2", "stochastic", "tet"])
def test_a_rows_step_is_timed(name):
    options = argparse.Namespace(width=8, precision="no")
    step = timing.Step(name, 2, options)
    norms = {n: m.training for n, m in step.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    # as their rows do: twins keep the calibrated statistics, adapters and fresh networks do not
    assert all(training == (name == "tet" or "adapters" in n) for n, training in norms.items()) and norms
    assert step.step(0) > 0
    trained = {n for n, p in step.model.named_parameters() if p.grad is not None}
    if name == "tet":
        assert "fc.weight" in "".join(trained) and step.draws == 1
    elif name == "stochastic":
        assert step.draws == 3 and len([n for n in trained if "adapters" in n and "conv" in n]) == 1
    else:
        assert not any("layer3" in n or "adapters.2" in n for n in trained) and any("layer2.1" in n for n in trained)
