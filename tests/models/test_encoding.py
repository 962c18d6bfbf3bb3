"""Poisson encoding: what it draws, what it refuses, and how each algorithm runs on it."""

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn
from toy_networks import Residual, generic, spiking

from models import NeuronConfig, PoissonEncoder, SpikingNeuron, create_snn, spiking_twin
from models.network import as_spiking


def test_spikes_are_one_a_step_with_the_values_probability():
    """10,000 draws of probability p have a standard deviation of sqrt(p (1 - p) / 10,000), at most 0.005."""
    values = torch.linspace(0, 1, 12).view(1, 3, 2, 2)
    spikes = PoissonEncoder()(values, 10_000)
    assert spikes.shape == (10_000, 1, 3, 2, 2) and spikes.dtype == torch.float32
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    deviation = (values * (1 - values) / 10_000).sqrt()
    assert ((spikes.mean(0) - values).abs() <= 4 * deviation).all()  # 4 of them: 1 in 1300 that one of 12 is off
    assert spikes[:, 0, 0, 0, 0].sum() == 0 and spikes[:, 0, 2, 1, 1].sum() == 10_000


def test_steps_and_pixels_are_drawn_each_by_itself():
    """Of 4,000 pairs of draws at probability 1/2, half agree: 0.5 with a standard deviation of 0.008."""
    spikes = PoissonEncoder()(torch.full((1, 1, 40, 100), 0.5), 3)
    for other in (spikes.roll(1, 0), spikes.roll(1, 3), spikes.roll(1, 4)):
        assert (spikes[0] == other[0]).double().mean().item() == pytest.approx(0.5, abs=0.04)


def test_nought_never_fires_though_a_nought_is_drawn(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    spikes = PoissonEncoder()(torch.tensor([0.0, 1e-6, 1.0]).view(1, 3, 1, 1), 4)
    assert spikes.flatten(1).tolist() == [[0, 1, 1]] * 4


def test_a_normalisation_is_undone():
    mean, std = (0.1, 0.5, 0.3), (0.2, 0.25, 0.1)
    values = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]).view(1, 3, 1, 2)
    m, s = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    spikes = PoissonEncoder(mean=mean, std=std)((values - m) / s, 500)
    assert torch.equal(spikes, values.expand(500, 1, 3, 1, 2))  # to rounding: 1 fires always, nought hardly ever
    quarter = PoissonEncoder(mean=(0.5,), std=(0.25,))(torch.full((1, 3, 20, 20), -1.0), 20)
    assert quarter.mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 24_000) ** 0.5)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (-1.5, 0.5, r"values in \[0, 1\], found -1.5 to 0.5; .* mean \(0.0,\) and std \(1.0,\)"),
        (0.0, 1.01, r"found 0 to 1.01"),
        (0.0, float("nan"), "found"),
        (0.0, float("inf"), "found"),
    ],
)
def test_values_that_are_no_probability_are_refused(low, high, message):
    with pytest.raises(ValueError, match=message):
        PoissonEncoder()(torch.tensor([low, 0.25, high]).view(1, 3, 1, 1), 2)


def test_rounding_is_no_reason_to_refuse():
    spikes = PoissonEncoder()(torch.tensor([-1e-6, 1 + 1e-6]).view(1, 2, 1, 1), 50)
    assert spikes.flatten(1).tolist() == [[0, 1]] * 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_spikes_have_the_type_of_the_images(dtype):
    assert PoissonEncoder()(torch.rand(1, 3, 2, 2).to(dtype), 2).dtype == dtype


@pytest.mark.parametrize("std", [(0.0,), (0.2, -0.1, 0.2), (float("nan"),)], ids=str)
def test_a_standard_deviation_is_above_nought(std):
    with pytest.raises(ValueError, match="std must be above 0, found"):
        PoissonEncoder(std=std)


def test_lists_are_as_good_as_tuples():
    encoder = PoissonEncoder(mean=[0.5], std=[0.25])
    assert encoder == PoissonEncoder(mean=(0.5,), std=(0.25,)) and hash(encoder) is not None


# -- in a network -------------------------------------------------------------------------------------


def encoded(algorithm, timesteps=3):
    network = generic(Residual(NeuronConfig(leak=0.5)))
    spec = {"kind": "toy"}
    return as_spiking(
        network, timesteps=timesteps, algorithm=algorithm, in_chans=3, encoder=PoissonEncoder(), spec=spec
    )


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s", "bptt"])
def test_a_network_runs_on_the_drawn_frames(algorithm):
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    ours, plain = encoded(algorithm), spiking(generic(Residual(NeuronConfig(leak=0.5))), 3, algorithm)
    plain.load_state_dict(ours.state_dict())
    torch.manual_seed(4)
    frames = ours.input_encoder(x, 3)
    assert not torch.equal(frames[0], frames[1])
    for training in (True, False):
        torch.manual_seed(4)
        logits = ours.train(training)(x)
        torch.testing.assert_close(logits, plain.train(training)(frames), rtol=1e-12, atol=1e-12)
    assert not torch.equal(ours(x), logits), "another draw"


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s", "bptt"])
def test_gradients_reach_every_weight(algorithm):
    snn = encoded(algorithm)
    snn(torch.rand(4, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in snn.parameters())


def test_frames_are_not_encoded_again():
    snn, frames = encoded("rate_m").eval(), 5 * torch.randn(3, 2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(snn(frames), snn(frames))


@pytest.mark.parametrize("algorithm", ["ottt", "sltt"])
def test_online_training_draws_at_each_step(algorithm):
    snn, seen = encoded(algorithm), []
    snn[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].folded.clone()))
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for t in range(3):
        snn(x, step=t).sum().backward()
    assert len(seen) == 3 and all(set(frame.unique().tolist()) == {0.0, 1.0} for frame in seen)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_a_network_without_layers_counts_the_spikes():
    """The mean of what an identity neuron passes on is the probability: 20,000 draws, standard deviation 0.0033."""
    network = nn.Sequential(SpikingNeuron(NeuronConfig(leak=1.0)), nn.Flatten(1), nn.Linear(100, 1, bias=False))
    nn.init.constant_(network[2].weight, 0.01)
    spec = {"kind": "toy"}
    snn = as_spiking(network, timesteps=200, algorithm="rate_m", in_chans=1, encoder=PoissonEncoder(), spec=spec).eval()
    assert snn(torch.full((1, 1, 10, 10), 0.3)).item() == pytest.approx(0.3, abs=0.013)


def test_images_out_of_range_are_refused_by_the_network():
    snn = create_snn("resnet18_cifar", width=4, encoder=PoissonEncoder())
    with pytest.raises(ValueError, match=r"values in \[0, 1\], found -2 to"):
        snn(torch.cat([torch.rand(1, 3, 8, 8), torch.full((1, 3, 8, 8), -2.0)]))


def test_step_by_step_each_call_draws_an_input():
    """A pixel that always fires and one that never does: the network sees 1 and 0, not the normalised values."""
    seen = []
    network = nn.Sequential(nn.Conv2d(1, 1, 1), SpikingNeuron(), nn.Flatten())
    network[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    snn = as_spiking(
        network,
        timesteps=3,
        algorithm="rate_m",
        in_chans=1,
        encoder=PoissonEncoder(mean=[0.25], std=[0.5]),
        spec={},
    ).eval()
    functional.set_step_mode(snn, "s")
    snn((torch.tensor([[[[0.0, 1.0]]]]) - 0.25) / 0.5)
    assert seen[0].flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_images_normalised_in_half_precision_are_taken(dtype):
    encoder = PoissonEncoder(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    white = ((torch.ones(1, 3, 2, 2) - mean) / std).to(dtype)
    black = ((torch.zeros(1, 3, 2, 2) - mean) / std).to(dtype)
    assert encoder(white, 2).dtype == dtype
    assert encoder(black, 50).mean() < 0.05


def test_a_module_of_the_name_of_an_attribute_is_refused():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_encoder = nn.Conv2d(3, 3, 1)

    with pytest.raises(ValueError, match=r"Named has a module or parameter of a name that is taken: .'input_encoder'."):
        as_spiking(Named(), timesteps=2, algorithm="rate_m", in_chans=3, spec={})


def test_a_module_called_encoder_stays():
    """Many networks have one."""

    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

        def forward(self, x):
            return self.encoder(x).mean((2, 3))

    snn = spiking_twin(Autoencoder(), 2, input_size=(3, 4, 4), encoder=PoissonEncoder())
    assert snn(torch.rand(2, 3, 4, 4)).shape == (2, 4)


def test_integers_are_no_probabilities():
    with pytest.raises(ValueError, match=r"floating-point values in \[0, 1\], found torch.uint8"):
        PoissonEncoder()(torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8), 2)


def test_one_number_does_for_all_channels():
    assert PoissonEncoder(mean=0.5, std=2) == PoissonEncoder(mean=(0.5,), std=(2.0,))
