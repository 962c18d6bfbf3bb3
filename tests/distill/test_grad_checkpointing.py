"""Runs with `train.grad_checkpointing`: they leave the weights and the figures of runs without it."""

import dataclasses

import pytest
import timm
from test_snn_training import config_of as snn_config
from test_teacher_training import config_of as teacher_config
from toy_runs import equal, start, timeless, tiny, weights_of

import distill.distillation
import distill.snn_training
import distill.teacher_training
import models.checkpointing
from distill.teacher_training import checkpoint_blocks


@pytest.fixture
def blocks_run(monkeypatch):
    """How often a block ran under checkpointing."""
    calls = []
    real = models.checkpointing.checkpoint
    monkeypatch.setattr(models.checkpointing, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def with_checkpointing(config):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, grad_checkpointing=True))


@pytest.mark.parametrize(
    ("run", "make"),
    [(distill.snn_training.run, snn_config), (distill.distillation.run, tiny)],
    ids=["alone", "distilled"],
)
def test_a_student_ends_with_the_same_weights_and_figures(run, make, tmp_path, blocks_run):
    plain, ours = make(tmp_path / "plain"), with_checkpointing(make(tmp_path / "ours"))
    run(plain, start(plain, False), False)
    assert not blocks_run
    run(ours, start(ours, False), False)
    assert blocks_run
    assert equal(weights_of(tmp_path / "ours", "student"), weights_of(tmp_path / "plain", "student"))
    assert timeless(tmp_path / "ours") == timeless(tmp_path / "plain")


def test_a_teacher_trains_with_timms_own_and_ends_without(tmp_path, monkeypatch):
    switched = []
    resnet = timm.models.resnet.ResNet
    real = resnet.set_grad_checkpointing
    monkeypatch.setattr(resnet, "set_grad_checkpointing", lambda s, on=True: switched.append(on) or real(s, on))
    config = with_checkpointing(teacher_config(tmp_path / "r", epochs=1))
    distill.teacher_training.run(config, start(config, False), False)
    assert switched == [True, False]


def test_networks_that_timm_does_not_checkpoint_are_refused():
    with pytest.raises(ValueError, match="grad_checkpointing must be false for a VGG"):
        checkpoint_blocks(timm.create_model("vgg11", num_classes=2))


def test_an_algorithm_without_it_is_refused_before_a_folder_is_made(tmp_path):
    config = with_checkpointing(snn_config(tmp_path / "r", student=dict(algorithm="rate_s"), ann={}))
    with pytest.raises(ValueError, match=r"gradient checkpointing goes with one of .*found 'rate_s'"):
        distill.snn_training.run(config, start(config, False), False)
    assert not (tmp_path / "r").exists()
