"""A pass from a graph is the pass; what a capture tries out leaves no trace.

Without a GPU PyTorch's own capture is stood in for by one that keeps to its contract: some trial passes, then the same
memory for images, outputs and gradients of all passes.
"""

import logging
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_teachers import SIZE, images_of, teacher_of
from toy_training import config_of, train

from distill import HybridDistiller, LossConfig, distillation_losses
from distill.cuda_graphs import CudaGraphs, graphs_for
from distill.train_config import TrainConfig
from models import compile_kernels, create_snn, spiking_twin

LABELS = torch.tensor([1, 4])
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def stand_in(module, sample_args, allow_unused_input, pool):
    """`torch.cuda.make_graphed_callables` of one module, as PyTorch's source has it, with passes for replays."""
    (static,) = sample_args
    parameters = [p for p in module.parameters() if p.requires_grad]
    forward, memory = module.forward, {}

    def grads(outputs, gradients):
        trained = [o for o in outputs if o.requires_grad]
        pairs = [g for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        return torch.autograd.grad(trained, parameters, pairs, allow_unused=allow_unused_input)

    for _ in range(3):
        outputs = forward(static)
        grads(outputs, [torch.full_like(o, torch.nan) for o in outputs])
    assert pool == (0, 1)

    def kept(name, values):
        """The values in the memory that they had the last time."""
        if name not in memory:
            memory[name] = [None if v is None else v.detach().clone() for v in values]
        for old, new in zip(memory[name], values, strict=True):
            if old is not None:
                old.copy_(new.detach())
        return [None if old is None else old.detach() for old in memory[name]]

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images, *_):
            static.copy_(images)
            with torch.enable_grad():
                ctx.outputs = forward(static)
            return tuple(kept("outputs", ctx.outputs))

        @staticmethod
        def backward(ctx, *gradients):
            return None, *kept("grads", grads(ctx.outputs, gradients))

    module.forward = lambda images: Graphed.apply(images, *parameters)
    return module


@pytest.fixture
def capture(monkeypatch):
    if torch.cuda.is_available():
        return "cuda"
    replaced = {
        "make_graphed_callables": stand_in,
        "graph_pool_handle": lambda: (0, 1),
        "get_rng_state": lambda device: torch.get_rng_state(),
        "set_rng_state": lambda state, device: torch.set_rng_state(state),
        "empty_cache": lambda: None,
        "synchronize": lambda device: None,
        "memory_allocated": lambda device: 10,
        "max_memory_allocated": lambda device: 30,
        "reset_peak_memory_stats": lambda device: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: (
            warnings.warn("Synchronization debug mode is a prototype", stacklevel=1) if mode else None
        ),
        "mem_get_info": lambda device: (50, 100),  # 2.5 times the 20 that a pass takes
    }
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return "cpu"


def distiller_of(dtype=torch.float32, algorithm="rate_m"):
    teacher = teacher_of("resnet18", dtype)
    student = spiking_twin(teacher, 2, algorithm=algorithm, input_size=SIZE)
    return HybridDistiller(teacher, student, images=images_of(dtype))


def steps_of(distiller, call, device, active):
    """Losses, gradients and buffers of a step for each set of taps."""
    found = []
    for number, taps in enumerate(active):
        images = images_of(torch.float64).to(device) * (1 + number)
        distiller.zero_grad()
        losses = distillation_losses(call(images, active=taps, student=True), LABELS.to(device), LossConfig())
        losses["total"].backward()
        found += [value.detach().clone() for value in losses.values()]
        del losses  # or the next capture finds gradients' nodes of another stream, as the class says
        found += [torch.zeros(()) if p.grad is None else p.grad.clone() for p in distiller.parameters()]
        with torch.no_grad():  # as an optimizer does, in place
            for parameter in distiller.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
    return found + [buffer.clone() for buffer in distiller.buffers()]


@pytest.mark.parametrize("algorithm", ["rate_m", "bptt"])
def test_steps_are_those_without_graphs(algorithm, capture):
    active = [["layer1"], ["layer2"], ["layer1"], ["layer1", "layer3"], [], ["layer2"]]
    found = []
    for graphed in (False, True):
        torch.manual_seed(0)
        distiller = distiller_of(torch.float64, algorithm).to(capture).train()
        call = CudaGraphs(distiller, distiller.student) if graphed else distiller
        found.append(steps_of(distiller, call, capture, active))
    assert call.count == 4  # sets of taps
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_what_is_not_trained_has_no_gradient(capture):
    distiller = distiller_of().to(capture).train()
    graphs = CudaGraphs(distiller, distiller.student)
    outputs = graphs(images_of().to(capture), active=[], student=True)
    assert graphs.count == 1 and outputs.student_logits.requires_grad and not outputs.teacher_logits.requires_grad
    assert outputs.hybrid_logits == {}


def test_rates_are_those_of_the_pass_and_found_where_they_are_wanted(capture):
    snn = create_snn("resnet18_cifar", width=4, timesteps=2).double().to(capture).train()
    graphs = CudaGraphs(snn, snn)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, device=capture)
    graphs(images)
    assert graphs.rates == {}
    graphs.recording = True
    rates = []
    for scale in (1.0, 0.0, 1.0):
        graphs(scale * images).sum().backward()
        rates.append({name: value.item() for name, value in graphs.rates.items()})
    assert graphs.count == 2 and len(rates[0]) == 17 and rates[0] == rates[2]
    assert rates[0]["conv0.2"] > 0 and rates[1]["conv0.2"] == 0  # of a black image


def test_a_capture_draws_no_random_numbers(capture):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Dropout(0.5)).to(capture).train()
    images = torch.randn(8, 3, 2, 2, device=capture)
    graphs = CudaGraphs(network, network)
    torch.manual_seed(1)
    first = graphs(images).clone()
    torch.manual_seed(1)
    assert torch.equal(network(images), first) and graphs.count == 1


class Looks(nn.Module):
    """Waits for the GPU in each pass, as an encoder does that checks its input."""

    def forward(self, x):
        assert x.sum().item() < 1e6
        return x


def test_a_pass_that_waits_for_the_device_runs_as_it_is(capture, monkeypatch, caplog):
    modes = []
    if capture == "cpu":  # where nobody minds a look at a number
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
        item = torch.Tensor.item

        def minded(tensor):
            if modes[-1:] == ["error"]:
                raise RuntimeError("called a synchronizing CUDA operation\nmore of it")
            return item(tensor)

        monkeypatch.setattr(torch.Tensor, "item", minded)
    network = nn.Sequential(Looks(), nn.Flatten(), nn.Linear(12, 4), nn.Dropout(0.5)).to(capture).train()
    graphs = CudaGraphs(network, network)
    images = torch.randn(8, 3, 2, 2, device=capture)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.manual_seed(1)
            found = graphs(images)
            torch.manual_seed(1)
            assert torch.equal(found, network(images))
    said = "steps run without CUDA graphs, slower where images are small: RuntimeError: called a synchronizing"
    assert caplog.text.count(said) == 1 and "more of it" not in caplog.text and graphs.count == 0
    if capture == "cpu":
        assert modes == ["error", 0]
    else:
        assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_too_little_memory_for_a_graph_is_said(capture, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 100))
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).to(capture)
    graphs = CudaGraphs(network, network)
    with caplog.at_level(logging.WARNING):
        graphs(torch.randn(8, 3, 2, 2, device=capture))
    assert "they need 0.0 GB, 0.0 are free" in caplog.text and graphs.count == 0


def test_a_capture_that_fails_names_the_setting_that_leaves_it_out(capture, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).to(capture)
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing; --train\.cuda_graphs false"):
        CudaGraphs(network, network)(torch.randn(8, 3, 2, 2, device=capture))


def test_closed_graphs_hold_nothing_and_the_network_runs_on(capture):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).to(capture).train()
    graphs = CudaGraphs(network, network)
    images = torch.randn(8, 3, 2, 2, device=capture)
    graphs(images)
    (made,) = graphs._passes.values()
    left = weakref.ref(made)
    del made
    graphs.close()
    assert left() is None and graphs.count == 0
    assert torch.equal(graphs(images), network(images)) and graphs.count == 0


@pytest.mark.parametrize("changes", [{}, {"clip": 0.1}, {"ema": 0.5}, {"momentum": 0.9, "weight_decay": 0.1}], ids=str)
def test_a_training_is_that_without_graphs(changes, tmp_path, capture, monkeypatch):
    if capture == "cuda":
        pytest.skip("the toy training runs on a CPU")
    config, made = config_of(epochs=3, **changes), []

    def graphs(accelerator, model, network, *_):
        made.append(CudaGraphs(model, network))
        return made[-1]

    expected, _ = train(tmp_path / "without", config)
    monkeypatch.setattr("distill.loop.graphs_for", graphs)
    counts = []
    found, _ = train(tmp_path / "with", config, evaluate=lambda model: counts.append(made[0].count) or {})
    assert counts[-1] == 2 and made[0].count == 0  # with rates and without; closed behind the training
    for ours, theirs in zip(found.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "device", "processes", "suits", "there"),
    [
        ({}, "cuda", 1, True, True),
        ({}, "cpu", 1, True, False),
        ({}, "cuda", 2, True, False),
        ({}, "cuda", 1, False, False),
        ({"cuda_graphs": False}, "cuda", 1, True, False),
        ({"accumulate": 2}, "cuda", 1, True, False),
        ({"grad_checkpointing": True}, "cuda", 1, True, False),
    ],
)
def test_graphs_serve_one_process_with_a_gpu(change, device, processes, suits, there):
    accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device))
    network = nn.Linear(2, 2)
    assert (graphs_for(accelerator, network, network, TrainConfig(**change), suits, 0) is not None) == there


@pytest.mark.parametrize("minded", [False, True])
def test_a_thread_that_pins_batches_is_not_disturbed(minded, monkeypatch):
    def newer(callables, sample_args, capture_error_mode="global"): ...
    def older(callables, sample_args): ...

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", newer if minded else older)
    accelerator = SimpleNamespace(num_processes=1, device=torch.device("cuda"))
    network = nn.Linear(2, 2)
    found = [graphs_for(accelerator, network, network, TrainConfig(), True, workers) for workers in (0, 2)]
    assert [graphs is not None for graphs in found] == [True, minded]


@on_gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_replays_compiled_kernels_under_autocast(dtype, caplog):
    found = []
    for graphed in (False, True):
        torch.manual_seed(0)
        snn = create_snn("resnet18_cifar", width=8).cuda().train().to(memory_format=torch.channels_last)
        compile_kernels(True)
        forward = snn.forward

        def cast(images, forward=forward):
            with torch.autocast("cuda", dtype):
                return forward(images).float()

        snn.forward = cast
        call = CudaGraphs(snn, snn) if graphed else snn
        images = torch.randn(8, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
        for _ in range(2):
            snn.zero_grad()
            logits = None  # with what it holds, see `steps_of`
            logits = call(images)
            torch.nn.functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long, device="cuda")).backward()
        found.append([logits.detach().clone(), *(p.grad.clone() for p in snn.parameters())])
    assert call.count == 1
    ours = [r.message for r in caplog.records if r.name.startswith("distill")]  # and none of the compiler's own
    assert ours in ([], ["steps run as CUDA graphs"])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=1e-3)
