"""The networks that are measured: this repository's here, those of others in `benchmarks.peers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One measurement of one training step."""

    network: str = "resnet18_cifar"
    """One of `models.list_snns()`; a peer knows "resnet18_cifar"."""
    algorithm: str = "rate_m"
    """One of `models.ALGORITHMS`; a peer knows one or two of them."""
    timesteps: int = 4
    """T."""
    batch: int = 32
    """Images a step."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16 and fp16 by autocast, fp16 without scaling of the loss."""
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    """Of the weights and images."""
    peer: Literal["authors", "spikingjelly"] | None = None
    """Whose implementation; None for this repository's."""
    authors_path: Path | None = None
    """A clone of the authors' repository."""
    sj14_path: Path | None = None
    """A folder that SpikingJelly 0.0.0.0.14 was installed into."""
    compiled: bool = True
    """Whether this repository's fused passes are compiled."""
    cuda_graphs: bool = False
    """Whether this repository's passes are replayed as CUDA graphs (`distill.cuda_graphs`)."""
    grad_checkpointing: bool = False
    """Whether this repository's blocks run again in the backward pass (`SpikingNetwork.set_grad_checkpointing`)."""
    width: int | None = None
    """Channels of the first stage; None for the paper's."""
    image_size: int = 32
    """Pixels a side."""
    warmup: int = 3
    """Steps that are not timed: they compile and fill caches."""
    steps: int = 10
    """Steps that are timed."""
    threads: int | None = None
    """None for PyTorch's choice."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    seed: int = 0
    """Of weights, images and labels."""

    def __post_init__(self) -> None:
        smallest = {"timesteps": 1, "batch": 1, "image_size": 8, "warmup": 0, "steps": 2, "threads": 1, "width": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A network in training mode and how one step of it runs."""

    network: nn.Module
    logits: Callable[[Tensor, int], Tensor]
    """From images (B, C, H, W) and the number of the part to logits (B, classes)."""
    parts: int = 1
    """Pairs of a forward and a backward pass in one training step: T for rules that go forward in time, else 1."""
    finish: Callable[[], None] = lambda: None
    """Runs at the end of a step: clears the state of the neurons."""
    versions: dict[str, str]
    """Of Python and of what the contestant is made of."""


def contestant(settings: Settings) -> Contestant:
    """
    Raises:
        ValueError: for a network or algorithm that the implementation does not have, naming those that it has.
        FileNotFoundError: where the peer's code is not found, with the commands that get it.
    """
    if settings.peer is not None and (settings.cuda_graphs or settings.grad_checkpointing):
        raise ValueError("cuda_graphs and grad_checkpointing are this repository's, not a peer's")
    if settings.peer == "authors":
        from benchmarks.peers import authors  # SpikingJelly 0.0.0.0.14 must come before `models` imports the installed

        return authors(settings)
    if settings.peer == "spikingjelly":
        from benchmarks.peers import spikingjelly

        return spikingjelly(settings)
    return _ours(settings)


def _ours(settings: Settings) -> Contestant:
    import models
    from distill.cuda_graphs import GRAPHED, CudaGraphs
    from distill.report import versions

    if settings.cuda_graphs and (settings.device != "cuda" or settings.algorithm not in GRAPHED):
        raise ValueError(f"cuda_graphs needs device 'cuda' and an algorithm of {GRAPHED}")
    if settings.algorithm not in models.ALGORITHMS:
        raise ValueError(f"algorithm must be one of {models.ALGORITHMS}, found {settings.algorithm!r}")
    if settings.cuda_graphs and settings.grad_checkpointing:
        raise ValueError("cuda_graphs and grad_checkpointing exclude one another")
    models.compile_kernels(settings.compiled)
    snn = models.create_snn(
        settings.network, timesteps=settings.timesteps, algorithm=settings.algorithm, width=settings.width
    )
    if settings.grad_checkpointing:
        snn.set_grad_checkpointing()
    if settings.algorithm in models.ONLINE:
        return Contestant(
            network=snn,
            logits=lambda images, part: snn(images, step=part),
            parts=settings.timesteps,
            versions=versions(),
        )
    call = CudaGraphs(snn, snn) if settings.cuda_graphs else snn
    return Contestant(network=snn, logits=lambda images, part: call(images), versions=versions())
