"""Formats torch_export and onnx: all steps in one graph, for any number of images."""

import json

import pytest
import timm
import torch
from export_toys import images, job, same_padding, small
from toy_networks import calibrated

from distill.export import FORMATS, onnx_file, torch_program
from models import NeuronConfig, create_snn, spiking_twin

SIZES = {"resnet18_cifar": (3, 32, 32), "sew_resnet18": (3, 32, 32), "vggsnn_cifar": (3, 48, 48)}


@torch.no_grad()
def test_a_program_runs_all_steps_of_any_batch(tmp_path):
    snn = small()
    check = FORMATS["torch_export"](job(snn, images(100), tmp_path, "torch_export"))
    assert check.passed and check.figures["float64"]["largest_difference"] <= 1e-9
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt2"]
    program = torch_program.load(tmp_path)
    for count in (1, 2, 7):
        assert program(images(count)).dtype == torch.float32
        assert (program(images(count)) - snn(images(count))).abs().max() < 1e-5
    graph = torch.export.load(tmp_path / "network.pt2").graph
    calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    # the image is the same at each step: of two convolutions each runs once, over all steps; T * 2 layers fire
    assert sum("conv2d" in name for name in calls) == 2 and sum(".ge." in name for name in calls) == 3 * 2


@torch.no_grad()
def test_a_program_of_frames_takes_one_for_each_step(tmp_path):
    snn = small(timesteps=2)
    frames = torch.randn(2, 100, 1, 8, 8)
    check = FORMATS["torch_export"](job(snn, frames, tmp_path, "torch_export"))
    assert check.passed, check.line
    assert (torch_program.load(tmp_path)(frames[:, :5]) - snn(frames[:, :5])).abs().max() < 1e-5


@torch.no_grad()
def test_onnxruntime_runs_all_steps_of_any_batch(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    snn = small()
    check = FORMATS["onnx"](job(snn, images(100), tmp_path, "onnx"))
    assert check.passed and {"onnx", "onnxruntime"} <= check.figures["packages"].keys()
    assert check.figures["onnxruntime"]["equal_predictions"] >= 0.99
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]
    session = onnx_file.load(tmp_path)
    for count in (1, 5):
        assert (session(images(count)) - snn(images(count))).abs().max() < 1e-5
    json.dumps(check.figures)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch_export", "onnx"])
@pytest.mark.parametrize("name", [*SIZES, "test_efficientnet", "resnet18", "regnetx_002", "same_padding", "vgg11_bn"])
def test_a_spread_of_networks(name, format, tmp_path):
    neuron = NeuronConfig(leak=0.5, threshold=0.05 if name == "vgg11_bn" else 0.7)
    size = SIZES.get(name, (3, 32, 32))
    if name in SIZES:
        snn = create_snn(name, 10, 2, neuron=neuron, width=8)
    else:
        kwargs = {"resnet18": {"channels": (8, 16, 16, 16)}, "vgg11_bn": {"mlp_ratio": 0.01}}.get(name, {})
        own = name == "same_padding"
        ann = same_padding() if own else timm.create_model(name, num_classes=10, drop_rate=0.0, **kwargs)
        snn = spiking_twin(ann, 2, neuron, gates="keep", input_size=size)
    samples = images(100, size)
    check = FORMATS[format](job(calibrated(snn, samples[:16]), samples, tmp_path, format))
    assert check.passed, check.line
