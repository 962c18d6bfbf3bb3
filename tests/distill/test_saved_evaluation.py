"""Evaluation from a run's folder: the figures of the run itself, for students and hybrids."""

import dataclasses
import json
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_runs import distil, forget_accelerate, tiny

import models
from distill import DataConfig, TeacherConfig
from distill.config import EvaluationConfig
from distill.data import load_data
from distill.evaluation_report import csv_text, evaluation_table
from distill.evaluator import Evaluator
from distill.saved_evaluation import load_network, run

DATA = DataConfig(max_train_samples=64, max_eval_samples=30)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "r"
    train = dict(epochs=3, batch_size=32, lr=0.1)
    return folder, distil(tiny(folder, data=dict(max_train_samples=256), train=train, teacher_train=train))


def evaluate(model, data=DATA, **options):
    forget_accelerate()
    return run(EvaluationConfig(model=str(model), data=data, threads=1, **options))


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
    rows = {row["timesteps"]: row for row in summary["frontier"] if row["network"] == "student"}
    teacher_row = summary["frontier"][0]
    assert found["analogue_energy"] == {k: teacher_row[k] for k in found["analogue_energy"]}
    for steps in (1, 2):  # rounding may flip a few spikes
        of_run, at = rows[steps], found["by_timesteps"][steps]
        assert at["macs"] == of_run["macs"] and at["acs"] == pytest.approx(of_run["acs"], rel=0.01)
        assert at["memory_uj"] == pytest.approx(of_run["memory_uj"])
    at = found["by_timesteps"][2]
    assert at["ece"] == pytest.approx(summary["confidence"]["ece"], abs=0.1) and at["top5"] >= at["top1"]
    assert at["firing_rates"] == found["firing_rates"] != found["by_timesteps"][3]["firing_rates"]
    assert sum(layer["macs"] for layer in at["layers"]) == at["macs"]
    assert found["early_exit"]["timesteps"] == 3
    last = found["early_exit"]["thresholds"][-1]
    assert last["top1"] == close(found["top1_by_timesteps"][3]) and 1 <= last["mean_steps"] <= 3


def test_the_loader_processes_of_one_number_of_time_steps_end_before_those_of_the_next(finished, monkeypatch):
    left, others = [], {process.pid for process in multiprocessing.active_children()}  # of other tests
    look = Evaluator.at

    def at(evaluator, *args):
        found = look(evaluator, *args)
        of_loaders = {process.pid for process in multiprocessing.active_children()} - others
        left.append((len(of_loaders), len(evaluator._accelerator._dataloaders)))
        return found

    monkeypatch.setattr(Evaluator, "at", at)
    evaluate(finished[0] / "student", data=dataclasses.replace(DATA, workers=1), timesteps=[1, 3], exit_thresholds=[])
    assert left == [(0, 0)] * 3


def test_a_hybrids_figures_are_those_of_its_run_and_its_rates_those_of_the_layers_that_run(finished):
    folder, summary = finished
    for tap in ("layer1", "layer3"):
        found = evaluate(folder / "hybrids" / tap)
        assert found["kind"] == "hybrid" and found["top1_by_timesteps"] == {2: close(summary["hybrid_top1"][tap])}
        assert "agreement_by_timesteps" not in found
        layers = {name.split(".")[1] for name in found["firing_rates"]}
        assert layers == {"act1", "layer1"} | ({"layer2", "layer3"} if tap == "layer3" else set())
        (row,) = [r for r in summary["frontier"] if r["network"] == f"hybrid/{tap}" and r["timesteps"] == 2]
        at = found["by_timesteps"][2]
        assert at["macs"] == row["macs"] and at["mac_share_of_layers"] == row["mac_share_of_layers"]
        assert at["acs"] == pytest.approx(row["acs"], rel=0.01)
        # with the teacher that is in it
        assert found["analogue_energy"]["macs"] == summary["frontier"][0]["macs"]
        saved = load_file(folder / "hybrids" / tap / "model.safetensors")
        learned = {name for name, _ in load_network(str(folder / "hybrids" / tap)).named_parameters()}
        assert found["parameters"] == sum(saved[name].numel() for name in saved.keys() & learned)


def test_statistics_are_estimated_anew_at_each_number_of_time_steps(finished, tmp_path):
    folder, _ = finished
    options = dict(timesteps=[1], exit_thresholds=[], csv=str(tmp_path / "new" / "x.csv"))
    for name in ("student", "hybrids/layer2"):
        plain = evaluate(folder / name, **options)
        found = evaluate(folder / name, recalibrate=True, recalibration_images=64, **options)
        assert found["recalibration_images"] == 64 and plain["recalibration_images"] is None
        assert plain["early_exit"] is None and found["analogue_energy"] == plain["analogue_energy"]
        for steps in (1, 2):
            assert found["by_timesteps"][steps]["acs"] != plain["by_timesteps"][steps]["acs"]
    rows = (tmp_path / "new" / "x.csv").read_text().splitlines()
    assert [row.split(",")[9:11] for row in rows[1:]] == [["1", "True"], ["2", "True"]]


@pytest.fixture
def held_out(tmp_path):
    """A folder of grey digits that has no training split: val/ with two images of each class."""
    for label in range(10):
        (tmp_path / "val" / str(label)).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng((label, i)).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / str(label) / f"{i}.png")
    return DataConfig(name="folder", root=str(tmp_path))


def test_held_out_images_alone_are_judged_but_for_statistics(finished, held_out, tmp_path):
    student = finished[0] / "student"
    assert evaluate(student, held_out, exit_thresholds=[])["images"] == 20
    for label in range(10):  # training images are not looked at, whatever they are
        (tmp_path / "train" / str(label)).mkdir(parents=True)
        (tmp_path / "train" / str(label) / "1.png").write_bytes(b"no image")
    assert evaluate(student, held_out, exit_thresholds=[])["images"] == 20
    with pytest.raises(ValueError, match=r"cannot read the image .*train/0/1\.png"):
        evaluate(student, held_out, recalibrate=True)


def test_a_network_without_names_of_classes_wants_those_of_the_training_split(held_out, tmp_path):
    snn = models.create_snn("resnet18_cifar", 10, 2, 1, width=8)
    models.save_snn(snn, tmp_path / "student", {"input_size": [1, 8, 8], "mean": [0.3], "std": [0.4]})
    with pytest.raises(ValueError, match=r"looked for train/ or train\.tar"):
        evaluate(tmp_path / "student", held_out)


def test_a_teacher_of_other_classes_is_refused(finished, tmp_path):
    folder, _ = finished
    teacher = models.create_ann("resnet18", 7, 1, True, kwargs={"channels": [8, 8, 8, 8]})
    save_file(teacher.state_dict(), tmp_path / "model.safetensors")
    config = TeacherConfig(
        kwargs={"channels": [8, 8, 8, 8]}, cifar_stem=True, input_size=[1, 8, 8], weights=str(tmp_path)
    )
    with pytest.raises(ValueError, match=r"fc\.(weight|bias)"):
        evaluate(folder / "student", teacher=config)


def beside(folder, **options):
    """The teacher of a run's folder, as options name it."""
    return TeacherConfig(kwargs={"channels": [8, 8, 8, 8]}, cifar_stem=True, weights=str(folder), **options)


def test_a_teacher_of_other_images_is_refused_before_any_data_is_read(finished, monkeypatch):
    folder, _ = finished
    read = []

    def load(*args):
        read.append(args)
        return load_data(*args)

    monkeypatch.setattr("distill.saved_evaluation.load_data", load)
    message = r"mean \[0\.5\], the network's \[0\.3\]; crop_mode squash, the network's center\."
    with pytest.raises(ValueError, match=message):
        evaluate(folder / "student", teacher=beside(folder / "teacher", mean=[0.5], crop_mode="squash"))
    assert not read


def test_a_teacher_below_what_was_asked_for_is_refused_and_one_that_guesses_is_a_warning(finished, tmp_path, capsys):
    folder, summary = finished
    options = dict(exit_thresholds=[])
    least = summary["teacher_top1"] + 5
    with pytest.raises(ValueError, match=rf"'resnet18' is right on .* at least {least:.2f} % are wanted"):
        evaluate(folder / "student", teacher=beside(folder / "teacher", min_top1=least), **options)
    torch.manual_seed(0)
    guesses = models.create_ann("resnet18", 10, 1, True, kwargs={"channels": [8, 8, 8, 8]})
    save_file(guesses.state_dict(), tmp_path / "model.safetensors")
    capsys.readouterr()
    found = evaluate(folder / "student", teacher=beside(tmp_path, input_size=[1, 8, 8]), **options)
    said = capsys.readouterr().err
    assert f"warning: the teacher 'resnet18' is right on {found['teacher_top1']:.2f} % of the 30" in said
    assert "images: 1x8x8, mean [0.3], std [0.4], interpolation bilinear" in said


def test_statistics_of_a_network_without_training_images_are_refused(finished, monkeypatch):
    folder, _ = finished

    def without_training(*args):
        return dataclasses.replace(load_data(*args), train=[])

    monkeypatch.setattr("distill.saved_evaluation.load_data", without_training)
    with pytest.raises(ValueError, match="recalibrate takes training images"):
        evaluate(folder / "student", recalibrate=True)


def row_of(**entries):
    energy = dict(compute_uj=1.0, memory_uj=6.0, macs=10.0, acs=20.0, mac_share_of_layers=0.25)
    rates = dict(mean_firing_rate=0.125, firing_rates={"act": 0.1, "layer1.act": 0.15})
    return dict(top1=50.0, top5=90.0, agreement=55.0, ece=0.125, **energy, **rates) | entries


RESULT = dict(
    model="runs/x/student", kind="student", timesteps=2, images=10, parameters=1_234_567, input_size=[1, 8, 16],
    crop_pct=0.9, interpolation="bicubic", recalibration_images=64, top1_by_timesteps={1: 50.0, 2: 75.0},
    agreement_by_timesteps={1: 55.0, 2: 65.0}, teacher_top1=80.0, teacher_top5=99.0, mean_firing_rate=0.125,
    firing_rates={"act": 0.1, "layer1.act": 0.15},
    by_timesteps={1: row_of(), 2: row_of(top1=75.123456, compute_uj=3.0)},
    ece_bins=15, early_exit={"timesteps": 2, "thresholds": [{"threshold": 0.9, "top1": 70.0, "mean_steps": 1.25}]},
    analogue_energy=dict(compute_uj=4.0, memory_uj=8.0), energy_assumptions=["first assumption", "second one"],
)  # fmt: skip


def test_the_table_has_a_row_for_each_number_of_time_steps():
    lines = evaluation_table(RESULT).splitlines()
    assert lines[1].split() == ["1", "50.00", "90.00", "55.00", "0.125", "12.5", "25.0", "75.0", "25.0"]
    assert lines[2].split() == ["2", "75.12", "90.00", "55.00", "0.125", "12.5", "75.0", "75.0", "25.0", "*"]
    assert "teacher: top-1 80.00 %, top-5 99.00 %" in lines and "10 images" in lines[3]
    assert "batch-norm statistics: of 64 training images, at each T" in lines
    assert ["0.9", "70.00", "1.25"] in [line.split() for line in lines]
    assert ["layer1.act", "15.0", "15.0"] in [line.split() for line in lines]
    assert "compute 4 uJ, memory 8 uJ" in lines[-3] and lines[-2:] == ["- first assumption", "- second one"]


def test_what_is_not_known_is_left_out_of_the_table():
    rows = {t: {k: v for k, v in row.items() if k != "agreement"} for t, row in RESULT["by_timesteps"].items()}
    without = RESULT | dict(by_timesteps=rows, analogue_energy=None, early_exit=None, recalibration_images=None)
    without = {k: v for k, v in without.items() if not k.startswith(("teacher", "agreement"))}
    text = evaluation_table(without)
    assert text.splitlines()[1].split() == ["1", "50.00", "90.00", "0.125", "12.5", "1", "6", "25.0"]  # in microjoule
    assert "compute (uJ)" in text and not any(word in text for word in ("teacher", "early exit", "statistics"))
    csv = csv_text(without).splitlines()
    assert csv[1].split(",")[10:12] == ["False", ""]  # recalibrated, agreement


def test_the_csv_has_timms_columns_first_and_a_row_for_each_number_of_time_steps():
    header, *lines = csv_text(RESULT).splitlines()
    timm = (
        "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation"  # of its results-imagenet.csv
    )
    own = "timesteps,recalibrated,agreement,ece,mean_firing_rate,compute_uj,memory_uj,macs,acs,mac_share_of_layers"
    assert header == f"{timm},{own}"
    assert lines[1] == (
        "runs/x/student,75.1235,24.8765,90.0,10.0,1.23,16,0.9,bicubic,2,True,55.0,0.125,0.125,3.0,6.0,10.0,20.0,0.25"
    )
    assert len(lines) == 2 and lines[0].split(",")[9] == "1"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"mean": [0.3], "std": [0.4]}, r"does not say how its images are made: extra\.input_size is missing"),
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
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is no configuration of a network"):
        load_network(str(tmp_path))


def test_a_network_of_the_hub_is_named_by_its_id(finished, monkeypatch):
    folder, _ = finished
    names = {"someone/student": folder / "student", "someone/layer2": folder / "hybrids" / "layer2"}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(names[name]))
    assert isinstance(load_network("someone/student"), models.SpikingNetwork)
    assert load_network("someone/layer2").tap.name == "layer2"


def test_the_configuration_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="timesteps must be at least 1 each"):
        EvaluationConfig(model="x", timesteps=[0])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        EvaluationConfig(model="x", batch_size=0)
    for threshold in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"exit_thresholds must be in \(0, 1\] each"):
            EvaluationConfig(model="x", exit_thresholds=[0.5, threshold])
    with pytest.raises(ValueError, match="recalibration_images must be at least 1"):
        EvaluationConfig(model="x", recalibration_images=0)


def test_evaluation_leaves_the_network_at_its_own_number_of_time_steps(finished):
    folder, _ = finished
    snn = load_network(str(folder / "student"))
    assert snn.timesteps == 2 and not snn.training and snn(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
