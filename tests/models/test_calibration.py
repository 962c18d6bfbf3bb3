"""Calibrated twins: a net worked out by hand, exact absorption in every family, convergence with T, refusals."""

import copy

import pytest
import timm
import torch
from test_twin import SIZE, ann_of
from torch import nn
from toy_networks import calibrated, generic

from models import NeuronConfig, PoissonEncoder, SpikingNeuron, UnsupportedOperationError, create_ann, spiking_twin
from models.calibration import calibrate
from models.scale_tracing import trace_scales
from models.twin import OnRate

IF = NeuronConfig(leak=1.0)
FAMILIES = ["resnet18", "regnetx_002", "vgg", "densenet121", "mobilenetv2_035", "efficientnet_lite0", "repvgg_a0"]


class Tiny(nn.Module):
    """One pixel, one channel: conv-bn-relu-conv-bn(+identity)-relu-pool-linear."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(1, eps=0.0), nn.BatchNorm2d(1, eps=0.0)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(1, 1)
        with torch.no_grad():
            for layer, weight in ((self.conv1, 1.0), (self.conv2, -0.5), (self.fc, 3.0)):
                layer.weight.fill_(weight)
            self.fc.bias.zero_()

    def forward(self, x):
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)) + x)
        return self.fc(self.pool(x).flatten(1))


class Changed(Tiny):
    """A tiny net with another second half."""

    def __init__(self, half):
        super().__init__()
        self.half = half

    def forward(self, x):
        return self.fc(self.half(self, self.act1(self.bn1(self.conv1(x)))).flatten(1))


def ladder():
    """Images whose only pixel is 0, 2, 4, 6 and 8."""
    return torch.arange(0.0, 9.0, 2.0, dtype=torch.float64).view(5, 1, 1, 1)


def twin_of(ann, timesteps=4, neuron=IF, size=SIZE, **kwargs):
    return spiking_twin(ann, timesteps=timesteps, neuron=neuron, input_size=size, **kwargs).eval()


def tiny_twin(ann=None, **kwargs):
    ann = (ann or Tiny()).double().eval()
    return ann, twin_of(ann, size=(1, 1, 1), **kwargs)


def family_ann(family):
    small = {"repvgg_a0": dict(num_classes=7), "regnety_002": dict(num_classes=7)}
    ann = timm.create_model(family, **small[family]) if family in small else ann_of(family)
    # with statistics of other data, deep networks of random weights amplify rounding errors
    return calibrated(generic(ann), torch.randn(8, *SIZE, dtype=torch.float64))  # type: ignore[arg-type]


def test_a_tiny_net_by_hand():
    ann, twin = tiny_twin()
    report = calibrate(ann, twin, [ladder()[:2], ladder()[2:]], percentile=100)
    # layer 1: c = 8 makes currents 0, 1/4 .. 1 and, in four steps, rates 0, 1/4 .. 1: a spike is worth 8
    # layer 2: activations 0 .. 4; each spike of the shortcut comes with -1/2 of it through conv2: half a current in
    # steps 4, 2 4, 2 3 4 and 1 2 3 4. Shifted by 1/8: membranes that end at 1/2, and spikes in 4, 4, 3 4 and 2 4
    rates = torch.tensor([0, 0.25, 0.25, 0.5, 0.5])
    value = 4.25 / 0.625  # sum of a r over that of r^2: 6.8, with an error of 30 - 4.25^2 / 0.625 = 1.1
    first, second = report.layers
    assert (first.name, second.name) == ("act1", "act2")
    assert [first.input_scale.item(), first.spike_value.item(), first.shift.item(), first.error] == [8, 8, 0, 0]
    assert [second.input_scale.item(), second.spike_value.item(), second.shift.item()] == [8, value, 0.125]
    assert second.error == pytest.approx(1.1 / 30)
    assert first.percentile.item() == 100 and second.percentile is None
    assert str(report).splitlines()[1] == (
        "act2  input scale        8  value of a spike      6.8  relative error 0.037"
    )
    assert {name: weight.item() for name, weight in twin.named_parameters()} == {
        **{"conv1.weight": 1, "bn1.weight": 1 / 8, "bn1.bias": 0},
        **{"conv2.weight": -0.5 * 8, "bn2.weight": 1 / 8, "bn2.bias": 0.125},
        **{"fc.weight": 3 * value, "fc.bias": 0},
    }
    assert twin(ladder()).flatten().tolist() == pytest.approx((3 * value * rates).tolist())


class Ideal(nn.Module):
    """A neuron of as many values as there are numbers: each call gives exactly what its rate should stand for."""

    def __init__(self, activation, calls):
        super().__init__()
        self.activation, self.calls = activation, calls

    def forward(self, current):
        layer = self.calls.pop(0)

        def per_channel(x):
            return x.view(-1, *[1] * (current.ndim - 2))

        real = (current - per_channel(layer.shift)) * per_channel(layer.input_scale)
        return self.activation(real) / per_channel(layer.spike_value)


def with_ideal_neurons(ann, twin, report):
    twin = copy.deepcopy(twin)
    for name in [name for name, module in twin.named_modules() if isinstance(module, SpikingNeuron)]:
        parent, _, child = name.rpartition(".")
        calls = [layer for layer in report.layers if layer.name == name]
        setattr(twin.get_submodule(parent), child, Ideal(ann.get_submodule(name), calls))
    for name, gate in [(name, module) for name, module in twin.named_modules() if isinstance(module, OnRate)]:
        twin.set_submodule(name, gate.activation)
    twin.step_mode = "s"  # one call is then the plain forward of the network's own class
    return twin


@pytest.mark.parametrize("family", [*FAMILIES, "regnety_002"])
def test_scales_cancel_exactly_with_ideal_neurons(family):
    ann = family_ann(family)
    images, before = torch.randn(3, *SIZE, dtype=torch.float64), copy.deepcopy(ann.state_dict())
    twin = twin_of(ann, 2, gates="keep")
    report = calibrate(ann, twin, [images])
    assert [layer.name for layer in report.layers] == [site.name for site in trace_scales(ann, twin, images).sites]
    assert all((layer.spike_value > 0).all() and (layer.input_scale > 0).all() for layer in report.layers)
    assert max((layer.spike_value - 1).abs().max() for layer in report.layers) > 0.1
    assert any(layer.shift.any() for layer in report.layers)
    with torch.no_grad():
        expected, found = ann(images), with_ideal_neurons(ann, twin, report)(images)
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
    assert all(torch.equal(before[name], value) for name, value in ann.state_dict().items())


def without_max_pool():
    """The pool of spikes is not the pool of rates at any T."""
    kwargs = dict(channels=[8, 16, 16, 16], zero_init_last=False)
    ann = create_ann("resnet18", 7, cifar_stem=True, kwargs=kwargs)
    return calibrated(generic(ann), torch.randn(8, *SIZE, dtype=torch.float64))


def distance(found, expected):
    """Relative to how far the images are from one another."""
    return ((found - expected).norm() / (expected - expected.mean(0)).norm()).item()


class Flat(nn.Sequential):
    """Pixels of several channels, each with its own scale, flattened into a linear layer."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(8 * 4, 3))


class Scaled(Flat):
    """A constant factor between the layer that takes the scale and the neurons."""

    def forward(self, x):
        return self[3](self[2](self[1](self[0](x) * 3.0)))


@pytest.mark.parametrize("network", [Flat, Scaled])
def test_scales_cancel_behind_a_flatten_and_a_factor(network):
    ann, images = network().double().eval(), torch.randn(8, 3, 4, 4, dtype=torch.float64)
    twin = twin_of(ann, 3, size=(3, 4, 4))
    report = calibrate(ann, twin, [images])
    (layer,) = report.layers
    assert layer.spike_value.unique().numel() > 2
    assert layer.shift.any() == (network is Flat), "a shift in front of a factor would not arrive as it is"
    torch.testing.assert_close(with_ideal_neurons(ann, twin, report)(images), ann(images), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_logits_approach_the_networks_with_more_steps():
    ann, images = without_max_pool(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    errors = []
    for timesteps in (4, 32, 256):
        twin = twin_of(ann, timesteps)
        calibrate(ann, twin, [images], percentile=100)
        errors.append(distance(twin(images), ann(images)))
    assert errors[1] < errors[0] and errors[2] < 0.25 * errors[1] and errors[2] < 0.1, errors


@torch.no_grad()
def test_calibration_helps_a_leaky_neuron():
    ann, images = without_max_pool(), torch.randn(16, 3, 8, 8, dtype=torch.float64)
    twin = twin_of(ann, 4, NeuronConfig())
    before = distance(twin(images), ann(images))
    report = calibrate(ann, twin, [images])
    assert distance(twin(images), ann(images)) < 0.75 * before, before
    assert all(0 < layer.error < 0.7 for layer in report.layers)


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_what_does_not_concern_it_stay(training):
    ann, twin = tiny_twin()
    twin.train(training)
    twin.bn1.eval()
    ann.act1.train()
    calibrate(ann, twin, [ladder()])
    assert twin.training == twin.conv1.training == training and not twin.bn1.training
    assert ann.act1.training and not ann.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for n in (ann, twin) for module in n.modules())
    assert all(parameter.requires_grad for parameter in twin.parameters())


def test_recalibrated_norms_have_the_statistics_of_the_twins_spikes():
    ann, twin = tiny_twin()
    other = copy.deepcopy(twin)
    calibrate(ann, other, [ladder()], percentile=100)
    calibrate(ann, twin, [ladder()[1:3], ladder()[3:]], percentile=100, recalibrate=True)
    assert torch.equal(twin.conv1.weight, other.conv1.weight) and twin.bn1.momentum == 0.1 and not twin.training
    # bn1 sees 2, 4 and then 6, 8, at each of four steps: means 3 and 7, variances 1 with Bessel's 8 / 7
    assert twin.bn1.running_mean.item() == pytest.approx(5)
    assert twin.bn1.running_var.item() == pytest.approx(8 / 7)


def test_a_threshold_and_a_learned_leak_are_heeded():
    ann, twin = tiny_twin(neuron=NeuronConfig(leak=1.0, threshold=2.0))
    report = calibrate(ann, twin, [ladder()], percentile=100)
    assert report.layers[0].input_scale.item() == 4 and report.layers[0].spike_value.item() == 8
    ann, twin = tiny_twin(neuron=NeuronConfig(leak=0.5, learnable_leak=True))
    with torch.no_grad():
        twin.act1.w.fill_(-40.0)  # no leak to rounding: as by hand
    assert calibrate(ann, twin, [ladder()], percentile=100).layers[0].spike_value.item() == pytest.approx(8)


def test_values_out_of_range_are_refused():
    ann, twin = tiny_twin()
    for percentile in (0, -1, 100.5, float("nan")):
        with pytest.raises(ValueError, match="percentile must be in"):
            calibrate(ann, twin, [ladder()], percentile=percentile)
    for batches in ([], [ladder()[:0]]):
        with pytest.raises(ValueError, match="at least one image"):
            calibrate(ann, twin, batches)
    with pytest.raises(ValueError, match="'act1' are not finite"):
        calibrate(ann, twin, [ladder() * torch.inf])
    assert torch.equal(twin.conv1.weight, ann.conv1.weight), "nothing was changed"


def test_what_is_no_twin_is_refused():
    ann, twin = tiny_twin()
    with pytest.raises(ValueError, match="spiking twin, found Tiny"):
        calibrate(ann, ann, [ladder()])
    with pytest.raises(ValueError, match="no twin of the network: 'act1'"):
        calibrate(nn.Sequential(nn.Linear(1, 1)), twin, [ladder()])
    calibrate(ann, twin, [ladder()])
    with pytest.raises(ValueError, match=r"'conv2.weight' differs|'bn1.weight' differs"):
        calibrate(ann, twin, [ladder()])


@pytest.mark.parametrize(
    "half, message",
    [
        (lambda n, x: n.fc(n.act2(n.bn2(n.conv1(x)))), "'conv1' is called twice"),
        (lambda n, x: n.conv2(x + n.act2(n.bn2(x))), "a sum of spikes of different values"),
        (
            lambda n, x: (y := n.bn2(n.conv2(x))) + n.act2(y),
            "the output of 'bn2' is read by 'act2', 'a sum with spikes'",
        ),
        (lambda n, x: n.act2(y := n.bn2(x)) * 0 + n.conv2(y), "the output of 'bn2' is read by 'act2', 'conv2'"),
        (lambda n, x: n.act2(n.bn2(x) + 1), "nothing before 'act2' can take the scale"),
    ],
)
def test_what_takes_no_scale_is_refused_by_name(half, message):
    ann, twin = tiny_twin(Changed(half))
    with pytest.raises(UnsupportedOperationError, match=message):
        calibrate(ann, twin, [ladder()])


def test_a_twin_that_draws_its_input_is_refused():
    ann, twin = tiny_twin()
    twin.input_encoder = PoissonEncoder()
    with pytest.raises(ValueError, match="direct encoding, found PoissonEncoder"):
        calibrate(ann, twin, [ladder()])


def test_an_operation_that_keeps_no_scale_is_named_with_its_module():
    ann, twin = tiny_twin()
    ann.fc.forward = lambda x: torch.exp(x)
    with pytest.raises(UnsupportedOperationError, match="exp is not known to keep the scale"):
        trace_scales(ann, twin, ladder())


@pytest.mark.parametrize("family, layer", [("seresnet18", "layer1.0.bn2"), ("darknet17", "stages.0.blocks.0")])
def test_networks_whose_scales_do_not_go_into_weights_are_refused_by_name(family, layer):
    ann = timm.create_model(family, num_classes=3).eval()
    with pytest.raises(UnsupportedOperationError, match=layer):
        trace_scales(ann, twin_of(ann, 2, gates="keep"), torch.randn(1, *SIZE))
