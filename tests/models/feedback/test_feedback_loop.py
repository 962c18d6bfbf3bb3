"""What a feedback loop computes step by step, in float64: the equations, written out, and the equilibrium."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_loops import IF, LIF, equilibrium, images, rate, toy_loop

from models import NeuronConfig, NonContractingLoopError, SpikeTrain, UnsupportedOperationError
from models.dsr import DSRConfig, DSRNeuron
from models.feedback import AverageNorm, Current, FeedbackConfig, FeedbackLoop
from models.feedback.averages import Readout, RunningAverage, average_over_steps
from models.feedback.bound import keep_below, matrix_norm
from models.feedback.loop import LoopState
from models.feedback.maps import PassDropout


def by_hand(loop, frames, fires_at, removes, start):
    """The spikes of each layer at each step, (T, B, C, ...), from the equations of the papers.

    Args:
        fires_at, removes, start: V_th, V_th - u_rest and the membrane before the first step.
    """
    back, layers = loop.feedback.linear, 1 + len(loop.maps)
    u, s, spikes = [start] * layers, [None] * layers, []
    for t, frame in enumerate(frames):
        for i in range(layers):
            if i == 0:
                conv = loop.input_map.linear
                current = F.conv2d(frame, conv.weight, conv.bias, conv.stride, conv.padding)
                if t and isinstance(back, nn.ConvTranspose2d):
                    current = current + F.conv_transpose2d(s[-1], back.weight, None, back.stride, 1, 1)
                elif t:
                    current = current + F.conv2d(s[-1], back.weight, None, 1, 1)
            else:
                conv = loop.maps[i - 1].linear
                current = F.conv2d(s[i - 1], conv.weight, conv.bias, conv.stride, conv.padding)
            u[i] = (loop.leak * u[i] if t else u[i]) + current
            s[i] = (u[i] >= fires_at).double()
            u[i] = u[i] - removes * s[i]
        spikes.append(list(s))
    return [torch.stack(of_layer) for of_layer in zip(*spikes, strict=True)]


@pytest.fixture(autouse=True)
def _no_graph_in_here():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("neuron", [IF, LIF], ids=["IF", "LIF"])
def test_spikes_are_those_of_the_papers_equations(neuron, layers):
    loop, frames = toy_loop(layers, neuron), torch.randn(9, 2, 3, 8, 8, dtype=torch.float64)
    wanted = by_hand(loop, frames, fires_at=2.0, removes=2.0, start=0.0)
    for found, expected in zip(simulated(loop, frames), wanted, strict=True):
        assert 0.02 < float(expected.mean()) < 0.98
        assert torch.equal(found, expected)


def simulated(loop, frames):
    """The spikes of each layer at each step, (T, B, C, ...), as the loop computes them."""
    steps = loop._simulated(loop.input_map(SpikeTrain.from_stream(frames, "plain")), LoopState())
    return [
        torch.stack(of_layer) for of_layer in zip(*([layer.folded for layer in step] for step in steps), strict=True)
    ]


@pytest.mark.parametrize("neuron", [IF, LIF], ids=["IF", "LIF"])
def test_half_a_threshold_at_the_start_makes_spides_neurons(neuron):
    """V_th = 1 and u_rest = -1: fires at 1, a spike removes 2, the membrane starts at 0."""
    loop, frames = toy_loop(3, neuron, head_start=0.5), torch.randn(9, 2, 3, 8, 8, dtype=torch.float64)
    wanted = by_hand(loop, frames, fires_at=1.0, removes=2.0, start=0.0)
    for found, expected in zip(simulated(loop, frames), wanted, strict=True):
        assert 0.02 < float(expected.mean()) < 0.98
        assert torch.equal(found, expected)
    ordinary = by_hand(loop, frames, fires_at=2.0, removes=2.0, start=0.0)
    assert not all(torch.equal(a, b) for a, b in zip(wanted, ordinary, strict=True))


@pytest.mark.parametrize("head_start", [0.0, 0.5])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_average_rates_approach_the_equilibrium_as_one_over_the_steps(layers, head_start):
    loop, x = toy_loop(layers, head_start=head_start), images()
    settled = equilibrium(loop, x)
    steps = [32, 64, 128, 256, 512, 1024]
    errors = []
    for timesteps in steps:
        averages = loop._averages(loop.input_map(SpikeTrain.constant(x, timesteps, "rate")))
        errors.append([float((a - b).abs().max()) for a, b in zip(averages, settled, strict=True)])
    assert all(error * timesteps < 4 for row, timesteps in zip(errors, steps, strict=True) for error in row), errors
    logs = torch.tensor(steps).double().log2()
    logs -= logs.mean()
    for column in torch.tensor(errors).double().T:
        assert -1.25 < float((logs * column.log2()).sum() / logs.square().sum()) < -0.8, errors


def test_weighted_averages_by_hand():
    """Spikes 1, 0, 1 under a leak of 1/2: (1/4 + 0 + 1) / (1/4 + 1/2 + 1) = 5/7."""
    average, spikes = RunningAverage(0.5), torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    so_far = []
    for s in spikes:
        average.add(s)
        so_far.append(float(average.value))
    assert so_far == pytest.approx([1, 1 / 3, 5 / 7])
    assert float(average_over_steps(spikes, 3, 0.5)) == pytest.approx(5 / 7)
    assert float(average_over_steps(spikes, 3, 1.0)) == pytest.approx(2 / 3)
    readout = Readout(0.5)
    given = [float(readout.next(s)) for s in spikes]  # A_1 = 1, 2 A_2 - A_1, 3 A_3 - 2 A_2
    assert given == pytest.approx([1, -1 / 3, 31 / 21])
    assert [sum(given[:k]) / k for k in (1, 2, 3)] == pytest.approx(so_far)


def test_leaky_averages_approach_their_equilibrium():
    """As the leak goes to 1, and long after the start: the membrane's share of the weighted average vanishes."""
    x, errors = images(), []
    for leak in (0.9, 0.99):
        torch.manual_seed(1)
        loop = toy_loop(2, NeuronConfig(leak=leak, threshold=2.0))
        found = rate(loop, x, timesteps=600)
        errors.append(float((found - equilibrium(loop, x)[-1]).abs().max()))
    assert errors[0] < 0.5 and errors[1] < 0.06, errors


@pytest.mark.parametrize("neuron", [IF, LIF], ids=["IF", "LIF"])
def test_the_rate_is_the_mean_of_the_stream_of_inference(neuron):
    loop, frames = toy_loop(3, neuron), torch.randn(9, 2, 3, 8, 8, dtype=torch.float64)
    stream = loop(SpikeTrain.from_stream(frames, "plain")).stream
    torch.testing.assert_close(rate(loop, frames), stream.mean(0), rtol=1e-12, atol=1e-12)
    if neuron is IF:
        assert torch.equal(stream, by_hand(loop, frames, 2.0, 2.0, 0.0)[-1])


def test_dropout_has_one_mask_for_all_steps_and_none_is_left():
    loop = toy_loop(2, dropout=0.5)
    for current in (loop.input_map, *loop.maps):
        current.linear.weight.zero_()
        current.linear.bias.fill_(3.0)
    loop.feedback.linear.weight.zero_()
    drawn = []
    for _ in range(2):
        layers = simulated(loop, torch.zeros(6, 2, 3, 8, 8).double())
        for spikes in layers:  # a current of 3 / (1 - p) fires at each step, one of 0 never
            assert set(spikes.sum(0).unique().tolist()) == {0.0, 6.0}
            assert 0.4 < float(spikes.mean()) < 0.6
        drawn.append(layers[1])
        loop._forget_masks()
    assert not torch.equal(*drawn)
    loop = toy_loop(2, dropout=0.5)
    rate(loop, images())
    assert all(module.mask is None for module in loop.modules() if isinstance(module, PassDropout))
    with torch.enable_grad():  # the graph knows the mask of its pass
        first, second = (torch.autograd.grad(rate(loop, images()).sum(), loop.maps[0].linear.bias) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    loop.eval()
    assert torch.equal(rate(loop, torch.ones(2, 3, 8, 8).double()), rate(loop, torch.ones(2, 3, 8, 8).double()))


@pytest.mark.parametrize("neuron", [IF, LIF], ids=["IF", "LIF"])
def test_the_norm_of_the_input_has_the_statistics_of_averages(neuron):
    loop, frames = toy_loop(2, neuron, batch_norm=True), torch.randn(6, 4, 3, 8, 8, dtype=torch.float64)
    norm, conv = loop.input_map.norm, loop.input_map.linear
    before = norm.running_mean.clone()
    weights = torch.tensor([neuron.leak**k for k in (5, 4, 3, 2, 1, 0)], dtype=torch.float64)
    average = torch.tensordot(weights / weights.sum(), frames, 1)
    y = F.conv2d(average, conv.weight, conv.bias, padding=1)
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
    currents = loop.input_map(SpikeTrain.from_stream(frames, "rate"))
    scale = (norm.weight / (var + norm.eps).sqrt())[:, None, None]
    wanted = (F.conv2d(frames.flatten(0, 1), conv.weight, conv.bias, padding=1) - mean[:, None, None]) * scale
    torch.testing.assert_close(currents.folded, wanted + norm.bias[:, None, None])
    torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * mean)


def test_norms_in_the_loop_move_once_a_pass_and_steps_see_them_as_they_were():
    loop, x = toy_loop(3, batch_norm=True), images(4)
    before = [current.norm.running_mean.clone() for current in loop.maps]
    measured = []
    real = loop._averages
    loop._averages = lambda currents: measured.extend(real(currents)) or list(measured)
    rate(loop, x)
    for current, old, average in zip(loop.maps, before, measured, strict=False):
        conv = current.linear
        mean = F.conv2d(average, conv.weight, conv.bias, conv.stride, 1).mean((0, 2, 3))
        torch.testing.assert_close(current.norm.running_mean, 0.9 * old + 0.1 * mean)
        assert current.norm.num_batches_tracked == 1
    assert loop.input_map.norm.num_batches_tracked == 1


# -- contraction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["spectral", "frobenius"])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_feedback_is_kept_below_its_bound(layers, which):
    loop = toy_loop(layers, bounded_norm=which, bound=0.7)
    weight = loop.feedback.linear.weight
    order = {"spectral": 2, "frobenius": "fro"}[which]
    direction = weight / weight.norm()
    assert float(torch.linalg.matrix_norm(weight.flatten(1), order)) > 0.7
    rate(loop, images())
    assert float(torch.linalg.matrix_norm(weight.flatten(1), order)) == pytest.approx(0.7)
    torch.testing.assert_close(weight / weight.norm(), direction)
    kept = weight.clone()
    rate(loop, images())
    assert torch.equal(weight, kept)


def test_norms_of_wide_and_of_tall_matrices():
    for shape in ((4, 3, 5, 5), (40, 2, 3, 3)):
        weight = torch.randn(shape, dtype=torch.float64)
        assert float(matrix_norm(weight, "spectral")) == pytest.approx(
            float(torch.linalg.matrix_norm(weight.flatten(1), 2))
        )
    small = torch.full((2, 2, 1, 1), 0.1)
    keep_below(small, "spectral", 1.0)
    assert torch.equal(small, torch.full((2, 2, 1, 1), 0.1)), "a weight within the bound is left alone"


@pytest.mark.parametrize("which", ["spectral", "frobenius"])
def test_under_autocast_the_bound_is_the_same(which):
    weight = torch.randn(6, 3, 5, 5)
    free, cast = weight.clone(), weight.clone()
    keep_below(free, which, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        keep_below(cast, which, 0.7)
    assert torch.equal(cast, free) and not torch.equal(free, weight)


def growing_loop(algorithm, **config):
    loop = toy_loop(1, algorithm=algorithm, backward_timesteps=20, max_iterations=30, gain=3.0, **config)
    loop.input_map.linear.bias.uniform_(0.5, 1.5)
    return loop


@pytest.mark.parametrize("how", ["fixed_point", "broyden", "spide"])
def test_a_loop_that_does_not_contract_is_reported_and_ends_training(how, caplog):
    algorithm, solver = ("spide", "fixed_point") if how == "spide" else ("ide", how)
    loop, x = growing_loop(algorithm, solver=solver, patience=3), images()
    weight, start = loop.feedback.linear.weight, loop.feedback.linear.weight.clone()

    def backward():
        weight.copy_(start)  # as if weakening it were of no use
        loop.excess.zero_()
        with torch.enable_grad():
            rate(loop, x, timesteps=30).sum().backward()

    with caplog.at_level(logging.WARNING):
        backward()
        backward()
    assert loop.solver_report.growth > 1
    assert [record.message for record in caplog.records if "does not contract" in record.message] == [
        caplog.records[0].message
    ], "one warning"
    with pytest.raises(NonContractingLoopError, match=r"multiplies the gradient by .* in 3 backward passes in a row"):
        backward()


def test_a_loop_that_does_not_contract_trains_without_it_and_is_weakened():
    loop, x = growing_loop("ide"), images()
    with torch.enable_grad():
        output = rate(loop, x, timesteps=30)
        g = torch.randn_like(output)
        output.backward(g)
    inner = (output > 0) & (output < 1)
    torch.testing.assert_close(loop.input_map.linear.bias.grad, (g * inner / 2).sum((0, 2, 3)))
    growth, weight = loop.solver_report.growth, loop.feedback.linear.weight.clone()
    assert growth > 1 and float(loop.excess) == pytest.approx(growth)
    restored = growing_loop("ide")
    restored.load_state_dict(loop.state_dict())  # a run that was stopped here goes on like one that was not
    for either in (loop, restored):
        rate(either, x, timesteps=30)
        torch.testing.assert_close(either.feedback.linear.weight, weight * (0.9 / growth))
        assert float(either.excess) == 0


def test_a_solver_that_is_stopped_early_says_so_once(caplog):
    loop, x = toy_loop(1, max_iterations=2), images()
    with caplog.at_level(logging.WARNING), torch.enable_grad():
        for _ in range(2):
            rate(loop, x).sum().backward()
    assert not loop.solver_report.converged and 0 < loop.solver_report.growth < 1
    assert [record.getMessage() for record in caplog.records] == [
        "the gradient of the feedback loop is not solved: after 2 iterations "
        f"{loop.solver_report.residual:.3g} of its norm is left (said once)"
    ]


def test_a_gradient_that_is_no_number_is_passed_on():
    loop = toy_loop(2)
    with torch.enable_grad():
        (rate(loop, images()) * float("nan")).sum().backward()
    assert loop.input_map.linear.bias.grad.isnan().all() and float(loop.excess) == 0


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("neuron", "message"),
    [
        (NeuronConfig(reset="hard"), "reset soft and a fixed leak.*reset='hard'"),
        (NeuronConfig(leak=0.5, learnable_leak=True), "reset soft and a fixed leak.*learnable_leak=True"),
    ],
)
def test_neurons_without_an_equilibrium_are_refused(neuron, message):
    with pytest.raises(ValueError, match=message):
        toy_loop(neuron=neuron)


def test_other_nodes_are_refused():
    conv = Current(nn.Conv2d(3, 8, 3), None, 0.0)
    with pytest.raises(ValueError, match="SpikingNeuron, found DSRNeuron"):
        FeedbackLoop(conv, [], conv, lambda: DSRNeuron(DSRConfig()), FeedbackConfig().resolved("ide"))


@pytest.mark.parametrize("kind", ["graph", "sltt"])
def test_other_passes_are_refused(kind):
    with pytest.raises(UnsupportedOperationError, match=f"feedback loop in a pass of kind '{kind}'.*'ide', 'spide'"):
        toy_loop()(SpikeTrain.constant(images(), 1, kind))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "newton"}, r"solver must be one of \('fixed_point', 'broyden'\), found 'newton'"),
        ({"bounded_norm": "max"}, "bounded_norm must be one of .* found 'max'"),
        ({"tolerance": 0}, "tolerance must be above 0, found 0"),
        ({"bound": -1}, "bound must be above 0, found -1"),
        ({"gradient_scale": 0.0}, "gradient_scale must be above 0"),
        ({"backward_threshold": 0.0}, "backward_threshold must be above 0"),
        ({"max_iterations": 1}, "max_iterations must be at least 2, found 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"backward_timesteps": 0}, "backward_timesteps must be at least 1"),
        ({"readout_side": 0}, "readout_side must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), found 1.0"),
        ({"head_start": -0.1}, r"head_start must be in \[0, 1\), found -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FeedbackConfig(**settings)


def test_average_norm_of_one_value_is_refused():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        AverageNorm(3, 1.0)(SpikeTrain.constant(torch.randn(1, 3, 1, 1), 4, "rate"))
