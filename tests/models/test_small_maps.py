"""Convolutions of small maps as products: the numbers of PyTorch's own, and where they are taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from models import small_maps
from models.spiketrain import SpikeTrain

NHWC = torch.channels_last
CASES = {
    "3x3": dict(kernel=(3, 3), stride=[1, 1], padding=[1, 1]),
    "strided": dict(kernel=(3, 3), stride=[2, 2], padding=[1, 1]),
    "nothing padded": dict(kernel=(2, 2), stride=[1, 1], padding=[0, 0]),
    "lopsided": dict(kernel=(3, 2), stride=[2, 1], padding=[0, 1]),
    "a padding that no pixel sees whole": dict(kernel=(5, 5), stride=[3, 3], padding=[2, 2]),
}


@pytest.fixture
def taken(monkeypatch):
    """Columns are made of so many images at a time; also in forward passes of the larger ones of small maps."""
    monkeypatch.setattr(small_maps, "PIXELS_FORWARD", 20)
    made, columns = [], small_maps._columns
    monkeypatch.setattr(small_maps, "_columns", lambda x, *rest: made.append(len(x)) or columns(x, *rest))
    return made


def case(kernel, stride, padding, images=5):
    x = torch.randn(images, 3, 5, 4, dtype=torch.float64).to(memory_format=NHWC).requires_grad_()
    weight = torch.randn(2, 3, *kernel, dtype=torch.float64).to(memory_format=NHWC).requires_grad_()
    return x, weight, torch.randn(2, dtype=torch.float64, requires_grad=True), stride, padding


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CASES)
def test_a_product_is_the_convolution_with_its_gradients(name, bias, taken, monkeypatch):
    x, weight, shift, stride, padding = case(**CASES[name])
    pixels = F.conv2d(x, weight, None, stride, padding)[0, 0].numel()
    monkeypatch.setattr(small_maps, "ROWS", 2 * pixels + 1)  # two images at a time, and one that is left
    shift = shift if bias else None
    inputs = [v for v in (x, weight, shift) if v is not None]
    found = small_maps._Convolution.apply(x, weight, shift, stride, padding)
    wanted = F.conv2d(x, weight, shift, stride, padding)
    grad = torch.randn_like(wanted)
    assert taken == [2, 2, 1]
    monkeypatch.setattr(small_maps, "_is_small", lambda *arguments: True)
    monkeypatch.setattr(small_maps, "PAIRS", 0)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    pairs = zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True)
    for of_product, of_convolution in pairs:
        torch.testing.assert_close(of_product, of_convolution, rtol=1e-12, atol=1e-12)
    assert taken == [2, 2, 1] + [5] * weight.shape[2]  # the gradient of the weight goes a row of kernels at a time


@torch.no_grad()
def test_of_float64_the_gradient_of_the_input_is_summed_in_float64():
    x, weight, _, stride, padding = case(**CASES["3x3"])
    grad = torch.randn(5, 2, 5, 4, dtype=torch.float64)
    wanted = torch.nn.grad.conv2d_input(x.shape, weight, grad, stride, padding)
    found = small_maps._input_gradient(grad, x, weight, stride, padding)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_are_as_near_to_float64_as_convolutions_are(dtype):
    channels = 384
    x, grad = (torch.randn(3, channels, 4, 4).to(dtype).to(memory_format=NHWC) for _ in range(2))
    weight = torch.randn(channels, channels, 3, 3).to(dtype).to(memory_format=NHWC)
    geometry = ([1, 1], [1, 1], [1, 1])

    def errors(convolve, backward, *numbers):
        of_grad, of_x, of_weight = numbers
        gradients = backward(of_grad, of_x, of_weight, [channels], *geometry, False, [0, 0], 1, [True, True, True])
        return [convolve(of_x, of_weight, None, *geometry, 1), *gradients]

    exact = errors(F.conv2d, torch.ops.aten.convolution_backward, *(v.double() for v in (grad, x, weight)))
    own = errors(F.conv2d, torch.ops.aten.convolution_backward, grad, x, weight)
    ours = errors(small_maps.convolve, small_maps.convolution_backward, grad, x, weight)
    for wanted, theirs, found in zip(exact, own, ours, strict=True):
        assert found.dtype == dtype and found.shape == theirs.shape
        assert found.is_contiguous(memory_format=NHWC) if found.ndim == 4 else True
        distance, given = ((v.double() - wanted).norm() / wanted.norm() for v in (found, theirs))
        assert distance < max(1.6 * given, 1e-6)


def maps(size=4, channels=384, images=2, dtype=torch.float32, memory_format=NHWC):
    return torch.randn(images, channels, size, size).to(dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("x", "weight", "geometry", "groups", "small"),
    [
        (maps(), (384, 384, 3, 3), ([1, 1], [1, 1], [1, 1]), 1, True),
        (maps(dtype=torch.bfloat16), (384, 384, 3, 3), ([1, 1], [1, 1], [1, 1]), 1, True),
        (maps(8), (384, 384, 3, 3), ([2, 2], [1, 1], [1, 1]), 1, True),
        (maps(8), (384, 384, 3, 3), ([1, 1], [1, 1], [1, 1]), 1, False),
        (maps(5), (384, 384, 3, 3), ([1, 1], [1, 1], [1, 1]), 1, False),
        (maps(channels=256), (511, 256, 3, 3), ([1, 1], [1, 1], [1, 1]), 1, False),
        (maps(channels=256), (512, 256, 3, 3), ([1, 1], [1, 1], [1, 1]), 1, True),
        (maps(), (384, 384, 1, 1), ([1, 1], [0, 0], [1, 1]), 1, False),
        (maps(6), (384, 384, 3, 3), ([1, 1], [1, 1], [2, 2]), 1, False),
        (maps(channels=768), (768, 384, 3, 3), ([1, 1], [1, 1], [1, 1]), 2, False),
        (maps(memory_format=torch.contiguous_format), (384, 384, 3, 3), ([1, 1], [1, 1], [1, 1]), 1, False),
        (maps(dtype=torch.float64), (384, 384, 3, 3), ([1, 1], [1, 1], [1, 1]), 1, False),
        (maps(images=0), (384, 384, 3, 3), ([1, 1], [1, 1], [1, 1]), 1, False),
    ],
)
def test_only_what_is_faster_is_a_product(x, weight, geometry, groups, small, taken):
    with torch.no_grad():
        small_maps.convolve(x, torch.randn(weight).to(x.dtype), None, *geometry, groups)
    assert bool(taken) == small


@pytest.mark.parametrize(("size", "forward"), [(2, [2]), (3, [])])
@pytest.mark.parametrize("graph", [True, False])
def test_a_forward_pass_is_a_product_for_the_smallest_maps_alone(size, forward, graph, taken, monkeypatch):
    monkeypatch.undo()
    made, columns = [], small_maps._columns
    monkeypatch.setattr(small_maps, "_columns", lambda x, *rest: made.append(len(x)) or columns(x, *rest))
    x, weight = maps(size), torch.randn(384, 384, 3, 3, requires_grad=graph)
    y = small_maps.convolve(x, weight, None, [1, 1], [1, 1], [1, 1], 1)
    assert made == forward and y.requires_grad == graph
    torch.testing.assert_close(y, F.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-3)
    if graph:
        y.sum().backward()
        assert made == [*forward, 2, 2, 2]
    elif not forward:  # nor is the weight cast by us, of which autocast keeps a copy of its own
        monkeypatch.setattr(small_maps, "_Convolution", None)
        small_maps.convolve(x, weight, None, [1, 1], [1, 1], [1, 1], 1)


@pytest.mark.parametrize(
    ("stride", "padding", "weight_dtype", "bias_dtype", "autocast"),
    [
        ([0, 1], [1, 1], torch.float32, torch.float32, False),
        ([1, 1], [-1, 1], torch.float32, torch.float32, False),
        ([1, 1], [1, 1], torch.float64, torch.float32, False),
        ([1, 1], [1, 1], torch.float32, torch.bfloat16, False),
        ([1, 1], [1, 1], torch.float64, torch.float64, True),
    ],
)
def test_what_pytorch_refuses_is_refused(stride, padding, weight_dtype, bias_dtype, autocast):
    weight, bias = torch.randn(384, 384, 3, 3, dtype=weight_dtype), torch.randn(384, dtype=bias_dtype)
    arguments = (maps(), weight, bias, stride, padding, [1, 1], 1)
    said = []
    for function in (F.conv2d, small_maps.convolve):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), pytest.raises(RuntimeError) as refused:
            function(*arguments)
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_a_kernel_larger_than_the_input_is_refused_as_pytorch_refuses_it():
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        small_maps.convolve(maps(2), torch.randn(384, 384, 5, 5), None, [1, 1], [0, 0], [1, 1], 1)


def test_gradients_of_weights_are_products_of_fewer_channels_than_the_others(taken, monkeypatch):
    monkeypatch.setattr(small_maps, "PAIRS", 2**14 + 1)
    x, weight = maps(channels=128, dtype=torch.bfloat16), torch.randn(128, 128, 3, 3).bfloat16()
    monkeypatch.setattr(small_maps, "PAIRS_OF_WEIGHT", 2**14)
    arguments = (torch.randn_like(x), x, weight, None, [1, 1], [1, 1], [1, 1])
    for needed, made in (([True, False, False], []), ([False, True, False], [2] * 3)):
        found = small_maps.convolution_backward(*arguments, False, [0, 0], 1, needed)
        wanted = torch.ops.aten.convolution_backward(*arguments, False, [0, 0], 1, needed)
        assert taken == made and [v is None for v in found] == [not n for n in needed]
        pair = [next(v for v in all_three if v is not None) for all_three in (found, wanted)]
        torch.testing.assert_close(*pair, rtol=2e-2, atol=2e-1)
    in_float32 = [v if v is None else v.float() for v in arguments[:3]]
    small_maps.convolution_backward(*in_float32, *arguments[3:], False, [0, 0], 1, [False, True, False])
    assert taken == [2] * 3  # there it takes as many channels as the others
    found = small_maps.convolution_backward(
        *arguments[:3], [128], *arguments[4:], True, [0, 0], 1, [False, True, False]
    )
    assert taken == [2] * 3 and found[1].shape == weight.shape  # of a transposed convolution it is PyTorch's own


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_gradient_of_a_weight_comes_in_the_type_that_is_asked_for(dtype, taken, monkeypatch):
    monkeypatch.setattr(small_maps, "PAIRS_OF_WEIGHT", 2**14)
    x, weight = maps(channels=128, dtype=torch.bfloat16), torch.randn(128, 128, 3, 3).bfloat16()
    arguments = (torch.randn_like(x), x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    _, found, _ = small_maps.convolution_backward(*arguments, dtype)
    _, as_it_is, _ = small_maps.convolution_backward(*arguments)
    assert taken and found.dtype == (dtype or torch.bfloat16) and torch.equal(found, as_it_is.to(found.dtype))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_beside_a_product_the_bias_needs_no_convolution(monkeypatch):
    """oneDNN would compute the gradient of the weight for it."""
    x, weight, grad = maps(), torch.randn(384, 384, 3, 3), maps()
    arguments = (grad, x, weight, [384], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True])
    *_, wanted = torch.ops.aten.convolution_backward(*arguments)
    with profile(activities=[ProfilerActivity.CPU]) as run:
        *_, found = small_maps.convolution_backward(*arguments)
    assert not any("conv" in event.key and event.key != small_maps.PROFILED_AS for event in run.key_averages())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_a_backward_pass_within_autocast_keeps_its_type():
    x, weight, grad = maps(), torch.randn(384, 384, 3, 3), maps()
    arguments = (grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
    wanted = small_maps.convolution_backward(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = small_maps.convolution_backward(*arguments)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_gradients_of_gradients_are_those_of_the_convolution():
    layer, x = nn.Conv2d(384, 384, 3, padding=1).to(memory_format=NHWC), maps(images=1).requires_grad_()

    def penalty(convolve):
        y = convolve(x, layer.weight, layer.bias, [1, 1], [1, 1], [1, 1], 1)
        (of_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(of_x.square().sum(), [layer.weight, x])

    for found, wanted in zip(penalty(small_maps.convolve), penalty(F.conv2d), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_autocast_takes_the_product_to_its_type_and_gradients_back(taken):
    x, layer = maps().requires_grad_(), nn.Conv2d(384, 384, 3, padding=1).to(memory_format=NHWC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = small_maps.convolve(x, layer.weight, layer.bias, [1, 1], [1, 1], [1, 1], 1)
    assert y.dtype == torch.bfloat16 and taken
    numbers = [v.bfloat16().float() for v in (x.detach(), layer.weight.detach(), layer.bias.detach())]
    exact = [v.requires_grad_() for v in numbers]
    wanted = F.conv2d(*exact, padding=1)
    torch.testing.assert_close(y.float(), wanted, rtol=2**-7, atol=1e-2)
    y.float().square().sum().backward()
    wanted.square().sum().backward()
    for found, given in zip((x, layer.weight, layer.bias), exact, strict=True):
        assert found.grad.dtype == torch.float32
        assert (found.grad - given.grad).norm() < 0.01 * given.grad.norm()


@pytest.mark.parametrize(("kind", "products"), [("rate", [6, 2, 2, 2]), ("graph", [6] * 4), ("plain", [6])])
def test_layers_on_spike_trains_take_them(kind, products, taken):
    layer = nn.Conv2d(384, 384, 3, padding=1, bias=False).to(memory_format=NHWC)
    stream = maps(images=6).round().unflatten(0, (3, 2))
    y = layer(SpikeTrain.from_stream(stream, kind))
    torch.testing.assert_close(y.folded, nn.functional.conv2d(stream.flatten(0, 1), layer.weight, padding=1))
    if kind != "plain":
        (y.rate if kind == "rate" else y.folded).square().sum().backward()
        again = nn.functional.conv2d(stream.flatten(0, 1), layer.weight, padding=1)
        of_loss = again.unflatten(0, (3, 2)).mean(0) if kind == "rate" else again
        (wanted,) = torch.autograd.grad(of_loss.square().sum(), layer.weight)
        torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-3, atol=1e-2)
    assert taken == products


def test_a_layer_with_a_bias_under_autocast_has_the_gradients_of_its_convolution(taken):
    layer = nn.Conv2d(384, 384, 3, padding=1).to(memory_format=NHWC)
    stream = maps(images=6).round().unflatten(0, (3, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rate = layer(SpikeTrain.from_stream(stream, "rate")).rate
    rate.float().square().sum().backward()
    assert taken == [6, 2, 2, 2]
    mean = F.conv2d(stream.mean(0), layer.weight, layer.bias, padding=1)
    wanted = torch.autograd.grad(mean.square().sum(), [layer.weight, layer.bias])
    for found, exact in zip((layer.weight.grad, layer.bias.grad), wanted, strict=True):
        assert (found - exact).norm() < 0.01 * exact.norm()


def test_an_exported_layer_is_a_convolution(taken, monkeypatch):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(384, 384, 3, 3))

        def forward(self, x):
            return small_maps.convolve(x, self.weight, None, [1, 1], [1, 1], [1, 1], 1)

    layer = Layer()
    for strict in (True, False):
        graph = torch.export.export(layer, (maps(),), strict=strict).graph
        assert any("conv2d" in str(node.target) for node in graph.nodes)
    assert not taken
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    layer(maps())
    assert not taken
