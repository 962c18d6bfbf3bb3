"""A hybrid as a network of its own: equal to the one in training, no larger than it must be, and loadable."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm_families import TEACHERS
from torch import nn
from toy_teachers import FAMILIES, images_of, student_of, student_taps_of, teacher_of

from distill import HybridDistiller, load_hybrid, save_hybrid
from distill.hybrid_network import _activation, _activation_spec
from distill.tap_names import default_tap_names
from distill.taps import hooks
from models import create_ann, create_snn, load_snn, save_snn, spiking_twin
from models.twin import ACTIVATIONS

TRANSFORMERS = {
    "vit_tiny_patch16_224": dict(img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2),  # a class token
    "swin_tiny_patch4_window7_224": dict(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2)
    ),  # channels last, and it takes no empty batch
    "mixer_s16_224": dict(img_size=32),  # tokens alone
}


def distiller_of(family):
    if family in TRANSFORMERS:
        torch.manual_seed(0)
        teacher = timm.create_model(family, num_classes=7, **TRANSFORMERS[family]).double().eval()
        nn.init.normal_(teacher.get_classifier().weight)  # some of timm's start at zero
        student, student_taps = create_snn("resnet18_cifar", 7, 2, width=8).double(), None
    else:
        teacher = teacher_of(family, torch.float64)
        student, student_taps = student_of(teacher), student_taps_of(teacher, default_tap_names(teacher))
    distiller = HybridDistiller(teacher, student, student_taps=student_taps, images=images_of(torch.float64))
    distiller.train()(images_of(torch.float64, 4))  # adapters and student have statistics of their own
    return distiller.eval()


@pytest.mark.parametrize("family", [*FAMILIES, *TRANSFORMERS])
def test_a_hybrid_alone_equals_the_one_in_training(family):
    distiller, images = distiller_of(family), images_of(torch.float64, 3)
    with torch.no_grad():
        expected = distiller(images).hybrid_logits
        assert len(expected) >= 2
        for tap, logits in expected.items():
            hybrid = distiller.hybrid(tap)
            torch.testing.assert_close(hybrid(images), logits, rtol=0, atol=1e-12)
            assert hybrid.runs_whole_teacher == family.startswith("vit")
            assert hybrid.blanks == (1 if family.startswith("swin") else 0)


@pytest.mark.parametrize(
    "family", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_a_saved_hybrid_gives_the_same_logits_and_holds_no_more_than_it_needs(family, tmp_path, monkeypatch):
    distiller, images = distiller_of(family), images_of(torch.float64, 3)
    tap = distiller.taps[1].name
    hybrid = distiller.hybrid(tap)
    save_hybrid(hybrid, tmp_path, images.shape[1:], {"classes": ["a"]})
    saved = set(load_file(tmp_path / "model.safetensors"))
    left_out = hybrid.state_dict().keys() - saved
    assert saved <= hybrid.state_dict().keys() and any(name.startswith("student.layer4") for name in left_out)
    assert any(name.startswith("teacher.") for name in left_out) == (not family.startswith("vit"))
    loaded = load_hybrid(tmp_path)
    assert not loaded.training and loaded.spec["extra"] == {"classes": ["a"]} and loaded.timesteps == 2
    with torch.no_grad():
        for name, value in loaded.state_dict().items():  # what was left out has no part
            if name not in saved and value.is_floating_point():
                value.fill_(torch.nan if name.startswith("student") else 1e3)
        expected = distiller(images).hybrid_logits[tap]
        torch.testing.assert_close(loaded(images), expected, rtol=0, atol=1e-12)


def test_neither_later_blocks_of_the_student_nor_earlier_ones_of_the_teacher_see_an_image():
    distiller, images = distiller_of("resnet18"), images_of(torch.float64, 3)
    hybrid = distiller.hybrid("layer2")
    rows = {}
    pairs = []
    for part in ("student", "teacher"):
        for name in ("conv1", "layer1", "layer2", "layer3", "layer4", "fc"):
            module = hybrid.get_submodule(f"{part}.{name}")
            pairs.append((module, lambda m, a, o, key=(part, name): rows.update({key: len(o)})))
    hybrid(images)  # the size of the teacher's feature is found once, on a blank image
    with hooks(pairs):
        hybrid(images)
    before = [(part, name) for part, name in rows if part == "student"]
    assert before == [("student", "conv1"), ("student", "layer1"), ("student", "layer2")]
    sizes = {name: count for (part, name), count in rows.items() if part == "teacher"}
    # the output of layer2's hook comes before the rows are handed in
    assert sizes == {"conv1": 0, "layer1": 0, "layer2": 3, "layer3": 3, "layer4": 3, "fc": 3} or sizes["layer2"] == 0
    assert sizes["conv1"] == sizes["layer1"] == 0 and sizes["layer3"] == sizes["fc"] == 3


def test_a_hybrid_runs_at_other_sizes_and_time_steps():
    distiller = distiller_of("resnet18")
    hybrid = distiller.hybrid("layer1")
    images = torch.rand(2, 3, 48, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(hybrid(images), distiller(images).hybrid_logits["layer1"], rtol=0, atol=1e-12)
        two = hybrid(images)
        hybrid.timesteps = 5
        assert distiller.student.timesteps == 5 and not torch.equal(hybrid(images), two)


@pytest.mark.parametrize("family", ["SwinV2", pytest.param("CoAtNet", marks=pytest.mark.slow)])
def test_weights_of_modules_that_are_not_called_are_saved_too(family, tmp_path):
    # timm's SwinV2 multiplies by `qkv.weight` itself, CoAtNet reads a table of position biases
    entry = TEACHERS[family]
    teacher, images = entry.build().double(), entry.images().double()
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # timm's, which `build` has changed
    student = create_snn("resnet18_cifar", 7, 2, width=8).double()
    distiller = HybridDistiller(teacher, student, images=images)
    distiller.train()(images)
    distiller.eval()
    for tap in (distiller.taps[0].name, distiller.taps[-1].name):
        save_hybrid(distiller.hybrid(tap), tmp_path / tap, images.shape[1:])
        with torch.no_grad():
            expected = distiller(images, active=[tap]).hybrid_logits[tap]
            torch.testing.assert_close(load_hybrid(tmp_path / tap)(images), expected, rtol=0, atol=1e-12)


def test_making_a_hybrid_changes_no_mode():
    distiller = distiller_of("resnet18").train()
    distiller.freeze([distiller.student.bn1])
    modes = [module.training for module in distiller.modules()]
    hybrid = distiller.hybrid("layer1")
    assert [module.training for module in distiller.modules()] == modes and hybrid.training
    hybrid.eval()
    with pytest.raises(ValueError, match=r"its student in evaluation mode: call distiller.train\(\)"):
        distiller(images_of(torch.float64))


@pytest.mark.parametrize("change", ["activation", "convolution"])
def test_a_teacher_that_was_changed_by_hand_is_not_saved(change, tmp_path):
    teacher = create_ann("resnet18", 7, kwargs={"channels": [8, 8, 8, 8]})
    if change == "activation":
        teacher.layer4[0].act1 = nn.SiLU()
    else:
        teacher.layer4[0].conv1 = nn.Conv2d(8, 8, 1, 2, bias=False)
    student = create_snn("resnet18_cifar", 7, 2, width=8)
    distiller = HybridDistiller(teacher, student, ["layer1"], images=images_of())
    with pytest.raises(ValueError, match=r"changed by hand and could not be rebuilt from .*layer4\.0\.(act1|conv1)"):
        save_hybrid(distiller.hybrid("layer1"), tmp_path, (3, 32, 32))
    assert list(tmp_path.iterdir()) == []


def test_extra_of_other_types_than_jsons_is_refused_before_anything_is_written(tmp_path):
    hybrid, size = distiller_of("resnet18").hybrid("layer1"), images_of().shape[1:]
    with pytest.raises(ValueError, match=r"extra takes JSON types: .*float32"):
        save_hybrid(hybrid, tmp_path / "new", size, {"mean": [np.float32(0.3)]})
    assert not (tmp_path / "new").exists()


def test_a_hybrid_in_training_mode_leaves_the_teacher_in_evaluation_mode():
    hybrid = distiller_of("resnet18").hybrid("layer1").train()
    assert hybrid.student.training and hybrid.adapter.training and not hybrid.teacher.training


def test_a_name_that_is_no_tap_is_refused():
    with pytest.raises(ValueError, match=r"tap must be one of \['layer1', 'layer2', 'layer3'\], found 'layer4'"):
        distiller_of("resnet18").hybrid("layer4")


@pytest.fixture
def saved(tmp_path):
    teacher = create_ann("resnet18", 7, kwargs={"channels": [8, 8, 8, 8]})
    distiller = HybridDistiller(teacher, spiking_twin(teacher, 2, input_size=(3, 32, 32)), images=images_of())
    save_hybrid(distiller.hybrid("layer1"), tmp_path, (3, 32, 32))
    return tmp_path


def test_a_folder_without_a_hybrid_is_refused_by_what_is_missing(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_hybrid(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_hybrid(saved)


@pytest.mark.parametrize("adapter", ["conv3x3", "norm"])
def test_a_hybrid_is_loaded_with_the_adapter_that_it_had(adapter, tmp_path):
    teacher, images = teacher_of("resnet18", torch.float64), images_of(torch.float64, 4)
    distiller = HybridDistiller(teacher, student_of(teacher), images=images, adapter=adapter).train()
    distiller(images)
    hybrid = distiller.eval().hybrid("layer2")
    save_hybrid(hybrid, tmp_path, tuple(images.shape[1:]))
    loaded = load_hybrid(tmp_path)
    assert loaded.adapter.form == adapter
    with torch.no_grad():
        assert torch.equal(loaded(images), hybrid(images))


@pytest.mark.parametrize(
    "change, said",
    [({"adapter": "linear"}, "adapter must be one of"), ({"adapter": "norm", "in_channels": 3}, "has 3 channels")],
)
def test_an_adapter_that_cannot_be_is_refused_with_its_file(saved, change, said):
    spec = json.loads((saved / "config.json").read_text()) | change
    (saved / "config.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=rf"config\.json does not describe a hybrid: .*{said}"):
        load_hybrid(saved)


def test_a_hybrid_of_before_adapters_had_forms_has_one_of_1x1(saved):
    spec = json.loads((saved / "config.json").read_text())
    assert spec.pop("adapter") == "conv1x1"
    (saved / "config.json").write_text(json.dumps(spec))
    assert load_hybrid(saved).adapter.form == "conv1x1"


def test_a_student_is_no_hybrid_nor_the_other_way_round(saved, tmp_path):
    with pytest.raises(ValueError, match="kind must be one of 'network', 'twin', found 'hybrid'"):
        load_snn(saved)
    save_snn(create_snn("resnet18_cifar", 3, width=8), tmp_path / "student")
    with pytest.raises(ValueError, match="kind must be 'hybrid', found 'network'"):
        load_hybrid(tmp_path / "student")


def test_weights_that_do_not_fit_are_named(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["student.layer4.0.conv1.weight"] = torch.zeros(1)
    del tensors["adapter.conv.weight"]
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing keys \['adapter.conv.weight'\], 1 unknown keys \['student.layer4"):
        load_hybrid(saved)


@pytest.mark.parametrize("change", [{"tap": {"name": "layer1"}}, {"student": {}}, {"teacher": {"nam": "resnet18"}}])
def test_a_configuration_that_describes_no_hybrid_is_refused(saved, change):
    spec = json.loads((saved / "config.json").read_text()) | change
    (saved / "config.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"config\.json does not describe a hybrid"):
        load_hybrid(saved)


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.ELU(0.5), nn.SiLU(), nn.GELU(approximate="tanh"), nn.Hardswish(),
     nn.PReLU(8), *[kind() for kind in ACTIVATIONS if kind.__module__.startswith("timm")]],
    ids=repr,
)  # fmt: skip
def test_every_activation_that_an_adapter_may_end_in_is_rebuilt_from_its_name(activation):
    x = torch.linspace(-3, 3, 24).reshape(1, 8, 3)
    rebuilt = _activation(json.loads(json.dumps(_activation_spec(activation))))
    assert torch.equal(rebuilt(x.clone()), activation(x.clone()))


def test_an_activation_from_a_file_is_one_of_those_that_are_known():
    with pytest.raises(ValueError, match=r"activation must be one of .*, found 'torch\.Linear'"):
        _activation({"type": "torch.Linear", "arguments": {}})
    assert _activation(None) is None
