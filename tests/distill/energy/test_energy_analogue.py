"""Multiply-accumulates of analogue networks, counted by hand."""

import pytest
import timm
import torch
from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SimpleEnergyCostConfig
from torch import nn

from distill import Adapter
from distill.energy import Cost, LayerCost, adapter_cost, analogue_costs, assumptions, hybrid_cost
from distill.energy.costs import PJ_PER_AC, PJ_PER_BIT, PJ_PER_MAC
from distill.layouts import Layout
from distill.taps import Tap


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(2, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.act(self.bn(self.conv(x))).mean((2, 3)))


def test_a_small_network_by_hand():
    found = analogue_costs(Small().eval(), torch.zeros(1, 2, 6, 6), ["act"])
    conv, head = found.whole.layers
    assert (conv.name, conv.macs, conv.acs) == ("conv", 9 * 8 * 2 * 9, 0) and (head.name, head.macs) == ("head", 40)
    assert conv.bits == 32 * (8 * 2 * 9 + 8 + 2 * 2 * 36) and head.bits == 32 * (40 + 5 + 2 * 8)
    assert found.behind == {"act": Cost((head,))} and found.whole.mac_share == 1


def test_a_silent_layer_costs_what_it_costs():
    """SpikingJelly's counter takes a tensor of zeros for spikes."""
    network = Small().eval()
    nn.init.zeros_(network.bn.weight)
    nn.init.constant_(network.bn.bias, -1.0)
    assert analogue_costs(network, torch.randn(1, 2, 6, 6)).whole.macs == 9 * 8 * 2 * 9 + 40


@pytest.mark.parametrize("family", ["resnet18", "mobilenetv2_035", "regnetx_002"])
def test_spikingjellys_counter_counts_the_same(family):
    network, image = timm.create_model(family, num_classes=7).eval(), torch.randn(1, 3, 32, 32)
    counter = MACCounter(extra_ignore_modules=[nn.BatchNorm2d])
    with torch.no_grad(), DispatchCounterMode([counter]):
        network(image)
    assert analogue_costs(network, image).whole.macs == counter.get_total() > 1e6


def test_attention_is_two_products_of_activations():
    width, heads, tokens = 24, 3, 5  # a class token and 2x2 patches
    arguments = dict(patch_size=8, img_size=16, embed_dim=width, depth=1, num_heads=heads, num_classes=7)
    network = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    by_name = {layer.name: layer for layer in analogue_costs(network, torch.zeros(1, 3, 16, 16)).whole.layers}
    product = tokens * tokens * width
    assert {name: layer.macs for name, layer in by_name.items()} == {
        "patch_embed.proj": 4 * width * 3 * 64,
        "blocks.0.attn.qkv": tokens * width * 3 * width,
        "blocks.0.attn": product,
        "blocks.0.attn (call 2)": product,
        "blocks.0.attn.proj": tokens * width * width,
        "blocks.0.mlp.fc1": tokens * width * 4 * width,
        "blocks.0.mlp.fc2": tokens * width * 4 * width,
        "head": width * 7,
    }
    # queries and keys; weights of all heads and values
    assert by_name["blocks.0.attn"].bits == 32 * 2 * (2 * tokens * width)
    assert by_name["blocks.0.attn (call 2)"].bits == 32 * 2 * (heads * tokens * tokens + tokens * width)


def test_einsum_and_transposed_convolutions_count():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 8, 2, stride=2, bias=False)

        def forward(self, x):
            return torch.einsum("bchw,cd->bd", self.up(x), torch.ones(8, 3))

    found = analogue_costs(Odd().eval(), torch.zeros(1, 2, 3, 3)).whole
    assert found.layers[0].macs == 9 * 2 * 8 * 4 and found.layers[1].macs in (8 * 3, 8 * 36 * 3)


def test_an_adapter_is_a_convolution_on_the_size_of_the_teachers_feature():
    tap = Tap("layer1", (12, 4, 6), nn.ReLU())
    found = adapter_cost(Adapter(8, tap).eval(), tap)
    assert found.macs == 24 * 8 * 12 and found.layers[0].bits == 32 * (96 + 2 * 8 * 24)
    assert adapter_cost(Adapter(8, tap, "conv3x3").eval(), tap).macs == 9 * found.macs
    assert adapter_cost(Adapter(12, tap, "norm").eval(), tap) == Cost(())


def cost(name, macs, acs=0.0, bits=0.0):
    return Cost((LayerCost(name, acs > 0, macs, acs, bits),))


def test_a_hybrid_is_the_sum_of_its_parts():
    whole = analogue_costs(Small().eval(), torch.zeros(1, 2, 6, 6), ["act"])
    front = Cost((LayerCost("conv", True, 0, 100.0, 10.0), LayerCost("stem", False, 50, 0.0, 10.0)), 7.0)
    found = hybrid_cost(Tap("act", (8, 3, 3), None), front, cost("conv", 20), whole)
    assert [layer.name for layer in found.layers] == ["student.conv", "student.stem", "adapter.conv", "teacher.head"]
    assert (found.macs, found.acs, found.membrane_bits, found.mac_share) == (50 + 20 + 40, 100, 7, 3 / 4)
    tokens = Tap("act", (8, 3, 3), None, Layout("BNC", 1))  # class tokens come from the teacher's own pass
    assert hybrid_cost(tokens, front, cost("conv", 20), whole).macs == 50 + 20 + whole.whole.macs


def test_energy_is_operations_and_bits_times_the_usual_constants():
    total = cost("a", 1e6, bits=1e6) + cost("b", 0, acs=1e6) + Cost((), 1e6)
    assert total.compute_uj == pytest.approx(4.6 + 0.9) and total.memory_uj == pytest.approx(2 * 3.12)
    expected = {"compute_uj": 5.5, "memory_uj": 6.24, "macs": 1e6, "acs": 1e6, "mac_share_of_layers": 0.5}
    assert total.figures() == pytest.approx(expected)
    assert total.by_layer()[1] == {"name": "b", "spiking": True, "macs": 0, "acs": 1e6, "memory_bits": 0.0}


def test_the_constants_are_those_of_spikingjelly():
    theirs = SimpleEnergyCostConfig.fp32()
    assert (theirs.e_mac_pj, theirs.e_ac_pj) == (PJ_PER_MAC, PJ_PER_AC)
    assert theirs.e_memory_pj_per_byte == pytest.approx(8 * PJ_PER_BIT)


def test_the_assumptions_name_the_numbers_that_are_used():
    text = " ".join(assumptions(77))
    for word in ("4.6 pJ", "0.9 pJ", "3.12 pJ", "77 of", "every step", "32 bits"):
        assert word in text
