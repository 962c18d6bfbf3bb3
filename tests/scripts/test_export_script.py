"""scripts/export.py as a user starts it."""

import torch
from test_scripts import read, succeed
from toy_networks import calibrated

import models


def test_a_network_is_exported(tmp_path):
    snn = models.create_snn("vgg11_cifar", timesteps=2, in_chans=1, width=8)
    extra = {"input_size": [1, 16, 16], "mean": [0.3], "std": [0.4], "classes": list("0123456789")}
    models.save_snn(calibrated(snn, torch.randn(32, 1, 16, 16)), tmp_path / "student", extra)
    arguments = ("--model", "student", "--format", "spikingjelly", "--out", "out", "--samples", "100", "--threads", "1")
    done = succeed(tmp_path, "export.py", *arguments)
    assert "check passed: float64: largest difference of a logit" in done.stderr
    assert "format spikingjelly, T = 2, is in out" in done.stderr and "Warning" not in done.stderr and done.stdout == ""
    assert read(tmp_path / "out" / "check.json")["passed"]
