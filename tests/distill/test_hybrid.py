"""Hybrids at timm's taps: exact where they can be, and learnable where they have to be."""

import copy

import pytest
import torch
from torch import nn
from toy_teachers import (
    FAMILIES,
    RECTIFIED,
    Around,
    NotEmpty,
    Toy,
    images_of,
    student_of,
    student_taps_of,
    teacher_of,
)

from distill import HybridDistiller, HybridOutput, LossConfig, distillation_losses
from distill.taps import default_tap_names, hooks
from models import create_snn, spiking_twin

LABELS = torch.tensor([1, 4])


def distiller_of(family, dtype=torch.float32, taps="stages", timesteps=2):
    teacher = teacher_of(family, dtype)
    student_taps = student_taps_of(teacher, default_tap_names(teacher))
    return HybridDistiller(teacher, student_of(teacher, timesteps), taps, student_taps, images=images_of(dtype))


class Own(nn.Module):
    """In place of an adapter: the teacher's own feature, whatever the student says."""

    def __init__(self, feature):
        super().__init__()
        self.feature = feature

    def forward(self, rate, size):
        return self.feature


def feed_own_features(distiller, images):
    """Each hybrid becomes the teacher itself."""
    features = {}

    def keep(name):
        return lambda module, args, output: features.update({name: output.clone()})

    with torch.no_grad(), hooks([(distiller.teacher.get_submodule(t.name), keep(t.name)) for t in distiller.taps]):
        distiller.teacher(images)
    distiller.adapters = nn.ModuleList(Own(features[tap.name]) for tap in distiller.taps)


def total(distiller, images):
    return distillation_losses(distiller(images), LABELS, LossConfig())["total"]


@pytest.mark.parametrize("blanks", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_teachers_own_feature_gives_the_teachers_logits(family, blanks):
    images = images_of(torch.float64, count=3)
    distiller = distiller_of(family, torch.float64).eval()
    assert distiller.blanks == 0  # what all these families allow
    distiller.blanks = blanks
    feed_own_features(distiller, images)
    out = distiller(images)
    assert list(out.hybrid_logits) == [tap.name for tap in distiller.taps] and len(out.hybrid_logits) >= 2
    assert out.teacher_logits.std() > 1e-6  # not all the same
    for logits in out.hybrid_logits.values():
        torch.testing.assert_close(logits, out.teacher_logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_taps_change_nothing_in_the_teachers_logits(family):
    images = images_of(torch.float64, count=3)
    alone = teacher_of(family, torch.float64)(images)
    distiller = distiller_of(family, torch.float64)
    for mode in (True, False):
        out = distiller.train(mode)(images)
        assert torch.equal(out.teacher_logits, alone)
        assert all((logits - alone).abs().max() > 1e-9 for logits in out.hybrid_logits.values())
    assert torch.equal(distiller.teacher(images), alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blank_image_in_front_changes_no_hybrid(family):
    images = images_of(torch.float64, count=3)
    distiller = distiller_of(family, torch.float64).eval()
    found = {}
    for distiller.blanks in (0, 1):
        out = distiller(images)
        assert all(len(logits) == 3 for logits in out.hybrid_logits.values())
        found[distiller.blanks] = torch.stack(list(out.hybrid_logits.values()))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_the_teacher_runs_on_images_once():
    distiller, images = distiller_of("resnet18"), images_of(count=2)
    sizes = []
    with hooks([(distiller.teacher.conv1, lambda m, a, out: sizes.append(len(out)))]):
        distiller(images)
    assert sizes == [2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_that_takes_no_empty_batch_gets_one_blank_image(dtype):
    teacher = NotEmpty().to(dtype)
    images = images_of(dtype)
    with pytest.raises(RuntimeError):
        teacher(images[:0])
    student = spiking_twin(Toy().to(dtype), 2, input_size=(3, 32, 32))
    distiller = HybridDistiller(teacher, student, ["act1", "act2"], images=images).eval()
    assert distiller.blanks == 1
    feed_own_features(distiller, images)
    out = distiller(images)
    for logits in out.hybrid_logits.values():
        torch.testing.assert_close(logits, out.teacher_logits, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_end_in_the_activation_that_the_feature_has_passed(family):
    distiller, images = distiller_of(family), images_of()
    outputs = []
    with hooks([(adapter, lambda m, a, out: outputs.append(out)) for adapter in distiller.adapters]):
        distiller.train()(images)
    for tap, adapter, output in zip(distiller.taps, distiller.adapters, outputs, strict=True):
        assert isinstance(adapter.act, nn.ReLU if family in RECTIFIED else nn.Identity)
        assert output.shape == (2, *tap.shape)
        assert (output.min() >= 0) == (family in RECTIFIED) and output.max() > 0


def test_a_students_module_that_fires_twice_is_no_cut():
    class Shared(Toy):
        def forward(self, x):
            return self.tail(self.act1(self.second(self.act1(self.first(x)))))

    student = spiking_twin(Shared(), 2, input_size=(3, 32, 32))
    with pytest.raises(ValueError, match="tap 'act1': the student's module 'act1' fires more than once"):
        HybridDistiller(Toy(), student, ["act1"], {"act1": "act1"}, images=images_of())


def test_what_the_user_says_of_a_students_tap_need_not_be_found():
    class Renamed(Toy):
        def __init__(self):
            super().__init__()
            self.other, self.act2 = self.act2, nn.Identity()

        def forward(self, x):
            return self.tail(self.other(self.second(self.act1(self.first(x)))))

    student = spiking_twin(Renamed(), 2, input_size=(3, 32, 32))
    distiller = HybridDistiller(Toy(), student, ["act1", "act2"], {"act2": "other"}, images=images_of())
    assert distiller.student_taps == {"act1": "act1", "act2": "other"}


def test_an_adapter_is_a_convolution_a_norm_and_the_activation():
    distiller = distiller_of("resnet18").eval()
    adapter = distiller.adapters[0]
    rate = torch.rand(2, adapter.conv.in_channels, 5, 6)
    with torch.no_grad():
        adapter.bn.running_mean.fill_(0.5)
        adapter.bn.running_var.fill_(4.0)
        pixelwise = torch.einsum("oc,bchw->bohw", adapter.conv.weight[:, :, 0, 0], rate)
        expected = ((pixelwise - 0.5) / (4.0 + adapter.bn.eps) ** 0.5).relu()
        torch.testing.assert_close(adapter(rate, rate.shape[2:]), expected)
    assert adapter.conv.kernel_size == (1, 1) and adapter.conv.bias is None


def test_an_adapter_without_a_convolution_scales_and_shifts_each_channel():
    teacher = teacher_of("resnet18")
    distiller = HybridDistiller(teacher, student_of(teacher), images=images_of(), adapter="norm").eval()
    adapter = distiller.adapters[1]
    rate = torch.rand(2, adapter.in_channels, 5, 6)
    assert {name for name, _ in adapter.named_parameters()} == {"bn.weight", "bn.bias"}
    with torch.no_grad():
        adapter.bn.bias.copy_(torch.arange(adapter.in_channels) - 0.5)
        adapter.bn.weight.copy_(torch.arange(adapter.in_channels) + 2.0)
        adapter.bn.running_mean.fill_(0.25)
        adapter.bn.running_var.fill_(4.0)
        scales, shifts = (x[:, None, None] for x in (adapter.bn.weight, adapter.bn.bias))
        shifted = scales * (rate - 0.25) / (4.0 + adapter.bn.eps) ** 0.5 + shifts
        torch.testing.assert_close(adapter(rate, rate.shape[2:]), shifted.relu())
    student = create_snn("resnet18_cifar", 7, 2, width=6)
    with pytest.raises(ValueError, match=r"tap 'layer1': adapter must be conv1x1 or conv3x3 .* 6 channels .* 4, found"):
        HybridDistiller(teacher, student, images=images_of(), adapter="norm")


def test_an_adapter_of_an_unknown_form_is_refused():
    teacher = teacher_of("resnet18")
    with pytest.raises(ValueError, match=r"adapter must be one of \('conv1x1', 'conv3x3', 'norm'\), found 'linear'"):
        HybridDistiller(teacher, student_of(teacher), images=images_of(), adapter="linear")


def test_an_adapter_of_3x3_sees_the_neighbours():
    teacher = teacher_of("resnet18")
    distiller = HybridDistiller(teacher, student_of(teacher), images=images_of(), adapter="conv3x3").eval()
    adapter = distiller.adapters[0]
    rate = torch.rand(2, adapter.in_channels, 5, 6)
    with torch.no_grad():
        patches = torch.nn.functional.unfold(rate, 3, padding=1)  # (B, c 9, h w)
        mixed = (adapter.conv.weight.flatten(1) @ patches).unflatten(2, (5, 6)) / (1 + adapter.bn.eps) ** 0.5
        torch.testing.assert_close(adapter(rate, rate.shape[2:]), mixed.relu())


def test_an_adapter_resizes_where_the_student_has_another_size():
    teacher = teacher_of("resnet18")
    student = student_of(teacher)
    distiller = HybridDistiller(teacher, student, ["layer2"], {"layer2": "layer1"}, images=images_of())
    (adapter,) = distiller.adapters
    assert distiller.taps[0].shape == (4, 4, 4) and adapter.conv.in_channels == 4
    step = torch.zeros(1, 4, 8, 8)
    step[..., 4:] = 1.0  # bilinear from 8 to 4 columns: the means of two neighbours
    with torch.no_grad():
        adapter.eval().conv.weight.copy_(torch.eye(4)[..., None, None])
        columns = adapter(step, torch.Size((4, 4)))[0, 0, 0]
    torch.testing.assert_close(columns, torch.tensor([0.0, 0.0, 1.0, 1.0]) / (1 + adapter.bn.eps) ** 0.5)
    assert distiller(images_of()).hybrid_logits["layer2"].shape == (2, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_and_student_parameter_gets_a_gradient_and_the_teacher_none(family):
    distiller = distiller_of(family).train()
    total(distiller, images_of()).backward()
    for name, parameter in distiller.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for adapter in distiller.adapters:
        assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    for parameter in distiller.teacher.parameters():
        assert parameter.grad is None and not parameter.requires_grad


@pytest.mark.parametrize("blanks", [0, 1])
def test_a_hybrid_trains_the_student_up_to_its_tap_and_no_further(blanks):
    distiller = distiller_of("resnet18").train()
    distiller.blanks = blanks
    distiller(images_of()).hybrid_logits["layer2"].square().sum().backward()
    student, moved = distiller.student, {}
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4", "fc"):
        parameters = student.get_submodule(name).parameters()
        moved[name] = any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
    assert moved == dict(conv1=True, layer1=True, layer2=True, layer3=False, layer4=False, fc=False)
    grads = [adapter.conv.weight.grad for adapter in distiller.adapters]
    assert [grad is not None and bool(grad.abs().max() > 0) for grad in grads] == [False, True, False]


def test_the_gradient_through_the_frozen_tail_is_that_of_the_tail():
    distiller, images = distiller_of("resnet18", torch.float64).eval(), images_of(torch.float64)
    feed_own_features(distiller, images)
    feature = distiller.adapters[1].feature.requires_grad_()
    weights = torch.randn(2, 7, dtype=torch.float64)
    (distiller(images).hybrid_logits["layer2"] * weights).sum().backward()
    teacher, leaf = distiller.teacher, feature.detach().clone().requires_grad_()
    (teacher.forward_head(teacher.layer4(teacher.layer3(leaf))) * weights).sum().backward()
    torch.testing.assert_close(feature.grad, leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_steps_leave_the_teacher_bit_for_bit_as_it_was(family):
    distiller, images = distiller_of(family).train(), images_of()
    before = copy.deepcopy(distiller.teacher.state_dict())
    student = copy.deepcopy(distiller.student.state_dict())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        total(distiller, images).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())
    assert any(not torch.equal(value, student[name]) for name, value in distiller.student.state_dict().items())
    assert not any(module.training for module in distiller.teacher.modules())


def test_a_teacher_that_comes_in_training_mode_is_put_in_evaluation_mode_and_frozen():
    teacher, student = teacher_of("resnet18"), student_of(teacher_of("resnet18"))
    before = copy.deepcopy(teacher.state_dict())
    distiller = HybridDistiller(teacher.train().requires_grad_(True), student, images=images_of()).train()
    distiller(images_of())
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_teacher_is_in_no_state_dict_and_among_no_parameters_or_modules():
    distiller = distiller_of("resnet18")
    own = {id(parameter) for parameter in distiller.teacher.parameters()}
    assert not own & {id(parameter) for parameter in distiller.parameters()}
    assert not set(distiller.teacher.modules()) & set(distiller.modules())
    keys = {key.split(".")[0] for key in distiller.state_dict()}
    assert keys == {"student", "adapters"}


def test_the_teacher_moves_with_the_distiller():
    distiller = distiller_of("resnet18")
    distiller.double()
    assert {p.dtype for p in distiller.teacher.parameters()} == {torch.float64}
    out = distiller.eval()(images_of(torch.float64))
    assert {out.student_logits.dtype, out.teacher_logits.dtype} == {torch.float64}
    distiller.to(torch.float32)
    assert {p.dtype for p in [*distiller.teacher.parameters(), *distiller.parameters()]} == {torch.float32}
    distiller.to("meta")
    assert {p.device.type for p in [*distiller.teacher.parameters(), *distiller.parameters()]} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_distiller_moves_to_a_gpu_with_its_teacher():
    distiller = distiller_of("resnet18").to("cuda").train()
    total_loss = distillation_losses(distiller(images_of().cuda()), LABELS.cuda(), LossConfig())["total"]
    total_loss.backward()
    assert {p.device.type for p in distiller.teacher.parameters()} == {"cuda"}


def test_the_output_is_a_named_tuple_of_float32_logits_also_under_autocast():
    distiller, images = distiller_of("resnet18").train(), images_of()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = distiller(images)
        assert isinstance(out, HybridOutput)
        assert out._fields == ("student_logits", "teacher_logits", "hybrid_logits", "feature_losses")
        assert list(out.hybrid_logits) == ["layer1", "layer2", "layer3"]
        for logits in (out.student_logits, out.teacher_logits, *out.hybrid_logits.values()):
            assert logits.dtype == torch.float32 and logits.shape == (2, 7)
    assert not out.teacher_logits.requires_grad and out.student_logits.requires_grad


def test_the_students_logits_are_those_of_the_student_alone():
    distiller, images = distiller_of("resnet18", torch.float64).eval(), images_of(torch.float64)
    assert torch.equal(distiller(images).student_logits, distiller.student(images))


def test_hybrids_see_the_rate_of_the_students_spikes():
    distiller, images = distiller_of("resnet18", torch.float64, timesteps=4).eval(), images_of(torch.float64)
    seen, streams = [], []
    with hooks([(distiller.adapters[0], lambda m, args, out: seen.append(args[0])),
                (distiller.student.layer1, lambda m, a, out: streams.append(out.stream))]):  # fmt: skip
        distiller(images)
    torch.testing.assert_close(seen[0], streams[0].mean(0), rtol=0, atol=1e-12)


def test_the_order_of_the_taps_does_not_matter():
    distiller = distiller_of("resnet18", taps=["layer3", "layer1"])
    assert list(distiller(images_of()).hybrid_logits) == ["layer1", "layer3"]


def test_no_taps_is_plain_logit_distillation():
    distiller = distiller_of("resnet18", taps=[]).train()
    out = distiller(images_of())
    assert out.hybrid_logits == {} and len(distiller.adapters) == 0
    total(distiller, images_of()).backward()


def test_without_images_the_taps_are_checked_on_random_numbers():
    teacher = teacher_of("resnet18")
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "input_size": (3, 32, 32)}
    distiller = HybridDistiller(teacher, student_of(teacher))
    assert [tap.shape for tap in distiller.taps] == [(4, 8, 8), (4, 4, 4), (8, 2, 2)]


@pytest.mark.parametrize(
    ("taps", "student_taps", "reason"),
    [
        (["layer9"], None, "tap 'layer9' is no module of the teacher"),
        (["layer2.0.act1"], None, "tap 'layer2.0.act1' is not a cut"),
        (["layer2"], {"layer2": "stage2"}, r"tap 'layer2': the student has no module 'stage2'; it has \['conv1'"),
        (["layer2"], {"layer2": "fc"}, "tap 'layer2': the student's module 'fc' yields no map"),
        (["layer2"], {"layer2": "global_pool"}, "tap 'layer2': the student's module 'global_pool' yields no map"),
    ],
)
def test_a_tap_that_cannot_serve_is_refused_when_the_distiller_is_made(taps, student_taps, reason):
    teacher = teacher_of("resnet18")
    with pytest.raises(ValueError, match=reason):
        HybridDistiller(teacher, student_of(teacher), taps, student_taps, images=images_of())


def test_a_network_written_by_hand_is_checked_too():
    teacher = Around()
    student = spiking_twin(teacher, 2, input_size=(3, 32, 32))
    with pytest.raises(ValueError, match="tap 'act2' is not a cut of Around"):
        HybridDistiller(teacher, student, ["act2"], images=images_of())
    assert list(HybridDistiller(teacher, student, ["act1"], images=images_of())(images_of()).hybrid_logits) == ["act1"]


def test_a_student_that_does_not_spike_is_refused():
    with pytest.raises(TypeError, match="the student must be a spiking network, found ResNet"):
        HybridDistiller(teacher_of("resnet18"), teacher_of("resnet18"), images=images_of())


def test_making_a_distiller_leaves_the_students_time_steps_mode_and_statistics():
    teacher = teacher_of("resnet18")
    student = student_of(teacher, timesteps=3).train()
    before = copy.deepcopy(student.state_dict())
    HybridDistiller(teacher, student, images=images_of())
    assert student.timesteps == 3 and student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not any(module._forward_hooks for network in (teacher, student) for module in network.modules())


def test_images_of_another_size_than_those_of_the_check_are_taken():
    distiller = distiller_of("resnet18").eval()
    images = torch.randn(3, 3, 48, 64)
    feed_own_features(distiller, images)
    out = distiller(images)
    for logits in out.hybrid_logits.values():
        torch.testing.assert_close(logits, out.teacher_logits, rtol=1e-4, atol=1e-5)
    assert distiller_of("resnet18")(images).hybrid_logits["layer1"].shape == (3, 7)


def test_a_teacher_that_somebody_put_in_training_mode_keeps_its_statistics():
    distiller, images = distiller_of("resnet18"), images_of()
    before = copy.deepcopy(distiller.teacher.state_dict())
    distiller.teacher.train()
    distiller.train()(images)
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())


def test_a_student_of_other_classes_is_refused():
    teacher = teacher_of("resnet18")
    student = student_of(teacher)
    student.fc = nn.Linear(student.fc.in_features, 5)
    with pytest.raises(ValueError, match="the student knows 5 classes, the teacher 7"):
        HybridDistiller(teacher, student, images=images_of())


def test_images_of_another_size_than_the_probe_are_distilled_too():
    teacher = teacher_of("resnet18")
    distiller = HybridDistiller(teacher, student_of(teacher, 2), images=torch.randn(2, 3, 64, 64)).train()
    out = distiller(torch.randn(3, 3, 32, 48))
    assert [logits.shape for logits in out.hybrid_logits.values()] == [(3, 7)] * 3


def test_somebodys_train_does_not_move_the_teachers_statistics():
    teacher = teacher_of("resnet18")
    distiller = HybridDistiller(teacher, student_of(teacher, 1), images=torch.randn(2, 3, 32, 32)).train()
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    teacher.train()
    distiller(torch.randn(4, 3, 32, 32))
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_the_checks_leave_every_modules_mode_and_t_alone():
    teacher = teacher_of("resnet18")
    student = student_of(teacher, 3).train()
    student.layer1[0].bn1.eval()
    HybridDistiller(teacher, student, images=torch.randn(2, 3, 32, 32))
    assert student.timesteps == 3 and student.training
    assert not student.layer1[0].bn1.training and student.layer1[0].bn2.training
