"""A feedback loop is written with the spikes of the step before as state, or refused by what cannot be held."""

import pytest
import torch
from export_toys import images, job

from distill.export import FORMATS
from distill.export.plain import plain_network
from distill.export.unrolled import Unrolled
from models import FeedbackConfig, NeuronConfig, UnsupportedOperationError, create_snn, load_snn

LOOP = FeedbackConfig(readout_side=4)
STATEFUL = ("torch_export", "onnx", "spikingjelly")


def network(algorithm="ide", leak=1.0, name="feedback_convnet", size=8, threshold=0.3):
    """Norms with statistics of their own, and neurons that fire."""
    neuron = NeuronConfig(leak=leak, threshold=threshold)
    torch.manual_seed(0)
    snn = create_snn(name, 10, 4, 1, neuron, algorithm, width=size, feedback=LOOP)
    for module in snn.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return snn.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["feedback_convnet", "feedback_alexnet"])
@pytest.mark.parametrize("algorithm", ["ide", "spide"])
@pytest.mark.parametrize("frames", [False, True])
def test_unrolled_in_float64_it_gives_the_logits_of_the_network(algorithm, name, frames):
    snn = network(algorithm, name=name).double()
    size = (1, 16, 16)
    x = images(6, size).double() * 2
    x = torch.stack([x, x.flip(0), -x, x]) if frames else x
    unrolled = Unrolled(plain_network(snn, size), 4)
    expected = snn(x)
    torch.testing.assert_close(unrolled(x), expected, rtol=0, atol=1e-12)
    snn.loop.feedback.linear.weight.zero_()  # the loop matters
    assert (snn(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("format", STATEFUL)
@pytest.mark.parametrize("algorithm", ["ide", "spide"])
def test_it_is_written_and_passes_its_check(format, algorithm, tmp_path):
    pytest.importorskip({"torch_export": "torch", "onnx": "onnxruntime"}.get(format, format))
    check = FORMATS[format](job(network(algorithm), images(100), tmp_path, format))
    assert check.passed, check.line


def test_nir_refuses_a_loop_by_name(tmp_path):
    pytest.importorskip("nir")
    with pytest.raises(ValueError, match=r"nir holds no feedback loop.*loop_spikes"):
        FORMATS["nir"](job(network(), images(100), tmp_path, "nir"))


@pytest.mark.parametrize("format", STATEFUL)
def test_a_loop_of_leaky_neurons_is_refused_by_name(format, tmp_path):
    pytest.importorskip({"torch_export": "torch", "onnx": "onnxruntime"}.get(format, format))
    with pytest.raises(UnsupportedOperationError, match=r"feedback loop 'loop'.*leak of its neurons \(0.9\)"):
        FORMATS[format](job(network(leak=0.9), images(100), tmp_path, format))
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ["ide", "spide"])
def test_as_snn_it_is_itself(algorithm, tmp_path):
    snn = network(algorithm, leak=0.9)
    assert FORMATS["snn"](job(snn, images(100), tmp_path, "snn")).passed
    torch.testing.assert_close(load_snn(tmp_path)(images(4)), snn(images(4)), rtol=0, atol=0)
