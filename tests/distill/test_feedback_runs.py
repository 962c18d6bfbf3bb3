"""Whole runs of feedback networks: what they log, that they repeat and go on, what ends them, how they are judged."""

import dataclasses
import json

import pytest
import torch
from test_snn_training import config_of, stopped, train
from toy_runs import equal, forget_accelerate, metrics_of, timeless, weights_of

import models
from distill import DataConfig, StudentConfig
from distill.config import EvaluationConfig
from distill.html_report import write_report
from distill.saved_evaluation import run as evaluate
from models import FeedbackConfig, NeuronConfig, NonContractingLoopError
from models.feedback import loop as loops

NEURON = NeuronConfig(leak=1.0, threshold=1.0)
LOOP = FeedbackConfig(backward_timesteps=6, gradient_scale=20.0, readout_side=4)
BROYDEN = dataclasses.replace(LOOP, solver="broyden")
STUDENT = dict(name="feedback_convnet", width=8, timesteps=3, neuron=NEURON, feedback=LOOP)


def of(folder, algorithm="ide", **parts):
    student = {**STUDENT, "algorithm": algorithm, **parts.pop("student", {})}
    return config_of(folder, student=student, **parts)


@pytest.fixture(scope="module", params=["ide", "spide"])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "r"
    return folder, request.param, train(of(folder, request.param))


def test_each_epoch_logs_how_the_backward_passes_went(finished):
    folder, algorithm, summary = finished
    logged = {"iterations/loop", "residual/loop", "converged/loop", "growth/loop"}
    logged |= {"firing_rate/loop.neurons.0"} if algorithm == "spide" else set()
    for line in metrics_of(folder):
        found = {name.removeprefix("backward/"): v for name, v in line.items() if name.startswith("backward/")}
        assert found.keys() == logged and 0 <= found["converged/loop"] <= 1 and 0 < found["growth/loop"] < 1
        if algorithm == "spide":
            assert found["iterations/loop"] == 6 and 0 < found["firing_rate/loop.neurons.0"] < 1
        else:
            assert 1 <= found["iterations/loop"] <= 30
    assert summary["backward"] == found and summary["algorithm"] == algorithm  # of the last epoch
    assert json.loads((folder / "summary.json").read_text())["backward"] == found


def test_the_report_says_how_the_backward_passes_went(finished):
    folder, algorithm, summary = finished
    page = write_report(folder).read_text()
    assert "Backward pass" in page and "of the batches" in page
    if algorithm == "spide":
        rate = summary["backward"]["firing_rate/loop.neurons.0"]
        assert f"{100 * rate:.1f} % of the neurons fire in a step, 6.00 steps" in page


def test_what_is_logged_is_the_mean_over_the_batches(tmp_path, monkeypatch):
    seen, take = [], models.FeedbackLoop.take_backward_figures

    def look(self):
        assert take(self) and not take(self)  # it is told once
        seen.append({"iterations": torch.tensor(float(len(seen))), "firing_rate/part": torch.tensor(0.5)})
        return seen[-1]

    monkeypatch.setattr(models.FeedbackLoop, "take_backward_figures", look)
    train(of(tmp_path / "r", eval_timesteps=[]))
    first, second = metrics_of(tmp_path / "r")  # four batches each: 0 to 3, 4 to 7
    assert (first["backward/iterations/loop"], second["backward/iterations/loop"]) == (1.5, 5.5)
    assert second["backward/firing_rate/loop.part"] == 0.5


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(finished, tmp_path, monkeypatch):
    folder, algorithm, _ = finished
    config = of(tmp_path / "cut", algorithm)
    stopped(config, monkeypatch, epoch=2)
    train(config, resume=True)
    assert equal(weights_of(tmp_path / "cut"), weights_of(folder))
    assert timeless(tmp_path / "cut") == timeless(folder)


def test_a_loop_without_an_equilibrium_ends_the_run_and_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    strict = dict(feedback=dataclasses.replace(LOOP, patience=1))
    solve, calls = loops.SOLVERS["fixed_point"], []

    def grows(turn, grad, *settings):
        beta, report = solve(turn, grad, *settings)
        calls.append(report)
        return beta, dataclasses.replace(report, growth=1.5) if len(calls) == 6 else report

    with monkeypatch.context() as patch:
        patch.setitem(loops.SOLVERS, "fixed_point", grows)
        with pytest.raises(NonContractingLoopError) as e:
            train(of(tmp_path / "r", student=strict))
    text = str(e.value)
    assert "multiplies the gradient by 1.5" in text and "in step 6 (epoch 2) of the student" in text
    assert "the last good checkpoint is" in text and "epoch_0001" in text and "--resume --allow-changed" in text
    assert not (tmp_path / "r" / "summary.json").exists() and len(metrics_of(tmp_path / "r")) == 1
    train(of(tmp_path / "r", student=strict), resume=True)
    train(of(tmp_path / "whole", student=strict))
    assert equal(weights_of(tmp_path / "r"), weights_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    "parts",
    [
        dict(student=dict(encoder="poisson"), run=dict(mixed_precision="bf16"), train=dict(accumulate=2, clip=1.0)),
        dict(student=dict(feedback=BROYDEN), train=dict(ema=0.5, freeze_norms=True)),
        dict(student=dict(neuron=NeuronConfig(leak=0.9, threshold=0.8)), loss=dict(gradient_scale="1/T")),
    ],
    ids=["poisson bfloat16 accumulate", "broyden average", "leak"],
)
@pytest.mark.parametrize("algorithm", ["ide", "spide"])
def test_other_configurations_run_end_to_end(tmp_path, algorithm, parts):
    parts = {name: dict(values) for name, values in parts.items()}
    parts["train"] = {**dict(epochs=1, batch_size=32), **parts.get("train", {})}
    summary = train(of(tmp_path / "r", algorithm, data=dict(max_eval_samples=12), eval_timesteps=[], **parts))
    assert summary["backward"] and summary["firing_rates"].keys() == {"loop.neurons.0"}
    assert models.load_snn(tmp_path / "r" / "student").algorithm == algorithm


def test_a_trained_network_is_judged_at_any_number_of_steps(finished):
    folder, algorithm, summary = finished
    snn = models.load_snn(folder / "student")
    assert snn.spec["feedback"]["backward_timesteps"] == 6 and snn.algorithm == algorithm
    forget_accelerate()
    data = DataConfig(max_train_samples=64, max_eval_samples=30)
    options = dict(model=str(folder / "student"), data=data, timesteps=[1, 6], threads=1, recalibration_images=32)
    found = evaluate(EvaluationConfig(**options, recalibrate=algorithm == "ide"))
    assert list(found["top1_by_timesteps"]) == [1, 3, 6]
    exits = found["early_exit"]
    assert exits and all(1 <= row["mean_steps"] <= 6 for row in exits["thresholds"])
    if algorithm == "spide":
        assert found["top1_by_timesteps"][3] == pytest.approx(summary["student_top1"], abs=100 / 30 + 1e-6)
        with pytest.raises(ValueError, match="no batch norms with running statistics"):
            evaluate(EvaluationConfig(**options, recalibrate=True))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            dict(algorithm="rate_m"),
            r"algorithm.*\('ide', 'spide'\) for feedback_convnet, which has a feedback loop.*'rate_m'",
        ),
        (dict(name="resnet18_cifar"), r"algorithm.*for resnet18_cifar, which has no feedback loop, found 'ide'"),
        (dict(name="twin", width=None), r"algorithm.*for a twin, found 'ide'"),
        (dict(name="feedback_vgg"), r"name.*feedback_alexnet.*found 'feedback_vgg'"),
        (dict(neuron=NeuronConfig(reset="hard")), r"neuron\.reset.*soft for feedback_convnet"),
        (dict(neuron=NeuronConfig(learnable_leak=True)), r"neuron\.learnable_leak.*false for feedback_convnet"),
        (dict(init="calibrated"), r"init.*teacher or scratch for feedback_convnet"),
    ],
)
def test_a_student_that_cannot_be_is_refused(student, message):
    with pytest.raises(ValueError, match=message):
        StudentConfig(**{**STUDENT, "algorithm": "ide", **student})


def test_what_a_feedback_network_does_not_go_with_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"loss\.name.*ce with ide"):
        of(tmp_path, loss=dict(name="tet"))
    for parts, message in (
        (dict(train=dict(grad_checkpointing=True)), "rate_m"),
        (dict(run=dict(mixed_precision="fp16")), r"no or bf16 with feedback_convnet, found 'fp16'"),
    ):
        with pytest.raises(ValueError, match=message):
            train(of(tmp_path / "r", **parts))
    assert not (tmp_path / "r").exists()
    other = of(tmp_path / "other", train=dict(epochs=1), eval_timesteps=[])
    train(other)
    forget_accelerate()
    with pytest.raises(ValueError, match=r"init\.from_run.*another network"):
        train(of(tmp_path / "r", student=dict(width=16), from_run=str(tmp_path / "other")))
