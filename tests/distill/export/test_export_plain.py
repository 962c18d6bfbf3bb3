"""A network as one plain time step, and that step as Python: in float64 the logits are the network's own."""

import math

import pytest
import timm
import torch
from export_toys import images, job, small
from test_twin_families import DEFAULT, LOW, SLOW, ann_of
from torch import nn
from toy_networks import TOYS, calibrated, generic, spiking

from distill.export import spikingjelly_code
from distill.export.folding import LAYERS
from distill.export.leaves import Gate, Neuron
from distill.export.plain import neurons_of, plain_network, refuse_gates
from distill.export.sources import spiking_network
from distill.export.unrolled import Unrolled
from models import (
    DSRConfig,
    NeuronConfig,
    PoissonEncoder,
    SpikingNeuron,
    UnsupportedOperationError,
    create_snn,
    list_snns,
    spiking_twin,
)
from models.registry import FEEDBACK_NETWORKS

SIZES = {"vggsnn_cifar": (3, 48, 48), "vggsnn_dvs": (2, 48, 48)}
NEURONS = {
    "lif": NeuronConfig(leak=0.5, threshold=0.4),
    "if, hard reset": NeuronConfig(leak=1.0, threshold=0.6, reset="hard"),
    "learned leak": NeuronConfig(leak=0.3, threshold=0.4, learnable_leak=True),
}


@torch.no_grad()
def check(snn, size, folder=None):
    """All steps as one graph and, with a folder, as SpikingJelly's code, against the network."""
    batch = torch.randn(2, *size, dtype=torch.float64)
    step = plain_network(snn, size)
    expected = snn(batch)
    bound = 1e-12 * max(1, expected.abs().max())
    assert expected.std() > 1e-6 and (Unrolled(step, snn.timesteps)(batch) - expected).abs().max() <= bound
    kinds = {type(module) for module in step.children()}
    assert kinds <= {*LAYERS, Neuron, Gate}  # no batch norm is left
    if folder is not None:
        spikingjelly_code._write(folder, step, snn.timesteps, size)
        assert (spikingjelly_code.load(folder)(batch) - expected).abs().max() <= 1e-9
    return step


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("toy", [name for name in TOYS if name != "Norms"])
def test_each_thing_that_blocks_do_has_a_plain_form(toy, neuron, tmp_path):
    snn = generic(spiking(TOYS[toy](NEURONS[neuron]), 3)).eval()
    step = check(snn, (3, 16, 16), tmp_path)
    calls = {"SharedNeuron": 2}.get(toy, sum(isinstance(m, SpikingNeuron) for m in snn.modules()))
    assert len(neurons_of(step)) == calls  # a module that is called twice has two membranes


class Scaled(nn.Module):
    """Two products with numbers that are made on the way and gone at once, as of timm's LayerScale2d."""

    def __init__(self, neuron: NeuronConfig) -> None:
        super().__init__()
        self.conv, self.spike, self.fc = nn.Conv2d(3, 8, 3, padding=1), SpikingNeuron(neuron), nn.Linear(8, 5)
        self.first, self.second = nn.Parameter(torch.linspace(0.5, 3, 8)), nn.Parameter(torch.linspace(4, 1, 8))

    def forward(self, x):
        x = self.conv(x) * self.first.view(1, -1, 1, 1) * self.second.view(1, -1, 1, 1)
        return self.fc(self.spike(x).mean((2, 3)))


def test_numbers_that_are_made_on_the_way_are_not_taken_for_one_another(tmp_path):
    check(generic(spiking(Scaled(NEURONS["lif"]), 3)).eval(), (3, 16, 16), tmp_path)


@pytest.mark.parametrize("name", sorted({*list_snns()} - FEEDBACK_NETWORKS.keys()))
def test_every_network_of_the_papers_has_a_plain_form(name, tmp_path):
    size = SIZES.get(name, (3, 32, 32))
    snn = create_snn(name, 5, 3, size[0], NeuronConfig(leak=0.5, threshold=0.5), width=8)
    # the preactivation network adds up unnormalised blocks: statistics of data, not drawn ones
    snn = calibrated(snn.double(), torch.randn(8, *size).double()) if "preact" in name else generic(snn).eval()
    check(snn, size, tmp_path)


families = [*DEFAULT, *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]]


@pytest.mark.parametrize("family", families)
def test_every_family_of_twins_has_a_plain_form(family, tmp_path):
    ann, size = ann_of(family)
    neuron = NeuronConfig(leak=0.5, threshold=LOW.get(family, 0.7))
    snn = generic(spiking_twin(ann, 2, neuron, gates="keep", input_size=size)).eval()
    if family == "repvit_m0_9":  # without a norm in front of its neurons drawn statistics grow to 1e19
        snn = calibrated(snn, torch.randn(8, *size).double())
    step = plain_network(snn, size)
    gated = any(isinstance(module, Gate) for module in step.children())
    check(snn, size, None if gated else tmp_path)
    if gated:
        with pytest.raises(ValueError, match="nir runs a network step by step"):
            refuse_gates(step, "nir")


def test_padding_that_depends_on_the_image_becomes_numbers():
    ann = timm.create_model("tf_efficientnet_lite0", num_classes=5)
    snn = generic(spiking_twin(ann, 2, NeuronConfig(leak=0.5, threshold=0.7), input_size=(3, 35, 35))).eval()
    step = check(snn, (3, 35, 35))  # 35 pixels in steps of 2: one zero more behind than in front, or as many
    assert {node.target.__name__ for node in step.graph.nodes if node.op == "call_function"} >= {"pad", "add"}
    even = plain_network(small(), (1, 8, 8))
    assert not [node for node in even.graph.nodes if node.op == "call_function" and node.target.__name__ == "pad"]


def test_a_norm_goes_into_the_layer_in_front_of_it():
    # (3 x - 1) * 4 / sqrt(3 + 1) + 0.5 = 6 x - 1.5
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=1.0), SpikingNeuron(), nn.Flatten(1))
    network[0].weight.data.fill_(3.0)
    norm = network[1]
    norm.running_mean.fill_(1.0), norm.running_var.fill_(3.0)
    norm.weight.data.fill_(4.0), norm.bias.data.fill_(0.5)
    step = plain_network(spiking(network, 1, in_chans=1).eval(), (1, 2, 2))
    (conv,) = [module for module in step.children() if isinstance(module, nn.Conv2d)]
    assert conv.weight.item() == 6.0 and conv.bias.item() == -1.5
    assert network[0].weight.item() == 3.0 and network[0].bias is None


def test_the_time_constant_is_spikingjellys():
    leaks = {0.2: 1.25, 0.5: 2.0, 1.0: math.inf}
    assert {leak: Neuron(NeuronConfig(leak=leak), leak).tau for leak in leaks} == pytest.approx(leaks)


def test_what_has_no_plain_form_is_refused_by_name():
    norms = generic(spiking(TOYS["Norms"](NeuronConfig()), 2)).eval()
    with pytest.raises(
        UnsupportedOperationError, match=r"depends on the batch, in module 'features.4' \(BatchNorm2d\)"
    ):
        plain_network(norms, (3, 8, 8))
    dsr = create_snn("vgg11_cifar", width=8, algorithm="dsr", dsr=DSRConfig())
    with pytest.raises(UnsupportedOperationError, match=r"DSR \('stage1.spike1'\) look at all time steps at once"):
        plain_network(dsr, (3, 32, 32))


def test_an_encoder_stays_outside(tmp_path):
    snn = create_snn("vgg11_cifar", timesteps=2, in_chans=1, width=8, encoder=PoissonEncoder())
    with pytest.raises(ValueError, match="input must be frames for a network with a Poisson encoder, found images"):
        spiking_network(job(snn, images(2, (1, 16, 16)), tmp_path, "onnx"))
    assert spiking_network(job(snn, images(2, (1, 16, 16)).repeat(2, 1, 1, 1, 1), tmp_path, "onnx")) is snn


def test_the_network_stays_what_it_was():
    snn = small()
    before, hooks = {k: v.clone() for k, v in snn.state_dict().items()}, [len(m._forward_hooks) for m in snn.modules()]
    plain_network(snn, (1, 8, 8))
    assert snn.step_mode == "m" and all(torch.equal(v, before[k]) for k, v in snn.state_dict().items())
    assert hooks == [len(m._forward_hooks) for m in snn.modules()] and snn(images(2)).shape == (2, 10)
