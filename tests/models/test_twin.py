"""Spiking twins of small timm networks: what is copied, what becomes a neuron, what is refused by name."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import Neuron, Reference, assert_same_training, train_once
from spikingjelly.activation_based import functional
from timm.models.vgg import VGG
from torch import nn
from toy_networks import calibrated, generic

from models import NeuronConfig, SpikingNetwork, SpikingNeuron, UnsupportedOperationError, spiking_twin
from models.twin import ACTIVATIONS

SIZE = (3, 32, 32)
FAMILIES = {
    "resnet18": dict(channels=(8, 16, 16, 16), zero_init_last=False),
    "resnet26": dict(channels=(4, 8, 8, 8), zero_init_last=False),
    "vgg": dict(cfg=[8, "M", 16, "M", 16], norm_layer=nn.BatchNorm2d, mlp_ratio=0.01),
    "regnetx_002": dict(),
    "mobilenetv2_035": dict(),
    "efficientnet_lite0": dict(),
    "densenet121": dict(block_config=(2, 2), growth_rate=8),
}


def ann_of(family, **kwargs):
    kwargs = {**FAMILIES[family], **kwargs, "num_classes": 7}
    if family != "vgg":
        return timm.create_model(family, **kwargs)
    ann = VGG(**kwargs)
    for module in (ann.pre_logits.fc1, ann.pre_logits.fc2):  # without a norm, they would never fire at first
        nn.init.normal_(module.weight, std=0.2)
    return ann


def activations(network):
    return [name for name, m in network.named_modules() if isinstance(m, ACTIVATIONS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_copies_the_tree_and_leaves_its_source_alone(family):
    ann = ann_of(family).eval()
    for parameter in ann.parameters():
        parameter.requires_grad_(False)
    before, names = copy.deepcopy(ann.state_dict()), activations(ann)
    snn = spiking_twin(ann, timesteps=2, input_size=SIZE)

    assert type(ann) is not type(snn) and not isinstance(ann, SpikingNetwork)
    assert activations(ann) == names and not any(p.requires_grad for p in ann.parameters())
    assert (
        all(torch.equal(before[k], v) for k, v in ann.state_dict().items()) and before.keys() == ann.state_dict().keys()
    )

    assert isinstance(snn, SpikingNetwork) and isinstance(snn, type(ann))
    assert names and activations(snn) == []
    assert [n for n, m in snn.named_modules() if isinstance(m, SpikingNeuron)] == names
    assert [n for n, _ in snn.named_parameters()] == [n for n, _ in ann.named_parameters()]
    assert all(torch.equal(before[k], v) for k, v in snn.state_dict().items()), "init='teacher' copies the weights"
    sources = {p.data_ptr() for p in ann.state_dict().values()}
    assert not any(v.data_ptr() in sources for v in snn.state_dict().values() if v.numel()), "copies, not views"
    assert all(p.requires_grad for p in snn.parameters()), "a frozen teacher has a trainable twin"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_trains_as_the_reference_and_reaches_every_parameter(family):
    snn = generic(spiking_twin(ann_of(family), timesteps=2, input_size=SIZE).train())
    plain = copy.deepcopy(snn)
    plain.step_mode = "s"  # one call is then the plain forward of the network's own class
    reference = Reference(plain, 2)
    images = torch.randn(4, *SIZE, dtype=torch.float64)
    ours = train_once(snn, snn, images)
    assert_same_training(ours, train_once(reference, reference.network, images))
    assert all(gradient.isfinite().all() for gradient in ours.gradients.values())


@pytest.mark.parametrize("family", ["resnet18", "mobilenetv2_035"])
def test_a_twin_runs_step_by_step(family):
    images = torch.randn(3, *SIZE, dtype=torch.float64)
    snn = calibrated(spiking_twin(ann_of(family), timesteps=3, input_size=SIZE).double(), images)
    functional.set_step_mode(snn, "s")
    with torch.no_grad():
        by_hand = torch.stack([snn(images) for _ in range(3)]).mean(0)
    functional.reset_net(snn)
    functional.set_step_mode(snn, "m")
    torch.testing.assert_close(snn(images), by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["resnet18", "mobilenetv2_035", "vgg"])
def test_from_scratch_every_weight_is_drawn_anew(family):
    ann = ann_of(family)
    for module in ann.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(3.0)
            nn.init.constant_(module.weight, 0.3)
    snn = spiking_twin(ann, init="scratch", input_size=SIZE)
    source = ann.state_dict()
    for name, value in snn.state_dict().items():
        if value.ndim > 1:
            assert not torch.equal(value, source[name]), f"{name} is the teacher's"
    for module in snn.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.running_mean, torch.zeros_like(module.running_mean))
            assert module.weight[0] in (0.0, 1.0)


def test_a_twin_keeps_mode_constants_and_steps():
    neuron = NeuronConfig(leak=0.5, reset="hard")
    for training in (True, False):
        ann = ann_of("resnet18").train(training)
        snn = spiking_twin(ann, timesteps=6, neuron=neuron, algorithm="bptt", input_size=SIZE)
        assert snn.training is training and all(m.training is training for m in snn.modules())
        assert (snn.timesteps, snn.algorithm, snn.in_chans) == (6, "bptt", 3)
        assert all(m.config == neuron for m in snn.modules() if isinstance(m, SpikingNeuron))


def test_a_twins_learned_leaks_are_on_the_networks_device():
    ann = ann_of("resnet18").bfloat16().to("meta")
    snn = spiking_twin(ann, 2, NeuronConfig(leak=0.5, learnable_leak=True), input_size=SIZE)
    leaks = [m.w for m in snn.modules() if isinstance(m, SpikingNeuron)]
    assert leaks and all(p.device.type == "meta" for p in snn.parameters())
    assert all(leak.dtype == torch.float32 for leak in leaks)  # whatever the weights are in


def test_the_size_of_the_probe_is_the_networks_own_where_none_is_given():
    snn = spiking_twin(ann_of("resnet18", in_chans=1))
    assert snn.in_chans == 1 and snn.spec["input_size"] == [1, 224, 224]


def test_the_probe_leaves_running_statistics_alone():
    ann = ann_of("resnet18")
    snn = spiking_twin(ann, input_size=SIZE)
    assert snn.bn1.num_batches_tracked == 0 and torch.equal(snn.bn1.running_var, torch.ones(64))


# -- one neuron, many calls ---------------------------------------------------------------------------


class SharedActivation(nn.Module):
    """One activation module called twice in the forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.relu(self.b(self.relu(self.a(x)))).mean((2, 3)))


def test_a_neuron_called_twice_a_step_is_refused_step_by_step():
    snn = spiking_twin(SharedActivation(), timesteps=3, input_size=SIZE).eval()
    images = torch.randn(2, *SIZE)
    whole = snn(images)
    functional.set_step_mode(snn, "s")
    with pytest.raises(RuntimeError, match="called 2 times a step"):
        snn(images)
    functional.reset_net(snn)
    functional.set_step_mode(snn, "m")
    assert torch.equal(snn(images), whole)


@pytest.mark.parametrize("algorithm", ["rate_m", "bptt"])
def test_a_neuron_called_twice_a_step_trains_on_whole_images(algorithm):
    network = SharedActivation().double()
    neuron = NeuronConfig(leak=0.5, threshold=0.2)
    snn = spiking_twin(network, timesteps=3, neuron=neuron, algorithm=algorithm, input_size=SIZE).train()
    images = torch.randn(2, *SIZE, dtype=torch.float64)
    logits = snn(images)
    logits.square().sum().backward()
    assert all(p.grad.norm() > 0 for p in snn.parameters())
    torch.testing.assert_close(logits, snn.eval()(images), rtol=1e-12, atol=1e-13)


def test_one_activation_under_two_names_is_a_neuron_under_both():
    act = nn.ReLU()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 4, 3), act, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    snn = spiking_twin(network, timesteps=2, input_size=SIZE)
    assert isinstance(snn[1], SpikingNeuron) and isinstance(snn[3], SpikingNeuron)
    assert isinstance(network[1], nn.ReLU) and network[1] is network[3]
    assert snn(torch.randn(2, *SIZE)).shape == (2, 4)


# -- what cannot spike --------------------------------------------------------------------------------


class Body(nn.Module):
    """A network with `block` between two convolutions with activations."""

    def __init__(self, block):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(nn.Identity(), block)
        self.last, self.head = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


class FunctionalRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"conv": nn.Conv2d(6, 6, 1)})

    def forward(self, x):
        return F.relu(self.inner["conv"](x))


class TwoTrains(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = (
            nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()),
        )

    def forward(self, x):
        return self.left(x) * self.right(x)


class SqueezeExcite(nn.Module):
    """x * sigmoid(expand(act(reduce(mean of x))))."""

    def __init__(self):
        super().__init__()
        self.reduce, self.act = nn.Conv2d(6, 3, 1), nn.SiLU(inplace=True)
        self.expand, self.gate = nn.Conv2d(3, 6, 1), nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


def test_a_functional_activation_is_refused_naming_the_module():
    with pytest.raises(
        UnsupportedOperationError, match=r"Body cannot be built.*relu.*module 'blocks.1' \(FunctionalRelu\)"
    ):
        spiking_twin(Body(FunctionalRelu()), input_size=SIZE)


def test_a_functional_activation_at_the_top_is_refused():
    class Top(Body):
        def forward(self, x):
            return super().forward(torch.sigmoid(x))

    with pytest.raises(UnsupportedOperationError, match=r"sigmoid.*the forward of"):
        spiking_twin(Top(nn.Identity()), input_size=SIZE)


def test_an_operation_that_fails_later_names_its_module_too():
    """The same message in a network that was made by other means than a twin."""
    snn = spiking_twin(Body(nn.Identity()), input_size=SIZE)
    snn.blocks.add_module("1", FunctionalRelu())
    with pytest.raises(UnsupportedOperationError, match=r"relu.*, in module 'blocks.1' \(FunctionalRelu\)"):
        snn(torch.randn(2, *SIZE))


def test_the_product_of_two_trains_is_refused_naming_the_module():
    for timesteps in (1, 4):  # with one step a train looks constant
        with pytest.raises(UnsupportedOperationError, match=r"product of two spike trains.*'blocks.1' \(TwoTrains\)"):
            spiking_twin(Body(TwoTrains()), timesteps=timesteps, input_size=SIZE)


def test_layer_norm_is_refused_naming_the_module():
    with pytest.raises(UnsupportedOperationError, match=r"layer_norm.*module 'stem\.1'"):
        spiking_twin(timm.create_model("convnext_atto"), input_size=SIZE)


def test_a_gate_is_refused_naming_it():
    with pytest.raises(ValueError, match=r"Body has gates.*'blocks\.1\.gate'.*gates=\"keep\""):
        spiking_twin(Body(SqueezeExcite()), input_size=SIZE)
    with pytest.raises(ValueError, match=r"gates.*'blocks\.0\.0\.se\.gate'"):
        spiking_twin(timm.create_model("mobilenetv3_small_050"), input_size=SIZE)


def test_a_kept_gate_is_computed_on_the_rate_and_multiplied_onto_every_step():
    network = Body(SqueezeExcite()).double()
    nn.init.normal_(network.blocks[1].expand.weight, std=3)  # a gate that differs from 1/2
    neuron = NeuronConfig(leak=0.5, threshold=0.4)
    snn = spiking_twin(network, 4, neuron, gates="keep", input_size=SIZE).eval()
    images = torch.randn(2, *SIZE, dtype=torch.float64)

    def fire(currents):
        v, spikes = 0, []
        for c in currents:
            u = 0.5 * v + c
            spikes.append((u >= 0.4).double())
            v = u - 0.4 * spikes[-1]
        return torch.stack(spikes)

    with torch.no_grad():
        spikes = fire(snn.stem[0](images).expand(4, -1, -1, -1, -1))
        gate = network.blocks[1].double()
        factor = gate.gate(gate.expand(F.silu(gate.reduce(spikes.mean(0).mean((2, 3), keepdim=True)))))
        assert factor.std() > 0.05
        out = fire(torch.stack([snn.last[0](s * factor) for s in spikes]))
        expected = snn.head(out.mean((0, 3, 4)))
    torch.testing.assert_close(snn(images), expected, rtol=1e-12, atol=1e-13)


class RateGate(nn.Module):
    """The reference's gate: in both passes a function of the rate."""

    def __init__(self, original, clock):
        super().__init__()
        self.reduce, self.act, self.expand, self.gate = original.reduce, nn.SiLU(), original.expand, nn.Sigmoid()
        self.clock = clock

    def forward(self, x):
        steps = self.clock.timesteps if self.clock.spiking else 1
        x = x.unflatten(0, (steps, -1))
        rate = x.mean((0, 3, 4)).unsqueeze(-1).unsqueeze(-1)
        return (x * self.gate(self.expand(self.act(self.reduce(rate))))).flatten(0, 1)


def test_a_kept_gate_trains_as_the_reference():
    network = Body(SqueezeExcite())
    neuron = NeuronConfig(leak=0.5, threshold=0.3)
    snn = generic(spiking_twin(network, 3, neuron, gates="keep", input_size=SIZE)).train()
    plain = copy.deepcopy(snn)
    plain.step_mode = "s"
    reference = Reference(plain, 3, {"SqueezeExcite": RateGate})
    images = torch.randn(2, *SIZE, dtype=torch.float64)
    assert sum(isinstance(m, Neuron) for m in reference.network.modules()) == 2
    assert_same_training(train_once(snn, snn, images), train_once(reference, reference.network, images))


def test_a_network_with_timms_gates_trains_when_they_are_kept():
    snn = spiking_twin(timm.create_model("mobilenetv3_small_050"), 2, gates="keep", input_size=SIZE).train()
    snn(torch.randn(2, *SIZE)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in snn.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"init": "ann"}, "init must be one of .*teacher.*scratch.*found 'ann'"),
        ({"gates": "drop"}, "gates must be one of .*refuse.*keep.*found 'drop'"),
        ({"algorithm": "rate_x"}, "algorithm must be one of .*rate_m.*found 'rate_x'"),
        ({"timesteps": 0}, "timesteps must be .*found 0"),
    ],
    ids=str,
)
def test_unknown_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        spiking_twin(ann_of("resnet18"), input_size=SIZE, **wrong)


def test_a_network_without_activations_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    with pytest.raises(ValueError, match="Sequential has no activation module"):
        spiking_twin(network, input_size=SIZE)


@pytest.mark.parametrize(
    "activation", [nn.ReLU6, nn.GELU, nn.SiLU, nn.PReLU, nn.LeakyReLU, nn.Hardswish, nn.Mish, nn.ELU]
)
def test_every_activation_becomes_a_neuron(activation):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    assert isinstance(spiking_twin(network, input_size=SIZE)[1], SpikingNeuron)


def test_a_network_that_accelerate_prepared_has_a_twin_that_spikes():
    """Under mixed precision Accelerate wraps `forward` on the instance, which a copy would take along."""
    ann = ann_of("resnet18").float()
    ann._original_forward = ann.forward
    ann.forward = lambda images: images
    twin = spiking_twin(ann, input_size=SIZE)
    assert "forward" not in vars(twin) and twin(torch.zeros(1, *SIZE)).ndim == 2


def test_a_forward_that_was_replaced_by_hand_is_refused():
    ann = ann_of("resnet18").float()
    ann.forward = lambda images: images
    with pytest.raises(ValueError, match="replaced by hand"):
        spiking_twin(ann, input_size=SIZE)
