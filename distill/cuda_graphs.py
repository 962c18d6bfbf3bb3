"""Forward and backward pass of a training step as two CUDA graphs: the GPU is told once what to run, not in each step.

A step of a spiking ResNet-18 launches some eight hundred kernels. Of small images each ends before Python has launched
the next: at a batch of 128 images of 32 pixels an H200 works a quarter of the time. `torch.cuda.make_graphed_callables`
notes the kernels of one forward and one backward pass and launches them again with one call each.

A pass that waits for the GPU, to look at a number, cannot be noted, and to try all the same leaves PyTorch's allocator
and random numbers in the state of a capture. So each pass runs as it is first, with such waits forbidden.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import warnings
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from distill.meters import recorded_rates
from distill.train_config import TrainConfig
from models.compiling import first_line

log = logging.getLogger(__name__)

GRAPHED = ("rate_m", "bptt")
"""Algorithms whose forward pass is the same kernels in each step, behind one another and without a look at a number."""

ROOM = 2.5
"""How often the memory of a pass must be free for its graph: the trials behind a capture have it once, in the ordinary
pool, the graph keeps it for itself, and evaluations need some beside it."""


class CudaGraphs:
    """Calls a network in training, like itself; the kernels of the first call are those of all later ones.

    There is a graph for each shape of the images and for each set of options. Their passes work in the same memory, but
    each has its own images, outputs and gradients. What a pass gives, and the gradients that its backward pass leaves,
    stand in that memory until its next: they must be used by then. And let go of: while a loss of an earlier pass
    lives, so do the nodes behind the parameters, which belong to the stream of that pass, and the capture of another
    set of options fails. A pass that a graph cannot hold, or for which there is too little memory, is said in the log,
    and from then on the network runs as it does without.

    Args:
        model: called with images and options; its parameters and buffers stay where they are.
        network: the part of it whose firing rates are recorded.
    """

    def __init__(self, model: nn.Module, network: nn.Module) -> None:
        self._model, self._network = model, network
        self._passes: dict[Hashable, _Pass] = {}
        self._given_up = False
        self._pool: Any = None
        self.recording = False
        """Whether the next passes find firing rates."""
        self.rates: Mapping[str, Tensor] = {}
        """Of the last pass, if it was `recording`, as `meters.recorded_rates` finds them."""

    @property
    def count(self) -> int:
        """How many graphs there are."""
        return len(self._passes)

    def __call__(self, images: Tensor, **options: Any) -> Any:
        """What ``model(images, **options)`` gives.

        Raises:
            RuntimeError: if a capture fails that a trial let expect to succeed; says which setting leaves it out.
        """
        key = (images.shape, images.stride(), images.dtype, _hashable(options), self.recording)
        if not self._given_up and key not in self._passes:
            self._capture(key, images, options)
        if self._given_up:
            with _recorded(self._network, self.recording) as self.rates:
                return self._model(images, **options)
        found = self._passes[key]
        outputs = found.outputs(found(images))
        self.rates = found.rates
        return outputs

    def close(self) -> None:
        """Gives the graphs and their memory back; from now on the network runs as it does without."""
        self._given_up, self.rates = True, {}
        for found in self._passes.values():
            found.close()
        self._passes.clear()
        self._pool = None
        gc.collect()
        torch.cuda.empty_cache()

    def _capture(self, key: Hashable, images: Tensor, options: Mapping[str, Any]) -> None:
        made = _Pass(self._model, self._network, options, self.recording)
        # trials move running statistics and draw random numbers, as steps do
        with _as_before(self._model, images.device):
            if reason := _trial(made, images):
                log.warning("steps run without CUDA graphs, slower where images are small: %s", reason)
                self.close()
                return
            # passes run one after the other, so that all may work in the same memory
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            static = torch.empty_like(images).copy_(images)
            how: dict[str, Any] = {"allow_unused_input": True, "pool": self._pool}
            if _minds_other_threads():
                how["capture_error_mode"] = "thread_local"
            try:
                with warnings.catch_warnings():
                    # the trials take gradients without adding them to anything
                    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
                    torch.cuda.make_graphed_callables(made, (static,), **how)  # in the place of made.forward
            except RuntimeError as error:  # what is left of a capture would make later errors harder to understand
                raise RuntimeError(
                    f"a training step could not be captured as CUDA graphs: {first_line(error)}; "
                    "--train.cuda_graphs false leaves them out"
                ) from error
        if not self._passes:
            log.info("steps run as CUDA graphs")
        self._passes[key] = made


class _Pass(nn.Module):
    """The model at fixed options, from images to the tensors among its outputs."""

    def __init__(self, model: nn.Module, network: nn.Module, options: Mapping[str, Any], recording: bool) -> None:
        super().__init__()
        self.model = model
        self._outside = (network,)  # a part of the model: once among the modules is enough
        self._options, self._recording = options, recording
        self.train(model.training)

    def train(self, mode: bool = True) -> _Pass:
        self.training = mode  # and leaves alone what modes the model's modules have: some norms may be frozen
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        with _recorded(self._outside[0], self._recording) as self.rates:
            outputs = self.model(images, **self._options)
        leaves, self._form = tree_flatten(outputs)
        self._others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self._trained = [leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor)]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def outputs(self, tensors: tuple[Tensor, ...]) -> Any:
        """The model's output with these tensors in it."""
        pairs = zip(tensors, self._trained, strict=True)
        found = iter([tensor if trained else tensor.detach() for tensor, trained in pairs])
        return tree_unflatten([next(found) if other is None else other[0] for other in self._others], self._form)

    def close(self) -> None:
        """Lets the graph go, which PyTorch has put where it holds this module, and this module holds it."""
        vars(self).pop("forward", None)


def graphs_for(
    accelerator: Accelerator, model: nn.Module, network: nn.Module, config: TrainConfig, suits: bool, workers: int
) -> CudaGraphs | None:
    """Graphs of a training where they serve: on one process's GPU, with nothing that adds up over passes.

    Args:
        model: wrapped for its devices.
        network: the same, as it was given.
        suits: whether the network's passes are the same kernels each time.
        workers: loader processes, whose batches a thread of this process pins.
    """
    if accelerator.device.type != "cuda" or not (config.cuda_graphs and suits):
        return None
    hindrances = {
        "there are several processes": accelerator.num_processes > 1,
        # a first gradient is the graph's own memory, which the next pass would overwrite before it is added to
        "train.accumulate is above 1": config.accumulate > 1,
        "train.grad_checkpointing runs blocks again": config.grad_checkpointing,
        # the thread's own calls would fail while a pass is captured
        "this PyTorch captures none beside loader processes (data.workers)": workers > 0 and not _minds_other_threads(),
    }
    for reason, there in hindrances.items():
        if there:
            log.info("steps run without CUDA graphs: %s", reason)
            return None
    return CudaGraphs(model, network)


def _trial(made: _Pass, images: Tensor) -> str | None:
    """Runs the pass as it is; says why it had better not be captured, if so."""
    device = images.device
    _there_and_back(made, images)  # compiles
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with _waits_forbidden():
            _there_and_back(made, images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return first_line(error)
    torch.cuda.synchronize(device)
    needed = ROOM * (torch.cuda.max_memory_allocated(device) - before)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return f"they need {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free" if needed > free else None


def _there_and_back(made: _Pass, images: Tensor) -> None:
    trained = [output for output in made(images) if output.requires_grad]
    parameters = [parameter for parameter in made.parameters() if parameter.requires_grad]
    torch.autograd.grad(trained, parameters, [torch.zeros_like(output) for output in trained], allow_unused=True)


@contextlib.contextmanager
def _waits_forbidden() -> Iterator[None]:
    """Operations that wait for the GPU raise a RuntimeError in here."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def _as_before(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Buffers and random numbers are behind it what they were."""
    buffers = list(model.buffers())
    kept, random = [buffer.clone() for buffer in buffers], torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)
        torch.cuda.set_rng_state(random, device)


def _recorded(network: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
    return recorded_rates(network) if wanted else contextlib.nullcontext({})


def _minds_other_threads() -> bool:
    """Whether PyTorch can be told to let other threads call CUDA during a capture; 2.11 cannot."""
    return "capture_error_mode" in inspect.signature(torch.cuda.make_graphed_callables).parameters


def _hashable(options: Mapping[str, Any]) -> Hashable:
    return tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(options.items()))
