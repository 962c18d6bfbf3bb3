"""Kinds of pass, shapes and settings of a spiking network; what training keeps in memory."""

import copy
import gc

import pytest
import torch
from torch import nn
from toy_networks import TOYS, Residual, calibrated, generic, spiking

from models import (
    ALGORITHMS,
    FEEDBACK_ALGORITHMS,
    ONLINE,
    NeuronConfig,
    SpikeTrain,
    SpikingNeuron,
    create_ann,
    create_snn,
    list_snns,
    set_algorithm,
    spiking_twin,
)

ORDINARY = [algorithm for algorithm in ALGORITHMS if algorithm not in ("dsr", *FEEDBACK_ALGORITHMS)]
"""Those that run on a spiking neuron in any network; dsr has neurons of its own, ide and spide take a feedback loop."""

WHOLE = [algorithm for algorithm in ORDINARY if algorithm not in ONLINE]
"""Those that train on all steps in one call."""


def residual(timesteps=4, algorithm="rate_m", **neuron):
    return spiking(generic(Residual(NeuronConfig(leak=0.5, **neuron))), timesteps, algorithm)


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class SavedTensors:
    """Everything that autograd keeps for a backward pass while the context is open."""

    def __enter__(self):
        self.tensors = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def _pack(self, tensor):
        self.tensors.append(tensor)
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def bytes(self):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return sum(storages.values())


# -- inference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ORDINARY)
@pytest.mark.parametrize("wants_grad", [False, True])
def test_evaluation_builds_no_graph(algorithm, wants_grad):
    snn, x = residual(algorithm=algorithm).eval(), images(2, 3, 8, 8).requires_grad_(wants_grad)
    with SavedTensors() as saved:
        logits = snn(x)
    assert saved.tensors == [] and logits.grad_fn is None and not logits.requires_grad


def test_evaluation_does_not_depend_on_the_algorithm():
    x = images(2, 3, 8, 8)
    snn = calibrated(residual(), x)
    logits = snn(x)
    for algorithm in ORDINARY:
        assert torch.equal(set_algorithm(snn, algorithm)(x), logits)


def test_training_under_no_grad_gives_the_same_logits_and_no_graph():
    x, snn = images(2, 3, 8, 8), residual()
    with torch.no_grad():
        logits = snn(x)
    assert not logits.requires_grad
    torch.testing.assert_close(snn(x), logits, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("algorithm", WHOLE)
@pytest.mark.parametrize("toy", ["Residual", "PreActivation", "Sums", "Norms"])
def test_frames_that_are_all_the_same_are_the_image(toy, algorithm, training):
    x = images(4, 3, 8, 8)
    snn = calibrated(spiking(generic(TOYS[toy](NeuronConfig(leak=0.5))), 3), x).train(training)
    set_algorithm(snn, algorithm)
    frames = x.expand(3, *x.shape).contiguous()
    before = {name: value.clone() for name, value in snn.state_dict().items()}
    direct, buffers = snn(x), {name: value.clone() for name, value in snn.named_buffers()}
    snn.load_state_dict(before)
    torch.testing.assert_close(snn(frames), direct, rtol=1e-12, atol=1e-12)
    for name, value in snn.named_buffers():
        torch.testing.assert_close(value, buffers[name], rtol=1e-12, atol=1e-12)


def test_the_order_of_frames_matters():
    frames = images(3, 2, 3, 8, 8)
    snn = calibrated(residual(3), frames)
    assert not torch.allclose(snn(frames), snn(frames.flip(0)))


def test_logits_are_the_mean_over_time():
    """A network that is only a neuron and a sum of pixels: 0.75 a step fires at steps 2, 3 and 4 of 5."""
    network = nn.Sequential(SpikingNeuron(NeuronConfig(leak=1.0)), nn.Flatten(1), nn.Linear(4, 1, bias=False))
    nn.init.constant_(network[2].weight, 0.25)
    snn = spiking(network, 5, in_chans=1).eval()
    assert snn(torch.full((1, 1, 2, 2), 0.75)).item() == pytest.approx(3 / 5)
    snn.timesteps = 2
    assert snn(torch.full((1, 1, 2, 2), 0.75)).item() == pytest.approx(1 / 2)


# -- settings and shapes ------------------------------------------------------------------------------


def test_timesteps_can_be_set():
    x = images(2, 3, 8, 8)
    snn = calibrated(residual(2), x)
    two = snn(x)
    snn.timesteps = 5
    five = snn(x)
    assert not torch.equal(two, five)
    torch.testing.assert_close(five, snn(x.expand(5, *x.shape)), rtol=1e-12, atol=1e-12)
    snn.timesteps = 2
    assert torch.equal(snn(x), two)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, 2.0, True, None, "4"], ids=repr)
def test_timesteps_are_whole_and_positive(wrong):
    snn = residual(2)
    with pytest.raises(ValueError, match=f"timesteps must be an integer of at least 1, found {wrong!r}"):
        snn.timesteps = wrong
    assert snn.timesteps == 2
    with pytest.raises(ValueError, match="timesteps"):
        create_snn("resnet18_cifar", timesteps=wrong)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 8, 8), "3 channels, found 1"),
        ((4, 2, 4, 8, 8), "3 channels, found 4"),
        ((3, 8, 8), r"\(B, C, H, W\) or \(T, B, C, H, W\), found shape \(3, 8, 8\)"),
        ((3,), r"found shape \(3,\)"),
        ((1, 4, 2, 3, 8, 8), r"found shape \(1, 4, 2, 3, 8, 8\)"),
        ((5, 2, 3, 8, 8), "runs 4 steps, found 5 frames"),
        ((1, 2, 3, 8, 8), "runs 4 steps, found 1 frames"),
    ],
    ids=str,
)
def test_other_shapes_are_refused(shape, message, training):
    with pytest.raises(ValueError, match=message):
        residual(4).train(training)(images(*shape))


def test_set_algorithm_returns_the_network_and_refuses_others():
    snn = residual()
    before = {name: value.clone() for name, value in snn.state_dict().items()}
    assert set_algorithm(snn, "bptt") is snn and snn.algorithm == "bptt"
    assert all(torch.equal(before[name], value) for name, value in snn.state_dict().items())
    with pytest.raises(ValueError, match=r"algorithm must be one of \('rate_m', .*'spide'\), found 'bp'"):
        set_algorithm(snn, "bp")
    assert snn.algorithm == "bptt"
    with pytest.raises(TypeError, match="takes a spiking network, found Linear"):
        set_algorithm(nn.Linear(2, 2), "bptt")


def test_networks_by_name():
    assert "resnet18_cifar" in list_snns() and list_snns() == sorted(set(list_snns()))
    with pytest.raises(ValueError, match=r"unknown spiking network 'resnet18_cifr'.*did you mean 'resnet18_cifar'"):
        create_snn("resnet18_cifr")
    for wrong in ({"num_classes": 0}, {"in_chans": 0}, {"num_classes": -3}):
        with pytest.raises(ValueError, match="at least 1"):
            create_snn("resnet18_cifar", **wrong)
    with pytest.raises(ValueError, match="algorithm must be one of"):
        create_snn("resnet18_cifar", algorithm="bp")


@pytest.mark.parametrize("algorithm", ["ottt", "sltt", "dsr"])
def test_a_twin_takes_only_what_trains_it(algorithm):
    ann = create_ann("resnet18", num_classes=3, kwargs={"channels": [4, 4, 4, 4]})
    message = rf"{algorithm} trains the networks of .*a twin takes one of \('rate_m', 'rate_s', 'bptt'\)"
    with pytest.raises(ValueError, match=message):
        spiking_twin(ann, algorithm=algorithm, input_size=(3, 16, 16))
    twin = spiking_twin(ann, input_size=(3, 16, 16))
    with pytest.raises(ValueError, match=message):
        set_algorithm(twin, algorithm)
    assert twin.algorithm == "rate_m"


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s", "bptt", "ottt", "sltt"])
def test_width_keeps_the_proportions(algorithm):
    snn = create_snn("resnet18_cifar", width=8, algorithm=algorithm)
    assert [info["num_chs"] for info in snn.feature_info] == [8, 8, 16, 32, 64]


@pytest.mark.parametrize("width", [0, -4, 2.0, True, "8"], ids=repr)
def test_other_widths_are_refused(width):
    with pytest.raises(ValueError, match=f"width must be an integer of at least 1 or None, found {width!r}"):
        create_snn("resnet18_cifar", width=width)


# -- logits of each step ------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ORDINARY)
def test_in_evaluation_every_algorithm_gives_each_steps_logits(algorithm):
    x = images(2, 3, 8, 8)
    snn = set_algorithm(calibrated(residual(4), x), algorithm)
    steps = snn(x, per_step=True)
    assert steps.shape == (4, 2, 5) and not steps.requires_grad
    torch.testing.assert_close(steps.mean(0), snn(x), rtol=1e-13, atol=1e-14)
    snn.timesteps = 1  # what the first step gives does not depend on those that follow
    torch.testing.assert_close(steps[0], snn(x), rtol=1e-13, atol=1e-14)
    assert not torch.allclose(steps[0], steps[1])


def test_logits_that_do_not_change_are_given_for_each_step():
    snn = spiking(nn.Sequential(nn.Flatten(1), nn.Linear(12, 2)), 3)
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(snn.eval()(x, per_step=True), snn(x).expand(3, 2, 2))


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s"])
def test_a_rate_rule_has_no_gradient_of_each_steps_logits(algorithm):
    message = rf"{algorithm} has no gradient of each step's logits; those that have: \('bptt', 'ottt', 'sltt'\)"
    with pytest.raises(ValueError, match=message):
        residual(2, algorithm)(images(2, 3, 8, 8), per_step=True)


@pytest.mark.parametrize("algorithm", WHOLE)
@pytest.mark.parametrize("training", [True, False])
def test_a_step_is_for_the_algorithms_that_go_forward_in_time(algorithm, training):
    with pytest.raises(ValueError, match=f"{algorithm} runs all steps in one call"):
        residual(2, algorithm).train(training)(images(2, 3, 8, 8), step=0)


# -- types and memory formats -------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ORDINARY)
@pytest.mark.parametrize("toy", ["Residual", "PreActivation", "Poolings", "Norms"])
def test_autocast_to_bfloat16_trains_with_float32_gradients(toy, algorithm):
    network = generic(TOYS[toy](NeuronConfig(leak=0.5))).float()
    snn = spiking(network, 3, algorithm).to(memory_format=torch.channels_last)
    seen = []
    for module in snn.modules():
        if isinstance(module, SpikingNeuron):
            module.register_forward_hook(lambda m, args, out: seen.append(out))
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = snn(x, step=0) if algorithm in ONLINE else snn(x)
    logits.float().square().sum().backward()
    assert {spikes.dtype for spikes in seen} == {torch.bfloat16}
    streams = [spikes.stream for spikes in seen if spikes.kind != "replay"]  # which has rates alone
    assert streams and all(set(stream.unique().tolist()) <= {0.0, 1.0} for stream in streams)
    for name, parameter in snn.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
    assert sum(p.grad.norm() > 0 for p in snn.parameters()) >= len(list(snn.parameters())) - 8
    for module in snn.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_mean.dtype == torch.float32 and module.running_var.isfinite().all()


def test_autocast_gradients_point_where_float32_ones_do():
    """One neuron layer far from its threshold, so that rounding flips no spike."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), SpikingNeuron(NeuronConfig(leak=0.5)), nn.Flatten(1), nn.Linear(288, 5))
    snn, x = spiking(network, 4), torch.randn(16, 3, 8, 8)
    gradients = []
    for enabled in (False, True):
        snn.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = snn(x)
        logits.float().square().mean().backward()
        gradients.append(snn.get_parameter("0.weight").grad.flatten().clone())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.97


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spikes_come_out_channels_last(dtype, training):
    snn = spiking(generic(Residual(NeuronConfig())).float(), 3).to(memory_format=torch.channels_last).train(training)
    formats = []
    for module in snn.modules():
        if isinstance(module, SpikingNeuron):

            def record(m, args, out):
                formats.append(out.folded.is_contiguous(memory_format=torch.channels_last))
                if training:
                    formats.append(out.rate.is_contiguous(memory_format=torch.channels_last))

            module.register_forward_hook(record)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        snn(x)
    assert len(formats) == 6 * (2 if training else 1) and all(formats)


# -- memory -------------------------------------------------------------------------------------------

B = 5  # no layer of the toys has 10, 20 or 40 of anything in its first axis


@pytest.mark.parametrize("toy", sorted(TOYS))
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_rate_m_keeps_no_tensor_of_all_steps(toy):
    snn = spiking(generic(TOYS[toy](NeuronConfig(leak=0.5))), 4)
    with SavedTensors() as saved:
        logits = snn(images(B, 3, 8, 8))
    assert len(saved.tensors) > 10
    rows = {t.shape[0] for t in saved.tensors if t.ndim}
    assert B in rows and 4 * B not in rows and 4 not in {t.shape[0] for t in saved.tensors if t.ndim > 4}
    gc.collect()
    alive = [tuple(t.shape) for t in gc.get_objects() if type(t) is torch.Tensor and t.shape[:1] == (4 * B,)]
    assert alive == [], "streams that are kept by other means than autograd's"
    assert logits.requires_grad


def bytes_kept(toy, timesteps, algorithm):
    torch.manual_seed(0)
    snn = spiking(generic(TOYS[toy](NeuronConfig(leak=0.5))), timesteps, algorithm)
    with SavedTensors() as saved:
        logits = snn(images(B, 3, 8, 8))
    assert logits.requires_grad
    return saved.bytes


@pytest.mark.parametrize("toy", sorted(TOYS))
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_what_rate_m_keeps_does_not_grow_with_the_steps(toy):
    assert bytes_kept(toy, 2, "rate_m") == bytes_kept(toy, 8, "rate_m")


def test_what_bptt_keeps_grows_with_the_steps():
    """The measurement above does see streams."""
    assert bytes_kept("Residual", 8, "bptt") > 2.5 * bytes_kept("Residual", 2, "bptt")


def test_the_papers_resnet18_keeps_the_same_for_two_and_eight_steps():
    kept = []
    for timesteps in (2, 8):
        snn = create_snn("resnet18_cifar", timesteps=timesteps)
        with SavedTensors() as saved:
            logits = snn(torch.randn(2, 3, 16, 16))
        assert logits.requires_grad and {2 * timesteps}.isdisjoint({t.shape[0] for t in saved.tensors if t.ndim == 4})
        kept.append(saved.bytes)
    assert kept[0] == kept[1]


# -- what a SpikeTrain tells ------------------------------------------------------------------------


def test_a_train_looks_like_one_batch():
    x = SpikeTrain.constant(torch.zeros(2, 3, 8, 9), 4, "plain")
    assert tuple(x.shape) == (2, 3, 8, 9) and x.size(1) == 3 and x.ndim == x.dim() == 4 and len(x) == 2
    assert x.dtype == torch.float32 and x.device.type == "cpu" and x.is_floating_point()
    assert "timesteps=4" in repr(x) and "(2, 3, 8, 9)" in repr(x)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        x.nonsense  # noqa: B018


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s", "bptt"])
@pytest.mark.parametrize("training", [True, False])
def test_until_gives_the_rate_at_a_module_and_runs_nothing_behind_it(algorithm, training):
    torch.manual_seed(0)
    snn = create_snn("resnet18_cifar", 5, 3, width=8, algorithm=algorithm).double().train(training)
    other = copy.deepcopy(snn)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    kept, calls = [], []
    handle = other.layer2.register_forward_hook(lambda m, a, out: kept.append(out.rate))
    snn.layer3.register_forward_hook(lambda *_: calls.append(1))
    other(images)
    handle.remove()
    rate = snn(images, until="layer2")
    torch.testing.assert_close(rate, kept[-1], rtol=0, atol=0)
    assert rate.shape == (2, 16, 4, 4) and calls == [] and rate.requires_grad == training
    if training:
        rate.square().sum().backward()
        kept[-1].square().sum().backward()
        own = dict(other.named_parameters())
        assert all(p.grad is None or torch.equal(p.grad, own[name].grad) for name, p in snn.named_parameters())
        reached = {name.partition(".")[0] for name, p in snn.named_parameters() if p.grad is not None}
        assert reached == {"conv0", "layer1", "layer2"}
    own, whole = snn.layer3[0].bn1, other.layer3[0].bn1
    assert torch.equal(own.running_mean, torch.zeros(32).double()) and (whole.running_mean.any() == training)
    assert len(snn.layer2._forward_hooks) == 0  # whole again
    assert torch.equal(snn(images), other(images))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("layer9", {}, "the network has no module 'layer9'; it has .*'layer4'"),
        ("", {}, "the module '' does not run"),
        ("layer1", dict(per_step=True), "until runs whole images"),
    ],
)
def test_until_refuses_what_it_cannot_stop_at(name, options, message):
    snn = create_snn("resnet18_cifar", 5, 2, width=8).eval()
    with pytest.raises(ValueError, match=message):
        snn(torch.rand(1, 3, 8, 8), until=name, **options)
