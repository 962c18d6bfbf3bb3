"""Schedules: which parameters train when, which blocks run, and that a run goes on in the stage it was in."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from toy_runs import distil, equal, forget_accelerate, metrics_of, timeless, tiny, weights_of
from toy_teachers import images_of, student_of, teacher_of

from distill import HybridDistiller, LossConfig, distillation_losses
from distill.runs import RunFolder
from distill.schedule_config import ScheduleConfig
from distill.schedules import Stage, different_steps, drawn_tap, end_stages, hybrid_backward, prepare_stage, stages_of
from distill.taps import hooks
from models import NeuronConfig, spiking_twin

TAPS = ["layer1", "layer2", "layer3"]
LABELS = torch.tensor([1, 4, 2])


def distiller_of(dtype=torch.float64):
    teacher = teacher_of("resnet18", dtype)
    student = student_of(teacher)
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias += 0.7  # every layer fires: what has a part also moves
    return HybridDistiller(teacher, student, images=images_of(dtype)).train()


def stages(**fields):
    epochs = fields.pop("of", 8)
    return stages_of(ScheduleConfig(**fields), TAPS, epochs)


def train(distiller, stage, freeze=False, steps=2):
    """Steps of plain gradient descent on what the stage leaves trainable; the names of all tensors that moved."""
    forget_accelerate()
    accelerator, images = Accelerator(cpu=True), images_of(torch.float64, 3)
    prepare_stage(distiller, stage, images, freeze)
    distiller.train()
    before = copy.deepcopy(distiller.state_dict())
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1)
    backward = hybrid_backward(stage, lambda out, labels: distillation_losses(out, labels, LossConfig()), seed=3)
    for step in range(steps):
        parts = backward(accelerator, distiller, images, LABELS, step)
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, value in distiller.state_dict().items() if not torch.equal(value, before[name])}
    return moved, parts


def test_joint_and_stochastic_have_one_stage_with_all_taps():
    whole = dict(name="student", taps=tuple(TAPS), student=True, epochs=8)
    assert stages() == [Stage(**whole, draw=False)]
    assert stages(name="stochastic") == [Stage(**whole, draw=True)]
    assert stages_of(ScheduleConfig(name="stochastic"), [], 5) == [
        Stage(**whole | {"taps": (), "epochs": 5}, draw=False)
    ]
    assert [stage.taps for stage in stages_of(ScheduleConfig(name="progressive"), [], 5)] == [()]


def test_progressive_has_a_stage_for_each_tap_and_one_for_the_student():
    found = stages(name="progressive", of=10)
    assert [stage.name for stage in found] == ["stage1_layer1", "stage2_layer2", "stage3_layer3", "student"]
    assert [stage.taps for stage in found] == [("layer1",), ("layer2",), ("layer3",), ()]
    assert [stage.student for stage in found] == [False, False, False, True]
    assert [stage.epochs for stage in found] == [2, 2, 2, 4]  # 10 = 3 * 2 + 4
    assert [stage.lr_epochs for stage in found] == [None] * 4
    assert [stage.epochs_before for stage in found] == [0, 2, 4, 6]
    found = stages(name="progressive", epochs=[1, 2, 3, 4], restart_lr=False)
    assert [stage.epochs for stage in found] == [1, 2, 3, 4]
    assert [stage.lr_epochs for stage in found] == [10] * 4 and [stage.epochs_before for stage in found] == [0, 1, 3, 6]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="progressive", epochs=[1, 2]), r"schedule\.epochs must be 4 numbers"),
        (dict(name="progressive", of=3), r"train\.epochs must be at least 4 .*, found 3"),
        (dict(name="progressive", epochs=[1, 0, 1, 1]), "epochs must be at least 1"),
        (dict(name="progressive", epochs=[]), "epochs must be at least 1"),
        (dict(epochs=[1]), "epochs must be none with joint"),
        (dict(name="stochastic", freeze=True), "freeze must be false with stochastic"),
        (dict(restart_lr=False), "restart_lr must be true with joint"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        stages(**fields)


def test_the_drawn_tap_is_a_function_of_seed_and_step_and_every_tap_has_its_turn():
    draws = [drawn_tap(7, step, TAPS) for step in range(600)]
    assert (
        draws == [drawn_tap(7, step, TAPS) for step in range(600)] != [drawn_tap(8, step, TAPS) for step in range(600)]
    )
    counts = np.array([draws.count(tap) for tap in TAPS])
    assert (np.abs(counts - 200) < 5 * np.sqrt(600 * 2 / 9)).all()  # five standard deviations


def owned(names, *prefixes):
    return {name for name in names if name.startswith(prefixes)}


def test_joint_moves_everything():
    distiller = distiller_of()
    moved, parts = train(distiller, stages()[0])
    everything = set(distiller.state_dict())
    assert everything - moved == set()
    assert {f"hybrid_ce/{tap}" for tap in TAPS} <= parts.keys()


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_progressive_stage_moves_the_student_up_to_its_tap_and_its_adapter_alone(number):
    distiller = distiller_of()
    moved, parts = train(distiller, stages(name="progressive")[number])
    names = set(distiller.state_dict())
    layers = [f"student.layer{layer}." for layer in (1, 2, 3, 4)]
    expected = owned(names, "student.conv1", "student.bn1", *layers[: number + 1])
    expected |= owned(names, f"adapters.{number}.") if number < 3 else owned(names, "student.")
    assert moved == expected
    taps = {name.partition("/")[2] for name in parts if name.startswith("hybrid")}
    assert taps == ({TAPS[number]} if number < 3 else set()) and ("student_ce" in parts) == (number == 3)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_freezing_leaves_the_blocks_of_earlier_stages_with_their_statistics_as_they_are(number):
    distiller = distiller_of()
    moved, _ = train(distiller, stages(name="progressive", freeze=True)[number], freeze=True)
    names = set(distiller.state_dict())
    expected = owned(names, f"student.layer{number + 1}.", *([f"adapters.{number}."] if number < 3 else ["student.fc"]))
    assert moved == expected
    end_stages(distiller)
    assert all(parameter.requires_grad for parameter in distiller.parameters())
    assert all(module.training for module in distiller.modules())


def test_freezing_holds_norms_without_parameters_and_dropout_too():
    class Block(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8, affine=False), torch.nn.ReLU())

    network = torch.nn.Sequential(Block(), torch.nn.Dropout(0.5), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU())
    network.extend([torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 7)])
    network.double()
    student = spiking_twin(network, 2, NeuronConfig(threshold=0.1), input_size=(3, 32, 32))  # low: both layers fire
    images = images_of(torch.float64, 3)
    distiller = HybridDistiller(network, student, ["1", "3"], images=images).train()
    second = stages_of(ScheduleConfig(name="progressive", freeze=True), ["1", "3"], 3)[1]
    moved, _ = train(distiller, second, freeze=True)
    assert {name for name in moved if name.startswith("student")} == {"student.2.weight", "student.2.bias"}
    modes = {name: module.training for name, module in student.named_modules()}
    assert not modes["0"] and not modes["0.1"] and not modes["1"] and modes["2"] and modes[""]


@pytest.mark.parametrize("seed", range(5))
def test_a_step_of_each_tap_is_known(seed):
    stage = stages(name="stochastic")[0]
    steps = different_steps(seed, stage)
    draws = [drawn_tap(seed, step, stage.taps) for step in range(max(steps) + 1)]
    assert sorted(draws[step] for step in steps) == sorted(stage.taps)
    assert all(draws.index(draws[step]) == step for step in steps)  # the first of each
    assert different_steps(seed, stages()[0]) == [0]


def test_stochastic_moves_the_student_and_the_drawn_adapter_alone():
    distiller = distiller_of()
    stage = stages(name="stochastic")[0]
    tap = drawn_tap(3, 0, TAPS)
    moved, parts = train(distiller, stage, steps=1)
    assert moved == owned(set(distiller.state_dict()), "student.", f"adapters.{TAPS.index(tap)}.")
    assert {name for name in parts if name.startswith("hybrid_ce")} == {f"hybrid_ce/{tap}"}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_in_a_progressive_stage_later_blocks_have_no_forward_and_no_gradient(number):
    distiller, stage = distiller_of(), stages(name="progressive")[number]
    images = images_of(torch.float64, 3)
    prepare_stage(distiller, stage, images, False)
    calls = []
    layers = [f"layer{layer}" for layer in (1, 2, 3, 4)]
    pairs = [(distiller.student.get_submodule(n), lambda m, a, o, n=n: calls.append(n)) for n in [*layers, "fc"]]
    with hooks(pairs):
        out = distiller.train()(images, active=list(stage.taps), student=False)
    assert calls == layers[: number + 1] and out.student_logits is None
    out.hybrid_logits[TAPS[number]].square().sum().backward()
    for name, parameter in distiller.student.named_parameters():
        before = name.startswith(("conv1", "bn1", *layers[: number + 1]))
        assert (parameter.grad is not None) == before, name
        assert parameter.requires_grad == before


def test_the_hybrid_of_a_stage_is_that_of_the_joint_pass():
    distiller, images = distiller_of(), images_of(torch.float64, 3)
    together = distiller(images)  # in training mode: statistics of the batch
    for tap in TAPS:
        alone = distiller(images, active=[tap], student=False)
        assert list(alone.hybrid_logits) == [tap]
        torch.testing.assert_close(alone.hybrid_logits[tap], together.hybrid_logits[tap], rtol=0, atol=1e-12)


@pytest.mark.parametrize("call", [dict(active=["layer4"]), dict(student=False), dict(active=[], student=False)])
def test_hybrids_that_cannot_run_are_refused(call):
    with pytest.raises(ValueError, match=r"active must be of \['layer1', 'layer2', 'layer3'\]"):
        distiller_of()(images_of(torch.float64), **call)


def test_a_student_of_other_stages_trains_up_to_the_matched_block():
    teacher = teacher_of("resnet18", torch.float64)
    student = spiking_twin(teacher_of("regnetx_002", torch.float64), 2, input_size=(3, 32, 32))
    distiller = HybridDistiller(teacher, student, ["layer1"], {"layer1": "s2"}, images=images_of(torch.float64)).train()
    moved, _ = train(distiller, stages_of(ScheduleConfig(name="progressive"), ["layer1"], 2)[0])
    assert moved == owned(set(distiller.state_dict()), "student.stem", "student.s1", "student.s2", "adapters.0")


class Interrupted(BaseException):
    """As a signal would: nothing catches it."""


SHORT = dict(teacher_train=dict(epochs=1, batch_size=32), eval_timesteps=[])


@pytest.fixture(scope="module")
def progressive(tmp_path_factory):
    """An uninterrupted run in four stages, of two epochs the second."""
    folder = tmp_path_factory.mktemp("progressive") / "r"
    schedule = dict(name="progressive", epochs=[1, 2, 1, 1], restart_lr=False)
    parts = dict(schedule=schedule, student=dict(timesteps=2), **SHORT)
    return folder, parts, distil(tiny(folder, **parts))


def test_a_progressive_run_has_one_learning_rate_curve_where_it_does_not_restart(progressive):
    folder, _, summary = progressive
    lines = [line for line in metrics_of(folder) if line["stage"] != "teacher"]
    expected = [0.5 * 0.05 * (1 + np.cos(np.pi * epoch / 5)) for epoch in range(5)]  # five epochs in all
    np.testing.assert_allclose([line["lr"] for line in lines], expected, rtol=1e-12)
    by_stage = {line["stage"]: line for line in lines}
    for tap, stage in zip(TAPS, by_stage, strict=False):
        assert summary["hybrid_top1"][tap] == by_stage[stage][f"hybrid_top1/{tap}"]
        assert "student_top1" not in by_stage[stage]
    assert summary["student_top1"] == by_stage["student"]["student_top1"]
    rows = {row["network"]: row["top1"] for row in summary["frontier"]}  # of each hybrid when its own training ended
    assert rows == {f"hybrid/{tap}": top1 for tap, top1 in summary["hybrid_top1"].items()} | {
        "teacher": summary["teacher_top1"], "student": summary["student_top1"]
    }  # fmt: skip
    assert list(rows) == ["teacher", *[f"hybrid/{tap}" for tap in TAPS], "student"]
    kept = {p.name for p in (folder / "checkpoints").iterdir()}
    assert kept - {"teacher"} == {"frontier.json", "student"}


@pytest.mark.parametrize(
    ("stage", "epoch"),
    [
        pytest.param("stage1_layer1", 1, marks=pytest.mark.slow),
        ("stage2_layer2", 1),
        pytest.param("stage2_layer2", 2, marks=pytest.mark.slow),
        ("student", 1),
    ],
)
def test_a_progressive_run_goes_on_in_the_stage_in_which_it_was_interrupted(
    progressive, tmp_path, monkeypatch, stage, epoch
):
    folder, parts, summary = progressive
    config = tiny(tmp_path / "r", **parts | {"teacher": dict(weights=str(folder / "teacher"))})
    append = RunFolder.append_metrics

    def stop(self, values):
        append(self, values)
        if (values["stage"], values["epoch"]) == (stage, epoch):
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunFolder, "append_metrics", stop)
        distil(config)
    resumed = distil(config, resume=True)
    assert equal(weights_of(tmp_path / "r"), weights_of(folder))
    for tap in TAPS:
        assert equal(weights_of(tmp_path / "r" / "hybrids", tap), weights_of(folder / "hybrids", tap))
    assert timeless(tmp_path / "r") == [line for line in timeless(folder) if line["stage"] != "teacher"]
    assert resumed["hybrid_top1"] == summary["hybrid_top1"] and resumed["frontier"] == summary["frontier"]


def test_a_stochastic_run_goes_on_with_the_draws_that_it_would_have_had(progressive, tmp_path, monkeypatch):
    folder, _, _ = progressive
    parts = dict(schedule=dict(name="stochastic"), teacher=dict(weights=str(folder / "teacher")), eval_timesteps=[])
    distil(tiny(tmp_path / "whole", **parts))
    append = RunFolder.append_metrics

    def stop(self, values):
        append(self, values)
        if values["epoch"] == 2:
            raise Interrupted

    config = tiny(tmp_path / "r", **parts)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunFolder, "append_metrics", stop)
        distil(config)
    distil(config, resume=True)
    assert equal(weights_of(tmp_path / "r"), weights_of(tmp_path / "whole"))
    assert timeless(tmp_path / "r") == timeless(tmp_path / "whole")
    line = metrics_of(tmp_path / "r")[0]
    drawn = {drawn_tap(0, step, TAPS) for step in range(4)}  # of the first epoch
    assert {name for name in line if name.startswith("loss/hybrid_ce/")} == {f"loss/hybrid_ce/{tap}" for tap in drawn}
