"""The papers' feedback networks: their sizes, and that every way to run one gives the same logits."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from test_step_by_step import step_by_step

from models import (
    FEEDBACK_ALGORITHMS,
    FeedbackConfig,
    NeuronConfig,
    check_saveable,
    create_ann,
    create_snn,
    list_snns,
    load_snn,
    save_snn,
    set_algorithm,
    spiking_twin,
)
from models.feedback import FEEDBACK_NEURON
from models.registry import FEEDBACK_NETWORKS
from models.spiketrain import SpikeTrain

LIF = NeuronConfig(leak=0.9, threshold=2.0)


def small(name, algorithm="ide", neuron=None, timesteps=5, **config):
    """Channels of 8 and more, every layer of which fires within few steps."""
    width = 8 if name == "feedback_convnet" else 12
    config = FeedbackConfig(readout_side=4, **config)
    snn = create_snn(name, 4, timesteps, 3, neuron, algorithm, width, feedback=config).double()
    for module in snn.loop.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.bias, 0, 2) if module.bias is not None else None
    return snn.train()


@pytest.mark.parametrize(
    ("name", "in_chans", "size", "parameters"),
    [  # the papers: 229 K, 3.7 M, 11.8 M
        ("feedback_convnet", 1, 28, 229_642),
        ("feedback_alexnet", 3, 32, 3_709_514),
        ("feedback_cifarnet", 3, 32, 11_840_010),
    ],
)
def test_the_papers_networks_have_their_number_of_parameters(name, in_chans, size, parameters):
    snn = create_snn(name, 10, 1, in_chans, algorithm="ide").eval()
    assert sum(parameter.numel() for parameter in snn.parameters()) == parameters
    assert snn(torch.randn(1, in_chans, size, size)).shape == (1, 10)
    assert snn.spec["feedback"]["bound"] == 1.0 and snn.loop.threshold == 2.0 and snn.loop.leak == 1.0
    maps = snn(torch.randn(1, in_chans, size, size), until="loop")
    assert maps.shape[2:] == snn.avg_pool(maps).shape[2:], "on the papers' images the pool does nothing"


def test_every_layer_of_a_fresh_network_without_norms_fires_and_learns():
    torch.manual_seed(0)
    snn = create_snn("feedback_alexnet", 10, 10, algorithm="spide", width=24).train()
    measured = []
    real = snn.loop._averages
    snn.loop._averages = lambda currents: measured.extend(real(currents)) or list(measured)
    F.cross_entropy(snn(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert all(0.05 < float(average.mean()) < 0.4 for average in measured), [float(a.mean()) for a in measured]
    assert all(float(current.linear.weight.grad.norm()) > 0 for current in snn.loop.maps)


def test_all_are_listed():
    assert set(FEEDBACK_NETWORKS) == {"feedback_convnet", "feedback_alexnet", "feedback_cifarnet"} <= set(list_snns())


@pytest.mark.parametrize("name", FEEDBACK_NETWORKS)
@pytest.mark.parametrize("algorithm", FEEDBACK_ALGORITHMS)
@pytest.mark.parametrize("neuron", [None, LIF], ids=["IF", "LIF"])
def test_all_ways_to_run_one_give_the_same_logits(name, algorithm, neuron):
    snn = small(name, algorithm, neuron).eval()
    for x in (torch.randn(2, 3, 16, 16).double(), torch.randn(5, 2, 3, 16, 16).double()):
        whole = snn(x)
        each = snn(x, per_step=True)
        torch.testing.assert_close(each.mean(0), whole, rtol=1e-12, atol=1e-12)
        assert not torch.equal(each[0], each[-1])
        for number, so_far in enumerate(snn.steps(x), 1):
            torch.testing.assert_close(so_far, each[:number].mean(0), rtol=1e-12, atol=1e-12)
        if x.ndim == 4:
            torch.testing.assert_close(step_by_step(snn, x, 5), whole, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(step_by_step(snn, x, 5), whole, rtol=1e-12, atol=1e-12)  # reset_net
        assert torch.equal(snn(x), whole)


@pytest.mark.parametrize("algorithm", FEEDBACK_ALGORITHMS)
@pytest.mark.parametrize("neuron", [None, LIF], ids=["IF", "LIF"])
def test_training_sees_the_logits_of_inference(algorithm, neuron):
    snn = small("feedback_alexnet", algorithm, neuron, dropout=0.0).eval()
    x = torch.randn(5, 2, 3, 16, 16).double()
    wanted = snn(x)
    snn.training = True  # the pass of training, norms and dropout as in evaluation
    logits = snn(x)
    torch.testing.assert_close(logits, wanted, rtol=1e-12, atol=1e-12)
    F.cross_entropy(logits, torch.tensor([0, 3])).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in snn.parameters())
    assert snn.loop.solver_report is not None and (snn.loop.backward_rates is None) == (algorithm == "ide")


@pytest.mark.parametrize("algorithm", FEEDBACK_ALGORITHMS)
def test_few_images_are_learned_by_heart(algorithm):
    torch.manual_seed(0)
    x, labels = torch.randn(8, 1, 16, 16), torch.arange(8) % 4
    config = FeedbackConfig(readout_side=4, dropout=0.0, backward_timesteps=40)
    snn = create_snn("feedback_convnet", 4, 10, 1, algorithm=algorithm, width=16, feedback=config).train()
    optimizer = torch.optim.SGD(snn.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        loss = F.cross_entropy(snn(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert (snn.eval()(x).argmax(1) == labels).all()


@pytest.mark.parametrize("algorithm", FEEDBACK_ALGORITHMS)
def test_a_saved_network_comes_back(algorithm, tmp_path):
    snn = small("feedback_alexnet", algorithm, LIF, solver="broyden", backward_timesteps=7).eval()
    save_snn(snn, tmp_path)
    loaded = load_snn(tmp_path)
    x = torch.randn(2, 3, 16, 16).double()
    assert torch.equal(loaded(x), snn(x))
    assert loaded.loop.config == snn.loop.config and loaded.algorithm == loaded.loop.algorithm == algorithm


def test_a_file_holds_the_loop_as_it_runs_whatever_trains_it_later(tmp_path):
    """The start of the membranes belongs to the network: spide's neurons stay when ide goes on."""
    snn = small("feedback_convnet", "spide").eval()
    set_algorithm(snn, "ide")
    save_snn(snn, tmp_path)
    loaded = load_snn(tmp_path)
    x = torch.randn(2, 3, 16, 16).double()
    assert loaded.loop.config.head_start == 0.5 and loaded.loop.algorithm == "ide"
    assert torch.equal(loaded(x), snn(x))


def test_a_file_without_settings_of_a_loop_is_read(tmp_path):
    snn = create_snn("resnet18_cifar", width=8)
    assert "feedback" not in check_saveable(snn)
    feedback = small("feedback_convnet")
    save_snn(feedback, tmp_path)
    spec = json.loads((tmp_path / "config.json").read_text())
    assert FeedbackConfig(**spec["feedback"]) == feedback.loop.config
    assert NeuronConfig(**spec["neuron"]) == FEEDBACK_NEURON


@pytest.mark.parametrize("algorithm", ["rate_m", "bptt", "dsr", "ottt"])
def test_a_feedback_network_takes_no_other_algorithm(algorithm):
    message = r"feedback.*algorithm must be one of \('ide', 'spide'\), found " + f"'{algorithm}'"
    with pytest.raises(ValueError, match=message):
        create_snn("feedback_convnet", algorithm=algorithm)
    if algorithm != "dsr":  # which has a message of its own
        with pytest.raises(ValueError, match="has a " + message):
            set_algorithm(create_snn("feedback_convnet", algorithm="ide", width=8), algorithm)


@pytest.mark.parametrize("algorithm", FEEDBACK_ALGORITHMS)
def test_other_networks_take_no_algorithm_of_feedback(algorithm):
    with pytest.raises(
        ValueError, match=r"no feedback loop: algorithm must be one of \('rate_m', .*found '" + algorithm
    ):
        create_snn("resnet18_cifar", width=8, algorithm=algorithm)
    with pytest.raises(ValueError, match=f"{algorithm} trains the networks of models.list_snns"):
        set_algorithm(spiking_twin(create_ann("resnet18", 4, kwargs={"channels": [8] * 4}), 2), algorithm)


def test_checkpointing_and_per_step_training_are_refused():
    snn = small("feedback_convnet")
    with pytest.raises(ValueError, match=r"gradient checkpointing goes with one of .*found 'ide'"):
        snn.set_grad_checkpointing()
    with pytest.raises(ValueError, match="ide has no gradient of each step's logits"):
        snn(torch.randn(2, 3, 16, 16).double(), per_step=True)


def test_until_gives_the_rate_of_the_loop_with_its_graph():
    snn = small("feedback_convnet")
    maps = snn(torch.randn(2, 3, 16, 16).double(), until="loop")
    maps.sum().backward()
    assert maps.shape == (2, 8, 8, 8) and snn.loop.input_map.linear.weight.grad.abs().sum() > 0


def test_autocast_leaves_averages_and_gradients_in_full_precision():
    snn = small("feedback_alexnet", dropout=0.0).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = snn(torch.randn(2, 3, 16, 16))
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in snn.parameters())


def test_a_transposed_convolution_has_the_rate_rule_of_a_linear_map():
    conv = torch.nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2).double()
    stream = (torch.rand(3, 2, 8, 4, 4) > 0.5).double()
    rate = stream.mean(0).requires_grad_()
    weights = torch.randn(2, 4, 8, 8).double()
    wanted = torch.autograd.grad((conv(rate) * weights).sum(), [rate, *conv.parameters()])
    leaf = stream.requires_grad_()
    train = conv(SpikeTrain.from_stream(leaf, "rate"))
    torch.testing.assert_close(train.rate, conv(rate))
    torch.testing.assert_close(train.stream[1], conv(stream[1]))
    found = torch.autograd.grad((train.rate * weights).sum(), [leaf, *conv.parameters()])
    torch.testing.assert_close(found[0].sum(0), wanted[0])
    torch.testing.assert_close(found[1:], wanted[1:])


def test_the_resolved_settings_are_those_of_the_papers():
    ide, spide = (FeedbackConfig().resolved(algorithm) for algorithm in FEEDBACK_ALGORITHMS)
    assert dataclasses.asdict(ide).items() >= {
        "bounded_norm": "spectral", "bound": 1.0, "batch_norm": True, "head_start": 0.0
    }.items()  # fmt: skip
    assert dataclasses.asdict(spide).items() >= {
        "bounded_norm": "frobenius", "bound": 2.0, "batch_norm": False, "head_start": 0.5
    }.items()  # fmt: skip
    assert FeedbackConfig(bound=0.3).resolved("spide").bound == 0.3


def test_until_goes_to_the_loop_and_not_into_it():
    snn, x = small("feedback_convnet").eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        rate = snn(x, until="loop")
        torch.testing.assert_close(snn.classifier(snn.avg_pool(rate).flatten(1)), snn(x))
        with pytest.raises(ValueError, match=r"'loop.neurons.0' is inside of a feedback loop, which runs step by step"):
            snn(x, until="loop.neurons.0")
