"""Each section refuses what cannot be, and says what can."""

import dataclasses
import re

import pytest

from distill import (
    DataConfig,
    DistillConfig,
    InitConfig,
    LossConfig,
    RunConfig,
    SnnLossConfig,
    SnnTrainingConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from distill.config import TeacherTrainingConfig

SECTIONS = [
    *(RunConfig, TeacherConfig, StudentConfig, LossConfig, SnnLossConfig, InitConfig, TrainConfig),
    *(DistillConfig, TeacherTrainingConfig, SnnTrainingConfig),
]
POISSON_AND_NOISE = dict(student=StudentConfig(encoder="poisson"), data=DataConfig(random_erasing=0.5))

REFUSED = [
    (RunConfig, dict(seed=-1), "seed must be at least 0, found -1"),
    (RunConfig, dict(name="a/b"), "name must be a folder's name, without / or \\, found 'a/b'"),
    (RunConfig, dict(name=""), "name"),
    (RunConfig, dict(threads=0), "threads must be at least 1"),
    (TeacherConfig, dict(pretrained=True, weights="w"), "weights must be none with pretrained"),
    (TeacherConfig, dict(input_size=[32, 32]), "input_size must be [channels, height, width]"),
    (TeacherConfig, dict(input_size=[3, 0, 32]), "input_size"),
    (TeacherConfig, dict(input_size=[3, 8, 8], mean=[0.5]), "mean must be 3 numbers"),
    (TeacherConfig, dict(input_size=[1, 8, 8], std=[0.5, 0.5]), "std must be 1 numbers"),
    (TeacherConfig, dict(std=[0.5, 0.0]), "std must be above 0"),
    (TeacherConfig, dict(crop_pct=0.0), "crop_pct must be in (0, 1]"),
    (TeacherConfig, dict(crop_pct=1.1), "crop_pct must be in (0, 1]"),
    (StudentConfig, dict(timesteps=0), "timesteps must be at least 1, found 0"),
    (StudentConfig, dict(algorithm="rate"), "algorithm must be one of ('rate_m', 'rate_s', 'bptt', 'ottt', "),
    (StudentConfig, dict(algorithm="ottt"), "one of ('rate_m', 'rate_s', 'bptt') for a twin, found 'ottt'"),
    (StudentConfig, dict(width=8), "width must be none for a twin, which is as wide as its analogue network, found 8"),
    (StudentConfig, dict(width=0, name="resnet18_cifar"), "width must be at least 1, or none, found 0"),
    (StudentConfig, dict(gates="keep", algorithm="rate_s"), "gates must be refuse with rate_s"),
    (SnnLossConfig, dict(label_smoothing=1.0), "label_smoothing must be in [0, 1), found 1.0"),
    (SnnLossConfig, dict(label_smoothing=0.1, name="tet"), "label_smoothing must be 0 with tet, found 0.1"),
    (SnnLossConfig, dict(tet_lambda=1.1), "tet_lambda must be in [0, 1], found 1.1"),
    (StudentConfig, dict(name="resnet"), "name must be one of ['twin', "),
    (LossConfig, dict(student_ce=-0.1), "student_ce must be at least 0"),
    (LossConfig, dict(student_kd=-0.1), "student_kd must be at least 0"),
    (LossConfig, dict(hybrid_ce=-0.1), "hybrid_ce must be at least 0"),
    (LossConfig, dict(hybrid_kd=-0.1), "hybrid_kd must be at least 0"),
    (LossConfig, dict(temperature=0.0), "temperature must be above 0, found 0.0"),
    (
        DistillConfig,
        dict(student=StudentConfig(encoder="poisson", init="calibrated")),
        "student.encoder must be direct with student.init=calibrated",
    ),
    (TrainConfig, dict(epochs=0), "epochs must be at least 1"),
    (TrainConfig, dict(batch_size=0), "batch_size must be at least 1"),
    (TrainConfig, dict(accumulate=0), "accumulate must be at least 1"),
    (TrainConfig, dict(lr=0.0), "lr must be above 0"),
    (TrainConfig, dict(min_lr=-0.1), "min_lr must be at least 0"),
    (TrainConfig, dict(lr=0.002, min_lr=0.01), "min_lr must be at most lr, 0.002, found 0.01"),
    (TrainConfig, dict(momentum=-0.1), "momentum must be at least 0"),
    (TrainConfig, dict(weight_decay=-0.1), "weight_decay must be at least 0"),
    (TrainConfig, dict(warmup_steps=-1), "warmup_steps must be at least 0"),
    (TrainConfig, dict(clip=0.0), "clip must be above 0, or none"),
    (TrainConfig, dict(label_smoothing=1.0), "label_smoothing must be in [0, 1)"),
    (DistillConfig, dict(eval_timesteps=[4, 0]), "eval_timesteps must be at least 1 each, found [4, 0]"),
    (
        DistillConfig,
        dict(student=StudentConfig(name="resnet18_cifar", algorithm="sltt")),
        "student.algorithm must be one of ('rate_m', 'rate_s', 'bptt', 'dsr', 'ide', 'spide') in distillation "
        "(a backward pass each step: train it with scripts/train_snn.py), found 'sltt'",
    ),
    (DistillConfig, POISSON_AND_NOISE, "data.random_erasing must be 0 with student.encoder=poisson"),
    (SnnTrainingConfig, POISSON_AND_NOISE, "data.random_erasing must be 0 with student.encoder=poisson"),
    (SnnTrainingConfig, dict(eval_timesteps=[0]), "eval_timesteps must be at least 1 each, found [0]"),
    (
        SnnTrainingConfig,
        dict(loss=SnnLossConfig(name="tet")),
        "loss.name must be ce with rate_m, whose gradient is that of the mean logits alone "
        "(tet takes ('bptt', 'ottt', 'sltt')), found 'tet'",
    ),
    (SnnTrainingConfig, dict(train=TrainConfig(label_smoothing=0.1)), "train.label_smoothing must be 0 for a spiking"),
    (
        SnnTrainingConfig,
        dict(student=StudentConfig(name="resnet18_cifar"), ann=TeacherConfig(weights="w")),
        "ann.weights must be none with resnet18_cifar",
    ),
]


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_frozen_and_take_keywords_only(section):
    config = section()
    field = dataclasses.fields(section)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, getattr(config, field))
    with pytest.raises(TypeError):
        section(getattr(config, field))


@pytest.mark.parametrize(
    ("section", "values", "message"), REFUSED, ids=lambda v: None if isinstance(v, type) else str(v)
)
def test_a_bad_value_is_refused_with_the_allowed_ones(section, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        section(**values)


def test_the_limits_themselves_are_allowed():
    RunConfig(seed=0, threads=1)
    TeacherConfig(input_size=[1, 1, 1], mean=[0.0], std=[1e-6], crop_pct=1.0)
    StudentConfig(timesteps=1, name="resnet18_cifar", algorithm="bptt")
    LossConfig(student_ce=0.0, student_kd=0.0, hybrid_ce=0.0, hybrid_kd=0.0, temperature=1e-3)
    TrainConfig(epochs=1, batch_size=1, accumulate=1, min_lr=0.0, momentum=0.0, weight_decay=0.0, warmup_steps=0)
    DistillConfig(eval_timesteps=[])


def test_sections_share_no_mutable_default():
    first, second = DistillConfig(), DistillConfig()
    assert first == second
    first.run.trackers.append("wandb")
    assert second.run.trackers == ["tensorboard"] and DataConfig() == second.data
