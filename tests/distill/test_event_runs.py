"""Whole runs on event data: the spiking network sees frames, the teacher their sum over time."""

import json

import pytest
import torch
from toy_events import striped_tar
from toy_runs import forget_accelerate, start

import models
from distill import (
    DataConfig,
    DistillConfig,
    HybridDistiller,
    InitConfig,
    RunConfig,
    SnnTrainingConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    distillation,
    load_hybrid,
    snn_training,
    teacher_training,
)
from distill.adapter_start import start_adapters
from distill.config import EvaluationConfig, TeacherTrainingConfig
from distill.data import load_data
from distill.hybrid_network import save_hybrid
from distill.saved_evaluation import run as evaluate
from distill.teachers import teacher_preprocessing

T, SIZE = 3, 16
ANN = dict(input_size=[2, SIZE, SIZE], mean=[0.0, 0.0], std=[1.0, 1.0])
TEACHER = TeacherConfig(kwargs={"channels": [8, 8, 8, 8]}, cifar_stem=True, **ANN)
TRAIN = dict(epochs=4, batch_size=8, lr=0.05, warmup_steps=2)
TEACHER_TRAIN = TRAIN | dict(epochs=12, optimizer="adamw", lr=0.01)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("events")
    tar = striped_tar(folder / "stripes.tar", train=12, test=5)
    return DataConfig(name="nmnist", root=str(tar), cache=str(folder / "cache"), event_shift=1)


def run_of(folder):
    return RunConfig(dir=str(folder), trackers=[], compile=False, threads=1)


def alone(folder, data, size=SIZE, **student):
    student = StudentConfig(**{**dict(name="vggsnn_cifar", width=8, timesteps=T), **student})
    return SnnTrainingConfig(
        run=run_of(folder), data=data,
        ann=TeacherConfig(**ANN | dict(input_size=[2, size, size])),
        student=student, train=TrainConfig(**TRAIN),
    )  # fmt: skip


def train(config):
    return snn_training.run(config, start(config), False)


@pytest.mark.parametrize("algorithm", models.ALGORITHMS)
def test_every_algorithm_trains_on_frames(data, tmp_path, algorithm):
    name = "feedback_convnet" if algorithm in models.FEEDBACK_ALGORITHMS else "vggsnn_cifar"
    config = alone(tmp_path / "r", data, algorithm=algorithm, name=name)
    first, *_, last = train(config), *losses(tmp_path / "r")
    assert last < losses(tmp_path / "r")[0]
    assert list(first["student_top1_by_timesteps"]) == [T]  # eval_timesteps is left out: other T, other frames


def test_the_papers_network_for_events_trains_on_frames_of_its_size(data, tmp_path):
    config = alone(tmp_path / "r", data, size=48, name="vggsnn_dvs")
    assert train(config)["student_top1"] == 100
    assert losses(tmp_path / "r")[-1] < losses(tmp_path / "r")[0]
    card = (tmp_path / "r" / "student" / "README.md").read_text()
    assert "event frames (T, B, C, H, W)" in card


def losses(folder):
    return [json.loads(line)["loss/total"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_trained_network_is_evaluated_on_frames_of_any_number(data, tmp_path):
    summary = train(alone(tmp_path / "r", data))
    assert summary["student_top1"] == 100  # left or right
    forget_accelerate()
    options = dict(model=str(tmp_path / "r" / "student"), threads=1)
    found = evaluate(EvaluationConfig(data=data, timesteps=[1, 6], **options))
    assert found["top1_by_timesteps"][T] == 100 and list(found["top1_by_timesteps"]) == [1, T, 6]
    snn = models.load_snn(tmp_path / "r" / "student")
    assert snn.spec["extra"]["input_size"] == [2, SIZE, SIZE]
    frames = load_data(data, teacher_preprocessing(TEACHER), 0, 6).eval
    snn.timesteps = 6
    stream = torch.stack([frames[i][0] for i in range(len(frames))], 1)
    with torch.no_grad():
        right = (snn(stream).argmax(1) == torch.tensor(frames.labels)).float().mean()
    assert found["top1_by_timesteps"][6] == pytest.approx(100 * right.item())


@pytest.fixture(scope="module")
def distilled(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled") / "r"
    config = DistillConfig(
        run=run_of(folder), data=data, teacher=TEACHER, student=StudentConfig(timesteps=T),
        teacher_train=TrainConfig(**TEACHER_TRAIN), train=TrainConfig(**TRAIN | dict(epochs=8)),
        taps=["layer1", "layer2"], init=InitConfig(adapters="regression", calibration_images=16),
    )  # fmt: skip
    summary = distillation.run(config, start(config), False)
    forget_accelerate()
    return folder, summary


def test_a_teacher_of_sums_teaches_a_student_of_frames(distilled):
    folder, summary = distilled
    # of ten recordings, by chance two; how many exactly depends on a processor's rounding, which flips spikes
    assert summary["teacher_top1"] == 100 and summary["student_top1"] >= 80
    assert set(summary["hybrid_top1"]) == {"layer1", "layer2"} and list(summary["student_top1_by_timesteps"]) == [T]
    assert {path.name for path in (folder / "hybrids").iterdir()} == {"layer1", "layer2"}


def test_the_kept_networks_are_evaluated_on_event_data(distilled, data):
    folder, summary = distilled
    teacher = TeacherConfig(kwargs=TEACHER.kwargs, cifar_stem=True, weights=str(folder / "teacher"), **ANN)
    for name in ("student", "hybrids/layer2"):
        forget_accelerate()
        found = evaluate(EvaluationConfig(model=str(folder / name), data=data, teacher=teacher, threads=1))
        wanted = summary["student_top1"] if name == "student" else summary["hybrid_top1"]["layer2"]
        assert found["top1_by_timesteps"][T] == pytest.approx(wanted) and found["teacher_top1"] == 100


def test_the_script_for_teachers_trains_on_sums(data, tmp_path):
    config = TeacherTrainingConfig(
        run=run_of(tmp_path / "r"), data=data, teacher=TEACHER, train=TrainConfig(**TEACHER_TRAIN)
    )
    assert teacher_training.run(config, start(config), False)["teacher_top1"] == 100


@pytest.fixture(scope="module")
def distiller():
    torch.manual_seed(0)
    teacher = models.create_ann("resnet18", 5, 2, cifar_stem=True, kwargs={"channels": [8, 8, 8, 8]})
    torch.nn.init.normal_(teacher.fc.weight)
    student = models.spiking_twin(teacher, timesteps=T).train()
    images = torch.rand(T, 4, 2, SIZE, SIZE)
    made = HybridDistiller(teacher, student, ["layer1", "layer2"], images=images, feature="mse").train()
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    made(torch.rand(T, 4, 2, SIZE, SIZE))  # the batch norms' statistics: neurons fire
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1
    return made


def test_the_teacher_sees_the_sum_and_the_student_the_frames(distiller):
    frames = torch.rand(T, 4, 2, SIZE, SIZE)
    with torch.no_grad():
        out = distiller.eval()(frames)
        torch.testing.assert_close(out.teacher_logits, distiller.teacher(frames[0] + frames[1] + frames[2]))
        torch.testing.assert_close(out.student_logits, distiller.student(frames))
        assert not torch.allclose(out.student_logits, distiller.student(frames.flip(0)))  # the order counts
    distiller.train()


def test_a_hybrid_of_its_own_gives_the_distillers_logits_of_frames(distiller, tmp_path):
    frames = torch.rand(T, 4, 2, SIZE, SIZE)
    with torch.no_grad():
        expected = distiller.eval()(frames).hybrid_logits["layer2"]
        hybrid = distiller.hybrid("layer2").eval()
        torch.testing.assert_close(hybrid(frames), expected)
        save_hybrid(hybrid, tmp_path, (2, SIZE, SIZE))
        torch.testing.assert_close(load_hybrid(tmp_path)(frames), expected)
    distiller.train()


def test_adapters_start_on_frames(distiller):
    shares = start_adapters(distiller, ["layer1"], [torch.rand(T, 8, 2, SIZE, SIZE)])
    assert 0 < shares["layer1"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(student=StudentConfig(encoder="poisson")), r"student\.encoder.*direct with event data"),
        (dict(student=StudentConfig(init="calibrated")), r"student\.init.*with event data"),
        (dict(train=TrainConfig(mixup=0.2)), r"train\.mixup.*0 with event frames"),
        (dict(train=TrainConfig(cutmix=1.0)), r"train\.cutmix.*0 with event frames"),
    ],
)
def test_what_event_data_does_not_go_with_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(data=DataConfig(name="nmnist", root="r"), **options)


def test_a_network_of_another_size_is_refused_before_training(data, tmp_path):
    with pytest.raises(ValueError, match="takes images of 48x48 pixels, found 16x16"):
        train(alone(tmp_path / "r", data, name="vggsnn_dvs"))
    assert not (tmp_path / "r").exists()
