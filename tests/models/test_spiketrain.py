"""Single operations on a spike train: against the same operation on the plain stream, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import SpikeTrain, SpikingNeuron, UnsupportedOperationError
from models.rules.arithmetic import constant_like  # and the table is filled

T, B = 3, 2
KINDS = ["plain", "rate", "graph"]


def train(kind="rate", channels=4, size=6):
    """A train of T steps and the stream that it was made of, in float64."""
    stream = torch.randn(T, B, channels, size, size, dtype=torch.float64, requires_grad=kind != "plain")
    return SpikeTrain.from_stream(stream, kind), stream


SAME_ON_EACH_STEP = {
    "add a number": lambda x: x + 0.1,
    "add a number to it": lambda x: 0.1 + x,
    "subtract": lambda x: x - 0.7,
    "subtract from": lambda x: 0.7 - x,
    "torch.rsub": lambda x: torch.rsub(x, 0.7),
    "Tensor.__rsub__": lambda x: torch.Tensor.__rsub__(x, 0.7),
    "scale": lambda x: x * 0.1,
    "scale it": lambda x: 0.1 * x,
    "divide": lambda x: x / 3,
    "negative": lambda x: -x,
    "torch.neg": lambda x: torch.neg(x),
    "divide by a tensor": lambda x: x / torch.arange(1, 5, dtype=x.dtype).view(4, 1, 1),
    "a tensor first": lambda x: torch.full((4, 1, 1), 0.3, dtype=x.dtype) * x,
    "a tensor minus": lambda x: torch.full((4, 1, 1), 0.3, dtype=x.dtype) - x,
    "chunks by keyword": lambda x: x.chunk(chunks=2, dim=1)[1],
    "split by keyword": lambda x: x.split(split_size=3, dim=1)[1],
    "in place": lambda x: (x * 1).mul_(0.5).add_(0.25),
    "flatten": lambda x: x.flatten(1),
    "flatten the middle": lambda x: torch.flatten(x, 1, 2),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape with the batch open": lambda x: x.reshape(-1, 4, 36),
    "mean by keyword": lambda x: x.mean(dim=[2, 3], keepdim=True),
    "mean from behind": lambda x: torch.mean(x, (-2, -1)),
    "sum": lambda x: x.sum(-1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(-1, 1),
    "slice": lambda x: x[:, 1:3, ::2],
    "slice from behind": lambda x: x[..., 1:],
    "new axis": lambda x: x[:, None],
    "squeeze": lambda x: x.unsqueeze(2).squeeze(2),
    "cat": lambda x: torch.cat((x, x[:, :1]), 1),
    "cat with a tensor": lambda x: torch.cat([x, torch.ones(x.shape[0], 1, 6, 6, dtype=x.dtype)], 1),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "nearest": lambda x: F.interpolate(x, size=(9, 4), mode="nearest"),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "reflection padding": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "constant padding": lambda x: F.pad(x, (1, 0), value=0.3),
    "negative padding": lambda x: nn.ZeroPad2d(-1)(x),
    "pooling": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "contiguous": lambda x: x.contiguous(memory_format=torch.channels_last),
    "clone": lambda x: x.clone(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAME_ON_EACH_STEP)
def test_an_affine_operation_acts_on_each_step_and_on_the_rate(name, kind):
    operation = SAME_ON_EACH_STEP[name]
    x, stream = train(kind)
    out = operation(x)
    expected = torch.stack([operation(step) for step in stream])
    assert isinstance(out, SpikeTrain) and out.shape == expected.shape[1:] and out.ndim == expected.ndim - 1
    torch.testing.assert_close(out.stream, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(out.rate, expected.mean(0), rtol=1e-12, atol=1e-13)
    if kind == "plain":
        return
    weights = torch.randn_like(out.rate)
    (gradient,) = torch.autograd.grad((out.rate * weights).sum(), stream)
    (wanted,) = torch.autograd.grad((expected.mean(0) * weights).sum(), stream)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-13)
    assert out.stream.requires_grad == (kind == "graph")


REFUSED = {
    "relu": (lambda x: F.relu(x), "relu"),
    "Tensor.relu": (lambda x: x.relu(), "relu"),
    "sigmoid": (lambda x: torch.sigmoid(x), "sigmoid"),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[1:]), "layer_norm"),
    "softmax": (lambda x: x.softmax(1), "softmax"),
    "product": (lambda x: x * x, "product of two spike trains"),
    "product with a part of it": (lambda x: torch.mul(x, x[:, :1]), "product of two spike trains"),
    "division": (lambda x: x / x, "division by a spike train"),
    "a number over a train": (lambda x: 1 / x, None),
    "a tensor over a train": (lambda x: torch.ones(1, dtype=x.dtype) / x, None),
    "power": (lambda x: x**2, None),
    "matmul": (lambda x: x @ torch.ones(6, 6, dtype=x.dtype), None),
    "comparison": (lambda x: x > 0, None),
    "equality": (lambda x: x == 0, None),
    "flatten all": (lambda x: x.flatten(), "flatten"),
    "mean of all": (lambda x: x.mean(), "mean"),
    "mean over the batch": (lambda x: x.mean(0), "mean"),
    "mean over the batch from behind": (lambda x: x.mean((-4, 1)), "mean"),
    "cat of batches": (lambda x: torch.cat([x, x]), "cat"),
    "chunk of the batch": (lambda x: x.chunk(2), "chunk"),
    "first image": (lambda x: x[0], "index"),
    "first image by a long way": (lambda x: x[..., 0, :, :, :], "index"),
    "another batch": (lambda x: x.view(B * 2, 2, 6, 6), "reshape"),
    "permute": (lambda x: x.permute(1, 0, 2, 3), "permute"),
    "transpose": (lambda x: x.transpose(0, 1), "transpose"),
    "unsqueeze": (lambda x: x.unsqueeze(0), "unsqueeze"),
    "squeeze": (lambda x: x.squeeze(), "squeeze"),
    "padding of the batch": (lambda x: F.pad(x, (0,) * 7 + (1,)), "padding"),
    "indices of max pooling": (lambda x: F.max_pool2d(x, 2, return_indices=True), "max_pool2d"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name(name):
    operation, named = REFUSED[name]
    with pytest.raises(UnsupportedOperationError, match=named):
        operation(train()[0])


@pytest.mark.parametrize("operation", ["add_", "mul_"])
def test_an_operation_in_place_never_goes_unnoticed(operation):
    """Its result is often not bound to a name: it must change the train, or be refused."""
    x, stream = train()
    before = stream.detach().clone()
    try:
        getattr(x, operation)(0.5)
    except UnsupportedOperationError:
        return
    torch.testing.assert_close(x.stream, before + 0.5 if operation == "add_" else before * 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), nn.Dropout2d(0.5), DropPath(0.5)], ids=str
)
def test_one_mask_for_all_steps_and_the_rate(layer, kind):
    stream = torch.rand(4, 16, 8, 5, 5, dtype=torch.float64, requires_grad=True) + 1
    out = layer(SpikeTrain.from_stream(stream, kind))
    kept = out.stream != 0
    assert torch.equal(kept, kept[:1].expand_as(kept)), "another mask at another step"
    assert torch.equal(out.rate != 0, kept[0])
    assert 0.15 < kept[0].double().mean() < 0.85
    torch.testing.assert_close(out.stream, stream * kept * 2)  # kept numbers are scaled by 1 / (1 - 0.5)
    torch.testing.assert_close(out.rate, (stream * kept * 2).mean(0))
    if kind != "plain":
        (gradient,) = torch.autograd.grad(out.rate.sum(), stream)
        torch.testing.assert_close(gradient, kept.double() * 2 / 4)  # over T
    if isinstance(layer, nn.Dropout2d):
        assert torch.equal(kept.flatten(3).any(3), kept.flatten(3).all(3)), "a channel is dropped as a whole"
    if isinstance(layer, DropPath):
        assert torch.equal(kept.flatten(2).any(2), kept.flatten(2).all(2)), "an image is dropped as a whole"


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Dropout2d(0.5), DropPath(0.5)], ids=str)
def test_no_mask_in_evaluation(layer):
    x, stream = train("rate")
    torch.testing.assert_close(layer.eval()(x).stream, stream, rtol=0, atol=0)


def test_adding_in_place_changes_the_train_for_all_who_hold_it_as_with_tensors():
    x, stream = train()
    y = x
    y += 1.0
    for held in (x, y):
        torch.testing.assert_close(held.stream, stream + 1, rtol=0, atol=0)


def test_adding_makes_a_new_train():
    x, stream = train()
    y = x + 1.0
    torch.testing.assert_close(x.stream, stream, rtol=0, atol=0)
    torch.testing.assert_close(y.stream, stream + 1, rtol=0, atol=0)


def test_a_clone_does_not_change_with_its_source():
    x, stream = train()
    y = x.clone()
    y += 1.0
    torch.testing.assert_close(x.stream, stream, rtol=0, atol=0)
    torch.testing.assert_close(y.stream, stream + 1, rtol=0, atol=0)


def test_a_monitor_that_looks_without_a_graph_takes_it_from_nobody():
    x, _ = train()
    weight = torch.randn(4, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight)
    with torch.no_grad():
        y.rate.mean()
    y.rate.sum().backward()
    # d(sum of W r)/dW is the sum of r over images and pixels, for each output channel
    expected = x.stream.mean(0).sum((0, 2, 3)).detach().expand(4, 4)[..., None, None]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("derived", [lambda y: y.clone(), lambda y: y - 0.1], ids=["clone", "sum"])
def test_what_a_monitor_derives_without_a_graph_takes_it_from_nobody(derived):
    x, _ = train()
    weight = torch.randn(4, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight)
    with torch.no_grad():
        derived(y).rate.mean()
    y.rate.sum().backward()
    expected = x.stream.mean(0).sum((0, 2, 3)).detach().expand(4, 4)[..., None, None]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaled", [lambda x: x * 0.1, lambda x: 0.1 * x, lambda x: x / 3, lambda x: x.div(3)])
def test_a_number_is_not_rounded_to_the_trains_type(scaled):
    stream = torch.randn(T, B, 4, 5, 5).bfloat16()
    found = scaled(SpikeTrain.from_stream(stream, "plain"))
    assert found.dtype == torch.bfloat16 and torch.equal(found.stream, scaled(stream))


def test_a_number_is_filled_in_on_the_trains_device():
    """A copy from the host would wait for a GPU."""
    filled = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            filled.extend([kwargs["device"]] if func is torch.ops.aten.full.default else [])
            return func(*args, **(kwargs or {}))

    x = SpikeTrain.constant(torch.ones(B, 4, device="meta", dtype=torch.bfloat16), T, "plain")
    with Recorded():
        half = constant_like(x, 0.5)
    assert filled == [torch.device("meta")] and half.dtype == x.dtype and half.folded.shape == (1, 1)


def test_a_pending_norm_of_a_bfloat16_stream_makes_no_float32_one():
    norm = nn.BatchNorm2d(4).eval()
    nn.init.uniform_(norm.weight)
    stream, made = torch.randn(T, B, 4, 3, 3).bfloat16(), set()

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            made.update([output.dtype] if output.numel() == stream.numel() else [])
            return output

    x = norm(SpikeTrain.from_stream(stream, "plain"))
    with Recorded():
        found = x.folded
    assert made == {torch.bfloat16}
    assert torch.equal(found, norm(stream.flatten(0, 1).float()).bfloat16())


def test_a_constant_train_stores_one_step():
    x = SpikeTrain.constant(torch.ones(B, 4, 6, 6), 5, "rate")
    out = F.conv2d(x, torch.ones(3, 4, 3, 3)) + 1
    assert out.steps == 1 and out.folded.shape[0] == B and out.stream.shape == (5, B, 3, 4, 4)


def test_a_long_sum_is_added_up_on_the_way():
    """A chain of residuals would otherwise keep every stream alive."""
    trains = [train() for _ in range(9)]
    total = sum(x for x, _ in trains)
    assert len(total.terms) <= 5
    torch.testing.assert_close(total.stream, sum(stream for _, stream in trains), rtol=1e-13, atol=1e-14)


def test_a_single_number_a_channel_has_no_variance_as_torch_says():
    norm = nn.BatchNorm2d(4).double()
    one = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(one)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(SpikeTrain.constant(one, 1, "rate"))


@pytest.mark.parametrize("training", [True, False])
def test_the_rate_before_a_norm_waits_for_the_neurons_which_find_it_in_passing(training, monkeypatch):
    layer, norm = nn.Conv2d(3, 5, 3).double(), nn.BatchNorm2d(5).double().train(training)
    images = torch.randn(3, 4, 3, 6, 6, dtype=torch.float64)

    def gradients(read_before):
        current = layer(SpikeTrain.from_stream(images, "rate"))
        normed = norm(current)
        assert current.terms[0].rate_is_pending and normed.terms[0].rate_is_pending
        again = norm(current)  # shares the rate before the norm
        if read_before:
            assert normed.terms[0].rate_before_norm() is current.rate
        spikes = SpikingNeuron()(normed)
        assert normed.terms[0].rate_before_norm() is current.terms[0].rate_before_norm()
        assert not again.terms[0].rate_is_pending and again.terms[0].rate_before_norm() is current.rate
        torch.testing.assert_close(current.rate, layer(images.flatten(0, 1)).unflatten(0, (3, 4)).mean(0))
        return torch.autograd.grad(spikes.rate.square().sum(), [layer.weight, norm.weight])

    for waited, read in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(waited, read)
