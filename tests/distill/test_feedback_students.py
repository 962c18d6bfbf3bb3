"""Feedback networks under a teacher: hybrids in front of the loop and at its end, and where there can be none."""

import pytest
import torch
from test_feedback_runs import LOOP, NEURON
from torch import nn
from toy_feedback import with_stem
from toy_runs import distil, forget_accelerate, metrics_of, tiny

import models
from distill import DataConfig, HybridDistiller, LossConfig, distillation_losses, load_hybrid
from distill.config import EvaluationConfig
from distill.saved_evaluation import run as evaluate
from distill.schedules import Stage, end_stages, prepare_stage

STUDENT = dict(name="feedback_convnet", width=8, timesteps=3, neuron=NEURON, feedback=LOOP, algorithm="ide")
TAPS = {"layer1": "stem", "layer3": "loop"}
SIZE = (3, 16, 16)


@pytest.fixture(scope="module")
def distiller():
    torch.manual_seed(0)
    teacher = models.create_ann("resnet18", 5, 3, cifar_stem=True, kwargs={"channels": [8, 8, 8, 8]}).double()
    nn.init.normal_(teacher.fc.weight)
    student = with_stem().double().train()
    images = torch.randn(4, *SIZE, dtype=torch.float64)
    made = HybridDistiller(teacher, student, [*TAPS], TAPS, images=images).train()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    made(images)  # the batch norms' statistics: neurons fire
    return made


def gradients(distiller, **options):
    images = torch.randn(4, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    distiller.zero_grad()
    outputs = distiller.train()(images, **options)
    parts = distillation_losses(outputs, torch.arange(4), LossConfig(student_ce=0.0, student_kd=0.0))
    parts["total"].backward()
    return {n.split(".")[0] for n, p in distiller.student.named_parameters() if p.grad is not None and p.grad.any()}


def test_a_hybrid_in_front_of_the_loop_trains_what_lies_in_front_of_it(distiller):
    assert gradients(distiller, active=["layer1"], student=False) == {"stem"}


def test_a_hybrid_at_the_loop_trains_the_loop_and_what_lies_in_front_of_it(distiller):
    assert gradients(distiller, active=["layer3"], student=False) == {"stem", "loop"}
    assert gradients(distiller, active=["layer1", "layer3"], student=True) == {"stem", "loop"}


@torch.no_grad()
def test_a_hybrid_of_its_own_gives_the_distillers_logits(distiller):
    images = torch.randn(3, *SIZE, dtype=torch.float64)
    hybrid = distiller.hybrid("layer3").eval()
    expected = distiller.eval()(images).hybrid_logits["layer3"]
    torch.testing.assert_close(hybrid(images), expected)
    torch.testing.assert_close(hybrid.cumulative_logits(images)[-1], expected)
    distiller.train()


def test_what_a_stage_has_trained_stays_as_it_is_the_feedback_too(distiller):
    stage = Stage(name="student", taps=(), student=True, draw=False, epochs=1)
    prepare_stage(distiller, stage, torch.randn(1, *SIZE, dtype=torch.float64), freeze=True)
    student = distiller.train().student
    for name in ("stem.1", "loop", "loop.input_map.norm", "loop.maps.0.norm", "loop.feedback", "loop.feedback.drop"):
        assert not student.get_submodule(name).training, name
    assert student.training and student.classifier.training
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}
    end_stages(distiller)


@pytest.mark.parametrize("inside", ["loop.neurons.1", "loop.maps.0", "loop.feedback", "loop.feedback.linear"])
def test_there_is_no_tap_inside_of_a_loop(distiller, inside):
    images = torch.randn(2, *SIZE, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"'{inside}' is inside of a feedback loop, 'loop'.*Name 'loop' itself"):
        HybridDistiller(distiller.teacher, distiller.student, ["layer2"], {"layer2": inside}, images=images)


@pytest.fixture(scope="module", params=["ide", "spide"])
def distilled(request, tmp_path_factory):
    """The papers' network has no stem: its only tap is the end of the loop."""
    folder = tmp_path_factory.mktemp(request.param) / "r"
    student = STUDENT | dict(algorithm=request.param)
    config = tiny(folder, student=student, taps=["layer3"], train=dict(epochs=2, batch_size=16, lr=0.05))
    return folder, distil(config)


def test_a_teacher_teaches_a_feedback_network(distilled):
    folder, summary = distilled
    assert list(summary["hybrid_top1"]) == ["layer3"] and summary["algorithm"] in models.FEEDBACK_ALGORITHMS
    lines = [line for line in metrics_of(folder) if line["stage"] == "student"]
    assert all("backward/residual/loop" in line and "loss/hybrid_kd/layer3" in line for line in lines)
    assert summary["backward"]["residual/loop"] == lines[-1]["backward/residual/loop"]
    assert "firing_rate/loop.neurons.0" in lines[-1]
    rows = {row["network"]: row for row in summary["frontier"]}
    assert rows["student"]["acs"] > 0 and rows["hybrid/layer3"]["acs"] > 0


def test_its_hybrid_is_judged_as_others_are(distilled):
    folder, summary = distilled
    hybrid = load_hybrid(folder / "hybrids" / "layer3")
    assert hybrid.student_tap == "loop"
    forget_accelerate()
    data = DataConfig(max_train_samples=64, max_eval_samples=30)
    found = evaluate(EvaluationConfig(model=str(folder / "hybrids" / "layer3"), data=data, timesteps=[1], threads=1))
    assert found["top1_by_timesteps"][3] == pytest.approx(summary["hybrid_top1"]["layer3"], abs=100 / 30 + 1e-6)


def test_the_stages_of_a_teacher_are_all_at_the_loop(tmp_path):
    config = tiny(tmp_path / "r", student=STUDENT, train=dict(epochs=1, batch_size=32), eval_timesteps=[])
    assert list(distil(config)["hybrid_top1"]) == ["layer1", "layer2", "layer3"]
    for tap in ("layer1", "layer2", "layer3"):
        assert load_hybrid(tmp_path / "r" / "hybrids" / tap).student_tap == "loop"


def test_plain_logit_distillation_has_no_taps(tmp_path):
    config = tiny(tmp_path / "r", student=STUDENT, taps=[], train=dict(epochs=1, batch_size=32), eval_timesteps=[])
    summary = distil(config)
    assert summary["hybrid_top1"] == {} and "loss/student_kd" in metrics_of(tmp_path / "r")[-1]


def test_a_float16_run_is_refused_before_anything_is_written(tmp_path):
    config = tiny(tmp_path / "r", student=STUDENT, run=dict(mixed_precision="fp16"))
    with pytest.raises(ValueError, match="no or bf16 with feedback_convnet"):
        distil(config)
    assert not (tmp_path / "r").exists()
