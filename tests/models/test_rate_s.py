"""rate_s: rate_m where no batch norm sees the steps, the paper's batch norm where one does, memory of one step."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import Reference, StepwiseReference, assert_same_training, train_once
from test_network import SavedTensors
from torch import nn
from toy_networks import TOYS, Head, Residual, SharedNeuron, conv_bn, generic, spiking, without_norms

import models.network
from models import NeuronConfig, SpikingNeuron, UnsupportedOperationError, create_snn, set_algorithm, spiking_twin
from models.tape import Mean, Membrane, Moments, Tape

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

NEURONS = {
    "soft": NeuronConfig(leak=0.5, threshold=0.8),
    "soft, attached": NeuronConfig(leak=0.5, threshold=0.8, detach_reset=False),
    "hard": NeuronConfig(leak=0.5, threshold=0.8, reset="hard"),
    "hard, attached": NeuronConfig(leak=0.5, threshold=0.8, reset="hard", detach_reset=False),
    "IF": NeuronConfig(leak=1.0, threshold=0.8),
    "IF, hard, attached": NeuronConfig(leak=1.0, threshold=0.8, reset="hard", detach_reset=False),
    "PLIF, attached": NeuronConfig(leak=0.5, threshold=0.8, detach_reset=False, learnable_leak=True),
}


def random_images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rates_of_layers(snn, images):
    """The mean spikes of each neuron module."""
    seen = []
    handles = [
        m.register_forward_hook(lambda m, args, out: seen.append(out.rate.mean().item()))
        for m in snn.modules()
        if isinstance(m, SpikingNeuron)
    ]
    snn(images)
    for handle in handles:
        handle.remove()
    return seen


# -- equal to rate_m ----------------------------------------------------------------------------------


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("toy", sorted(TOYS))
def test_without_batch_norm_it_is_rate_m(toy, neuron):
    network, x = without_norms(TOYS[toy](NEURONS[neuron]).double()), random_images(4, 3, 8, 8)
    m, s = spiking(network, 4), spiking(network, 4, "rate_s")
    theirs = train_once(m, m, x)
    firing = rates_of_layers(m, x)
    assert sum(0.02 < rate < 0.98 for rate in firing) >= len(firing) - 1, firing
    assert_same_training(train_once(s, s, x), theirs)


@pytest.mark.parametrize("toy", ["Residual", "PreActivation", "Poolings", "Sums"])
def test_with_batch_norms_in_evaluation_mode_it_is_rate_m(toy):
    network, x = generic(TOYS[toy](NeuronConfig(leak=0.5, threshold=0.7))), random_images(3, 3, 8, 8)
    for norm in network.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.eval()
    m, s = spiking(network, 3), spiking(network, 3, "rate_s")
    assert_same_training(train_once(s, s, x), train_once(m, m, x))


@pytest.mark.parametrize("toy", ["Residual", "Masks", "SharedNeuron"])
def test_frames_without_batch_norm_train_as_under_rate_m(toy):
    network, x = without_norms(TOYS[toy](NEURONS["soft"]).double()), 2 * random_images(3, 4, 3, 8, 8)
    m, s = spiking(network, 3), spiking(network, 3, "rate_s")
    assert_same_training(train_once(s, s, x), train_once(m, m, x))


@pytest.mark.parametrize("toy", sorted(TOYS))
def test_with_one_step_it_is_rate_m(toy):
    network, x = generic(TOYS[toy](NeuronConfig(leak=0.5, threshold=0.8))), random_images(4, 3, 8, 8)
    m, s = spiking(network, 1), spiking(network, 1, "rate_s")
    assert_same_training(train_once(s, s, x), train_once(m, m, x))


# -- batch norm ---------------------------------------------------------------------------------------


def both(network, images, timesteps):
    ours, reference = spiking(network, timesteps, "rate_s"), StepwiseReference(network, timesteps)
    return train_once(ours, ours, images), train_once(reference, reference.network, images)


@pytest.mark.parametrize("neuron", ["soft", "hard, attached", "IF", "PLIF, attached"])
@pytest.mark.parametrize("timesteps", [2, 4])
@pytest.mark.parametrize("toy", sorted(TOYS))
def test_it_trains_as_the_papers_two_passes(toy, timesteps, neuron):
    network = generic(TOYS[toy](NEURONS[neuron]))
    assert_same_training(*both(network, random_images(6, 3, 8, 8), timesteps))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("toy", ["Residual", "Shapes"])
def test_frames_train_as_the_papers_two_passes(toy, channels_last):
    network, x = generic(TOYS[toy](NeuronConfig(leak=0.5))), random_images(3, 2, 3, 8, 8)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    assert_same_training(*both(network, x, 3))


def test_the_two_references_differ_where_a_norm_sees_the_steps():
    """The comparisons above tell the two algorithms apart."""
    network, x = generic(Residual(NeuronConfig(leak=0.5))), random_images(4, 3, 8, 8)
    m, s = Reference(network, 4), StepwiseReference(network, 4)
    first, second = train_once(m, m.network, x), train_once(s, s.network, x)
    for name in ("0.0.weight", "2.conv2.1.weight"):
        ratio = (first.gradients[name] - second.gradients[name]).norm() / second.gradients[name].norm()
        assert ratio > 1e-3


def test_a_batch_norms_statistics_by_hand():
    """One channel, two steps whose numbers are -1, 1 and then 2, 6: means 0 and 4, variances 1 and 4."""
    network = nn.Sequential(nn.BatchNorm2d(1, eps=0.5, momentum=0.5), nn.Flatten(1), nn.Linear(1, 1)).double()
    snn = spiking(network, 2, "rate_s", in_chans=1)
    frames = torch.tensor([[-1.0, 1.0], [2.0, 6.0]], dtype=torch.float64).view(2, 2, 1, 1, 1).requires_grad_()
    nn.init.ones_(snn[2].weight)
    nn.init.zeros_(snn[2].bias)
    (snn(frames) * torch.tensor([[1.0], [0.0]], dtype=torch.float64)).sum().backward()
    # running mean: 0, then (0 + 4) / 2; running variance (unbiased: 2 and 8): (1 + 2) / 2, then (1.5 + 8) / 2
    assert snn[0].running_mean.item() == pytest.approx(2) and snn[0].running_var.item() == pytest.approx(4.75)
    assert snn[0].num_batches_tracked == 2
    # mu = 2, sigma^-2 = (1/1.5 + 1/4.5) / 2 = 4/9; xbar - mu = (-1.5, 1.5); g = (1, 0), N = 2:
    # dx = sigma^-1 (g - 1/2 - (xbar - mu) sigma^-2 (-1.5) / 2); each step has half of it
    first = 2 / 3 * (1 - 1 / 2 - 1.5 * 1.5 * 4 / 9 / 2) / 2
    assert frames.grad.flatten().tolist() == pytest.approx([first, -first, first, -first], abs=1e-15)
    assert snn[0].weight.grad.item() == pytest.approx(-1.5 * 2 / 3) and snn[0].bias.grad.item() == pytest.approx(1)


def test_without_a_graph_the_logits_are_the_same():
    network, x = generic(Residual(NeuronConfig(leak=0.5))), random_images(2, 3, 8, 8)
    with_graph, without = spiking(network, 3, "rate_s"), spiking(network, 3, "rate_s")
    with torch.no_grad():
        logits = without(x)
    assert not logits.requires_grad and torch.equal(with_graph(x), logits)
    assert all(torch.equal(a, b) for a, b in zip(with_graph.buffers(), without.buffers(), strict=True))


def test_two_backward_passes_add_up():
    snn, x = spiking(generic(Residual(NeuronConfig())), 2, "rate_s"), random_images(2, 3, 8, 8)
    once = train_once(snn, snn, x).gradients["0.0.weight"].clone()
    logits = snn(x)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights + 0.3 * logits.softmax(1) * weights.flip(0)).sum().backward()
    torch.testing.assert_close(snn.get_parameter("0.0.weight").grad, 2 * once, rtol=1e-12, atol=0)


# -- masks --------------------------------------------------------------------------------------------


def test_one_mask_for_all_steps_and_the_replay_and_another_for_the_next_batch():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), SpikingNeuron(), nn.Dropout(0.5), nn.Flatten(1), nn.Linear(72, 2))
    snn, masks = spiking(network.double(), 4, "rate_s"), []
    snn[2].register_forward_hook(lambda m, args, out: masks.append((out.folded != 0, args[0].folded != 0)))
    x = random_images(2, 3, 3, 3).abs() * 3
    nn.init.constant_(snn[0].weight, 1.0)  # every neuron fires at every step
    snn(x)
    assert len(masks) == 5 and all(fired.all() for _, fired in masks)
    first = masks[0][0]
    assert all(torch.equal(mask, first) for mask, _ in masks) and 0.2 < first.double().mean() < 0.8
    snn(x)
    assert not torch.equal(masks[5][0], first)


def test_the_random_numbers_afterwards_are_those_of_one_traversal():
    network, x = generic(TOYS["Masks"](NeuronConfig())), random_images(2, 3, 8, 8)
    after = []
    for algorithm in ("rate_m", "rate_s"):
        torch.manual_seed(5)
        spiking(network, 3, algorithm)(x)
        after.append(torch.rand(3))
    assert torch.equal(*after)


# -- memory -------------------------------------------------------------------------------------------

B = 5


def bytes_kept(toy, timesteps):
    torch.manual_seed(0)
    snn = spiking(generic(TOYS[toy](NeuronConfig(leak=0.5))), timesteps, "rate_s")
    with SavedTensors() as saved:
        logits = snn(random_images(B, 3, 8, 8))
    assert logits.requires_grad and len(saved.tensors) > 10
    assert B * timesteps not in {t.shape[0] for t in saved.tensors if t.ndim}
    return saved.bytes


@pytest.mark.parametrize("toy", sorted(TOYS))
def test_what_it_keeps_for_backward_does_not_grow_with_the_steps(toy):
    assert bytes_kept(toy, 2) == bytes_kept(toy, 8)


def tensors_of(record):
    if isinstance(record, torch.Tensor):
        return [record]
    if isinstance(record, (list, tuple)):
        return [t for part in record for t in tensors_of(part)]
    return [t for part in vars(record).values() for t in tensors_of(part)] if hasattr(record, "__dict__") else []


@pytest.mark.parametrize("neuron", ["soft", "hard, attached", "PLIF, attached"])
@pytest.mark.parametrize("toy", ["Residual", "Poolings", "Norms"])
def test_what_lies_on_the_tape_does_not_grow_with_the_steps(toy, neuron, monkeypatch):
    sizes = {}

    class Watched(Tape):
        def rewind(self):
            super().rewind()
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for record in self._records
                for t in tensors_of(record)
                if t.device.type != "meta"
            }
            sizes.setdefault(self.timesteps, []).append((len(self._records), sum(storages.values())))

    monkeypatch.setattr(models.network, "Tape", Watched)
    for timesteps in (2, 8):
        torch.manual_seed(0)
        spiking(generic(TOYS[toy](NEURONS[neuron])), timesteps, "rate_s")(random_images(B, 3, 8, 8))
    two, eight = sizes[2], sizes[8]
    assert len(two) == 3 and len(eight) == 9  # one before each step and one before the replay
    assert two[0] == (0, 0) and two[2][0] > 8 and two[2][1] > 1000
    assert two[2] == eight[2] == eight[8]


def test_nothing_of_the_tape_is_left_after_the_replay(monkeypatch):
    tapes = []
    monkeypatch.setattr(models.network, "Tape", lambda timesteps: tapes.append(Tape(timesteps)) or tapes[-1])
    spiking(generic(Residual(NeuronConfig())), 3, "rate_s")(random_images(2, 3, 8, 8)).sum().backward()
    (tape,) = tapes
    assert len(tape._records) > 8 and set(tape._records) == {None}


def test_the_records_by_hand():
    mean = Mean()
    first = torch.tensor([1.0, 2.0])
    for x in (first, torch.tensor([3.0, 6.0])):
        mean.add(x)
    assert mean.value(2).tolist() == [2.0, 4.0] and first.tolist() == [1.0, 2.0]
    halves = Mean()
    for _ in range(3):
        halves.add(torch.tensor([1 / 3], dtype=torch.bfloat16))
    assert halves.sum.dtype == torch.float32 and halves.dtype == torch.bfloat16
    moments = Moments()
    moments.add(torch.tensor([0.0]), torch.tensor([1.0]), 0.5)
    moments.add(torch.tensor([4.0]), torch.tensor([4.0]), 0.5)
    mu, invstd = moments.value(2)
    assert mu.item() == 2 and invstd.item() == pytest.approx((4 / 9) ** 0.5)
    tape = Tape(2)
    records = tape.record(Mean), tape.record(Membrane)
    tape.rewind()
    assert (tape.record(Mean), tape.record(Membrane)) == records
    tape.rewind()
    assert tape.take() is records[0] and tape.take() is records[1]


# -- refusals and settings ----------------------------------------------------------------------------


class Relu(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act = conv_bn(3, 4), Inner()
        self.spike, self.head = SpikingNeuron(), Head(4)

    def forward(self, x):
        return self.head(self.act(self.spike(self.first(x))))


class Inner(nn.Module):
    def forward(self, x):
        return F.relu(x)


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s"])
def test_what_has_no_rule_is_named_with_its_module(algorithm):
    with pytest.raises(
        UnsupportedOperationError, match=r"no rule for .*relu on a spike train, in module 'act' \(Inner"
    ):
        spiking(Relu(), 2, algorithm)(torch.randn(2, 3, 8, 8))


class Product(Relu):
    """The mean of x_t y_t is not the product of the means."""

    def __init__(self):
        super().__init__()
        self.act = Squares()


class Squares(nn.Module):
    def forward(self, x):
        return x * x


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s"])
def test_the_product_of_two_trains_is_refused_by_every_rate_rule(algorithm):
    with pytest.raises(UnsupportedOperationError, match=r"product of two spike trains.*in module 'act' \(Squares"):
        spiking(Product(), 2, algorithm)(torch.randn(2, 3, 8, 8))


def test_a_gate_is_refused_by_name():
    gated = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Sequential(Gate()), nn.AdaptiveAvgPool2d(1))
    network = nn.Sequential(*gated, nn.Flatten(1), nn.Linear(4, 3))
    x = torch.rand(2, 3, 8, 8)
    twin = spiking_twin(network, 2, gates="keep", input_size=(3, 8, 8))
    assert twin.train()(x).requires_grad
    with pytest.raises(UnsupportedOperationError, match=r"no rule under rate_s for a gate.*in module '2\.0\.gate' \("):
        set_algorithm(twin, "rate_s")(x)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.gate = nn.Conv2d(4, 4, 1), nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.fc(x.mean((2, 3), keepdim=True)))


def test_a_twin_trains_with_it():
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1), nn.Linear(144, 3)).double()
    x, twins = random_images(4, 3, 8, 8), []
    for algorithm in ("rate_m", "rate_s"):
        twins.append(spiking_twin(source, 3, algorithm=algorithm, input_size=(3, 8, 8)).train())
    # a batch norm of the constant input has the same statistics at each step: only the counts differ
    first, second = (train_once(twin, twin, x) for twin in twins)
    first.buffers = second.buffers = {}
    assert_same_training(second, first)


def test_it_can_be_chosen_and_left():
    snn, x = generic(create_snn("resnet18_cifar", timesteps=2, width=4)), random_images(2, 3, 8, 8)
    other = copy.deepcopy(snn)
    set_algorithm(set_algorithm(other, "rate_s"), "rate_m")
    assert_same_training(train_once(other, other, x), train_once(snn, snn, x))


def test_a_norm_of_one_number_a_channel_is_refused():
    snn = spiking(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(1), nn.Linear(3, 2)), 4, "rate_s")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        snn(torch.randn(1, 3, 1, 1))


def test_the_shared_neuron_has_a_state_for_each_of_its_calls():
    """The literal first network with its one neuron module written as two."""
    network, x = generic(SharedNeuron(NeuronConfig(leak=1.0))), random_images(3, 3, 8, 8)
    two = nn.Sequential(network.a, SpikingNeuron(network.spike.config), network.b, SpikingNeuron(network.spike.config))
    two = nn.Sequential(two, network.head)
    logits = [spiking(net, 4, "rate_s")(x) for net in (network, two)]
    assert torch.equal(*logits)


def test_a_network_that_runs_otherwise_at_another_step_is_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.neuron, self.head, self.calls = nn.Conv2d(3, 3, 1), SpikingNeuron(), Head(3), 0

        def forward(self, x):
            self.calls += 1
            x = self.neuron(self.conv(x))
            return self.head(self.conv(x) if self.calls == 2 else x)

    snn = spiking(Fickle().double(), 3, "rate_s")
    with pytest.raises(RuntimeError, match="the network's code ran otherwise than at the step before"):
        snn(random_images(2, 3, 4, 4))


def test_gradient_checkpointing_is_refused():
    snn = spiking_twin(timm.create_model("resnet18"), 2, algorithm="rate_s", input_size=(3, 32, 32)).train()
    with pytest.raises(ValueError, match="found 'rate_s': it goes through T steps without a graph"):
        snn.set_grad_checkpointing(True)
    snn(torch.randn(2, 3, 32, 32)).sum().backward()
