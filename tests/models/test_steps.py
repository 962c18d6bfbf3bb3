"""Inference a step at a time: the logits so far are means of the whole call's, and no step runs unasked."""

import gc
import weakref

import pytest
import torch
from spikingjelly.activation_based import functional
from test_models_io import NARROW
from torch import nn
from toy_networks import TOYS, Norms, Residual, SharedNeuron, calibrated, generic, spiking

from models import (
    NeuronConfig,
    PoissonEncoder,
    SpikingNeuron,
    UnsupportedOperationError,
    compile_kernels,
    create_ann,
    create_snn,
    spiking_twin,
)
from models.tape import Membrane

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

NEURONS = {
    "soft": NeuronConfig(leak=0.5, threshold=0.7),
    "hard": NeuronConfig(leak=0.5, threshold=0.7, reset="hard"),
    "IF": NeuronConfig(leak=1.0, threshold=0.7),
    "PLIF": NeuronConfig(leak=0.5, threshold=0.7, learnable_leak=True),
    "PLIF, hard": NeuronConfig(leak=0.5, threshold=0.7, learnable_leak=True, reset="hard"),
}


def random_images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_means_so_far(snn, images, seed=None):
    """Every step of `steps` against the mean of the logits that the whole call gives for each step."""

    def again():
        if seed is not None:
            torch.manual_seed(seed)

    again()
    each = snn(images, per_step=True)
    again()
    steps = list(snn.steps(images))
    again()
    whole = snn(images)
    assert len(steps) == snn.timesteps and not any(logits.requires_grad for logits in steps)
    for number, logits in enumerate(steps, 1):
        assert logits.dtype == whole.dtype
        torch.testing.assert_close(logits, each[:number].mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(steps[-1], whole, rtol=1e-12, atol=1e-12)
    assert not torch.equal(each[0], each[-1]), "steps that are all the same tell nothing"


def plain(toy, neuron, timesteps=5):
    network = generic(TOYS[toy](NEURONS[neuron]))
    if toy == "Norms":  # it has a norm without running statistics: those of one step are not those of all
        network.features[4] = nn.Identity()
    return spiking(network, timesteps)


@pytest.mark.parametrize("neuron", NEURONS)
def test_the_logits_so_far_of_every_neuron(neuron):
    images = random_images(3, 3, 8, 8)
    assert_means_so_far(calibrated(plain("Residual", neuron), images), images)


@pytest.mark.parametrize("toy", sorted(TOYS))
def test_the_logits_so_far_of_every_construct(toy):
    """A neuron that is called twice a step among them: each call has a membrane of its own."""
    images = random_images(3, 3, 8, 8)
    snn = calibrated(plain(toy, "soft"), images)
    if toy == "SharedNeuron":
        assert isinstance(snn.spike, SpikingNeuron)
    assert_means_so_far(snn, images)


def test_the_logits_so_far_of_a_twin_of_timm():
    ann = create_ann("resnet18", num_classes=7, cifar_stem=True, kwargs=NARROW).double()
    images = random_images(2, 3, 16, 16)
    assert_means_so_far(calibrated(spiking_twin(ann, timesteps=4, input_size=(3, 16, 16)), images), images)


def test_a_twin_whose_neuron_is_called_twice_a_step():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv, self.act, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.act(self.conv(self.act(self.norm(self.stem(x))))).mean((2, 3)))

    snn = spiking_twin(generic(Shared()), timesteps=4, input_size=(3, 8, 8))
    with torch.no_grad():
        snn.conv.weight.mul_(3)
    assert snn.act.calls_per_step == 2
    images = random_images(2, 3, 8, 8)
    assert_means_so_far(calibrated(snn, images), images)


@pytest.mark.parametrize("name", ["resnet18_cifar", "sew_resnet18", "vggsnn_cifar"])
def test_the_logits_so_far_of_the_papers_networks(name):
    images = random_images(2, 3, 32, 32)
    snn = calibrated(create_snn(name, width=8, timesteps=3).double(), images)
    assert_means_so_far(snn, images)


def test_frames_come_one_a_step():
    frames = random_images(4, 2, 3, 8, 8)
    assert_means_so_far(calibrated(plain("Residual", "soft", 4), frames), frames)


def test_poisson_input_is_what_the_whole_call_draws():
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    snn = plain("Residual", "soft", 4)
    snn.input_encoder = PoissonEncoder()
    calibrated(snn, images)
    assert_means_so_far(snn, images, seed=7)


def test_channels_last():
    images = random_images(2, 3, 8, 8).to(memory_format=torch.channels_last)
    snn = calibrated(plain("Residual", "soft", 4), images).to(memory_format=torch.channels_last)
    assert_means_so_far(snn, images)


def test_under_autocast_as_the_whole_call():
    images = torch.randn(2, 3, 8, 8)
    snn = calibrated(plain("Residual", "soft", 3).float(), images)
    with torch.autocast("cpu", torch.bfloat16):
        each, whole, steps = snn(images, per_step=True), snn(images), list(snn.steps(images))
    assert all(logits.dtype == torch.bfloat16 for logits in [*steps, whole])
    # sums in float32, rounded once: what the whole call does with its T steps
    for number, logits in enumerate(steps, 1):
        assert torch.equal(logits, (each[:number].float().sum(0) / number).bfloat16())
    assert torch.equal(steps[-1], whole)


@pytest.mark.slow
def test_compiled_passes_give_the_same():
    images = random_images(2, 3, 8, 8)
    snn = calibrated(plain("Residual", "PLIF", 3), images)
    expected = list(snn.steps(images))
    compile_kernels(True)
    try:
        found = list(snn.steps(images))
    finally:
        compile_kernels(False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# -- laziness and state -------------------------------------------------------------------------------


def calls_of(snn):
    calls = []
    snn.get_submodule("0").register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_step_runs_when_it_is_asked_for_and_not_before():
    images = random_images(2, 3, 8, 8)
    snn = calibrated(plain("Residual", "soft", 4), images)
    calls = calls_of(snn)
    steps = snn.steps(images)
    assert calls == []
    next(steps)
    assert len(calls) == 1
    next(steps)
    steps.close()
    assert len(calls) == 2 and next(steps, None) is None


def test_the_state_is_the_iterators_and_goes_with_it():
    images, other = random_images(2, 3, 8, 8), random_images(5, 3, 8, 8)
    snn = calibrated(plain("Residual", "IF", 4), images)
    expected = list(snn.steps(images))
    first, second = snn.steps(images), snn.steps(other)
    found = []
    for _ in range(4):  # two under way at once, and whole calls in between
        found.append(next(first))
        next(second)
        snn(other)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(m.v == 0.0 for m in snn.modules() if isinstance(m, SpikingNeuron))
    abandoned = snn.steps(images)
    next(abandoned)
    gc.collect()
    membranes = [weakref.ref(x) for x in gc.get_objects() if type(x) is Membrane]
    assert membranes
    del abandoned, first, second
    gc.collect()
    assert all(ref() is None for ref in membranes)


def test_the_callers_gradients_stay_on_between_steps():
    images = random_images(2, 3, 8, 8)
    snn = calibrated(plain("Residual", "soft", 3), images)
    for logits in snn.steps(images):
        assert torch.is_grad_enabled() and not logits.requires_grad
    snn.train()(images).sum().backward()  # nothing is left that would stand in its way


def test_changing_what_was_given_changes_nothing_that_was_given_before():
    images = random_images(2, 3, 8, 8)
    snn = calibrated(plain("Residual", "soft", 3), images)
    expected = list(snn.steps(images))
    for logits, wanted in zip(snn.steps(images), expected, strict=True):
        assert torch.equal(logits, wanted)
        logits.zero_()


# -- what is refused ----------------------------------------------------------------------------------


def test_what_does_not_run_step_by_step_is_refused_by_name():
    images = torch.randn(2, 3, 32, 32)
    twin = spiking_twin(create_ann("mobilenetv3_small_050", num_classes=7), gates="keep", input_size=(3, 32, 32)).eval()
    with pytest.raises(
        UnsupportedOperationError, match=r"a step at a time for a gate: .*, in module 'blocks\.0\.0\.se\."
    ):
        next(twin.steps(images))
    with pytest.raises(ValueError, match="steps: DSR looks at all time steps at once"):
        create_snn("resnet18_cifar", width=8, algorithm="dsr").eval().steps(images)
    norms = spiking(generic(Norms(NEURONS["soft"])), 2).eval()
    with pytest.raises(UnsupportedOperationError, match=r"the statistics of all steps, in module 'features\.4'"):
        next(norms.steps(random_images(2, 3, 8, 8)))


def test_mistakes_are_named_before_the_first_step():
    snn = spiking(Residual(NEURONS["soft"]), 2)
    with pytest.raises(ValueError, match=r"steps is for a network in evaluation mode: call eval\(\)"):
        snn.steps(torch.randn(1, 3, 8, 8))
    snn.eval()
    with pytest.raises(ValueError, match="takes images of 3 channels, found 1"):
        snn.steps(torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match="runs 2 steps, found 3 frames"):
        snn.steps(torch.randn(3, 1, 3, 8, 8))
    snn._step_mode = "s"
    with pytest.raises(ValueError, match='steps runs whole images: it does not go with step mode "s"'):
        snn.steps(torch.randn(1, 3, 8, 8))


def test_shared_neurons_would_be_wrong_with_one_membrane():
    """The comparison above tells: steps by hand, which keep one membrane a module, give other logits."""
    images = random_images(3, 3, 8, 8)
    snn = calibrated(spiking(generic(SharedNeuron(NEURONS["IF"])), 4), images)
    assert_means_so_far(snn, images)
    expected = snn(images)
    functional.set_step_mode(snn, "s")
    with torch.no_grad():
        steps = [snn(images) for _ in range(4)]
    assert (torch.stack(steps).mean(0) - expected).abs().max() > 0.01


def test_a_gate_that_is_computed_on_the_rate_has_no_step_mode():
    snn = spiking_twin(create_ann("mobilenetv3_small_050"), 2, gates="keep", input_size=(3, 32, 32)).eval()
    functional.set_step_mode(snn, "s")
    with pytest.raises(UnsupportedOperationError, match=r"'blocks\.0\.0\.se\.act1', a gate, .* step mode \"s\""):
        snn(torch.randn(1, 3, 32, 32))
