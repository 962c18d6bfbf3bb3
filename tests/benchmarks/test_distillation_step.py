"""The benchmark of a distillation step: what it counts, against counts from the shapes of the layers."""

import sys

import pytest
import torch
from torch import nn

import models
from benchmarks import distillation_step
from benchmarks.distillation_cost import TAPS, VARIANTS, Variant, equivalents, macs, saved_by, teacher_graph

T = 3
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([3, 7])


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    kwargs = {"channels": [8, 16, 16, 24]}
    return models.create_ann("resnet18", num_classes=10, cifar_stem=True, kwargs=kwargs).double()


@pytest.fixture(scope="module")
def variants(teacher):
    return {name: Variant(name, teacher, IMAGES, LABELS, T, "fp64") for name in VARIANTS}


@pytest.fixture(scope="module")
def layers(teacher):
    """Multiply-accumulates of each layer in one forward pass of the teacher, from its output's size."""
    found = {}

    def count(name):
        def hook(module, args, out):
            found[name] = out.numel() * module.weight[0].numel()

        return hook

    products = [(n, m) for n, m in teacher.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(count(n)) for n, m in products]
    teacher(IMAGES)
    for handle in handles:
        handle.remove()
    assert found["conv1"] == 2 * 16 * 16 * 64 * 27 and found["fc"] == 2 * 10 * 24
    return found


def of_student(layers):
    # the images are the same at each step and need no gradient: one forward pass, and the weight's gradient
    return 2 * layers["conv1"] + (T + 2) * sum(count for name, count in layers.items() if name != "conv1")


def of_hybrid(layers, tap):
    """The adapter's 1x1 convolution three times; the teacher behind the tap forward, and its inputs' gradient."""
    channels, size = {"layer1": (8, 16), "layer2": (16, 8), "layer3": (16, 4)}[tap]
    stages = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    tail = sum(count for name, count in layers.items() if stages.index(name.split(".")[0]) > stages.index(tap))
    return 3 * 2 * size * size * channels * channels + 2 * tail


def test_the_cost_of_each_step_is_that_of_its_layers(variants, layers):
    unit = sum(layers.values())
    hybrids = [of_hybrid(layers, tap) for tap in TAPS]
    expected = {
        "standalone": [of_student(layers)],
        "logit KD": [of_student(layers) + unit],
        "joint": [of_student(layers) + unit + sum(hybrids)],
        "stochastic": [of_student(layers) + unit + hybrid for hybrid in hybrids],
    }
    for name, counts in expected.items():
        assert equivalents(variants[name]) == pytest.approx([count / unit for count in counts], rel=1e-12)


def test_multiply_accumulates_of_a_linear_layer():
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    assert macs(lambda: layer(x)) == 3 * 5 * 7
    assert macs(lambda: layer(x).sum().backward()) == 2 * 3 * 5 * 7  # and the weight's gradient


@pytest.mark.parametrize(("name", "active"), [("joint", TAPS), ("stochastic", TAPS[1:2]), ("logit KD", ())])
def test_in_front_of_the_taps_the_teacher_keeps_nothing(variants, name, active):
    graph = teacher_graph(variants[name], active)
    assert graph.front == 0 and graph.front_modules == ()
    assert (graph.behind > 0) == bool(active)


def test_a_graph_in_front_of_the_taps_is_seen(variants, teacher):
    teacher.conv1.weight.requires_grad_(True)
    try:
        graph = teacher_graph(variants["stochastic"], TAPS[1:2])
    finally:
        teacher.requires_grad_(False)
    assert "conv1" in graph.front_modules and "layer1.1.conv2" in graph.front_modules
    assert not any(name.startswith(("layer3", "layer4", "fc")) for name in graph.front_modules)


def test_hybrids_keep_more_the_earlier_they_are_cut(variants):
    early, late = (teacher_graph(variants["joint"], (tap,)).behind for tap in ("layer1", "layer3"))
    assert early > 2 * late > 0
    assert saved_by(variants["joint"], TAPS) > saved_by(variants["logit KD"], ())


def test_a_run_prints_a_table_and_writes_it(tmp_path, capsys, monkeypatch):
    out = tmp_path / "table.md"
    small = ["--width=8", "--image-size=8", "--batch=2", "--timesteps=2", "--no-compile", "--warmup=0", "--rounds=2"]
    monkeypatch.setattr(sys, "argv", ["distillation_step.py", *small, f"--out={out}"])
    distillation_step.main()
    printed = capsys.readouterr().out
    assert printed == out.read_text() + "\n"
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == list(VARIANTS) and {len(row) for row in rows} == {9}
    cost, most, ratio = (dict(zip(VARIANTS, [row[i] for row in rows[2:]], strict=True)) for i in (1, 2, 4))
    assert most == {"standalone": "4", "logit KD": "-", "joint": "8", "stochastic": "6"}  # T = 2
    assert float(cost["logit KD"]) == pytest.approx(float(cost["standalone"]) + 1, abs=0.011)
    assert ratio["standalone"] == "1.00 [1.00, 1.00]"


def test_one_round_has_no_quartiles(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distillation_step.py", "--rounds=1"])
    with pytest.raises(SystemExit):
        distillation_step.main()
    assert "--rounds must be 0, or at least 2 for quartiles, found 1" in capsys.readouterr().err
