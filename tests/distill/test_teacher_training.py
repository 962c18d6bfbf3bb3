"""The analogue teacher: trained, kept, loaded again, and resumed."""

import json

import pytest
import torch
from toy_runs import TEACHER, equal, metrics_of, start, tiny, weights_of

from distill import RunConfig, TeacherConfig, TrainConfig
from distill.config import TeacherTrainingConfig
from distill.runs import RunFolder
from distill.teacher_training import run
from distill.teachers import build_teacher


def config_of(folder, **train):
    data = tiny(folder).data
    values = {**dict(epochs=2, batch_size=16, lr=0.05), **train}
    return TeacherTrainingConfig(
        run=RunConfig(dir=str(folder), trackers=[], compile=False, threads=1),
        data=data,
        teacher=TeacherConfig(**TEACHER),
        train=TrainConfig(**values),
    )


def train(config, resume=False):
    return run(config, start(config, resume), resume)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "r"
    return folder, train(config_of(folder))


def test_a_teacher_and_its_summary_are_kept(finished):
    folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["teacher_top1"] == metrics_of(folder)[-1]["teacher_top1"]
    assert [(line["stage"], line["epoch"]) for line in metrics_of(folder)] == [("teacher", 1), ("teacher", 2)]
    assert summary["classes"] == [*"0123456789"] and "torch" in summary["versions"]


def test_the_kept_teacher_can_be_built_again(finished):
    folder, _ = finished
    again = build_teacher(TeacherConfig(**TEACHER, weights=str(folder / "teacher")), 10)
    assert equal(again.state_dict(), weights_of(folder, "teacher"))
    spec = json.loads((folder / "teacher" / "config.json").read_text())
    assert spec["name"] == "resnet18" and spec["num_classes"] == 10 and spec["cifar_stem"] is True


def test_label_smoothing_enters_the_loss(finished, tmp_path):
    train(config_of(tmp_path / "r", label_smoothing=0.5))
    plain, smooth = metrics_of(finished[0])[0], metrics_of(tmp_path / "r")[0]
    assert plain["loss/total"] != smooth["loss/total"]


def test_training_starts_from_weights_where_there_are_any(finished, tmp_path):
    folder, _ = finished
    config = config_of(tmp_path / "r", epochs=1, lr=1e-9)
    weights = TeacherConfig(**TEACHER, weights=str(folder / "teacher"))
    train(TeacherTrainingConfig(run=config.run, data=config.data, teacher=weights, train=config.train))
    name = "layer1.0.conv1.weight"
    torch.testing.assert_close(
        weights_of(tmp_path / "r", "teacher")[name], weights_of(folder, "teacher")[name], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(finished, tmp_path, monkeypatch, epoch):
    folder, summary = finished
    append = RunFolder.append_metrics

    def stop(self, values):
        append(self, values)
        if values["epoch"] == epoch:
            raise KeyboardInterrupt

    config = config_of(tmp_path / "r")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "append_metrics", stop)
        train(config)
    assert train(config, resume=True)["teacher_top1"] == summary["teacher_top1"]
    assert equal(weights_of(tmp_path / "r", "teacher"), weights_of(folder, "teacher"))
    assert [line["epoch"] for line in metrics_of(tmp_path / "r")] == [1, 2]
