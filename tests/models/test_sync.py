"""The pieces of synchronised batch norm, in one process; several are run by tests/distill/test_sync_bn.py."""

import contextlib
import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_norm_backward import PIXELS, TERMS, inputs
from timm.layers import StdConv2d
from torch import nn
from torch._dynamo.testing import CompileCounter
from toy_networks import Residual, generic, spiking

import models.sync
from models import NeuronConfig, SpikingNeuron, synchronised_batch_norm
from models.norm_backward import norms_backward
from models.ranks import active_group, moments_over_ranks, sums_over_ranks, taking_together
from models.sync import batch_norm_over_ranks


@pytest.fixture
def group(tmp_path):
    """A group of one process, over which sums are those of the process itself."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def synchronised(group):
    """What `synchronised_batch_norm` does for several processes, for one."""

    @contextlib.contextmanager
    def switch():
        with taking_together(group), models.sync._SynchronisedFunctions():
            yield

    return switch


@pytest.fixture
def collectives(monkeypatch):
    """The numbers that each collective exchanged, by its name."""
    calls = []
    for name in ("all_gather", "all_reduce"):
        real = getattr(dist, name)

        def counted(*args, real=real, name=name, **kwargs):
            calls.append((name, (args[1] if name == "all_gather" else args[0]).numel()))
            return real(*args, **kwargs)

        monkeypatch.setattr(dist, name, counted)
    return calls


def of_parts(monkeypatch, parts, **patched):
    """Collectives of this process with others that hold these parts."""
    monkeypatch.setattr(dist, "get_world_size", lambda group: len(parts))
    for name, function in patched.items():
        monkeypatch.setattr(dist, name, function)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_moments_of_unequal_parts_are_those_of_all_numbers(monkeypatch, dtype):
    """Around 3000 with a deviation of 0.1: of squares of such numbers float32 knows the ones, not the hundredths."""
    parts = [(torch.randn(n, 3, dtype=torch.float64) / 10 + 3000 + s).to(dtype) for n, s in ((5, 0), (20, 0.3), (1, 0))]
    rows = [torch.cat([p.mean(0), p.var(0, correction=0), p.new_tensor([len(p)])]) for p in parts]

    def all_gather(outputs, own, group):
        torch.testing.assert_close(own, rows[0])
        for output, row in zip(outputs, rows, strict=True):
            output.copy_(row)

    of_parts(monkeypatch, parts, all_gather=all_gather)
    mean, var, count = moments_over_ranks(parts[0].mean(0), parts[0].var(0, correction=0), 5, None)
    whole = torch.cat(parts).double()
    assert count == 26
    rtol = 1e-9 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(mean.double(), whole.mean(0), rtol=1e-12 if dtype == torch.float64 else 2e-7, atol=0)
    torch.testing.assert_close(var.double(), whole.var(0, correction=0), rtol=rtol, atol=0)


def test_sums_travel_together(monkeypatch):
    sent = []

    def all_reduce(packed, group):
        sent.append(packed.clone())
        packed.mul_(10)

    of_parts(monkeypatch, [0, 0], all_reduce=all_reduce)
    first, second = sums_over_ranks([torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])], None)
    assert [x.tolist() for x in sent] == [[1, 2, 3]]
    assert first.tolist() == [[10, 20]] and second.tolist() == [30]


def tensors(dtype, memory_format, affine):
    torch.manual_seed(0)
    x = (3 * torch.randn(4, 8, 5, 5) + 2).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    parameters = [nn.Parameter(torch.rand(8, dtype=wide) + 0.5) if affine else None for _ in range(2)]
    return x, torch.zeros(8, dtype=wide), torch.ones(8, dtype=wide), *parameters


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_of_one_process_it_is_pytorchs_batch_norm(group, dtype, affine, memory_format):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    results = []
    for function, options in ((F.batch_norm, dict(training=True)), (batch_norm_over_ranks, dict(group=group))):
        x, *buffers, weight, bias = tensors(dtype, memory_format, affine)
        y = function(x, *buffers, weight, bias, momentum=0.3, eps=1e-3, **options)
        (y * torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)).sum().backward()
        assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
        results.append([y.detach(), x.grad, *buffers, *(p.grad for p in (weight, bias) if affine)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("memory", PIXELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_of_one_process_the_sums_of_a_layer_are_its_own(group, dtype, memory):
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    grad, kappa, norms, rates, weights, needs = inputs(TERMS["one of each"], memory, dtype)
    over_ranks = [norm and dataclasses.replace(norm, group=group if norm.of_batch else None) for norm in norms]
    expected = norms_backward(grad, kappa, norms, rates, weights, needs)
    found = norms_backward(grad, kappa, over_ranks, rates, weights, needs)
    assert [x is None for x in found] == [x is None for x in expected]
    alone = [norm for norm in over_ranks if norm is not None and norm.group is not None]
    assert alone
    for i, norm in enumerate(over_ranks):
        if norm is not None:  # whose map was applied to the rate by itself
            expected += norms[i].backward(grad, rates[i], weights[i], needs[i])
            found += norm.backward(grad, rates[i], weights[i], needs[i])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is None or ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * (1 if ours is None else 3))


def test_under_autocast_statistics_stay_float32(synchronised):
    """2000 numbers of 1 and 2000 of 3: bfloat16 counts neither their sum nor their number."""
    norm = nn.BatchNorm2d(1, momentum=1.0)
    x = torch.tensor([1.0, 3.0]).repeat(2000).view(4, 1, 10, 100).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), synchronised():
        y = norm(x)
    assert y.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean, torch.tensor([2.0]))
    torch.testing.assert_close(norm.running_var, torch.tensor([4000 / 3999]))


@pytest.mark.parametrize("enabled", [True, False])
def test_one_process_and_one_that_wants_none_change_nothing(group, monkeypatch, enabled):
    monkeypatch.setattr(models.sync, "_SynchronisedFunctions", None)  # calling it fails
    if not enabled:
        monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    with synchronised_batch_norm(enabled):
        assert active_group() is None


def test_without_processes_it_changes_nothing():
    with synchronised_batch_norm():
        assert active_group() is None


def test_with_several_processes_it_ends_with_the_context(group, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    with pytest.raises(KeyError), synchronised_batch_norm():
        assert active_group() is group
        with synchronised_batch_norm(False):
            assert active_group() is group
        raise KeyError
    assert active_group() is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_norms_of_running_statistics_and_standardised_weights_exchange_nothing(
    synchronised, collectives, memory_format
):
    frozen = nn.BatchNorm2d(8).eval()
    conv = StdConv2d(8, 8, 3).to(memory_format=memory_format)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    with synchronised():
        y = conv(frozen(x))
    y.sum().backward()
    assert not collectives
    torch.testing.assert_close(y, conv(frozen(x)))


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s", "bptt"])
def test_a_norm_costs_a_collective_and_a_layer_of_neurons_one_on_the_way_back(synchronised, collectives, algorithm):
    snn = spiking(generic(Residual(NeuronConfig(leak=0.5))), 3, algorithm)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    norms = [m for m in snn.modules() if isinstance(m, nn.BatchNorm2d)]
    neurons = [m for m in snn.modules() if isinstance(m, SpikingNeuron)]
    assert (len(norms), len(neurons)) == (7, 6)
    with synchronised():
        loss = snn.train()(images).square().sum()
    assert [name for name, _ in collectives] == ["all_gather"] * 7 * (3 if algorithm == "rate_s" else 1)
    assert {numbers for _, numbers in collectives} == {2 * 6 + 1, 2 * 8 + 1}
    collectives.clear()
    loss.backward()
    assert [name for name, _ in collectives] == ["all_reduce"] * (7 if algorithm == "bptt" else 6)
    if algorithm != "bptt":
        # one of the layers sums the norms of its convolution and of its shortcut
        assert sorted(numbers for _, numbers in collectives) == [13, 13, 13, 17, 17, 25]


def test_entering_anew_compiles_nothing_anew(synchronised):
    counter = CompileCounter()
    compiled = torch.compile(lambda x: (x.sin() * 2).sum(0), backend=counter)
    for _ in range(3):
        with synchronised():
            compiled(torch.ones(3, 4))
    assert counter.frame_count == 1
