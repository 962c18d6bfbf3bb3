"""Cosines and lengths by hand, and where the two gradients must be equal."""

import math

import pytest
import torch
from torch import nn
from toy_networks import TOYS, generic, spiking

import models
from benchmarks.gradient_cosine import ALL, Closeness, closeness, fresh, gradients, measure, report, with_weights
from models.io import save_weights

NEURON = models.NeuronConfig()


def test_cosines_and_lengths_by_hand():
    ours = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[0.0], [2.0]]), "bias": torch.tensor([1.0])}
    theirs = {"a": torch.tensor([[5.0, 0.0]]), "b": torch.tensor([[0.0], [-1.0]]), "bias": torch.tensor([1.0])}
    found = closeness(ours, theirs)
    assert list(found) == ["a", "b", ALL]  # a bias is among all, but no row
    assert found["a"] == pytest.approx((0.6, 1.0)) and found["b"] == pytest.approx((-1.0, 2.0))
    # 15 - 2 + 1 over the roots of 25 + 4 + 1 and 25 + 1 + 1
    assert found[ALL] == pytest.approx((14 / (30 * 27) ** 0.5, (30 / 27) ** 0.5))


def network(toy="Residual", timesteps=3):
    torch.manual_seed(5)
    snn = spiking(generic(TOYS[toy](NEURON)), timesteps, "rate_m")
    return snn, (torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 1, 4]))


def equal(left, right):
    assert left.keys() == right.keys() and any(g.abs().max() > 1e-6 for g in left.values())
    for name, gradient in left.items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-9, atol=1e-12)


def test_of_one_step_all_gradients_are_the_same():
    snn, batch = network(timesteps=1)
    for rule in ("rate_m", "rate_s"):
        for values in measure([snn], rule, [batch]).values():
            assert values[0] == pytest.approx((1.0, 1.0), abs=1e-9)


def without_norms(snn):
    for module in list(snn.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return snn


def test_frozen_norms_take_their_running_statistics():
    snn, batch = network()
    for norm in (m for m in snn.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_parameters()
        norm.running_var.fill_(1 - norm.eps)  # so that it changes nothing
        norm.requires_grad_(False)
    frozen, free = (gradients(snn, "rate_m", *batch, frozen_norms=frozen) for frozen in (True, False))
    equal(frozen, gradients(without_norms(snn), "rate_m", *batch))
    assert not torch.allclose(frozen["0.0.weight"], free["0.0.weight"])


def test_bptt_by_step_is_bptt_where_nothing_is_normalised():
    snn, batch = network()
    without_norms(snn)
    equal(gradients(snn, "bptt_by_step", *batch), gradients(snn, "bptt", *batch))


def test_bptt_by_step_normalises_each_step_by_itself():
    """The last norm of a network, whose input differs from step to step through the neurons before it."""
    snn, (images, labels) = network()
    norms = [m for m in snn.modules() if isinstance(m, nn.BatchNorm2d)]
    seen = []
    handle = norms[-1].register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    before = {name: buffer.clone() for name, buffer in snn.named_buffers()}
    found = gradients(snn, "bptt_by_step", images, labels)
    handle.remove()
    assert len(seen) == 3 and not torch.equal(seen[0][0], seen[1][0])
    for current, out in seen:
        mean, var = current.mean((0, 2, 3), keepdim=True), current.var((0, 2, 3), correction=0, keepdim=True)
        by_hand = (current - mean) / (var + norms[-1].eps).sqrt()
        by_hand = by_hand * norms[-1].weight.view(1, -1, 1, 1) + norms[-1].bias.view(1, -1, 1, 1)
        torch.testing.assert_close(out, by_hand)
    assert all(buffer.equal(before[name]) for name, buffer in snn.named_buffers())  # running statistics are put back
    assert snn.step_mode == "m" and all(not torch.is_tensor(m.v) for m in snn.modules() if hasattr(m, "v"))
    assert not torch.allclose(found["0.0.weight"], gradients(snn, "bptt", images, labels)["0.0.weight"])


def test_the_same_network_with_other_weights(tmp_path):
    torch.manual_seed(9)
    snn = models.create_snn("resnet18_cifar", 3, 2, 1, width=8).double()
    save_weights(snn, tmp_path / "w.safetensors")
    first, second, again = (fresh(snn, seed) for seed in (0, 1, 0))
    name = "layer1.0.conv1.weight"
    weights = [network.state_dict()[name] for network in (snn, first, second, again)]
    assert weights[1].equal(weights[3]) and weights[1].dtype == torch.float64
    assert not weights[1].equal(weights[2]) and not weights[1].equal(weights[0])
    assert with_weights(first, tmp_path / "w.safetensors").state_dict()[name].equal(weights[0])


def test_a_weight_without_a_gradient_has_neither():
    gradient = {"a": torch.ones(1, 2), "b": torch.zeros(2, 1)}
    found = closeness(gradient, gradient)
    assert found["a"] == found[ALL] == pytest.approx((1.0, 1.0)) and math.isnan(found["b"].cosine)
    text = report({("rate_m", "fresh", 2): {name: [value] for name, value in found.items()}}, "")
    assert "| b | - |" in text and "is 1.00 (a, T = 2)" in text


def test_the_report_gives_means_spreads_and_the_worst_weight():
    def rows(a, b):
        return {"conv": [Closeness(a, 0.5), Closeness(a + 0.2, 1.5)], ALL: [Closeness(b, 1.0), Closeness(b, 3.0)]}

    measured = {("rate_m", "trained", 2): rows(0.5, 0.9), ("rate_m", "trained", 4): rows(0.6, 0.95)}
    text = report(measured, "# Title")
    assert "# Title\n" in text and "| rule | weights | T = 2 | T = 4 |\n| --- | --- | ---: | ---: |" in text
    assert "| rate_m | trained | 0.900 ± 0.000 (2.00 ± 1.41) | 0.950 ± 0.000 (2.00 ± 1.41) |" in text
    assert "| conv | 0.600 (1.00) | 0.700 (1.00) |" in text
    assert "| weight | trained, T = 2 | trained, T = 4 |" in text
    assert "cosine of 0.90 to 0.95 with BPTT's and 2.00 to 2.00 times" in text and "0.60 (conv, T = 2)" in text
