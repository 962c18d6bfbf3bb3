"""Whole runs on a few digits: what they leave, that they repeat, and that they go on after an interruption."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from toy_runs import BATCH, EPOCHS, IMAGES, TEACHER, distil, equal, metrics_of, resolved, timeless, tiny, weights_of

import models
from distill import InitConfig, LossConfig, TeacherConfig
from distill.checkpoints import Checkpoints
from distill.data import Preprocessing
from distill.runs import RunFolder
from distill.students import make_student
from distill.teachers import build_teacher
from models import UnsupportedOperationError
from models.io import save_weights

TAPS = ["layer1", "layer2", "layer3"]
DIGITS = Preprocessing(input_size=(1, 8, 8), mean=(0.3,), std=(0.4,))


class Interrupted(BaseException):
    """As a signal would: nothing catches it."""


def interrupt(monkeypatch, stage, epoch):
    """Lets the run end in this epoch, after its metrics were written and before its checkpoint was."""
    append = RunFolder.append_metrics

    def stop(self, values):
        append(self, values)
        if (values["stage"], values["epoch"]) == (stage, epoch):
            raise Interrupted

    monkeypatch.setattr(RunFolder, "append_metrics", stop)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run that is read by several tests: folder, configuration and summary."""
    folder = tmp_path_factory.mktemp("finished") / "r"
    config = tiny(folder)
    return folder, config, distil(config)


def test_a_run_leaves_everything_in_its_folder(finished):
    folder, config, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "summary.json", ".lock", "checkpoints", "teacher", "student", "hybrids"
    }  # fmt: skip
    assert (folder / "config.yaml").read_text() == resolved(config)
    assert {path.name for path in (folder / "student").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert {path.name for path in (folder / "teacher").iterdir()} == {"model.safetensors", "config.json"}


def test_the_summary_has_percentages_of_every_network(finished):
    folder, _, summary = finished
    saved = json.loads((folder / "summary.json").read_text())
    assert saved == json.loads(json.dumps(summary))
    assert list(saved["hybrid_top1"]) == ["layer1", "layer2", "layer3"]
    assert list(saved["student_top1_by_timesteps"]) == ["1", "2"]
    assert saved["student_top1_by_timesteps"]["2"] == saved["student_top1"]  # its own T
    accuracies = [saved["teacher_top1"], saved["student_top1"], *saved["hybrid_top1"].values()]
    for accuracy in [*accuracies, *saved["student_top1_by_timesteps"].values()]:
        assert 0 <= accuracy <= 100 and accuracy * 30 / 100 == pytest.approx(round(accuracy * 30 / 100))  # of 30 images
    assert saved["seconds"] > saved["train_seconds"] > 0
    assert saved["images_per_second"] == pytest.approx(EPOCHS * IMAGES / saved["train_seconds"])
    assert saved["timesteps"] == 2 and saved["versions"]["torch"] == torch.__version__.split("+")[0]
    assert all(0 <= rate <= 1 for rate in saved["firing_rates"].values()) and len(saved["firing_rates"]) == 17


def test_the_frontier_has_accuracy_and_energy_of_every_network_at_every_t(finished):
    folder, _, summary = finished
    rows = {(row["network"], row["timesteps"]): row for row in summary["frontier"]}
    taps = ["layer1", "layer2", "layer3"]
    hybrids = [(f"hybrid/{tap}", steps) for tap in taps for steps in (1, 2)]
    assert list(rows) == [("teacher", None), *hybrids, ("student", 1), ("student", 2)]
    assert rows["teacher", None]["top1"] == summary["teacher_top1"]
    for tap in taps:
        assert rows[f"hybrid/{tap}", 2]["top1"] == summary["hybrid_top1"][tap]
    for steps in (1, 2):
        assert rows["student", steps]["top1"] == summary["student_top1_by_timesteps"][steps]
    # the teacher: a stem of 64 channels on 8x8 pixels, layer1's first convolution and shortcut, 15 convolutions of 8
    # channels on 8x8 pixels and less, 1x1 shortcuts, a head
    stem = 9 * 64 * 64
    macs = stem + (9 + 1) * 64 * 8 * 64 + 9 * 64 * (3 * 64 + 4 * 16 + 4 * 4 + 4 * 1) + 64 * (16 + 4 + 1) + 80
    assert rows["teacher", None]["macs"] == macs and rows["teacher", None]["mac_share_of_layers"] == 1
    # of the student the stem alone, at each step: the map in front of the pool is one place, so the head sees spikes
    assert rows["student", 2]["macs"] == 2 * stem == 2 * rows["student", 1]["macs"]
    assert rows["student", 2]["mac_share_of_layers"] == 1 / 22 and rows["student", 2]["acs"] > 0
    # of the hybrid up to layer3 the stem twice, the adapter and layer4 and the head once
    behind = 9 * 64 * 4 * 1 + 64 * 1 + 80
    assert rows["hybrid/layer3", 2]["macs"] == 2 * stem + 64 * 4 + behind
    assert rows["hybrid/layer3", 2]["acs"] < rows["student", 2]["acs"]
    confidence = summary["confidence"]
    assert 0 <= confidence["ece"] <= 1 and 0.1 <= confidence["mean"] <= 1 and confidence["bins"] == 15
    assert any("30 of the evaluation images" in text for text in summary["energy_assumptions"])
    assert "compute (%)" in (folder / "student" / "README.md").read_text()


def test_energies_that_cannot_be_counted_are_left_out_and_nothing_else(finished, tmp_path, monkeypatch, capsys):
    folder, _, _ = finished

    def fails(*_, **__):
        raise RuntimeError("no rule\nfor this layer")

    monkeypatch.setattr("distill.frontier.spiking_costs", fails)
    distil(tiny(tmp_path / "r", teacher=dict(weights=str(folder / "teacher")), train=dict(epochs=1, batch_size=BATCH)))
    saved = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert saved["frontier"] == saved["energy_assumptions"] == []
    assert list(saved["student_top1_by_timesteps"]) == ["1", "2"] and list(saved["hybrid_top1"]) == TAPS
    assert saved["student_top1_by_timesteps"]["2"] == saved["student_top1"]
    assert (
        "energies could not be counted (RuntimeError: no rule for this layer): they are left" in capsys.readouterr().err
    )
    assert "compute" not in (tmp_path / "r" / "student" / "README.md").read_text()


def test_what_was_trained_is_kept_where_its_figures_fail(finished, tmp_path, monkeypatch):
    folder, _, _ = finished
    config = tiny(tmp_path / "r", teacher=dict(weights=str(folder / "teacher")), train=dict(epochs=1, batch_size=BATCH))

    def fails(*_, **__):
        raise RuntimeError("no figures")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no figures"):
        patch.setattr("distill.results.judge", fails)
        distil(config)
    found = Checkpoints(tmp_path / "r" / "checkpoints" / "student").newest().path
    trained = load_file(found / "model.safetensors")
    kept = weights_of(tmp_path / "r")
    assert equal(kept, {n.removeprefix("student."): t for n, t in trained.items() if n.startswith("student.")})
    assert sorted(path.name for path in (tmp_path / "r" / "hybrids").iterdir()) == TAPS
    assert models.load_snn(tmp_path / "r" / "student").timesteps == 2
    assert not (tmp_path / "r" / "summary.json").exists()
    assert distil(config, resume=True)["student_top1"] >= 0 and equal(weights_of(tmp_path / "r"), kept)


def test_metrics_have_each_epoch_of_both_parts_once(finished):
    folder, _, summary = finished
    lines = metrics_of(folder)
    expected = [(stage, epoch) for stage in ("teacher", "student") for epoch in range(1, EPOCHS + 1)]
    assert [(line["stage"], line["epoch"]) for line in lines] == expected
    assert [line["steps"] for line in lines] == [IMAGES // BATCH, 2 * IMAGES // BATCH] * 2
    parts = {f"loss/{part}/{tap}" for part in ("hybrid_ce", "hybrid_kd") for tap in ("layer1", "layer2", "layer3")}
    parts |= {"loss/total", "loss/student_ce", "loss/student_kd"}
    top1 = {"teacher_top1", "student_top1", *(f"hybrid_top1/layer{i}" for i in (1, 2, 3))}
    for line in lines[EPOCHS:]:
        assert parts | top1 | {"lr", "images_per_second"} <= line.keys()
        assert all(math.isfinite(value) for value in line.values() if not isinstance(value, str))
    assert lines[-1]["student_top1"] == summary["student_top1"]
    assert lines[-1]["hybrid_top1/layer2"] == summary["hybrid_top1"]["layer2"]
    assert lines[0].keys() >= {"loss/total", "teacher_top1"} and lines[1]["teacher_top1"] == summary["teacher_top1"]


def test_the_saved_student_gives_the_accuracy_of_the_summary(finished):
    from distill.data import load_data
    from distill.teachers import teacher_preprocessing

    folder, config, summary = finished
    snn = models.load_snn(folder / "student")
    data = load_data(config.data, teacher_preprocessing(config.teacher), config.run.seed)
    images, labels = (torch.stack([torch.as_tensor(item[i]) for item in data.eval]) for i in (0, 1))
    with torch.no_grad():
        top1 = (snn(images).argmax(1) == labels).double().mean().item() * 100
    assert top1 == pytest.approx(summary["student_top1"], abs=100 / 30 + 1e-6)  # rounding may flip a spike
    assert snn.timesteps == 2 and snn.spec["extra"]["mean"] == [0.3] and snn.spec["extra"]["std"] == [0.4]
    assert snn.spec["extra"]["input_size"] == [1, 8, 8] and snn.spec["extra"]["classes"] == [*"0123456789"]


def test_the_saved_student_gives_the_logits_of_the_trained_one(tmp_path, monkeypatch):
    from distill import results

    trained = []
    save = results.save_snn
    monkeypatch.setattr(results, "save_snn", lambda snn, *args: (trained.append(snn), save(snn, *args)))
    distil(tiny(tmp_path / "r", train=dict(epochs=1, batch_size=32), teacher_train=dict(epochs=1, batch_size=32)))
    images = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    loaded = models.load_snn(tmp_path / "r" / "student")
    with torch.no_grad():
        assert torch.equal(loaded.double()(images), trained[0].eval().double()(images))


def test_the_model_card_says_how_the_student_was_made(finished):
    folder, config, summary = finished
    card = (folder / "student" / "README.md").read_text()
    assert resolved(config).strip() in card and f"{summary['student_top1']:.2f}" in card and "resnet18" in card


def test_the_teacher_of_a_run_serves_another_one_and_gives_the_same_student(finished, tmp_path, capsys):
    folder, _, summary = finished
    silent = dict(input_size=None, mean=None, std=None)  # the folder says it
    again = distil(tiny(tmp_path / "r", teacher=dict(weights=str(folder / "teacher"), **silent)))
    assert f"images: {DIGITS}" in capsys.readouterr().err.splitlines()
    assert again["teacher_top1"] == summary["teacher_top1"] and not (tmp_path / "r" / "teacher").exists()
    assert equal(weights_of(tmp_path / "r"), weights_of(folder))
    assert timeless(tmp_path / "r") == timeless(folder)[EPOCHS:]


def test_in_bfloat16_the_twin_of_a_teacher_trained_on_the_spot_is_that_of_its_weights(tmp_path):
    # Accelerate's autocast wraps the forward of the network that it trains; none of that may reach the twin
    common = dict(run=dict(mixed_precision="bf16"), train=dict(epochs=1, batch_size=64))
    summary = distil(tiny(tmp_path / "spot", **common))
    again = distil(tiny(tmp_path / "again", **common, teacher=dict(weights=str(tmp_path / "spot" / "teacher"))))
    assert again["teacher_top1"] == summary["teacher_top1"]
    assert equal(weights_of(tmp_path / "again"), weights_of(tmp_path / "spot"))


def test_equal_seeds_give_equal_weights_and_another_seed_does_not(finished, tmp_path):
    folder, _, _ = finished
    distil(tiny(tmp_path / "same"))
    assert equal(weights_of(tmp_path / "same"), weights_of(folder))
    assert equal(weights_of(tmp_path / "same", "teacher"), weights_of(folder, "teacher"))
    assert timeless(tmp_path / "same") == timeless(folder)
    distil(tiny(tmp_path / "other", run=dict(seed=1)))
    assert not equal(weights_of(tmp_path / "other"), weights_of(folder))
    assert not equal(weights_of(tmp_path / "other", "teacher"), weights_of(folder, "teacher"))


@pytest.mark.parametrize(("stage", "epoch"), [("teacher", 1), ("teacher", 2), ("student", 1), ("student", 2)])
def test_an_interrupted_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    finished, tmp_path, monkeypatch, stage, epoch
):
    folder, _, summary = finished
    config = tiny(tmp_path / "r")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, stage, epoch)
        distil(config)
    assert not (tmp_path / "r" / "summary.json").exists()
    resumed = distil(config, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    assert equal(weights_of(tmp_path / "r"), weights_of(folder))
    assert equal(weights_of(tmp_path / "r", "teacher"), weights_of(folder, "teacher"))
    assert timeless(tmp_path / "r") == timeless(folder)
    assert resumed["hybrid_top1"] == summary["hybrid_top1"]  # the adapters too


def test_resuming_a_finished_run_changes_nothing(finished, tmp_path):
    config = tiny(tmp_path / "r")
    first = distil(config)
    before, lines = weights_of(tmp_path / "r"), timeless(tmp_path / "r")
    again = distil(config, resume=True)
    assert equal(weights_of(tmp_path / "r"), before) and timeless(tmp_path / "r") == lines
    assert again["student_top1"] == first["student_top1"]


def test_resuming_where_nothing_was_saved_is_a_new_run_with_a_note(finished, tmp_path, capsys):
    folder, _, _ = finished
    distil(tiny(tmp_path / "r"), resume=True)
    assert "nothing to resume in" in capsys.readouterr().err
    assert equal(weights_of(tmp_path / "r"), weights_of(folder))


def test_resuming_with_another_configuration_is_refused_by_field(finished, tmp_path):
    folder, _, _ = finished
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(ValueError, match=r"loss\.temperature \(was 2\.0, is 3\.0\)"):
        distil(tiny(folder, loss=type(tiny(folder).loss)(temperature=3.0)), resume=True)
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_second_run_takes_another_folder(finished, tmp_path):
    config = tiny(tmp_path / "r", train=dict(epochs=1, batch_size=32), teacher_train=dict(epochs=1, batch_size=32))
    distil(config)
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    distil(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r", "r-2"]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (tmp_path / "r-2" / "summary.json").exists()


def test_the_seed_fixes_the_order_of_the_images_too(tmp_path, monkeypatch):
    from distill import hybrid_training, teacher_training

    seeds = []
    for module in (hybrid_training, teacher_training):
        make = module.train_loader
        patched = lambda *args, make=make, **kwargs: (seeds.append(kwargs["seed"]), make(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(module, "train_loader", patched)
    short = dict(epochs=1, batch_size=64)
    distil(tiny(tmp_path / "r", run=dict(seed=7), train=short, teacher_train=short))
    assert seeds and set(seeds) == {7}


def test_the_last_epochs_evaluation_is_that_of_the_summary_also_when_nothing_was_left_to_train(tmp_path, monkeypatch):
    config = tiny(tmp_path / "r", eval_timesteps=[])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunFolder, "write_summary", lambda self, values: (_ for _ in ()).throw(Interrupted))
        distil(config)
    summary = distil(config, resume=True)
    last = metrics_of(tmp_path / "r")[-1]
    assert summary["student_top1"] == last["student_top1"] and summary["teacher_top1"] == last["teacher_top1"]
    assert {f"hybrid_top1/{tap}": value for tap, value in summary["hybrid_top1"].items()}.items() <= last.items()
    seconds = sum(line["train_seconds"] for line in metrics_of(tmp_path / "r") if line["stage"] == "student")
    assert summary["train_seconds"] == pytest.approx(seconds)  # also of the epochs before the interruption
    assert summary["images_per_second"] == pytest.approx(EPOCHS * IMAGES / seconds)


def test_training_lowers_the_loss_and_beats_chance(tmp_path):
    train = dict(epochs=6, batch_size=32, lr=0.1)
    config = tiny(
        tmp_path / "r",
        data=dict(max_train_samples=512, max_eval_samples=100),
        teacher=dict(kwargs={"channels": [8, 8, 16, 16]}),
        teacher_train=train,
        train=train,
        student=dict(timesteps=2),
        eval_timesteps=[2],
    )
    summary = distil(config)
    losses = [line["loss/total"] for line in metrics_of(tmp_path / "r") if line["stage"] == "student"]
    assert losses[-1] < 0.7 * losses[0]
    assert summary["teacher_top1"] > 60 and summary["student_top1"] > 30  # ten classes
    assert min(summary["hybrid_top1"].values()) > 30


@pytest.mark.parametrize(
    "parts",
    [
        dict(student=dict(algorithm="bptt")),
        dict(student=dict(algorithm="rate_s")),
        dict(student=dict(encoder="poisson")),
        dict(student=dict(init="scratch")),
        dict(taps=[]),
        dict(taps=["layer2"], save_hybrids=False),
        dict(taps="blocks", schedule=dict(name="stochastic")),
        dict(loss=LossConfig(feature="cosine", tap_weights={"layer2": 2.0}, label_smoothing=0.1)),
        dict(train=dict(mixup=0.2, cutmix=1.0), loss=LossConfig(label_smoothing=0.1)),
        dict(train=dict(accumulate=2, clip=1.0, optimizer="adamw", channels_last=False)),
        dict(run=dict(mixed_precision="bf16")),
        dict(teacher=dict(kwargs={"channels": [4, 8, 8, 8]}, name="resnet26")),
    ],
    ids=[
        "bptt",
        "rate_s",
        "poisson",
        "scratch",
        "no taps",
        "one tap",
        "blocks",
        "features",
        "mixup",
        "accumulate and clip",
        "bfloat16",
        "bottlenecks",
    ],
)
def test_other_configurations_run_end_to_end(tmp_path, parts):
    short = dict(epochs=1, batch_size=32)
    parts = {**parts, "train": {**short, **parts.get("train", {})}}
    summary = distil(tiny(tmp_path / "r", **parts, teacher_train=short, eval_timesteps=[]))
    taps = parts.get("taps", ["layer1", "layer2", "layer3"])
    taps = [f"layer{n}.{b}" for n in (1, 2, 3, 4) for b in (0, 1)][:-1] if taps == "blocks" else taps
    assert list(summary["hybrid_top1"]) == taps
    kept = tmp_path / "r" / "hybrids"
    assert sorted(p.name for p in kept.glob("*")) == (sorted(taps) if parts.get("save_hybrids", True) else [])
    assert summary["student_top1_by_timesteps"] == {2: summary["student_top1"]}  # its own T in any case
    assert models.load_snn(tmp_path / "r" / "student").timesteps == 2


def test_tensorboard_writes_into_the_runs_folder(tmp_path):
    short = dict(epochs=1, batch_size=32)
    distil(tiny(tmp_path / "r", run=dict(trackers=["tensorboard"]), train=short, teacher_train=short))
    assert list((tmp_path / "r").rglob("events.out.tfevents.*"))
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_student_by_name_takes_the_teachers_classes_and_channels(tmp_path):
    config = tiny(tmp_path, student=dict(name="resnet18_cifar", timesteps=3))
    student = make_student(config.student, build_teacher(config.teacher, 6), 6, torch.zeros(1, 1, 8, 8), DIGITS)
    assert isinstance(student, models.SpikingNetwork) and student.timesteps == 3
    assert student.in_chans == 1 and student.classifier.out_features == 6


@pytest.mark.parametrize(("init", "same"), [("teacher", True), ("scratch", False)])
def test_a_twin_starts_from_the_teachers_weights_or_anew(tmp_path, init, same):
    config = tiny(tmp_path, student=dict(init=init))
    teacher = build_teacher(config.teacher, 10).eval()
    student = make_student(config.student, teacher, 10, torch.zeros(1, 1, 8, 8), DIGITS)
    assert torch.equal(student.layer1[0].conv1.weight, teacher.layer1[0].conv1.weight) == same


@pytest.mark.parametrize("taps", [["layer9"], ["layer2.0.act1"]])
def test_a_tap_that_cannot_serve_is_refused_by_name_before_anything_is_trained_or_written(tmp_path, taps):
    with pytest.raises(ValueError, match=f"tap '{taps[0]}'"):
        distil(tiny(tmp_path / "r", taps=taps))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (dict(train=dict(optimizer="sgdd")), "sgdd"),
        (dict(teacher_train=dict(optimizer="sgdd")), "sgdd"),
        (dict(train=dict(batch_size=65)), "batch_size is 65"),
        (dict(train=dict(accumulate=5)), r"\(1 x batch_size 16 x accumulate 5\)"),
        (dict(teacher_train=dict(accumulate=5)), "fewer training images than one step"),
        (
            dict(teacher=dict(name="seresnet18"), student=dict(init="calibrated", gates="keep"), taps=[]),
            "layer1.0.bn2",
        ),
        (dict(teacher=dict(weights="nowhere")), "no weights at nowhere"),
        (dict(teacher=dict(mean=None)), r"set teacher\.mean"),
        (dict(taps=["layer1"], student_taps={"layer1": "stage1"}), "the student has no module 'stage1'"),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained_or_written(tmp_path, parts, message):
    with pytest.raises((ValueError, FileNotFoundError, UnsupportedOperationError), match=message):
        distil(tiny(tmp_path / "r", **parts))
    assert list(tmp_path.iterdir()) == []


def test_the_students_modules_may_have_other_names_than_the_teachers(tmp_path):
    short = dict(epochs=1, batch_size=64)
    parts = dict(taps=["layer2"], student_taps={"layer2": "layer1"}, train=short, teacher_train=short)
    assert list(distil(tiny(tmp_path / "r", **parts))["hybrid_top1"]) == ["layer2"]


def test_a_student_starts_from_another_runs_at_another_number_of_time_steps(finished, tmp_path):
    folder, _, _ = finished
    config = tiny(
        tmp_path / "r",
        init=InitConfig(from_run=str(folder)),
        teacher=dict(weights=str(folder / "teacher")),
        student=dict(timesteps=3),
        train=dict(epochs=1, lr=1e-12, batch_size=64),
    )
    assert distil(config)["timesteps"] == 3
    name = "layer3.1.conv2.weight"
    torch.testing.assert_close(weights_of(tmp_path / "r")[name], weights_of(folder)[name], rtol=0, atol=1e-9)


def test_a_run_to_start_from_must_be_there_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"init\.from_run: there is no folder nowhere"):
        distil(tiny(tmp_path / "r", init=InitConfig(from_run="nowhere")))
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_guesses_is_refused_before_a_folder_is_made(tmp_path):
    teacher = build_teacher(TeacherConfig(**TEACHER), 10)
    save_weights(teacher, tmp_path / "random.safetensors")
    changes = dict(weights=str(tmp_path / "random.safetensors"), min_top1=None)
    with pytest.raises(ValueError, match=r"'resnet18' is right on .* % of the 30 evaluation images"):
        distil(tiny(tmp_path / "r", teacher={**TEACHER, **changes}))
    assert not (tmp_path / "r").exists()


def photos(folder):
    """Six grey images of each of two classes to train on and to evaluate on; one of the former is cut short."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for number in range(6):
                pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / split / label / f"{number}.png")
    bad = folder / "train" / "b" / "3.png"
    bad.write_bytes(bad.read_bytes()[:50])
    return bad


def test_an_image_that_cannot_be_read_is_named_or_left_out_and_reported(tmp_path, capsys):
    bad = photos(tmp_path / "photos")
    data = dict(name="folder", root=str(tmp_path / "photos"), crop_padding=0)
    short = dict(epochs=1, batch_size=4, lr=0.05)
    parts = dict(train=short, teacher_train=short, eval_timesteps=[])
    with pytest.raises(ValueError, match=f"cannot read the image {bad}"):
        distil(tiny(tmp_path / "error", data=data, **parts))
    assert not (tmp_path / "error").exists()
    summary = distil(tiny(tmp_path / "skip", data=data | dict(on_corrupt="skip"), **parts))
    assert [name.endswith("3.png") for name in summary["skipped_images"]] == [True]
    assert json.loads((tmp_path / "skip" / "summary.json").read_text())["skipped_images"] == summary["skipped_images"]
    assert "1 images could not be read and were left out" in capsys.readouterr().err
