"""rate_m against a second implementation of the same equations (tests/models/reference.py), in float64."""

import copy

import pytest
import torch
from reference import Reference, assert_same_training, train_once
from torch import nn
from toy_networks import TOYS, Head, Residual, conv_bn, generic, spiking

from models import NeuronConfig, SpikeTrain, SpikingNeuron, UnsupportedOperationError, create_snn
from models.linear_rate import cast_once
from models.network import as_spiking


def both(network, images, timesteps, ours=None):
    ours = spiking(network, timesteps) if ours is None else ours
    reference = Reference(network, timesteps)
    return train_once(ours, ours, images), train_once(reference, reference.network, images)


def random_images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("timesteps", [1, 2, 3, 4])
@pytest.mark.parametrize("leak", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_a_residual_network_trains_as_the_reference(reset, detach_reset, leak, timesteps, channels_last):
    neuron = NeuronConfig(leak=leak, reset=reset, detach_reset=detach_reset, threshold=0.9, alpha=3.0)
    network, images = generic(Residual(neuron)), random_images(2, 3, 9, 9)
    if channels_last:
        network, images = (
            network.to(memory_format=torch.channels_last),
            images.to(memory_format=torch.channels_last),
        )
    assert_same_training(*both(network, images, timesteps))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("toy", sorted(TOYS))
def test_each_operation_trains_as_the_reference(toy, timesteps, reset):
    neuron = NeuronConfig(leak=0.5, reset=reset, detach_reset=False, threshold=0.8)
    network, images = generic(TOYS[toy](neuron)), random_images(6, 3, 8, 8)
    assert_same_training(*both(network, images, timesteps))


@pytest.mark.parametrize("toy", ["Residual", "PreActivation", "Norms"])
@pytest.mark.parametrize("every", [1, 2], ids=["all", "every_second"])
def test_batch_norm_in_eval_mode_is_an_affine_map_in_training(toy, every):
    network = generic(TOYS[toy](NeuronConfig(leak=0.5, threshold=0.7)))
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms[::every]:
        norm.eval()
    before = copy.deepcopy(network.state_dict())
    ours = spiking(network, 3)
    assert_same_training(*both(network, random_images(3, 3, 8, 8), 3, ours))
    frozen = {n for n, m in network.named_modules() if m in norms[::every] and m.running_mean is not None}
    assert frozen and all(
        torch.equal(before[f"{n}.running_mean"], ours.get_buffer(f"{n}.running_mean")) for n in frozen
    )


@pytest.mark.parametrize("toy", ["Residual", "Sums", "Shapes"])
def test_frames_that_differ_train_as_the_reference(toy):
    network = generic(TOYS[toy](NeuronConfig(leak=0.5)))
    assert_same_training(*both(network, random_images(3, 2, 3, 8, 8), 3))


def test_two_backward_passes_add_up():
    network, images = generic(Residual(NeuronConfig())), random_images(2, 3, 8, 8)
    snn = spiking(network, 2)
    once = train_once(snn, snn, images).gradients["0.0.weight"].clone()
    logits = snn(images)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights + 0.3 * logits.softmax(1) * weights.flip(0)).sum().backward()
    torch.testing.assert_close(snn.get_parameter("0.0.weight").grad, 2 * once, rtol=1e-12, atol=0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_the_papers_resnet18_trains_as_the_reference(channels_last):
    snn = generic(create_snn("resnet18_cifar", timesteps=2))
    images = random_images(2, 3, 8, 8)
    if channels_last:
        snn, images = snn.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(snn)
    plain.step_mode = "s"  # one call is then the plain forward of the network's own class
    assert_same_training(*both(plain, images, 2, ours=snn))


def test_the_papers_resnet18_trains_as_the_reference_over_two_steps_of_training():
    """The second step starts from weights and running statistics that the first one moved."""
    neuron = NeuronConfig(leak=0.5, reset="hard", detach_reset=False)
    network, images = generic(Residual(neuron)), random_images(2, 3, 8, 8)
    ours, reference = spiking(network, 3), Reference(network, 3)
    for call, net in ((ours, ours), (reference, reference.network)):
        train_once(call, net, images)
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.05 * p.grad
    later = random_images(2, 3, 8, 8)
    first, second = train_once(ours, ours, later), train_once(reference, reference.network, later)
    assert_same_training(first, second, 1e-9)


def test_an_unregistered_class_is_not_needed_to_be_spiking():
    """`as_spiking` leaves names, parameters and the forward code of a network alone."""
    network = generic(Residual(NeuronConfig()))
    names = [n for n, _ in network.named_modules()], [n for n, _ in network.named_parameters()]
    snn = as_spiking(network, timesteps=2, algorithm="rate_m", in_chans=3, spec={})
    assert snn is network and isinstance(snn, Residual)
    assert ([n for n, _ in snn.named_modules()], [n for n, _ in snn.named_parameters()]) == names


class StackAndExpand(nn.Module):
    """Paths stacked behind, between and in front of other axes, with a plain tensor among them; expanded maps."""

    def __init__(self, neuron):
        super().__init__()
        self.stem, self.spike = conv_bn(3, 6), SpikingNeuron(neuron)
        self.a, self.b, self.merge = conv_bn(6, 6), conv_bn(6, 6), conv_bn(6, 6)
        self.spikes = nn.ModuleList(SpikingNeuron(neuron) for _ in range(3))
        self.path = nn.Parameter(torch.rand(6, 1, 1))
        self.head = Head(6)

    def forward(self, x):
        x = self.spike(self.stem(x))
        a, b = self.spikes[0](self.a(x)), self.spikes[1](self.b(x))
        plain = self.path.expand(x.shape)
        paths = torch.stack([a, b, plain], dim=1)  # (B, 3, C, H, W)
        last = torch.stack((a, b), -1).mean(-1)
        row = x.mean(2, keepdim=True).expand(-1, 6, *x.shape[2:])
        pixel = a.mean((2, 3), keepdim=True).expand_as(x)
        return self.head(self.spikes[2](self.merge(paths.sum(1) + last + row + pixel)))


@pytest.mark.parametrize("timesteps", [1, 3])
def test_stack_and_expand_train_as_the_reference(timesteps):
    network = generic(StackAndExpand(NeuronConfig(leak=0.5, threshold=0.8)))
    assert_same_training(*both(network, random_images(4, 3, 8, 8), timesteps))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: torch.stack([x, x]),
        lambda x: torch.stack([x, x], -5),
        lambda x: x.expand(4, -1, -1, -1),
        lambda x: x.expand(2, *x.shape),
        lambda x: x.expand_as(torch.zeros(3, 2, 1, 5, 5)),
    ],
    ids=["stack", "stack_from_behind", "expand", "expand_new_axis", "expand_as"],
)
def test_stack_and_expand_leave_the_batch_axis_alone(wrong):
    train = SpikeTrain.from_stream(torch.rand(3, 1, 2, 5, 5), "plain")
    with pytest.raises(UnsupportedOperationError, match=r"no rule for (unsqueeze|expand)"):
        wrong(train)


def test_stacked_and_expanded_streams_hold_the_numbers_of_every_step():
    stream = torch.rand(3, 2, 4, 1, 5)
    train, plain = SpikeTrain.from_stream(stream, "plain"), torch.rand(2, 4, 1, 5)
    stacked = torch.stack([train, plain, train], 2).stream
    assert torch.equal(stacked, torch.stack([stream, plain.expand_as(stream), stream], 3))
    assert torch.equal(train.expand(2, 4, 6, -1).stream, stream.expand(3, 2, 4, 6, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s"])
def test_a_network_held_in_half_precision_trains(algorithm, dtype):
    snn = create_snn("resnet18_cifar", width=8, timesteps=2, algorithm=algorithm).to(dtype)
    snn(torch.randn(2, 3, 16, 16, dtype=dtype)).square().sum().backward()
    for name, parameter in snn.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == dtype, name
        assert parameter.grad.isfinite().all(), name


def test_on_a_cpu_autocast_casts_a_weight_once_for_both_passes():
    layer = nn.Conv2d(3, 5, 3)
    stream = torch.randn(4, 2, 3, 6, 6)
    saved = []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        y = layer(SpikeTrain.from_stream(stream, "rate"))
        rate = y.rate
    assert [x.dtype for x in saved if x.shape == layer.weight.shape] == [torch.bfloat16]
    rate.float().square().sum().backward()
    (wanted,) = torch.autograd.grad(  # the map of the mean, in the type in which it was convolved
        nn.functional.conv2d(stream.mean(0).bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()),
        layer.weight,
        (2 * rate.float()).bfloat16(),
    )
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.float64, True), (torch.bfloat16, True)], ids=str
)
def test_a_weight_that_autocast_leaves_alone_is_not_cast(dtype, autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert cast_once(torch.randn(3, dtype=dtype)) is None
