"""Format nir: the graph means, to NIR's own equations and to another reader, what the network does."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_toys import images, job, same_padding, small
from test_twin_families import DEFAULT, LOW, SLOW, ann_of
from torch import nn
from toy_networks import TOYS, Head, calibrated, conv_bn, generic, spiking

from distill.export import FORMATS
from distill.export.nir_layers import square_kernel
from distill.export.plain import plain_network
from models import NeuronConfig, SpikingNeuron, UnsupportedOperationError, create_snn, list_snns, spiking_twin
from models.registry import FEEDBACK_NETWORKS

nir = pytest.importorskip("nir")
from distill.export.nir_simulation import Simulation  # noqa: E402
from distill.export.nir_writer import DT, Writer  # noqa: E402

HARD = NeuronConfig(leak=0.5, threshold=0.7, reset="hard")


@torch.no_grad()
def check(snn, size, folder):
    """The graph written, read back and run step by step, in float64."""
    batch = torch.randn(2, *size, dtype=torch.float64)
    nir.write(folder / "graph.nir", Writer(plain_network(snn, size), torch.float64).graph())
    graph = nir.read(folder / "graph.nir")
    expected = snn(batch)
    found = Simulation(graph, snn.timesteps, DT)(batch)
    assert expected.std() > 1e-6
    assert (found - expected).abs().max() <= 1e-9 * max(1, expected.abs().max())
    return graph


@pytest.mark.parametrize("leak", [0.25, 1.0])
def test_a_neuron_of_the_graph_fires_when_ours_does(leak, tmp_path):
    # currents of a quarter of the threshold; u at leak 1: 1/4, 1/2, 3/4, 1 -> spike, 0; at leak 1/4 never above 1/3
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), SpikingNeuron(NeuronConfig(leak=leak, reset="hard")))
    network[0].weight.data.fill_(0.25)
    snn = spiking(network.append(nn.Flatten(1)), 8, in_chans=1).eval()
    graph = Writer(plain_network(snn, (1, 1, 1)), torch.float32).graph()
    (neuron,) = [node for node in graph.nodes.values() if isinstance(node, (nir.IF, nir.LIF))]
    if leak == 1:
        assert isinstance(neuron, nir.IF) and neuron.r.item() == pytest.approx(1 / DT)
    else:
        # v += dt/tau (-v + r c) = 3/4 (-v + 4/3 c): 1/4 of v stays, and c comes in whole
        assert isinstance(neuron, nir.LIF) and neuron.tau.item() == pytest.approx(DT * 4 / 3)
        assert neuron.r.item() == pytest.approx(4 / 3)
    assert neuron.v_threshold.item() == np.nextafter(np.float32(1), np.float32(0)) and neuron.v_reset.item() == 0
    one = torch.ones(1, 1, 1, 1)
    spikes = [Simulation(graph, steps, DT)(one).item() * steps for steps in (3, 4, 7, 8)]
    assert spikes == pytest.approx([0, 1, 1, 2] if leak == 1 else [0, 0, 0, 0])
    assert Simulation(graph, 2, DT)(4 * one).item() == 1.0  # a membrane at the threshold, not above it, fires
    assert snn(4 * one).item() == 1.0


@pytest.mark.parametrize("name", ["resnet18_cifar", "sew_resnet18", "vggsnn_cifar"])
def test_networks_of_the_papers_are_nir_graphs(name, tmp_path):
    size = (3, 48, 48) if name == "vggsnn_cifar" else (3, 32, 32)
    snn = generic(create_snn(name, 5, 3, neuron=HARD, width=8)).eval()
    graph = check(snn, size, tmp_path)
    kinds = {type(node).__name__ for node in graph.nodes.values()}
    assert kinds <= {"Input", "Conv2d", "LIF", "AvgPool2d", "SumPool2d", "Threshold", "Flatten", "Affine", "Output"}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("toy", "refused"),
    [
        ("PreActivation", None),
        ("Masks", None),
        ("SharedNeuron", None),
        ("Residual", None),
        ("Sums", None),
        ("ConvolutionKinds", "a convolution with dilation"),
        ("Poolings", "max pooling of anything but spikes"),
        ("Shapes", "the part .* of a signal|interpolate"),
    ],
)
def test_what_blocks_do_is_in_the_graph_or_refused_by_name(toy, refused, tmp_path):
    snn = generic(spiking(TOYS[toy](HARD), 3)).eval()
    if refused is None:
        check(snn, (3, 16, 16), tmp_path)
    else:
        with pytest.raises(ValueError, match=f"NIR has no node for ({refused}).* of this network"):
            check(snn, (3, 16, 16), tmp_path)


@pytest.mark.parametrize("around", [(1, 1, 1, 1), (0, 1, 0, 1), (2, 0, 2, 0), (3, 3, 0, 0), (0, 2, 0, 2)])
@pytest.mark.parametrize("kernel", [3, (1, 3), (1, 7)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_made_square_and_even(around, kernel, stride):
    conv = nn.Conv2d(4, 6, kernel, stride, groups=2).double()
    x = torch.randn(1, 4, 14, 15, dtype=torch.float64)
    expected = F.conv2d(F.pad(x, around), conv.weight, conv.bias, stride, groups=2)
    try:
        weight, padding = square_kernel(conv, around)
    except ValueError as error:
        total = [size + abs(b - a) for size, a, b in zip(conv.kernel_size, around[2::-2], around[3::-2], strict=True)]
        assert (total[0] - total[1]) % 2 == 1 and "kernel" in str(error)
        return
    assert weight.shape[2] == weight.shape[3] and weight.shape[1] == 4
    torch.testing.assert_close(F.conv2d(x, weight, conv.bias, stride, padding), expected, rtol=0, atol=1e-12)


def test_spikingjelly_reads_the_graph(tmp_path):
    """Another reader of NIR, without a line of ours."""
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange.from_nir")
    snn = small(reset="hard")
    assert FORMATS["nir"](job(snn, images(100), tmp_path, "nir")).passed
    theirs = exchange.import_from_nir(nir.read(tmp_path / "network.nir"), dt=DT)
    state, total = None, 0
    with torch.no_grad():
        for _ in range(snn.timesteps):
            logits, state = theirs(images(8), state)
            total = total + logits
        torch.testing.assert_close(total / snn.timesteps, snn(images(8)), rtol=0, atol=1e-5)


def test_soft_reset_is_refused_and_the_way_out_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none of its neurons subtracts.*'spike1'.*--student.neuron.reset hard"):
        FORMATS["nir"](job(small(), images(100), tmp_path, "nir"))
    assert list(tmp_path.iterdir()) == []


def test_same_padding_of_one_side_is_in_the_graph(tmp_path):
    snn = generic(spiking_twin(same_padding(), 2, HARD, input_size=(3, 32, 32))).eval()
    check(snn, (3, 32, 32), tmp_path)


WITHOUT = {
    **dict.fromkeys(("densenetblur121d", "resnetblur18", "hgnetv2_b0"), "padding"),
    **dict.fromkeys(("legacy_xception", "nf_resnet26", "resnetv2_18"), "max pooling"),
    "hrnet_w18_small": "interpolate",
    "inception_v4": "average pooling",
    "vovnet39a": "pooling from",
}
"""Families without gates that NIR cannot express, and what they lack there."""


@pytest.mark.slow
@pytest.mark.parametrize("family", [*DEFAULT, *SLOW])
def test_which_twins_are_nir_graphs(family):
    """Of the larger ones the graph is made, with the check of shapes that is nir's own, but not run."""
    ann, size = ann_of(family)
    try:
        snn = spiking_twin(ann, 2, HARD, input_size=size).eval()
    except ValueError as error:
        assert "gates" in str(error)
        return
    writer = Writer(plain_network(snn, size), torch.float32)
    if family in WITHOUT:
        with pytest.raises(ValueError, match=f"NIR has no node for {WITHOUT[family]}"):
            writer.graph()
    else:
        assert writer.graph().check_types()


@pytest.mark.parametrize("family", ["resnet10t", "rep_net", "vgg_net", "regnetx_002"])
def test_twins_are_nir_graphs(family, tmp_path):
    ann, size = ann_of(family)
    neuron = NeuronConfig(leak=0.5, threshold=LOW.get(family, 0.7), reset="hard")
    check(generic(spiking_twin(ann, 2, neuron, input_size=size)).eval(), size, tmp_path)


class Channels(nn.Module):
    """Spikes twice in a sum; parts of them, and all again, under one maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spike = conv_bn(3, 8), SpikingNeuron(HARD)
        self.last, self.spike2, self.head = conv_bn(13, 8), SpikingNeuron(HARD), Head(8)

    def forward(self, x):
        x = self.spike(self.stem(x))
        _, second = x.split([3, 5], dim=1)
        pooled = F.max_pool2d(torch.cat([second, x], 1), 3, 2, 1)
        return self.head(self.spike2(self.last(pooled))) + self.head(x + x)


def test_sums_parts_and_maxima_of_spikes(tmp_path):
    graph = check(generic(spiking(Channels(), 3)).eval(), (3, 16, 16), tmp_path)
    kinds = [type(node).__name__ for node in graph.nodes.values()]
    assert kinds.count("Scale") == 1 and kinds.count("Threshold") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*list_snns()} - FEEDBACK_NETWORKS.keys()))
def test_which_networks_of_the_papers_are_nir_graphs(name, tmp_path):
    size = {"vggsnn_cifar": (3, 48, 48), "vggsnn_dvs": (2, 48, 48)}.get(name, (3, 32, 32))
    snn = create_snn(name, 5, 2, size[0], HARD, width=8).double()
    snn = calibrated(snn, torch.randn(16, *size).double()) if "preact" in name else generic(snn).eval()
    if name == "preact_resnet34":
        with pytest.raises(ValueError, match="max pooling of anything but spikes"):
            check(snn, size, tmp_path)
    else:
        check(snn, size, tmp_path)


def test_gates_are_refused_by_name(tmp_path):
    ann, size = ann_of("test_efficientnet")
    snn = spiking_twin(ann, 2, HARD, gates="keep", input_size=size).eval()
    with pytest.raises(
        (ValueError, UnsupportedOperationError), match=r"nir runs a network step by step.*'blocks_3_0_se"
    ):
        FORMATS["nir"](job(snn, images(100, size), tmp_path, "nir"))
