"""The analogue teacher: trained, kept, loaded again, and resumed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_runs import TEACHER, equal, metrics_of, start, timeless, tiny, weights_of

from distill import DataConfig, RunConfig, TeacherConfig, TrainConfig
from distill.config import TeacherTrainingConfig
from distill.runs import RunFolder
from distill.teacher_training import run
from distill.teachers import build_teacher, teacher_preprocessing


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
    assert spec["extra"]["classes"] == [*"0123456789"]


def test_the_images_of_a_teacher_are_said_and_kept_with_it(tmp_path, capsys):
    config = config_of(tmp_path / "r", epochs=1)
    made = dict(interpolation="bicubic", crop_pct=0.9, crop_mode="squash")
    train(dataclasses.replace(config, teacher=TeacherConfig(**TEACHER, **made)))
    line = "images: 1x8x8, mean [0.3], std [0.4], interpolation bicubic, crop_pct 0.9, crop_mode squash"
    assert line in capsys.readouterr().err.splitlines()
    silent = {name: TEACHER[name] for name in ("kwargs", "cifar_stem")}
    kept = TeacherConfig(**silent, weights=str(tmp_path / "r" / "teacher"))
    assert teacher_preprocessing(kept) == teacher_preprocessing(TeacherConfig(**TEACHER, **made))


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


BROKEN = ("train/a/5.png", "train/b/3.png", "train/b/5.png", "val/b/1.png")


@pytest.fixture(scope="module")
def with_broken_images(tmp_path_factory):
    """A configuration, but for its folder, of six images of each of two classes, of which some are no images."""
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for number in range(6):
                pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / split / label / f"{number}.png")
    for name in BROKEN:
        (folder / name).write_bytes(b"")
    data = DataConfig(name="folder", root=str(folder), on_corrupt="skip", in_memory=False, workers=0)
    return lambda run: dataclasses.replace(
        config_of(run, batch_size=4),
        run=RunConfig(dir=str(run), trackers=[], compile=False, threads=1, save_every="1 steps"),
        data=data,
    )


def test_skipped_images_are_in_the_summary_after_an_interruption_too(with_broken_images, tmp_path, monkeypatch, capsys):
    whole = train(with_broken_images(tmp_path / "whole"))
    assert ["/".join(Path(name).parts[-3:]) for name in whole["skipped_images"]] == [*BROKEN]
    assert json.loads((tmp_path / "whole" / "summary.json").read_text()) == whole
    assert "4 images could not be read and were left out" in capsys.readouterr().err
    append = RunFolder.append_metrics

    def stop(self, values):
        if values["epoch"] == 2:  # every batch was trained on: the rest of the run meets none of the broken images
            raise KeyboardInterrupt
        append(self, values)

    config = with_broken_images(tmp_path / "cut")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "append_metrics", stop)
        train(config)
    assert train(config, resume=True) == whole
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    assert equal(weights_of(tmp_path / "cut", "teacher"), weights_of(tmp_path / "whole", "teacher"))
    (tmp_path / "cut" / "summary.json").unlink()  # and where the teacher is finished, but what follows it is not
    assert train(config, resume=True) == whole
