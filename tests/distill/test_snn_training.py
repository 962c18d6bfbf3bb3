"""Whole runs of a network that learns from labels alone: what they leave, that they repeat and go on."""

import dataclasses
import json

import pytest
import torch
from toy_runs import BATCH, EPOCHS, IMAGES, TEACHER, equal, metrics_of, resolved, start, timeless, tiny, weights_of

import models
from distill import InitConfig, SnnLossConfig, SnnTrainingConfig, StudentConfig, TeacherConfig, TrainConfig
from distill.runs import RunFolder
from distill.snn_training import run

STUDENT = dict(name="resnet18_cifar", width=8, timesteps=2)
ANN = {name: TEACHER[name] for name in ("input_size", "mean", "std")}


def config_of(folder, **parts):
    base = tiny(folder, run=parts.pop("run", {}), data=parts.pop("data", {}))
    train = {**dict(epochs=EPOCHS, batch_size=BATCH, lr=0.05), **parts.pop("train", {})}
    return SnnTrainingConfig(
        run=base.run,
        data=base.data,
        ann=TeacherConfig(**{**ANN, **parts.pop("ann", {})}),
        student=StudentConfig(**{**STUDENT, **parts.pop("student", {})}),
        loss=SnnLossConfig(**parts.pop("loss", {})),
        init=InitConfig(from_run=parts.pop("from_run", None)),
        train=TrainConfig(**train),
        **{"eval_timesteps": [1, 2], **parts},
    )


def train(config, resume=False):
    return run(config, start(config, resume), resume)


def stopped(config, monkeypatch, epoch):
    """A run that ends in this epoch, after its metrics were written and before its checkpoint was."""
    append = RunFolder.append_metrics

    def stop(self, values):
        append(self, values)
        if values["epoch"] == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "append_metrics", stop)
        train(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snn") / "r"
    config = config_of(folder)
    return folder, config, train(config)


def test_what_was_trained_is_kept_where_energies_or_figures_fail(finished, tmp_path, monkeypatch, capsys):
    folder, _, _ = finished

    def fails(*_, **__):
        raise RuntimeError("no rule for this layer")

    monkeypatch.setattr("distill.frontier.spiking_costs", fails)
    summary = train(config_of(tmp_path / "r"))
    assert summary["frontier"] == [] and list(summary["student_top1_by_timesteps"]) == [1, 2]
    said = capsys.readouterr().err
    assert "energies could not be counted (RuntimeError: no rule for this layer)" in said
    assert "images: 1x8x8, mean [0.3], std [0.4], interpolation bilinear" in said
    monkeypatch.setattr("distill.results.judge", fails)
    with pytest.raises(RuntimeError, match="no rule"):
        train(config_of(tmp_path / "s"))
    for run_folder in (tmp_path / "r", tmp_path / "s"):
        assert equal(weights_of(run_folder), weights_of(folder))
    assert not (tmp_path / "s" / "summary.json").exists()


def test_a_run_leaves_network_summary_and_metrics(finished):
    folder, config, summary = finished
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "summary.json", ".lock", "checkpoints", "student"
    }  # fmt: skip
    assert (folder / "config.yaml").read_text() == resolved(config)
    saved = json.loads((folder / "summary.json").read_text())
    assert saved == json.loads(json.dumps(summary)) and "teacher_top1" not in saved
    assert list(saved["student_top1_by_timesteps"]) == ["1", "2"]
    assert saved["student_top1_by_timesteps"]["2"] == saved["student_top1"]
    assert saved["student_top1"] * 30 / 100 == pytest.approx(round(saved["student_top1"] * 30 / 100))  # of 30 images
    rows = [(row["network"], row["timesteps"], row["top1"]) for row in saved["frontier"]]
    assert rows == [("student", int(t), top1) for t, top1 in saved["student_top1_by_timesteps"].items()]
    assert all(row["acs"] > 0 < row["macs"] for row in saved["frontier"]) and 0 <= saved["confidence"]["ece"] <= 1
    assert saved["algorithm"] == "rate_m" and len(saved["firing_rates"]) == 17
    assert saved["images_per_second"] == pytest.approx(EPOCHS * IMAGES / saved["train_seconds"])
    lines = metrics_of(folder)
    assert [(line["stage"], line["epoch"], line["steps"]) for line in lines] == [("student", 1, 4), ("student", 2, 8)]
    assert lines[-1]["student_top1"] == saved["student_top1"]


def test_the_saved_network_can_be_used_and_says_what_it_is(finished):
    folder, config, _ = finished
    snn = models.load_snn(folder / "student")
    assert snn(torch.zeros(2, 1, 8, 8)).shape == (2, 10) and snn.spec["width"] == 8
    assert snn.spec["extra"] == dict(
        input_size=[1, 8, 8], mean=[0.3], std=[0.4], interpolation="bilinear", crop_pct=1.0, crop_mode="center",
        classes=[*"0123456789"],
    )  # fmt: skip
    card = (folder / "student" / "README.md").read_text()
    assert "Trained on labels, from the start" in card and resolved(config).strip() in card


@pytest.mark.parametrize("parts", [dict(), dict(student=dict(algorithm="ottt"))], ids=["rate_m", "ottt"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(finished, tmp_path, monkeypatch, parts):
    folder = finished[0]
    if parts:
        folder = tmp_path / "whole"
        train(config_of(folder, **parts))
    config = config_of(tmp_path / "cut", **parts)
    stopped(config, monkeypatch, epoch=2)
    assert not (tmp_path / "cut" / "summary.json").exists()
    train(config, resume=True)
    assert equal(weights_of(tmp_path / "cut"), weights_of(folder))
    assert timeless(tmp_path / "cut") == timeless(folder)


SHORT = dict(epochs=1, batch_size=32)


@pytest.mark.parametrize(
    "parts",
    [
        dict(student=dict(algorithm="bptt"), loss=dict(name="tet", gradient_scale="1/T")),
        dict(student=dict(algorithm="rate_s")),
        dict(student=dict(algorithm="sltt"), loss=dict(name="tet"), train=dict(accumulate=2, clip=1.0)),
        dict(student=dict(algorithm="dsr", timesteps=3)),
        dict(student=dict(algorithm="ottt", encoder="poisson"), run=dict(mixed_precision="bf16")),
        dict(student=dict(name="twin", width=None), ann=TEACHER),
    ],
    ids=["bptt tet", "rate_s", "sltt tet accumulate", "dsr", "ottt poisson bfloat16", "twin"],
)
def test_other_configurations_run_end_to_end(tmp_path, parts):
    parts = {**parts, "train": {**SHORT, **parts.get("train", {})}}
    config = config_of(tmp_path / "r", **parts)
    summary = train(config)
    line = metrics_of(tmp_path / "r")[-1]
    assert line["steps"] == (1 if "clip" in parts["train"] else 2)
    assert summary["algorithm"] == config.student.algorithm and line["loss/total"] > 0
    assert ("loss/mse" in line) == (config.loss.name == "tet")
    assert list(summary["student_top1_by_timesteps"]) == sorted({1, 2, config.student.timesteps})
    assert all(0 <= rate <= 1 for rate in summary["firing_rates"].values())
    snn = models.load_snn(tmp_path / "r" / "student")
    assert snn.algorithm == config.student.algorithm
    if config.student.encoder == "poisson":
        assert snn.input_encoder == models.PoissonEncoder(mean=(0.3,), std=(0.4,))


def test_the_gradients_scale_reaches_the_weights(tmp_path):
    # one step of plain descent with a rate T times as large undoes a gradient of 1/T
    common = dict(epochs=1, batch_size=IMAGES, optimizer="momentum", momentum=0.0, weight_decay=0.0)
    for name, lr, scale in (("plain", 0.01, "none"), ("scaled", 0.02, "1/T"), ("other", 0.01, "1/T")):
        train(config_of(tmp_path / name, train=dict(**common, lr=lr), loss=dict(gradient_scale=scale)))
    plain, scaled, other = (weights_of(tmp_path / name)["classifier.weight"] for name in ("plain", "scaled", "other"))
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-7)
    assert (other - plain).abs().max() > 1e-5


def test_a_twin_starts_from_the_weights_of_its_analogue_network(tmp_path):
    ann = models.create_ann("resnet18", 10, 1, True, False, TEACHER["kwargs"])
    models.io.save_weights(ann, tmp_path / "ann.safetensors")
    tiny_steps = dict(student=dict(name="twin", width=None), train=dict(**SHORT, lr=1e-12))
    train(config_of(tmp_path / "r", ann={**TEACHER, "weights": str(tmp_path / "ann.safetensors")}, **tiny_steps))
    found = weights_of(tmp_path / "r")["layer1.0.conv1.weight"]
    torch.testing.assert_close(found, ann.layer1[0].conv1.weight.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("inner", ["", "student"])
def test_a_run_starts_from_another_ones_network_at_another_number_of_time_steps(finished, tmp_path, inner):
    folder = finished[0]
    other = dict(student=dict(timesteps=5, algorithm="bptt"), train=dict(**SHORT, lr=1e-12))
    summary = train(config_of(tmp_path / "r", from_run=str(folder / inner), **other))
    assert summary["timesteps"] == 5
    found, before = weights_of(tmp_path / "r"), weights_of(folder)
    for name in ("conv0.0.weight", "layer4.1.conv2.weight", "classifier.bias"):
        torch.testing.assert_close(found[name], before[name], rtol=0, atol=1e-9)
    batches = found["conv0.1.num_batches_tracked"] - before["conv0.1.num_batches_tracked"]
    assert batches == 2  # the statistics went on from those of the other run


def test_a_checkpoint_counts_more_than_the_run_to_start_from(finished, tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "student").mkdir(parents=True)
    for file in (finished[0] / "student").iterdir():
        (source / "student" / file.name).write_bytes(file.read_bytes())
    whole = config_of(tmp_path / "whole", from_run=str(source))
    train(whole)
    config = config_of(tmp_path / "cut", from_run=str(source))
    stopped(config, monkeypatch, epoch=2)
    source.rename(tmp_path / "gone")
    train(config, resume=True)
    assert equal(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (dict(from_run="nowhere"), r"init\.from_run: there is no folder nowhere"),
        (dict(from_run="EMPTY"), r"init\.from_run: .*empty holds no trained student"),
        (
            dict(from_run="OTHER", student=dict(width=16)),
            r"the student in .* is another network: .* other shapes",
        ),
        (dict(ann=dict(mean=None)), r"the ann's images .* set ann\.mean"),
        (dict(train=dict(optimizer="sgdd")), "sgdd"),
        (dict(train=dict(batch_size=65)), "batch_size is 65"),
        (dict(student=dict(name="vgg11_cifar", width=8)), r"student\.name: 'vgg11_cifar' does not take images of 8x8"),
        (dict(student=dict(name="vggsnn_dvs", width=8)), "48x48 pixels, found 8x8"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(finished, tmp_path, parts, message):
    (tmp_path / "empty").mkdir()
    folders = {"EMPTY": str(tmp_path / "empty"), "OTHER": str(finished[0])}
    parts = {name: folders.get(value, value) if name == "from_run" else value for name, value in parts.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config_of(tmp_path / "r", **parts))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_the_dsr_neurons_of_the_configuration_are_those_of_the_network(tmp_path):
    config = config_of(tmp_path / "r", student=dict(algorithm="dsr", dsr=models.DSRConfig(threshold=3.0)), train=SHORT)
    train(dataclasses.replace(config, eval_timesteps=[]))
    assert models.load_snn(tmp_path / "r" / "student").conv0[2].config.threshold == 3.0


def test_a_twin_is_calibrated_where_it_comes_with_weights(tmp_path, monkeypatch):
    from distill import students

    torch.manual_seed(0)
    ann = models.create_ann("resnet18", 10, 1, True, kwargs={"channels": [8, 8, 8, 8]})
    models.io.save_weights(ann, tmp_path / "ann.safetensors")
    calls = []
    calibrate = students.calibrate

    def counting(ann, snn, batches, percentile):
        batches = list(batches)
        calls.append((sum(map(len, batches)), percentile))
        return calibrate(ann, snn, batches, percentile)

    monkeypatch.setattr(students, "calibrate", counting)
    twin = dict(name="twin", init="calibrated", width=None)
    weights = dict(kwargs={"channels": [8, 8, 8, 8]}, cifar_stem=True, weights=str(tmp_path / "ann.safetensors"))
    train(config_of(tmp_path / "r", student=twin, ann=weights))
    assert calls == [(64, None)]  # all of its images, once
    with pytest.raises(ValueError, match=r"student\.init must be teacher or scratch without ann\.weights"):
        config_of(tmp_path / "q", student=twin)
