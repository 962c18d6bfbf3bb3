"""Twins of timm's families of convolutional networks: each trains as the reference, and reaches every parameter.

What `test_twin.py` holds five families to, here for many more, gated ones among them. One of each kind runs by
default, the whole list with ``-m slow``.
"""

import copy
import re
from pathlib import Path

import pytest
import timm
import timm.layers.activations as timm_activations
import timm.layers.activations_me as timm_activations_me
import torch
import torch.nn.functional as F
from reference import Reference, _Layer, train_once
from timm.layers import BatchNormAct2d, SqueezeExcite
from timm.layers.create_act import _ACT_LAYER_DEFAULT, _ACT_LAYER_ME
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.vgg import VGG
from torch import nn
from toy_networks import generic

from models import NeuronConfig, SpikingNeuron, UnsupportedOperationError, spiking_twin
from models.twin import ACTIVATIONS, GATES, OnRate

NARROW = dict(channels=(8, 16, 16, 16), zero_init_last=False)


def rep_net(**kwargs):
    """RepVGG in small: 3x3, 1x1 and identity branches, each with its norm."""
    blocks = (ByoBlockCfg(type="rep", d=1, c=8, s=2, br=0.0), ByoBlockCfg(type="rep", d=2, c=16, s=2, br=0.0))
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), **kwargs)


def vgg_net(**kwargs):
    """A VGG without batch norm: biases in front of its neurons."""
    return VGG(cfg=[8, 8, "M", 16, "M"], mlp_ratio=0.01, **kwargs)


DEFAULT = {
    "resnet10t": NARROW,
    "ecaresnet26t": NARROW,
    "densenetblur121d": dict(block_config=(2, 2), growth_rate=8),
    "mobilenetv4_conv_small_035": {},
    "mobilenetv3_small_050": {},
    "test_efficientnet": {},
    "rep_net": {},
    "vgg_net": {},
}
"""A plain residual, an efficient-channel-attention one, dense concatenation with anti-aliasing, linear bottlenecks,
Hardswish with hard gates, SiLU with squeeze-and-excitation, many branches, and a VGG."""

SLOW = {
    "cs3darknet_focus_s": {},
    "cspnext_tiny": {},
    "cspresnet50": {},
    "darknet17": {},
    "dla46_c": {},
    "dpn48b": {},
    "efficientnet_b0": {},
    "efficientnet_es": {},
    "efficientnet_lite0": {},
    "efficientnetv2_rw_t": {},
    "ese_vovnet19b_slim": {},
    "fasternet_t0": {},
    "fastvit_t8": dict(layer_scale_init_value=0.5),
    "fbnetc_100": {},
    "fbnetv3_b": {},
    "gernet_s": {},
    "ghostnet_050": {},
    "ghostnetv2_100": dict(size=64),
    "ghostnetv3_050": dict(size=64),
    "hardcorenas_a": {},
    "hgnet_tiny": {},
    "hgnetv2_b0": {},
    "hrnet_w18_small": {},
    "inception_v4": dict(size=80),
    "lcnet_035": {},
    "lcnetv2_small": {},
    "legacy_seresnet18": {},
    "legacy_xception": {},
    "mixnet_s": {},
    "mnasnet_small": {},
    "mobilenetv1_100": {},
    "mobileone_s0": {},
    "mobileone_s4": {},
    "nf_resnet26": {},
    "regnetv_040": {},
    "regnetx_002": {},
    "regnety_002": {},
    "regnetz_005": {},
    "repghostnet_050": {},
    "repvgg_a0": {},
    "repvit_m0_9": {},
    "res2net50_14w_8s": {},
    "resnetblur18": NARROW,
    "resnetv2_18": {},
    "resnext50_32x4d": dict(layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), zero_init_last=False),
    "rexnet_100": {},
    "selecsls42": {},
    "semnasnet_075": {},
    "seresnet33ts": {},
    "test_nfnet": {},
    "tinynet_e": {},
    "tresnet_m": {},
    "vovnet39a": {},
    "wide_resnet50_2": dict(layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), zero_init_last=False),
    "xception41": {},
}

families = pytest.mark.parametrize("family", [*DEFAULT, *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]])

LOW = {"fastvit_t8": 0.1, "hgnet_tiny": 0.1, "nf_resnet26": 0.05, "test_nfnet": 0.02, "vgg_net": 0.02}
"""Thresholds at which layers without a batch norm in front of them fire before any training."""


def ann_of(family):
    """A network without weights or dropout (which some families call as a function, of one mask a step), and the size
    of its images."""
    kwargs = {**DEFAULT, **SLOW}[family]
    size = kwargs.get("size", 32)
    kwargs = {k: v for k, v in kwargs.items() if k != "size"} | {"num_classes": 5, "drop_rate": 0.0}
    own = {"rep_net": rep_net, "vgg_net": vgg_net}.get(family)
    return (own(**kwargs) if own else timm.create_model(family, **kwargs)), (3, size, size)


class OnMean(_Layer):
    """The reference's gate: its activations see the rate, in the spike pass as the mean over the steps."""

    def __init__(self, original, clock):
        super().__init__(original, clock)
        self.activation = original.activation

    def spike_pass(self, x):
        self.kept.append(None)
        y = self.activation(self.steps(x).mean(0))
        return y.repeat(self.clock.timesteps, *[1] * (y.ndim - 1))

    def rate_pass(self, rate, kept):
        return self.activation(rate)


@families
def test_a_twin_of_the_family_trains_as_the_reference_and_reaches_every_parameter(family):
    ann, size = ann_of(family)
    neuron = NeuronConfig(leak=0.5, threshold=LOW.get(family, 0.7))
    snn = generic(spiking_twin(ann, 2, neuron, gates="keep", input_size=size).train())
    for name, parameter in snn.named_parameters():
        if name.endswith("gain") and not parameter.any():  # normaliser-free networks start with closed branches
            nn.init.constant_(parameter, 0.5)
    plain = copy.deepcopy(snn)
    plain.step_mode = "s"  # one call is then the plain forward of the network's own class
    reference = Reference(plain, 2, {"OnRate": OnMean})
    neurons = {module: name for name, module in snn.named_modules() if isinstance(module, SpikingNeuron)}
    silent = set(neurons.values())

    def hear(module, args, output):
        if output.rate.any():
            silent.discard(neurons[module])

    for module in neurons:
        module.register_forward_hook(hear)
    images = torch.randn(4, *size, dtype=torch.float64)
    ours = train_once(snn, snn, images)
    theirs = train_once(reference, reference.network, images)

    assert neurons and not silent, f"nothing behind {silent} would be tested"
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-10, atol=1e-12)
    assert ours.logits.isfinite().all() and ours.gradients.keys() == theirs.gradients.keys()
    scale = max(gradient.norm() for gradient in theirs.gradients.values())
    for name, gradient in ours.gradients.items():
        assert gradient is not None and gradient.isfinite().all(), name
        assert gradient.ndim < 2 or gradient.any(), f"no gradient reaches {name}"
        error = (gradient - theirs.gradients[name]).norm()
        # relative, but for what is nought up to rounding: biases in front of a batch norm
        assert error <= 1e-9 * theirs.gradients[name].norm() + 1e-13 * scale, f"{name} is off by {error:.1e}"


@families
def test_what_stays_analogue_is_what_reaches_the_logits_through_gates_alone(family):
    """Asked of autograd: with every gate's output detached, no gradient comes to the activations of the gates."""
    ann, size = ann_of(family)
    snn = spiking_twin(ann, 2, gates="keep", input_size=size)
    marks = {}

    def mark(name):
        marks[name] = torch.zeros((), requires_grad=True)
        return lambda module, args, output: output + marks[name]

    for name, module in ann.eval().named_modules():
        if isinstance(module, GATES):
            module.register_forward_hook(lambda module, args, output: output.detach())
        elif isinstance(module, ACTIVATIONS):
            module.register_forward_hook(mark(name))
    gradients = torch.autograd.grad(ann(torch.randn(1, *size)).sum(), list(marks.values()), allow_unused=True)
    inside = {name for name, gradient in zip(marks, gradients, strict=True) if gradient is None}
    analogue = {name for name in marks if isinstance(snn.get_submodule(name), OnRate)}
    assert analogue == inside
    assert all(isinstance(snn.get_submodule(name), SpikingNeuron) for name in marks.keys() - inside)


# -- which activations, which gates ------------------------------------------------------------------

KINDS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish)
OF_TIMM = [
    *(timm_activations.Swish, timm_activations.GELU, timm_activations.GELUTanh, timm_activations.QuickGELU),
    *(timm_activations.HardSwish, timm_activations.Mish, timm_activations.HardMish, timm_activations.PReLU),
    *(timm_activations_me.SwishMe, timm_activations_me.HardSwishMe),
    *(timm_activations_me.MishMe, timm_activations_me.HardMishMe),
]


@pytest.mark.parametrize("activation", [*KINDS, *OF_TIMM], ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_an_activation_is_a_neuron_by_itself_and_inside_timms_batch_norm(activation):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        activation(),
        BatchNormAct2d(8, act_layer=activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
    )
    snn = spiking_twin(network, input_size=(3, 8, 8))
    assert isinstance(snn[1], SpikingNeuron) and isinstance(snn[2].act, SpikingNeuron)
    assert type(network[1]) is activation and isinstance(network[2].act, activation)


def test_every_activation_that_timm_has_a_name_for_is_known():
    kinds = {**_ACT_LAYER_DEFAULT, **{f"{name}, memory-efficient": act for name, act in _ACT_LAYER_ME.items()}}
    unknown = {name for name, act in kinds.items() if not issubclass(act, ACTIVATIONS + GATES)}
    assert len(kinds) > 20 and unknown == {"identity"}


class Gated(nn.Module):
    """A timm squeeze-and-excitation block between two convolutions."""

    def __init__(self, act_layer, gate_layer):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.se = SqueezeExcite(8, rd_channels=4, act_layer=act_layer, gate_layer=gate_layer)
        self.last, self.act2, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.act2(self.last(self.se(self.act(self.stem(x))))).mean((2, 3)))


@pytest.mark.parametrize(
    ("act", "gate", "act_of", "gate_of"),
    [
        (nn.ReLU, "sigmoid", F.relu, torch.sigmoid),
        (nn.SiLU, "sigmoid", lambda x: x * torch.sigmoid(x), torch.sigmoid),
        (nn.Hardswish, "hard_sigmoid", lambda x: x * (x + 3).clamp(0, 6) / 6, lambda x: (x + 3).clamp(0, 6) / 6),
    ],
    ids=["relu", "silu", "hard"],
)
def test_timms_gate_is_the_analogue_computation_on_the_rate_times_every_step(act, gate, act_of, gate_of):
    network = Gated(act, gate).double()
    nn.init.normal_(network.se.fc1.weight, std=2)
    nn.init.normal_(network.se.fc2.weight, std=2)
    snn = spiking_twin(network, 3, NeuronConfig(leak=0.5, threshold=0.3), gates="keep", input_size=(3, 8, 8)).eval()
    assert isinstance(snn.se.bn, nn.Identity) and isinstance(snn.se.act, OnRate) and isinstance(snn.se.gate, OnRate)
    seen = {}
    for name in ("act", "se", "act2"):
        snn.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.stream}))
    logits = snn(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    spikes = seen["act"]  # (T, B, C, H, W)
    assert (spikes.std(0) > 0).any(), "spikes that are the same at each step say nothing"
    squeezed = spikes.mean(0).mean((2, 3))  # the rate, (B, C)
    weights = [(conv.weight.flatten(1), conv.bias) for conv in (network.se.fc1, network.se.fc2)]
    factor = gate_of(F.linear(act_of(F.linear(squeezed, *weights[0])), *weights[1]))
    assert factor.std() > 0.1
    torch.testing.assert_close(seen["se"], spikes * factor[None, :, :, None, None], rtol=1e-12, atol=1e-14)
    expected = F.linear(seen["act2"].mean((0, 3, 4)), network.head.weight, network.head.bias)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-14)


class GhostBlock(nn.Module):
    """As in GhostNetV2, the gate is a child of the block whose convolutions it multiplies."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.short, self.gate_fn = nn.Conv2d(3, 8, 1), nn.Sigmoid()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head((self.act(self.conv(x)) * self.gate_fn(self.short(F.avg_pool2d(x, 1)))).mean((2, 3)))


def test_a_block_with_a_gate_among_its_layers_spikes():
    snn = spiking_twin(nn.Sequential(GhostBlock()), gates="keep", input_size=(3, 8, 8))
    assert isinstance(snn[0].act, SpikingNeuron) and isinstance(snn[0].gate_fn, OnRate)


@pytest.mark.parametrize(
    ("family", "gate"),
    [
        ("test_efficientnet", "'blocks.3.0.se.gate'"),
        ("ecaresnet26t", "'layer1.0.se.gate'"),
        ("hgnet_tiny", "'stages.0.blocks.0.aggregation.1.sigmoid'"),
    ],
)
def test_a_gate_is_refused_by_name_unless_kept(family, gate):
    ann, size = ann_of(family)
    with pytest.raises(ValueError, match=f'has gates, which do not spike: .*{gate}.*gates="keep"'):
        spiking_twin(ann, gates="refuse", input_size=size)


REFUSED = {
    "bat_resnext26ts": (64, r"Tensor.sigmoid.*'stages.0.0.attn.ba' \(BilinearAttnTransform\)"),
    "convnext_zepto_rms": (64, r"torch.var.*'stem.1' \(SimpleNorm2d\)"),
    "efficientnet_cc_b0_4e": (64, r"torch.sigmoid.*'blocks.4.0' \(CondConvResidual\)"),
    "gcresnet33ts": (64, r"functional.softmax.*'stages.0.0.attn' \(GlobalContext\)"),
    "lambda_resnet26t": (64, r"functional.softmax.*'stages.2.1.self_attn' \(LambdaLayer\)"),
    "resnest14d": (64, r"functional.softmax.*'layer1.0.conv2.rsoftmax' \(RadixSoftmax\)"),
    "resnet50_clip": (224, r"scaled_dot_product_attention.*'head' \(AttentionPool2d\)"),
    "resnetv2_50d_gn": (64, r"group_norm.*'stem.norm1' \(GroupNormAct\)"),
    "skresnet18": (64, r"torch.softmax.*'layer1.0.conv1.attn' \(SelectiveKernelAttn\)"),
    "starnet_s050": (64, r"product of two spike trains.*'stages.0.1' \(Block\)"),
}


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in ("skresnet18", "starnet_s050") else pytest.mark.slow) for name in REFUSED],
)
def test_a_family_that_cannot_spike_is_refused_naming_operation_and_module(family):
    size, message = REFUSED[family]
    with pytest.raises(UnsupportedOperationError, match=f"cannot be built: .*{message}"):
        spiking_twin(timm.create_model(family), gates="keep", input_size=(3, size, size))


def test_the_page_on_students_lists_these_networks():
    text = (Path(__file__).parents[2] / "docs" / "students.md").read_text()
    lists, table = (
        text.partition("These have gates")[0].partition("for every parameter.")[2],
        text.partition("| Network")[2],
    )
    gated = text.partition("names the first of them.")[2].partition("These are refused")[0]
    listed = [set(re.findall(r"`(\w+)`", part)) for part in (lists, gated)]
    own = {"rep_net", "vgg_net"}  # written here
    assert listed[0] | listed[1] == {*DEFAULT, *SLOW} - own and not listed[0] & listed[1]
    assert set(re.findall(r"^\| `(\w+)` \|", table.partition("## ")[0], re.MULTILINE)) == REFUSED.keys()
