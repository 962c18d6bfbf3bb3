"""Which parts a hybrid uses, on networks whose parts are known."""

import copy

import pytest
import torch
from torch import nn
from toy_teachers import Toy, images_of, student_of, teacher_of

from distill.parts import Calls, trained_until
from models import spiking_twin
from models.network import probing


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s", "bptt"])
def test_the_parameters_up_to_a_module_are_those_that_its_rate_depends_on(algorithm):
    snn = spiking_twin(Toy().double(), 2, algorithm=algorithm, input_size=(3, 32, 32))
    images = images_of(torch.float64)
    first, second = ["first.weight", "first.bias"], ["second.weight", "second.bias"]
    assert trained_until(snn, "first", images) == trained_until(snn, "act1", images) == first
    assert trained_until(snn, "act2", images) == [*first, *second]
    assert trained_until(snn, "head", images) == [*first, *second, "head.weight", "head.bias"]  # `unused` never runs


def test_looking_for_them_changes_nothing():
    snn = student_of(teacher_of("resnet18", torch.float64))
    snn.layer1.eval()
    snn.conv1.weight.requires_grad_(False)
    modes = [module.training for module in snn.modules()]
    state, numbers = copy.deepcopy(snn.state_dict()), torch.get_rng_state()
    names = trained_until(snn, "layer2", images_of(torch.float64))
    assert "conv1.weight" in names and "layer2.1.bn2.bias" in names and "layer3.0.conv1.weight" not in names
    assert [module.training for module in snn.modules()] == modes
    assert not snn.conv1.weight.requires_grad and snn.fc.weight.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in snn.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers) and all(p.grad is None for p in snn.parameters())


class Nested(nn.Module):
    """a - outer(b - tap - c) - d, with a parameter of the outer module's own."""

    def __init__(self):
        super().__init__()
        self.a, self.d, self.unused = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.outer = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
        self.outer.register_buffer("own", torch.zeros(1))

    def forward(self, x):
        return self.d(self.outer(self.a(x)))


def test_calls_are_told_apart_by_the_end_of_the_tap():
    network = Nested()
    calls = Calls(network, "outer.1", lambda: network(torch.zeros(1, 2)))
    assert calls.began_before == {"", "a", "outer", "outer.0", "outer.1", "outer.1.0"}
    assert calls.ended_behind == {"", "outer", "outer.2", "d"}
    before, behind = calls.state_of(network, before=True), calls.state_of(network, before=False)
    assert {name.rpartition(".")[0] for name in before} == {"a", "outer", "outer.0", "outer.1.0", "unused"}
    assert {name.rpartition(".")[0] for name in behind} == {"outer", "outer.2", "d", "unused"}  # it may be anybody's
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class Borrowing(Nested):
    """`outer.2`'s weight is used without a call, by the network behind the tap; that of `outer.0.inner` in front."""

    def __init__(self):
        super().__init__()
        self.outer[0] = Lender()

    def forward(self, x):
        x = self.outer[1](self.outer[0](self.a(x)))
        return self.d(nn.functional.linear(x, self.outer[2].weight))


class Lender(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight)


def test_a_weight_that_is_used_without_a_call_belongs_to_the_module_around_it():
    network = Borrowing()
    calls = Calls(network, "outer.1", lambda: network(torch.zeros(1, 2)))
    before, behind = calls.state_of(network, before=True), calls.state_of(network, before=False)
    assert "outer.0.inner.weight" in before and "outer.0.inner.weight" not in behind
    assert "outer.2.weight" in behind


def test_the_students_part_is_what_began_before_the_end_of_the_tap():
    snn, images = student_of(teacher_of("resnet18", torch.float64)), images_of(torch.float64)
    with probing(snn, timesteps=1):
        calls = Calls(snn, "layer2", lambda: snn(images))
    layers = {name.partition(".")[0] for name in calls.state_of(snn, before=True)}
    assert layers == {"conv1", "bn1", "layer1", "layer2"}
