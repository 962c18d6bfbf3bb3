"""On a GPU: every algorithm gives the numbers of the CPU, as written and compiled (Triton), in float64.

Skipped without CUDA; the lent machines of this project have it now and then.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_networks import Residual, generic, spiking

from models import (
    ALGORITHMS,
    FEEDBACK_ALGORITHMS,
    ONLINE,
    FeedbackConfig,
    NeuronConfig,
    PoissonEncoder,
    SpikeTrain,
    SpikingNeuron,
    compile_kernels,
    create_snn,
    spiking_twin,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore"),  # of the compiler's own
]


@pytest.fixture(autouse=True)
def _uncompiled_again():
    yield
    compile_kernels(False)


def gradients(snn, images, labels):
    """Of the mean cross-entropy, with the logits, on the CPU."""
    snn.zero_grad()
    if snn.algorithm in ONLINE:
        steps = []
        for t in range(snn.timesteps):
            steps.append(snn(images, step=t))
            (F.cross_entropy(steps[-1], labels) / snn.timesteps).backward()
        logits = torch.stack(steps).mean(0)
    else:
        logits = snn(images)
        F.cross_entropy(logits, labels).backward()
    # copies: a network that moves to the GPU takes its gradients along, in place
    return [logits.detach().cpu()] + [p.grad.clone().cpu() for p in snn.parameters()]


def network(algorithm, **neuron):
    if algorithm == "dsr":
        return create_snn("resnet18_cifar", width=8, timesteps=3, algorithm="dsr").double().train()
    if algorithm in FEEDBACK_ALGORITHMS:
        config = FeedbackConfig(dropout=0.0, readout_side=4)
        return create_snn("feedback_convnet", 5, 3, 3, None, algorithm, 8, feedback=config).double().train()
    return spiking(generic(Residual(NeuronConfig(leak=0.5, **neuron))), 3, algorithm)


@pytest.mark.parametrize("compiled", [False, True], ids=["written", "compiled"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_are_those_of_the_cpu(algorithm, memory_format, compiled):
    snn = network(algorithm)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    labels = torch.randint(0, snn(images, step=0).shape[1] if algorithm in ONLINE else snn(images).shape[1], (4,))
    state = {name: tensor.clone() for name, tensor in snn.state_dict().items()}
    expected = gradients(snn, images, labels)
    snn.load_state_dict(state)
    snn = snn.cuda().to(memory_format=memory_format)
    compile_kernels(compiled)
    found = gradients(snn, images.cuda().contiguous(memory_format=memory_format), labels.cuda())
    # SpikingJelly's DSR nodes go back in float32, whatever they are given
    near = {"rtol": 1e-3, "atol": 1e-6} if algorithm == "dsr" else {"rtol": 1e-8, "atol": 1e-11}
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **near)


def test_a_learned_leak_and_one_dropout_mask():
    snn = network("rate_m", learnable_leak=True).cuda()
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64).cuda(), torch.zeros(4, dtype=torch.long).cuda()
    expected = gradients(snn, images, labels)
    compile_kernels(True)
    for ours, theirs in zip(gradients(snn, images, labels), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s", "bptt"])
def test_frozen_statistics_train_as_on_the_cpu(algorithm, memory_format):
    """As with train.freeze_norms, as written: the compiled pass has kernels of its own."""
    snn = network(algorithm)
    for module in snn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().weight.requires_grad_(False)
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    trained = [p for p in snn.parameters() if p.requires_grad]

    def found(images):
        loss = F.cross_entropy(snn(images), labels.to(images.device))
        return [gradient.cpu() for gradient in torch.autograd.grad(loss, trained)]

    expected = found(images)
    snn = snn.cuda().to(memory_format=memory_format)
    for ours, theirs in zip(found(images.cuda().contiguous(memory_format=memory_format)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_numbers_do_not_wait_for_the_device():
    x = SpikeTrain.constant(torch.ones(2, 4).cuda(), 3, "rate")
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = (2 * x + 0.5) / 5
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (y.rate == 0.5).all()


def test_a_twin_is_where_its_network_is():
    ann = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).cuda()
    snn = spiking_twin(ann, 2, NeuronConfig(leak=0.5, learnable_leak=True), input_size=(3, 8, 8))
    assert any(isinstance(m, SpikingNeuron) for m in snn.modules()) and all(p.is_cuda for p in snn.parameters())


def test_poisson_input_is_drawn_on_the_device():
    spikes = PoissonEncoder()(torch.rand(2, 3, 4, 4).cuda(), 5)
    assert spikes.is_cuda and set(spikes.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("algorithm", FEEDBACK_ALGORITHMS)
def test_feedback_trains_in_bfloat16(algorithm):
    snn = network(algorithm).float().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(snn(torch.randn(4, 3, 16, 16).cuda()).float(), torch.zeros(4, dtype=torch.long).cuda())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in snn.parameters())


@pytest.mark.parametrize("algorithm", ["rate_m", "rate_s", "bptt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_trains_with_finite_gradients(dtype, algorithm):
    snn = (
        create_snn("resnet18_cifar", width=8, algorithm=algorithm).cuda().train().to(memory_format=torch.channels_last)
    )
    compile_kernels(True)
    with torch.autocast("cuda", dtype):
        loss = F.cross_entropy(snn(torch.randn(8, 3, 32, 32).cuda()).float(), torch.zeros(8, dtype=torch.long).cuda())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in snn.parameters())
