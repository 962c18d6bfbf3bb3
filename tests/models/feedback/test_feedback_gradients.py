"""The gradients of feedback loops, in float64: against autograd through the settled loop, and against one another."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from host_reads import HostReads
from toy_loops import IF, LIF, at_equilibrium, equilibrium, images, rate, toy_loop, turn

from models import FeedbackConfig, SpikeTrain, create_snn
from models.feedback import solvers
from models.feedback.linearised import LinearisedLoop, TransposedMap
from models.feedback.solvers import broyden, fixed_point
from models.feedback.spiking_solver import spiking_couples

LOOPS = [1, 2, 3]


def linearised(loop, x):
    averages = [average.detach() for average in equilibrium(loop, x)]
    return LinearisedLoop(loop.feedback, loop.maps, averages, loop.threshold)


@pytest.mark.parametrize("batch_norm", [False, True], ids=["", "batch norm"])
@pytest.mark.parametrize("layers", LOOPS)
@pytest.mark.parametrize("solver", ["fixed_point", "broyden"])
def test_ide_is_autograd_through_the_settled_loop(solver, layers, batch_norm, monkeypatch):
    loop = toy_loop(layers, batch_norm=batch_norm, solver=solver).eval()  # norms by their running statistics
    x = images().requires_grad_()
    at_equilibrium(loop, x, monkeypatch)
    weights = torch.randn_like(equilibrium(loop, x)[-1])
    inputs = [x, *loop.parameters()]
    expected = torch.autograd.grad((equilibrium(loop, x)[-1] * weights).sum(), inputs)
    found = torch.autograd.grad((rate(loop, x) * weights).sum(), inputs)
    assert loop.solver_report.converged and loop.solver_report.residual < 1e-12
    for wanted, gradient in zip(expected, found, strict=True):
        assert float((wanted - gradient).norm()) < 1e-8 * float(wanted.norm())


@pytest.mark.parametrize("layers", LOOPS)
def test_ide_is_finite_differences_of_the_equilibrium(layers, monkeypatch):
    loop = toy_loop(layers)
    x = images()
    at_equilibrium(loop, x, monkeypatch)
    weights = torch.randn_like(equilibrium(loop, x)[-1])
    (rate(loop, x) * weights).sum().backward()
    for parameter in loop.parameters():
        direction = torch.randn_like(parameter)
        direction /= direction.norm()
        ends = []
        for step in (1e-7, -1e-7):
            with torch.no_grad():
                parameter += step * direction
                ends.append(float((equilibrium(loop, x)[-1] * weights).sum()))
                parameter -= step * direction
        assert (ends[0] - ends[1]) / 2e-7 == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("layers", LOOPS)
def test_a_turn_of_the_linearised_loop_is_the_transposed_jacobian(layers):
    loop, x = toy_loop(layers, batch_norm=True, dropout=0.3), images(1)
    for current in (loop.input_map, *loop.maps, loop.feedback):
        side = 8 if layers == 1 or current in (loop.input_map, loop.feedback) else 4
        current.drop.mask = F.dropout(torch.ones(1, 8, side, side, dtype=torch.float64), 0.3)
    last = equilibrium(loop, x)[-1].detach()
    jacobian = torch.autograd.functional.jacobian(lambda a: turn(loop, a, x)[-1], last).view(last.numel(), -1)
    v = torch.randn_like(last)
    torch.testing.assert_close(linearised(loop, x).turn(v).flatten(), jacobian.t() @ v.flatten())


@pytest.mark.parametrize("solve", [fixed_point, broyden])
def test_solvers_find_the_solution_of_the_dense_system(solve):
    loop, x = toy_loop(), images(1)
    turn_back = linearised(loop, x).turn
    g = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    jt = torch.stack([turn_back(e.view_as(g)).flatten() for e in torch.eye(128, dtype=torch.float64)], dim=1)
    exact = torch.linalg.solve(torch.eye(128, dtype=torch.float64) - jt, g.flatten()).view_as(g)
    found, report = solve(turn_back, g, 1e-12, 100)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    assert report.converged and 2 < report.iterations < 100
    assert report.residual == pytest.approx(float((turn_back(found) + g - found).norm() / g.norm()), abs=1e-11)
    largest = float(torch.linalg.eigvals(jt).abs().max())
    assert report.growth == pytest.approx(largest, rel=0.15)


def test_broyden_needs_fewer_turns_where_the_loop_hardly_contracts():
    loop = toy_loop(1, gain=1.1)
    turn_back = linearised(loop, images()).turn
    g = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    turns = [solve(turn_back, g, 1e-6, 300)[1].iterations for solve in (fixed_point, broyden)]
    assert turns[1] < 0.8 * turns[0], turns


def test_broyden_ends_after_twice_as_many_turns_as_an_image_has_numbers():
    """As his method does for every linear system (Gay, 1979), whether the loop contracts or not."""
    matrices = torch.randn(2, 3, 3, dtype=torch.float64)
    g = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    beta, report = broyden(lambda v: (matrices @ v.flatten(1)[:, :, None])[..., None], g, 1e-9, 100)
    wanted = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - matrices, g.flatten(1)[:, :, None])[..., None]
    torch.testing.assert_close(beta, wanted, rtol=1e-6, atol=1e-6)
    assert report.converged and report.iterations <= 6


@pytest.mark.parametrize(("solve", "each"), [(fixed_point, 1), (broyden, 0)])  # broyden: .tolist()
def test_an_iteration_asks_for_numbers_once(solve, each, monkeypatch):
    monkeypatch.setattr(solvers, "growth_of", lambda sizes: 0.5)  # asks once for all, but on a CPU one after the other
    g = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    factors = torch.linspace(0.2, 0.7, 3, dtype=g.dtype)[:, None, None]
    with HostReads() as reads:
        _, report = solve(lambda v: factors * v, g, 1e-12, 9)
    assert report.iterations > 2 and reads.count == each * report.iterations + 1 + (solve is broyden)


def test_solvers_of_a_gradient_of_zero():
    g = torch.zeros(2, 8, 4, 4, dtype=torch.float64)
    turn_back = linearised(toy_loop(), images()).turn
    for solve in (fixed_point, broyden):
        beta, report = solve(turn_back, g, 1e-12, 100)
        assert torch.equal(beta, g) and report.converged and report.growth == 0


def test_gradients_of_half_batches_add_up_to_that_of_the_whole():
    x, labels = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.arange(4)
    for algorithm in ("ide", "spide"):
        config = FeedbackConfig(dropout=0.0, batch_norm=False, tolerance=1e-13, max_iterations=200, readout_side=4)
        snn = create_snn("feedback_convnet", 4, 4, 1, algorithm=algorithm, width=8, feedback=config).double()
        parameters = list(snn.parameters())

        def gradients(part, snn=snn, parameters=parameters):
            return torch.autograd.grad(F.cross_entropy(snn(x[part]), labels[part]), parameters)

        whole, halves = gradients(slice(4)), [gradients(slice(2)), gradients(slice(2, 4))]
        for wanted, first, second in zip(whole, *halves, strict=True):
            torch.testing.assert_close((first + second) / 2, wanted, rtol=1e-10, atol=1e-12)


# -- SPIDE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", LOOPS)
def test_spides_gradient_approaches_that_of_ide_as_one_over_the_steps(layers):
    loop, x = toy_loop(layers), images()
    linear = linearised(loop, x)
    g = 0.1 * torch.randn_like(equilibrium(loop, x)[-1])
    exact = linear.gradients(fixed_point(linear.turn, g, 1e-14, 1000)[0])
    steps = [32, 64, 128, 256, 512, 1024]
    errors = []
    for count in steps:
        betas, _ = spiking_couples(linear, g, count, 0.5, 1.0)
        errors.append([float((found - wanted).abs().max()) for found, wanted in zip(betas, exact, strict=True)])
    assert all(error * count < 4 for row, count in zip(errors, steps, strict=True) for error in row), errors
    slopes = slope_of(steps, errors)
    assert all(-1.25 < slope < -0.8 for slope in slopes), slopes


def slope_of(steps, errors):
    """The exponents with which the errors of layers, a row for each number of steps, fall."""
    logs = torch.tensor(steps, dtype=torch.float64).log2()
    logs = logs - logs.mean()
    return [float((logs * column.log2()).sum() / logs.square().sum()) for column in torch.tensor(errors).double().T]


@pytest.mark.parametrize("threshold", [0.5, 0.25])
def test_every_value_sent_backward_is_a_sign_times_the_constant(threshold, monkeypatch):
    sent, real = [], TransposedMap.__call__

    def watched(self, v):
        sent.append(v)
        return real(self, v)

    loop, x = toy_loop(3, algorithm="spide", backward_threshold=threshold, backward_timesteps=20), images()
    averages = rate(loop, x)
    monkeypatch.setattr(TransposedMap, "__call__", watched)
    betas, fired = spiking_couples(linearised(loop, x), torch.randn_like(averages), 20, threshold, 1.0)
    assert len(sent) == 3 * 20 - 1  # the last spikes of layer 1 go nowhere
    values = torch.unique(torch.cat([v.flatten() for v in sent])).tolist()
    assert values == [-2 * threshold, 0, 2 * threshold]
    of_last = torch.stack(sent[0::3])  # layer 3 comes first in each step
    assert float(fired[2]) == pytest.approx(float((of_last != 0).double().mean()))
    torch.testing.assert_close(betas[2], of_last.mean(0))


def test_spides_update_is_made_of_averages_alone():
    """Of layer i: its own backward average, masked, with the forward average before it. Nothing else is kept."""
    loop, x = toy_loop(2, algorithm="spide", backward_timesteps=25, gradient_scale=2.0), images()
    g = 0.05 * torch.randn(2, 8, 4, 4, dtype=torch.float64)
    measured = []
    real = loop._averages
    loop._averages = lambda currents: measured.extend(real(currents)) or list(measured)
    rate(loop, x, timesteps=7).backward(g)
    first, last = measured
    linear = LinearisedLoop(loop.feedback, loop.maps, measured, loop.threshold)
    betas, fired = spiking_couples(linear, g, 25, 0.5, 2.0 * len(x))
    assert torch.equal(loop.backward_rates, fired) and 0 < float(fired.min()) < 0.5
    deltas = [beta * ((a > 0) & (a < 1)) / 2 for beta, a in zip(betas, measured, strict=True)]
    conv = loop.maps[0].linear
    of_conv = torch.nn.grad.conv2d_weight(first, conv.weight.shape, deltas[1], stride=2, padding=1)
    torch.testing.assert_close(conv.weight.grad, of_conv)
    torch.testing.assert_close(conv.bias.grad, deltas[1].sum((0, 2, 3)))
    of_input = torch.nn.grad.conv2d_weight(x, (8, 3, 3, 3), deltas[0], padding=1)
    torch.testing.assert_close(loop.input_map.linear.weight.grad, of_input)
    # a transposed convolution is the transpose of one: input and output change places
    of_feedback = torch.nn.grad.conv2d_weight(deltas[0], (8, 8, 3, 3), last, stride=2, padding=1)
    torch.testing.assert_close(loop.feedback.linear.weight.grad, of_feedback)


def test_backward_spikes_that_do_not_go_around_give_the_gradient_of_a_network_without_feedback():
    loop, x = toy_loop(3), images()
    linear = linearised(loop, x)
    g = 0.1 * torch.randn(2, 8, 4, 4, dtype=torch.float64)
    betas, _ = spiking_couples(linear, g, 2000, 0.5, 1.0, around=False)
    for found, wanted in zip(betas, linear.gradients(g), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


def test_the_scale_of_the_gradient_is_divided_out():
    loop, x = toy_loop(), images()
    linear = linearised(loop, x)
    g = 1e-3 * torch.randn(2, 8, 4, 4, dtype=torch.float64)
    exact = fixed_point(linear.turn, g, 1e-14, 1000)[0]
    coarse, fine = (spiking_couples(linear, g, 100, 0.5, scale)[0][-1] for scale in (1.0, 300.0))
    assert float((fine - exact).norm()) < 0.05 * float(exact.norm())
    assert float((coarse - exact).norm()) > 0.5 * float(exact.norm()), "too small a gradient fires nothing"


# -- memory ---------------------------------------------------------------------------------------


def kept(loop, x, timesteps):
    """Bytes that a forward pass keeps for its backward pass, those of parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in loop.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = rate(loop, x, timesteps)
    return sum(found.values()), output


@pytest.mark.parametrize("neuron", [IF, LIF], ids=["IF", "LIF"])
@pytest.mark.parametrize("batch_norm", [False, True], ids=["", "batch norm"])
def test_what_training_keeps_does_not_depend_on_the_steps(neuron, batch_norm):
    loop = toy_loop(3, neuron, batch_norm=batch_norm, dropout=0.2)
    sizes = [kept(loop, images(), timesteps)[0] for timesteps in (4, 16)]
    assert sizes[0] == sizes[1] > 0


def test_the_backward_spikes_of_earlier_steps_are_gone(monkeypatch):
    sent, alive, real = [], [], TransposedMap.__call__

    def watched(self, v):
        sent.append(weakref.ref(v))
        alive.append(sum(spikes() is not None for spikes in sent))
        return real(self, v)

    monkeypatch.setattr(TransposedMap, "__call__", watched)
    spiking_couples(linearised(toy_loop(3), images()), torch.randn(2, 8, 4, 4, dtype=torch.float64), 16, 0.5, 1.0)
    assert len(alive) == 47 and max(alive) <= 2


def test_a_train_that_has_a_graph_before_the_loop_gets_its_gradient(monkeypatch):
    loop, x = toy_loop(), images()
    at_equilibrium(loop, x, monkeypatch)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    stem = SpikeTrain.constant(x, 4, "rate") * scale
    loop(stem).rate.sum().backward()
    factor = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    equilibrium(loop, x * factor)[-1].sum().backward()
    assert float(scale.grad) == pytest.approx(float(factor.grad), rel=1e-8)
