"""Where a device has no float64 nothing is widened to it; the device is played by a watch over all operations.

And no TF32 where logits of different batches are compared.
"""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy_networks import Head, calibrated, spiking
from toy_teachers import images_of, student_of, teacher_of

import models
from distill import HybridDistiller
from distill.adapter_start import start_adapters
from distill.energy import spiking_costs
from distill.layouts import Layout, change_quadrants, quadrants_followed
from distill.precision import widest_float, without_tf32
from distill.tails import images_in_front
from distill.taps import check_taps, tap_names


class NoFloat64(TorchDispatchMode):
    """Refuses what a device without float64 refuses: to make float64 of float32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = {x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = {x.dtype for x in tree_leaves(output) if isinstance(x, torch.Tensor)}
        if torch.float64 in made and torch.float32 in given:
            raise TypeError(f"no float64 here: {func}")
        return output


@pytest.fixture
def on_mps(monkeypatch):
    for name in ("energy.spiking", "adapter_start", "layouts"):
        monkeypatch.setattr(f"distill.{name}.widest_float", lambda device: widest_float(torch.device("mps")))


def test_the_widest_type_is_the_devices():
    found = {name: widest_float(torch.device(name)) for name in ("cpu", "cuda", "mps")}
    assert found == {"cpu": torch.float64, "cuda": torch.float64, "mps": torch.float32}


FIRES = models.NeuronConfig(leak=0.5, threshold=0.3)


def upwards():
    """Spikes into a transposed convolution."""
    layers = nn.Conv2d(1, 8, 3), models.SpikingNeuron(FIRES), nn.ConvTranspose2d(8, 8, 3, stride=2), Head(8, 3)
    return spiking(nn.Sequential(*layers), 3, in_chans=1)


def counts(network):
    torch.manual_seed(3)
    own = network == "transposed"
    snn = upwards() if own else models.create_snn(network, 3, timesteps=3, in_chans=1, width=8, neuron=FIRES)
    images = torch.rand(4, 1, 8, 8)
    return spiking_costs(Accelerator(cpu=True), [(images, torch.zeros(4, dtype=torch.long))], calibrated(snn, images))


@pytest.mark.parametrize("network", ["resnet18_cifar", "transposed"])
def test_spikes_are_counted_without_float64(network, request):
    wide = counts(network)
    assert wide.whole.layers[1].acs > 0  # of the first layer behind a neuron
    with NoFloat64(), pytest.raises(TypeError, match="no float64"):
        counts(network)
    request.getfixturevalue("on_mps")
    with NoFloat64():
        assert counts(network) == wide  # whole numbers below 2^24


def explained():
    torch.manual_seed(3)
    teacher = teacher_of("resnet18")
    distiller = HybridDistiller(teacher, student_of(teacher), images=images_of())
    return start_adapters(distiller.train(), ["layer1"], [images_of(count=6)])


def test_adapters_start_without_float64(request):
    wide = explained()
    with NoFloat64(), pytest.raises(TypeError, match="no float64"):
        explained()
    request.getfixturevalue("on_mps")
    with NoFloat64():
        assert explained() == pytest.approx(wide, abs=1e-3)


def test_layouts_are_guessed_without_float64(on_mps):
    image = torch.randn(1, 3, 16, 16)
    maps = change_quadrants(image)
    with NoFloat64():
        times, own = quadrants_followed(Layout(), maps, (16, 16))
    assert times > 1e6 and own == 1.0  # each place of an image follows its own quadrant, and no other at all


def of_products():
    """What is set for the factors of convolutions and of matrix products."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if not hasattr(cudnn, "conv"):  # before torch 2.9
        return cudnn.allow_tf32, matmul.allow_tf32
    return cudnn.conv.fp32_precision, matmul.fp32_precision


def test_taps_are_checked_without_tf32():
    teacher, seen, before = teacher_of("resnet18"), [], of_products()
    handle = teacher.register_forward_hook(lambda *_: seen.append(of_products()))
    taps = check_taps(teacher, tap_names(teacher, "blocks", images_of()), images_of())
    images_in_front(teacher, taps, images_of())
    handle.remove()
    assert len(seen) > 4 and set(seen) <= {("ieee", "ieee"), (False, False)}
    assert of_products() == before and before not in seen


def test_what_was_set_of_tf32_comes_back_whichever_way_it_was_set():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        set_by_hand = of_products()
        with pytest.raises(KeyError), without_tf32():
            raise KeyError
        assert of_products() == set_by_hand and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
