"""One training step of a contestant: its time, its memory, and what of its time is not convolution.

A step is zero_grad, forward, cross-entropy, backward and an SGD step. A megabyte is 10^6 bytes.
"""

from __future__ import annotations

import contextlib
import math
import re
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import machine
from benchmarks.contestants import Contestant, Settings, contestant

MB = 1e6
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PRODUCTS = re.compile(r"aten::(\w*conv\w*|(mkldnn_)?linear(_backward)?|_?(add|badd)?b?mm(_\w+)?)")
"""PyTorch's convolutions and matrix products, forward and backward."""
SMALL_MAPS = "convolution of small maps"
"""`models.small_maps.PROFILED_AS`; a peer must not import `models`."""


def measure(settings: Settings) -> dict[str, Any]:
    """Builds the contestant and measures it; times are medians over the timed steps.

    Returns:
        what `benchmarks/training_step.py` prints: JSON types only.
    """
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' where PyTorch finds no GPU, found 'cuda'")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    step = Step(contestant(settings), settings, device)
    for _ in range(settings.warmup):
        step()
    forget_peak_memory(device)
    began, cpu_began = time.perf_counter(), time.process_time()
    times = [step() for _ in range(settings.steps)]
    wall, cpu_time = time.perf_counter() - began, time.process_time() - cpu_began
    peak = peak_memory_mb(device)  # before anything that is not a plain training step
    whole = [1000 * t["step"] for t in times]
    first, median, third = statistics.quantiles(whole, n=4, method="inclusive")
    row = {name: getattr(settings, name) for name in ("network", "algorithm", "timesteps", "batch", "precision")}
    row |= {name: getattr(settings, name) for name in ("peer", "memory_format", "width", "image_size", "seed")}
    inside = None if settings.cuda_graphs else step  # a graph's memory is its own, and its kernels have no operators
    return row | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cuda_graphs": settings.cuda_graphs,
        "grad_checkpointing": settings.grad_checkpointing,
        "compiled": settings.peer is None and _compiling(),
        "warmup": settings.warmup,
        "steps": settings.steps,
        "images_per_second": 1000 * settings.batch / median,
        "step_ms": median,
        "step_ms_spread": {"quartile_1": first, "quartile_3": third},
        "forward_ms": 1000 * statistics.median(t["forward"] for t in times),
        "backward_ms": 1000 * statistics.median(t["backward"] for t in times),
        "peak_memory_mb": inside and peak,
        # what a checkpointed block keeps, autograd does not save
        "saved_activation_mb": None if settings.grad_checkpointing else inside and inside.saved_activation_mb(),
        "non_convolution_share": inside and inside.non_convolution_share(),
        "cpu_share": cpu_time / wall / torch.get_num_threads(),
        "loss": step.checked_loss(),
        "versions": step.contestant.versions | machine.cpu(),
    }


class Step:
    """One training step on fixed random images (B, 3, H, W) and labels; a call runs it and times it in seconds."""

    def __init__(self, contestant: Contestant, settings: Settings, device: torch.device) -> None:
        self.contestant, self.device = contestant, device
        dtype = torch.float64 if settings.precision == "fp64" else torch.float32
        channels_last = settings.memory_format == "channels_last"
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        contestant.network.to(device, dtype).to(memory_format=memory_format).train()
        size = (settings.batch, 3, settings.image_size, settings.image_size)
        self.images = torch.randn(size).to(device, dtype, memory_format=memory_format)
        self.labels = torch.randint(10, (settings.batch,)).to(device)
        self.optimizer = torch.optim.SGD(contestant.network.parameters(), lr=0.01, momentum=0.9)
        self.autocast = _AUTOCAST.get(settings.precision)
        # in a graph copies of the weights must not outlive the pass; in one pass none is used twice
        self.caching = not settings.cuda_graphs
        self.loss = torch.zeros(())

    def __call__(self) -> dict[str, float]:
        forward = backward = 0.0
        start = self._clock()
        self.optimizer.zero_grad()
        for part in range(self.contestant.parts):
            before = self._clock()
            loss = self._forward(part)
            between = self._clock()
            loss.backward()
            forward, backward = forward + between - before, backward + self._clock() - between
        self.optimizer.step()
        self.contestant.finish()
        self.loss = loss.detach()
        return {"step": self._clock() - start, "forward": forward, "backward": backward}

    def _forward(self, part: int) -> Tensor:
        enabled = self.autocast is not None
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=enabled, cache_enabled=self.caching):
            logits = self.contestant.logits(self.images, part)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return cross_entropy(logits.to(dtype), self.labels) / self.contestant.parts

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def checked_loss(self) -> float:
        """Of the last part of the last step, in nats; a network that diverged fires otherwise, at another speed."""
        loss = self.loss.item() * self.contestant.parts
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} after the last step: the network diverged")
        return loss

    def saved_activation_mb(self) -> float:
        """What the graph of one forward pass keeps for the backward pass; of several parts, the largest."""
        largest = 0
        self.optimizer.zero_grad()
        for part in range(self.contestant.parts):
            with saved_bytes(self.contestant.network) as count:
                loss = self._forward(part)
            largest = max(largest, count())
            loss.backward()
        self.contestant.finish()
        return largest / MB

    def non_convolution_share(self, steps: int = 2) -> float:
        """Share of a step's time outside of convolutions and matrix products; fused passes count as outside.

        Inside are PyTorch's operators and our convolutions of small maps, with the copies that they make, as
        PyTorch's make theirs. On a CPU self time of operators in the time of the steps; on a GPU time of kernels in
        that of all kernels.
        """
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
        with profile(activities=activities) as run:
            for _ in range(steps):
                with record_function("training_step"):
                    self()
        events = [event for event in run.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
        if on_gpu:  # a kernel's time belongs to the operator that launched it
            products = (event for event in events if _PRODUCTS.fullmatch(event.key))
            total = sum(event.self_device_time_total for event in events)
            return 1 - sum(event.self_device_time_total for event in products) / total
        total = sum(event.cpu_time_total for event in events if event.key == "training_step")
        inside = (event for event in run.events() if _PRODUCTS.fullmatch(event.name) or _in_small_maps(event))
        return 1 - sum(event.self_cpu_time_total for event in inside) / total


def _in_small_maps(event: Any) -> bool:
    """Whether a profiler's event is of our convolutions of small maps."""
    while event is not None and event.name != SMALL_MAPS:
        event = event.cpu_parent
    return event is not None


@contextlib.contextmanager
def saved_bytes(network: nn.Module) -> Iterator[Callable[[], int]]:
    """Gives a function that counts the bytes saved for the backward pass of what ran inside, and are so still.

    A storage that several tensors share counts once and whole. The network's parameters and buffers do not count, nor
    do copies of a parameter in another type, which autocast makes (on a CPU ours for it, which both passes use).
    """
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()
    own = [*network.parameters(), *network.buffers()]
    own_storages = {tensor.untyped_storage().data_ptr() for tensor in own}
    own_types = {tensor.shape: tensor.dtype for tensor in network.parameters()}

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())
        alive.add(saved)
        return saved

    def count() -> int:
        storages = {}
        for saved in alive:
            cast = own_types.get(saved.tensor.shape, saved.tensor.dtype) != saved.tensor.dtype
            storage = saved.tensor.untyped_storage()
            if not cast and storage.data_ptr() not in own_storages:
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield count


class _Saved:
    """A tensor that a graph keeps; gone when the graph is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def forget_peak_memory(device: torch.device) -> None:
    """Has `peak_memory_mb` start anew on a GPU: what trials of kernels took in the warm-up is no step's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that the process had resident so far; on a GPU, that PyTorch had allocated there since
    `forget_peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of one ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def _compiling() -> bool:
    """Whether the fused passes still are compiled: they fall back where no compiler works."""
    from models.compiling import is_compiling

    return is_compiling()
