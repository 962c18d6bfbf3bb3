"""Evaluation from a run's folder: the figures of the run itself, for students and hybrids."""

import json

import pytest
import torch
from toy_runs import distil, forget_accelerate, tiny

import models
from distill import DataConfig, TeacherConfig
from distill.config import EvaluationConfig
from distill.saved_evaluation import evaluation_table, load_network, run

DATA = DataConfig(max_train_samples=64, max_eval_samples=30)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "r"
    train = dict(epochs=3, batch_size=32, lr=0.1)
    return folder, distil(tiny(folder, data=dict(max_train_samples=256), train=train, teacher_train=train))


def evaluate(model, **options):
    forget_accelerate()
    return run(EvaluationConfig(model=str(model), data=DATA, threads=1, **options))


def close(value):
    return pytest.approx(value, abs=100 / 30 + 1e-6)  # one image: rounding may flip a spike


def test_a_students_figures_are_those_of_its_run(finished, tmp_path):
    folder, summary = finished
    teacher = TeacherConfig(
        kwargs={"channels": [8, 8, 8, 8]}, cifar_stem=True, input_size=[1, 8, 8], weights=str(folder / "teacher")
    )
    out = tmp_path / "deep" / "figures.json"
    found = evaluate(folder / "student", timesteps=[1, 3], teacher=teacher, out=str(out))
    assert list(found["top1_by_timesteps"]) == [1, 2, 3] and found["timesteps"] == 2 and found["kind"] == "student"
    assert found["top1_by_timesteps"][2] == close(summary["student_top1"])
    assert found["top1_by_timesteps"][1] == close(summary["student_top1_by_timesteps"][1])
    assert found["agreement_by_timesteps"][2] == close(summary["student_agreement"])
    assert found["teacher_top1"] == close(summary["teacher_top1"])
    assert found["firing_rates"].keys() == summary["firing_rates"].keys() and found["images"] == 30
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))


def test_a_hybrids_figures_are_those_of_its_run_and_its_rates_those_of_the_layers_that_run(finished):
    folder, summary = finished
    for tap in ("layer1", "layer3"):
        found = evaluate(folder / "hybrids" / tap)
        assert found["kind"] == "hybrid" and found["top1_by_timesteps"] == {2: close(summary["hybrid_top1"][tap])}
        assert "agreement_by_timesteps" not in found
        layers = {name.split(".")[1] for name in found["firing_rates"]}
        assert layers == {"act1", "layer1"} | ({"layer2", "layer3"} if tap == "layer3" else set())


def test_the_table_has_a_row_for_each_number_of_time_steps():
    result = dict(
        timesteps=2, images=10, mean_firing_rate=0.125, top1_by_timesteps={1: 50.0, 2: 75.0}, teacher_top1=80.0,
        agreement_by_timesteps={1: 55.0, 2: 65.0},
    )  # fmt: skip
    lines = evaluation_table(result).splitlines()
    assert lines[1].split() == ["1", "50.00", "55.00"] and lines[2].split() == ["2", "75.00", "65.00", "*"]
    assert "teacher: 80.00 %" in lines and "mean firing rate: 12.5 %" in lines[-1] and "10 images" in lines[3]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"mean": [0.3], "std": [0.4]}, r"does not say how images are made: extra\.input_size is missing"),
        (
            {"input_size": [1, 8, 8], "mean": [0.3], "std": [0.4], "classes": ["cat", "0"]},
            r"knows 2 classes, the data has 10; not in both: \['1', '2', '3'\]",
        ),
        (
            {"input_size": [1, 8, 8], "mean": [0.3], "std": [0.4], "classes": [*"1023456789"]},
            "knows 10 classes, the data has 10, in another order",
        ),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_refused(tmp_path, extra, message):
    snn = models.create_snn("resnet18_cifar", len(extra.get("classes", [0] * 10)), 2, 1, width=8)
    models.save_snn(snn, tmp_path, extra)
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path)


def test_a_folder_without_a_network_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no saved network: config\.json is missing"):
        load_network(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ValueError, match="is no configuration of a network"):
        load_network(str(tmp_path))


def test_the_configuration_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="timesteps must be at least 1 each"):
        EvaluationConfig(model="x", timesteps=[0])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        EvaluationConfig(model="x", batch_size=0)


def test_evaluation_leaves_the_network_at_its_own_number_of_time_steps(finished):
    folder, _ = finished
    snn = load_network(str(folder / "student"))
    assert snn.timesteps == 2 and not snn.training and snn(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
