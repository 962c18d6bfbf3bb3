"""Networks with batch norms, each trained for one step; as a program, several processes with a share of the batch each.

    python sync_program.py FOLDER PROCESSES DEVICE CASE ...

leaves FOLDER/RANK.pt for each process: what `train_once` gives by the name of the case, or by "CASE, alone" where each
process normalises with its own share. Everything is float64. T steps, B images, K processes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spikingjelly.activation_based import layer
from timm.layers import BatchNormAct2d, StdConv2d
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from toy_feedback import with_stem
from toy_networks import Head, Norms, PreActivation, Residual, Shapes, Sums, conv_bn, generic, spiking

from distill import HybridDistiller, LossConfig, distillation_losses
from models import (
    ONLINE,
    NeuronConfig,
    SpikingNetwork,
    compile_kernels,
    create_snn,
    set_algorithm,
    spiking_twin,
    synchronised_batch_norm,
)
from models.compiling import is_compiling

IMAGES = 8
T = 3
ALONE = ", alone"


class Case(NamedTuple):
    """A network, and the loss of its forward pass.

    Args:
        loss: of network, images, labels, the weight of each image's loss (B,) and the step.
        size: height and width of the images.
        memory_format: of images and network.
        compiler: "inductor", or "none", which runs what a compiler is given; None for passes as they are written.
        unequal: whether processes hold different numbers of images.
        tolerance: of gradients.
    """

    network: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor, Tensor, dict], Tensor]
    size: int = 8
    memory_format: torch.memory_format = torch.contiguous_format
    compiler: str | None = None
    unequal: bool = False
    tolerance: float = 1e-10


def shares(case: Case, processes: int) -> list[slice]:
    """The images of each process."""
    ends = [0] + [(i + 1) * IMAGES // processes for i in range(processes)]
    if case.unequal:
        ends = {1: [0, 8], 2: [0, 5, 8], 4: [0, 1, 4, 6, 8]}[processes]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


# -- networks and losses ------------------------------------------------------------------------------


def snn(toy: Callable[..., nn.Module], algorithm: str) -> Callable[[], SpikingNetwork]:
    return lambda: spiking(generic(toy(NeuronConfig(leak=0.5, threshold=0.8))), T, algorithm)


def dsr() -> nn.Module:
    return generic(create_snn("resnet18_cifar", width=8, timesteps=2, algorithm="dsr"))


def feedback(algorithm: str) -> Callable[[], nn.Module]:
    """With batch norms in the stem and, with ide, in the loop: they make currents several times as large."""
    return lambda: generic(with_stem(T, algorithm, bound=0.02))


def resnet() -> nn.Module:
    return generic(timm.create_model("resnet18", num_classes=5, channels=(8, 8, 16, 16)))


class Analogue(nn.Module):
    """timm's norm with an activation in it, a weight that is standardised, SpikingJelly's norm, a norm of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8), nn.ReLU(), StdConv2d(8, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 8, 1))
        self.norm = layer.BatchNorm2d(8)
        self.head = nn.Sequential(BatchNormAct2d(8, track_running_stats=False), Head(8, 8), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)).relu())


def distiller(algorithm: str, feature: str = "none") -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        teacher = resnet().eval()
        student = generic(spiking_twin(teacher, 2, input_size=(3, 16, 16)))
        images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        return HybridDistiller(teacher, set_algorithm(student, algorithm), images=images, feature=feature)

    return build


def on_labels(network, images, labels, weights, step):
    return (F.cross_entropy(network(images, **step), labels, reduction="none") * weights).sum()


def distilled(**options: Any):
    def loss(network, images, labels, weights, step):
        outputs = network(images, **options)
        return distillation_losses(outputs, labels, LossConfig(hybrid_feature=1.0))["total"]

    return loss


CHANNELS_LAST = torch.channels_last
UNTIL_LAYER2 = dict(active=["layer2"], student=False)
CASES = {
    **{f"rate_m, {toy.__name__}": Case(snn(toy, "rate_m"), on_labels) for toy in (PreActivation, Norms, Shapes, Sums)},
    **{
        f"{name}, Residual": Case(snn(Residual, name), on_labels)
        for name in ("rate_m", "rate_s", "bptt", "sltt", "ottt")
    },
    "rate_s, Norms": Case(snn(Norms, "rate_s"), on_labels),
    "bptt, Norms": Case(snn(Norms, "bptt"), on_labels),
    "dsr": Case(dsr, on_labels, size=16, tolerance=1e-6),  # SpikingJelly's nodes compute in float32
    "ide": Case(feedback("ide"), on_labels),
    "ide, unequal": Case(feedback("ide"), on_labels, unequal=True),
    "spide": Case(feedback("spide"), on_labels),
    "rate_m, channels_last": Case(snn(Residual, "rate_m"), on_labels, memory_format=CHANNELS_LAST),
    "bptt, channels_last": Case(snn(Residual, "bptt"), on_labels, memory_format=CHANNELS_LAST),
    **{f"{name}, unequal": Case(snn(Norms, name), on_labels, unequal=True) for name in ("rate_m", "rate_s", "bptt")},
    "teacher, resnet18": Case(resnet, on_labels, size=16),
    "teacher, channels_last": Case(resnet, on_labels, size=16, memory_format=CHANNELS_LAST),
    "teacher, its own norms": Case(lambda: generic(Analogue()), on_labels),
    "teacher, unequal": Case(lambda: generic(Analogue()), on_labels, unequal=True),
    **{f"joint, {name}": Case(distiller(name), distilled(), size=16) for name in ("rate_m", "rate_s", "bptt")},
    "joint with features": Case(distiller("rate_m", "cosine"), distilled(), size=16),
    "stochastic": Case(distiller("rate_m"), distilled(active=["layer3"]), size=16),
    "progressive, rate_m": Case(distiller("rate_m"), distilled(**UNTIL_LAYER2), size=16),
    "progressive, rate_s": Case(distiller("rate_s"), distilled(**UNTIL_LAYER2), size=16),
}
OF_COMPILERS = (
    *("rate_m, Residual", "rate_m, channels_last", "rate_m, unequal", "rate_s, Residual", "bptt, Residual"),
    *("joint, rate_m", "progressive, rate_s"),
)
COMPILABLE = {f"{name}, compilable": CASES[name]._replace(compiler="none") for name in OF_COMPILERS}
"""To compile takes minutes."""
COMPILED = {f"{name}, compiled": CASES[name]._replace(compiler="inductor") for name in OF_COMPILERS}


# -- one step -----------------------------------------------------------------------------------------


def train_once(
    case: Case, rank: int = 0, processes: int = 1, of: int = 1, synchronised: bool = True, device: str = "cpu"
) -> dict[str, Any]:
    """Loss, gradients averaged over processes and buffers after one step, on the CPU.

    Args:
        processes: K, with a share of the batch each.
        of: of a single process with the whole batch: K of those it is compared with, whose losses are means over their
            own images.
    """
    torch.manual_seed(0)
    network = case.network().to(device, memory_format=case.memory_format).train()
    images = torch.randn(IMAGES, 3, case.size, case.size, dtype=torch.float64)
    labels = torch.arange(IMAGES) % 5
    images, labels = images.contiguous(memory_format=case.memory_format).to(device), labels.to(device)
    own = shares(case, processes)[rank]
    weights = torch.empty(IMAGES, dtype=torch.float64, device=device)
    for part in shares(case, max(of, processes)):
        weights[part] = 1 / (part.stop - part.start) / of
    algorithm = getattr(network, "algorithm", None)
    steps = [dict(step=t) for t in range(T)] if algorithm in ONLINE else [{}]
    model = network if processes == 1 else DistributedDataParallel(network, find_unused_parameters=True)
    compile_kernels(case.compiler is not None)
    total = 0.0
    for step in steps:
        last = processes == 1 or step is steps[-1]
        with contextlib.nullcontext() if last else model.no_sync():
            with synchronised_batch_norm(synchronised):
                loss = case.loss(model, images[own], labels[own], weights[own], step)
            loss.backward()
        total += loss.item()
    assert is_compiling() == (case.compiler is not None), "torch.compile failed: see the log"
    return {
        "loss": torch.tensor(total, dtype=torch.float64),
        "gradients": {name: None if p.grad is None else p.grad.cpu() for name, p in network.named_parameters()},
        "buffers": {name: buffer.cpu() for name, buffer in network.named_buffers()},
    }


def work(rank: int, folder: str, processes: int, device: str, names: Sequence[str]) -> None:
    """One process of K."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    cases = CASES | COMPILABLE | COMPILED
    compilers = {cases[name.removesuffix(ALONE)].compiler for name in names}
    assert not {"none", "inductor"} <= compilers, "a pass is compiled once in a process"
    if "none" in compilers:
        torch.compile = lambda kernel, **_: kernel
    results = {
        name: train_once(
            cases[name.removesuffix(ALONE)], rank, processes, synchronised=not name.endswith(ALONE), device=device
        )
        for name in names
    }
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def main(folder: str, processes: str, device: str, *names: str) -> None:
    torch.set_num_threads(1)
    # a fork saves each process the imports; nothing has run yet that a fork would break
    start_processes(work, (folder, int(processes), device, names), int(processes), start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
