"""The fused backward pass of pending batch norms: compiled, as written, and as autograd finds it."""

import pytest
import torch
import torch.nn.functional as F
from compiler import skip_without_compiler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import NeuronConfig, SpikeTrain, SpikingNeuron, compile_kernels
from models.compiling import is_compiling
from models.norm_backward import norms_backward
from models.normalization import Norm

B, C = 6, 4
PIXELS = {"contiguous": (3, 5), "channels_last": (3, 5), "vectors": (), "sequences": (7,)}

TERMS = {  # of the batch, with weight and bias; None is an addend without a norm
    "one norm": [(True, True)],
    "two norms": [(True, True), (True, True)],
    "a norm and a plain addend": [(True, True), None],
    "plain addends around it": [None, (True, True), None],
    "no weight": [(True, False)],
    "in evaluation mode": [(False, True)],
    "one of each": [(False, False), (True, True), None],
}


@pytest.fixture(autouse=True)
def _uncompiled_again():
    yield
    compile_kernels(False)


def compiled(caplog, function):
    compile_kernels(True)
    result = function()
    skip_without_compiler(caplog)
    assert is_compiling()
    compile_kernels(False)
    return result


def inputs(terms, memory, dtype=torch.float64):
    def tensor(scale=1.0):
        x = (scale * torch.randn(B, C, *PIXELS[memory], dtype=torch.float64) + 0.3).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if memory == "channels_last" else x

    norms, rates, weights, biases = [], [], [], []
    for term in terms:
        norm = rate = weight = bias = None
        if term is not None:
            of_batch, affine = term
            rate = tensor(2.0)
            wide = torch.promote_types(dtype, torch.float32)
            # not the statistics of the rate: those of a stream are others
            mean, invstd = torch.randn(C, dtype=wide), torch.rand(C, dtype=wide) + 0.5
            weight, bias = (nn.Parameter(torch.randn(C, dtype=wide)) if affine else None for _ in range(2))
            norm = Norm(mean, invstd, weight, bias, of_batch)
        norms.append(norm)
        rates.append(rate)
        weights.append(weight)
        biases.append(bias)
    needs = [(True, w is not None, b is not None) for w, b in zip(weights, biases, strict=True)]
    return tensor(), tensor().abs(), norms, rates, weights, needs


def by_hand(grad, kappa, norms, rates, weights):
    """The equations in the module's text, term by term; sums over all axes but the channels'."""
    g = grad * kappa
    axes = [axis for axis in range(g.ndim) if axis != 1]
    grads, count = [], g.numel() // g.shape[1]
    for norm, x, weight in zip(norms, rates, weights, strict=True):
        if norm is None:
            grads += [g, None, None]
            continue
        mu, invstd, w = (
            v.detach().view(1, -1, *[1] * (g.ndim - 2)) if v is not None else 1.0
            for v in (norm.mean, norm.invstd, weight)
        )
        deviation = x - mu
        product = (g * deviation).sum(axes, keepdim=True)
        bracket = (g.sum(axes, keepdim=True) + deviation * invstd**2 * product) / count if norm.of_batch else 0
        affine = weight is not None
        grads += [
            w * invstd * (g - bracket),
            (invstd * product).flatten() if affine else None,
            g.sum(axes) if affine else None,
        ]
    return grads


@pytest.mark.parametrize("memory", PIXELS)
@pytest.mark.parametrize("terms", TERMS.values(), ids=list(TERMS))
def test_as_written_it_is_the_equations(terms, memory):
    grad, kappa, norms, rates, weights, needs = inputs(terms, memory)
    written = norms_backward(grad, kappa, norms, rates, weights, needs)
    assert_same(written, by_hand(grad, kappa, norms, rates, weights))


@pytest.mark.parametrize("memory", PIXELS)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)], ids=["all", "rate alone"])
def test_constant_statistics_are_those_of_batch_norm_in_evaluation(needs, memory):
    grad, _, (norm,), (rate,), (weight,), _ = inputs(TERMS["in evaluation mode"], memory)
    leaves = [rate.requires_grad_(), norm.weight, norm.bias]
    normed = F.batch_norm(rate, norm.mean, norm.invstd.pow(-2), norm.weight, norm.bias, training=False, eps=0.0)
    wanted = torch.autograd.grad(normed, leaves, grad)
    found = norm.backward(grad, rate.detach(), weight, needs)
    assert_same(found, [gradient if need else None for gradient, need in zip(wanted, needs, strict=True)])


@pytest.mark.parametrize("of_batch", [True, False])
def test_kernels_are_given_the_saved_statistics_which_cuda_asks_for(of_batch):
    grad, _, (norm,), (rate,), (weight,), (needs,) = inputs([(of_batch, True)], "channels_last")
    with Recorded() as recorded:
        norm.backward(grad, rate, weight, needs)
    ((_, _, _, running_mean, running_var, save_mean, save_invstd),) = recorded.arguments
    assert save_mean is norm.mean and save_invstd is norm.invstd
    assert (running_mean is None) == (running_var is None) == of_batch


class Recorded(TorchDispatchMode):
    """What `native_batch_norm_backward` is called with: the tensors."""

    def __init__(self):
        super().__init__()
        self.arguments = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.native_batch_norm_backward.default:
            self.arguments.append(args[:7])
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize(
    ("names", "memory"),
    [(list(TERMS), "channels_last"), (["one norm", "one of each"], "contiguous"), (["two norms"], "vectors")],
    ids=["channels_last", "contiguous", "vectors"],
)
def test_compiled_it_is_what_is_written(names, memory, caplog):
    for name in names:
        grad, kappa, norms, rates, weights, needs = inputs(TERMS[name], memory)
        written = norms_backward(grad, kappa, norms, rates, weights, needs)
        fused = compiled(caplog, lambda: norms_backward(grad, kappa, norms, rates, weights, needs))  # noqa: B023
        assert_same(fused, written)
        for one, other in zip(fused, written, strict=True):
            assert one is None or one.dim() != 4 or memory != "channels_last" or one.stride() == other.stride()


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore")
def test_a_gradient_of_another_memory_format_is_brought_into_kappas(caplog):
    """A max pool or an expanded mean behind the neuron gives gradients laid out otherwise."""
    _, kappa, norms, rates, weights, needs = inputs(TERMS["a norm and a plain addend"], "channels_last")
    contiguous = torch.randn(B, C, *PIXELS["contiguous"], dtype=torch.float64)
    expanded = torch.randn(B, C, 1, 1, dtype=torch.float64).expand(B, C, 3, 5)
    for grad in (contiguous, expanded):
        rates = [rate if rate is None else rate.contiguous() for rate in rates]
        fused = compiled(caplog, lambda: norms_backward(grad, kappa, norms, rates, weights, needs))  # noqa: B023
        assert_same(fused, by_hand(grad, kappa, norms, rates, weights))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "input"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen, caplog):
    def gradients():
        torch.manual_seed(1)
        norm, spike = nn.BatchNorm2d(C).double(), SpikingNeuron(NeuronConfig(leak=0.5))
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        stream = torch.randn(3, B, C, 3, 5, dtype=torch.float64).requires_grad_(frozen != "input")
        norm.weight.requires_grad_(frozen not in ("weight", "both"))
        norm.bias.requires_grad_(frozen not in ("bias", "both"))
        rate = spike(norm(SpikeTrain.from_stream(stream, "rate"))).rate
        (rate * torch.linspace(-1, 2, rate.numel(), dtype=rate.dtype).view_as(rate)).sum().backward()
        return [stream.grad, norm.weight.grad, norm.bias.grad]

    written, fused = gradients(), compiled(caplog, gradients)
    absent = {"weight": [1], "bias": [2], "both": [1, 2], "input": [0]}[frozen]
    for i, (one, other) in enumerate(zip(fused, written, strict=True)):
        assert (one is None) == (other is None) == (i in absent)
        if one is not None:
            assert other.norm() > 1e-3
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore")
def test_in_bfloat16_sums_are_at_least_float32(caplog):
    """kappa and the gradient are 1 and x - mu is 1: the weight's gradient counts 3000 numbers, bfloat16 cannot."""
    ones = torch.ones(200, 1, 3, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = nn.Parameter(torch.ones(1))
    norm = Norm(torch.zeros(1), torch.ones(1), weight, nn.Parameter(torch.zeros(1)), of_batch=False)
    results = compiled(caplog, lambda: norms_backward(ones, ones, [norm], [ones], [weight], [(True, True, True)]))
    rate, slope, shift = results
    assert rate.dtype == torch.bfloat16 and slope.dtype == shift.dtype == torch.float32
    assert slope.item() == shift.item() == 3000
