"""Where a teacher's weights and its preprocessing come from."""

import dataclasses
import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from toy_runs import TEACHER, equal

from distill import TeacherConfig, teachers
from distill.data import Preprocessing
from distill.teachers import (
    build_teacher,
    check_accuracy,
    check_classes,
    check_same_images,
    has_weights,
    teacher_preprocessing,
)


def saved(folder, classes=10, **changes):
    network = build_teacher(TeacherConfig(**{**TEACHER, **changes}), classes)
    save_file(network.state_dict(), folder / "model.safetensors")
    return network


@pytest.mark.parametrize("form", ["file", "folder"])
def test_weights_load_from_a_file_or_its_folder(tmp_path, form):
    network = saved(tmp_path)
    path = tmp_path / "model.safetensors" if form == "file" else tmp_path
    config = TeacherConfig(**TEACHER, weights=str(path))
    assert has_weights(config) and not has_weights(TeacherConfig(**TEACHER))
    assert equal(build_teacher(config, 10).state_dict(), network.state_dict())


def test_the_network_is_timms_with_the_changes_that_were_asked_for():
    network = build_teacher(TeacherConfig(**TEACHER), 7)
    assert network.conv1.kernel_size == (3, 3) and network.conv1.stride == (1, 1) and network.conv1.in_channels == 1
    assert isinstance(network.maxpool, torch.nn.Identity) and network.fc.out_features == 7
    assert [info["num_chs"] for info in network.feature_info][1:] == [8, 8, 8, 8]


def test_timms_weights_are_asked_for_where_there_are_no_others(tmp_path, monkeypatch):
    asked = []
    make = teachers.create_ann

    def create(name, classes, in_chans, cifar_stem, pretrained, kwargs):
        asked.append(pretrained)
        return make(name, classes, in_chans, cifar_stem, False, kwargs)

    monkeypatch.setattr(teachers, "create_ann", create)
    saved(tmp_path)
    config = TeacherConfig(**{**TEACHER, "pretrained": True})
    build_teacher(config, 10)
    build_teacher(config, 10, weights=tmp_path)  # those that an interrupted run has saved
    assert asked == [False, True, False]


def test_missing_weights_are_named(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no weights at {path}"):
            build_teacher(TeacherConfig(**TEACHER, weights=str(path)), 10)


def test_weights_of_another_network_are_refused(tmp_path):
    saved(tmp_path, kwargs={"channels": [4, 4, 8, 16]})
    with pytest.raises(ValueError, match=r"does not fit ResNet: .*fc.weight: \(10, 16\), wanted \(10, 8\)"):
        build_teacher(TeacherConfig(**TEACHER, weights=str(tmp_path)), 10)
    with pytest.raises(ValueError, match=r"does not fit ResNet: .*missing keys"):
        build_teacher(TeacherConfig(**{**TEACHER, "name": "resnet34"}, weights=str(tmp_path)), 10)


def test_a_file_that_holds_no_weights_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("nonsense")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        build_teacher(TeacherConfig(**TEACHER, weights=str(tmp_path)), 10)


def test_an_unknown_network_or_argument_is_refused():
    with pytest.raises(ValueError, match=r"timm knows no network 'resnet19'.*resnet18"):
        build_teacher(TeacherConfig(name="resnet19"), 10)
    with pytest.raises(ValueError, match="does not take these arguments"):
        build_teacher(TeacherConfig(name="resnet18", kwargs={"no_such_argument": 1}), 10)


def test_the_preprocessing_is_that_of_the_configuration():
    config = TeacherConfig(
        input_size=[3, 8, 9], mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0], interpolation="bicubic", crop_pct=0.5,
        crop_mode="border",
    )  # fmt: skip
    assert teacher_preprocessing(config) == Preprocessing(
        input_size=(3, 8, 9), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), interpolation="bicubic", crop_pct=0.5,
        crop_mode="border",
    )  # fmt: skip
    silent = teacher_preprocessing(TeacherConfig(**TEACHER))
    assert (silent.interpolation, silent.crop_pct, silent.crop_mode) == ("bilinear", 1.0, "center")


@pytest.mark.parametrize("missing", ["input_size", "mean", "std"])
def test_own_weights_without_their_normalisation_are_refused_by_field(missing):
    values = {name: value for name, value in TEACHER.items() if name != missing}
    optional = r"teacher\.interpolation .*teacher\.crop_pct .*teacher\.crop_mode "
    with pytest.raises(ValueError, match=rf"set teacher\.{missing}; optional: {optional}.*teacher\.pretrained"):
        teacher_preprocessing(TeacherConfig(**values, weights="somewhere"))


KEPT = Preprocessing(
    input_size=(1, 9, 8), mean=(0.1,), std=(0.2,), interpolation="bicubic", crop_pct=0.95, crop_mode="squash"
)
TEN = [*"abcdefghij"]
SILENT = {name: TEACHER[name] for name in ("kwargs", "cifar_stem")}


def kept(folder, **spec):
    (folder / "config.json").write_text(json.dumps({"name": "resnet18", **spec}))
    return saved(folder)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_folder_of_train_teacher_says_how_its_images_are_made(tmp_path, form):
    network = kept(tmp_path, extra=KEPT.entries())
    path = str(tmp_path / "model.safetensors" if form == "file" else tmp_path)
    config = TeacherConfig(**SILENT, weights=path)
    assert teacher_preprocessing(config) == KEPT
    assert equal(build_teacher(config, 10).state_dict(), network.state_dict())  # of as many channels
    other = TeacherConfig(**SILENT, weights=path, mean=[0.5], crop_mode="center")
    assert teacher_preprocessing(other) == dataclasses.replace(KEPT, mean=(0.5,), crop_mode="center")


def test_a_folder_that_says_nothing_of_its_images_leaves_them_to_the_configuration(tmp_path):
    kept(tmp_path)
    assert teacher_preprocessing(TeacherConfig(**TEACHER, weights=str(tmp_path))).interpolation == "bilinear"
    with pytest.raises(ValueError, match=r"set teacher\.input_size, teacher\.mean, teacher\.std;"):
        teacher_preprocessing(TeacherConfig(**SILENT, weights=str(tmp_path)))
    kept(tmp_path, extra=KEPT.entries())
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")  # not what config.json is of
    with pytest.raises(ValueError, match=r"set teacher\.input_size"):
        teacher_preprocessing(TeacherConfig(**SILENT, weights=str(tmp_path / "other.safetensors")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ('{"extra": {"input_size": [1, 8, 8]}}', r"extra\.mean is missing"),
        ('{"extra": {"input_size": [1, 8, 8], "mean": [0], "std": [0]}}', r"std is \(0,\)"),
    ],
)
def test_a_broken_configuration_beside_the_weights_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'config.json'}: .*{message}"):
        teacher_preprocessing(TeacherConfig(**TEACHER, weights=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "crop_mode"), [("resnet18", "center"), ("tf_efficientnetv2_b3.in21k_ft_in1k", "squash")]
)
def test_pretrained_weights_bring_all_of_their_preprocessing(name, crop_mode):
    known = timm.data.resolve_model_data_config(timm.create_model(name))
    found = teacher_preprocessing(TeacherConfig(name=name, pretrained=True))
    assert found == Preprocessing(**known) and found.crop_mode == crop_mode  # a field that we do not know is an error


def test_the_configuration_has_the_last_word_over_pretrained_weights():
    found = teacher_preprocessing(TeacherConfig(pretrained=True))
    values = dict(input_size=[3, 64, 64], crop_pct=0.5, crop_mode="squash")
    other = teacher_preprocessing(TeacherConfig(pretrained=True, **values))
    assert other == dataclasses.replace(found, **values | dict(input_size=(3, 64, 64)))


def test_a_teacher_of_other_images_is_refused_by_field_with_both_values():
    student = teacher_preprocessing(TeacherConfig(name="resnet18.a1_in1k", pretrained=True))
    check_same_images(TeacherConfig(name="resnet18.a1_in1k", pretrained=True), student)
    config = TeacherConfig(name="tf_efficientnetv2_s.in1k", pretrained=True)
    with pytest.raises(ValueError) as error:
        check_same_images(config, student)
    for text in (
        "'tf_efficientnetv2_s.in1k' wants other images",
        "network's: input_size [3, 300, 300], the network's [3, 224, 224]; ",
        "; mean [0.5, 0.5, 0.5], the network's [0.485, 0.456, 0.406]; ",
        "; crop_pct 1.0, the network's 0.95. ",
        "say --teacher.input_size '[3, 224, 224]' --teacher.mean '[0.485, 0.456, 0.406]' --teacher.std ",
    ):
        assert text in str(error.value)
    assert "interpolation" not in str(error.value)  # the same


@pytest.mark.parametrize(
    ("field", "value", "other"),
    [
        ("input_size", [1, 8, 8], [1, 8, 9]),
        ("mean", [0.3], [0.25]),
        ("std", [0.4], [0.5]),
        ("interpolation", "bilinear", "bicubic"),
        ("crop_pct", 1.0, 0.9),
        ("crop_mode", "center", "squash"),
    ],
)
def test_each_field_that_is_stated_of_a_teacher_is_compared_and_no_other(tmp_path, field, value, other):
    network = Preprocessing(input_size=(1, 8, 8), mean=(0.3,), std=(0.4,))
    check_same_images(TeacherConfig(**SILENT, weights="somewhere"), network)
    check_same_images(TeacherConfig(**SILENT, weights="somewhere", **{field: value}), network)
    message = rf"network's: {field} {re.escape(str(other))}, the network's {re.escape(str(value))}\. "
    with pytest.raises(ValueError, match=message):
        check_same_images(TeacherConfig(**SILENT, weights="somewhere", **{field: other}), network)
    kept(tmp_path, extra=network.entries() | {field: other})
    with pytest.raises(ValueError, match=message):
        check_same_images(TeacherConfig(**SILENT, weights=str(tmp_path)), network)
    check_same_images(TeacherConfig(**SILENT, weights=str(tmp_path), **{field: value}), network)  # stated: it wins


def test_pretrained_weights_with_another_number_of_classes_are_refused():
    network = timm.create_model("resnet18", num_classes=10, channels=(4, 4, 8, 8))  # its weights know 1000
    config = TeacherConfig(pretrained=True)
    with pytest.raises(ValueError, match=r"'resnet18' know 1000 classes, the data has 10: .*train_teacher.py"):
        check_classes(config, network, TEN)
    check_classes(config, network, [*map(str, range(1000))])
    check_classes(TeacherConfig(), network, TEN)  # weights of the user's own


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_teacher_of_other_classes_or_another_order_is_refused(tmp_path, form):
    path = str(tmp_path / "model.safetensors" if form == "file" else tmp_path)
    config = TeacherConfig(**TEACHER, weights=path)
    network = kept(tmp_path, extra=KEPT.entries() | {"classes": TEN})
    check_classes(config, network, tuple(TEN))
    out = rf".*data\.class_map.*take extra\.classes out of {tmp_path / 'config.json'}"
    order = "knows 10 classes, the data has 10, in another order: class 2 is 'c' there, 'd' in the data"
    with pytest.raises(ValueError, match=f"the teacher 'resnet18' of teacher.weights {order}{out}"):
        check_classes(config, network, [*"abdcefghij"])
    with pytest.raises(ValueError, match=rf"the data has 10; not in both: \['a', 'x'\]{out}"):
        check_classes(config, network, [*"xbcdefghij"])
    kept(tmp_path, extra=KEPT.entries() | {"classes": 10})
    with pytest.raises(ValueError, match=r"config\.json: extra\.classes must be a list of names, found 10"):
        check_classes(config, network, TEN)


@pytest.mark.parametrize("spec", [{}, {"extra": KEPT.entries()}], ids=["nothing", "images alone"])
def test_a_teacher_that_was_saved_without_names_has_any(tmp_path, spec):
    network = kept(tmp_path, **spec)
    check_classes(TeacherConfig(**TEACHER, weights=str(tmp_path)), network, [*"jihgfedcba"])


@pytest.mark.parametrize(
    ("min_top1", "top1", "refused"),
    [
        (None, 18.99, True),  # 10 classes, 100 images: 10 + 3 sqrt(0.1 * 0.9 / 100) = 19 percent
        (None, 19.01, False),
        (80.0, 79.9, True),
        (0.0, 0.0, False),
    ],
)
def test_a_teacher_that_guesses_is_refused_with_the_likely_causes(min_top1, top1, refused):
    config = TeacherConfig(**{**TEACHER, "min_top1": min_top1})
    if not refused:
        return check_accuracy(config, top1, 100, 10)
    with pytest.raises(ValueError, match=rf"'resnet18' is right on {top1:.2f} % of the 100 .*teacher\.mean.*class_map"):
        check_accuracy(config, top1, 100, 10)


def test_two_classes_and_few_images_ask_for_no_more_than_all():
    check_accuracy(TeacherConfig(**{**TEACHER, "min_top1": None}), 100.0, 4, 2)  # 50 + 3 * 25 percent
