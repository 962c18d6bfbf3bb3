"""Forward and backward pass of a training step as two CUDA graphs: the GPU is told once what to run, not in each step.

A step of a spiking ResNet-18 launches some eight hundred kernels. Of small images each ends before Python has launched
the next: at a batch of 128 images of 32 pixels an H200 works a quarter of the time. `torch.cuda.make_graphed_callables`
notes the kernels of one forward and one backward pass and launches them again with one call each.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from distill.meters import recorded_rates
from distill.train_config import TrainConfig

log = logging.getLogger(__name__)

GRAPHED = ("rate_m", "bptt")
"""Algorithms whose forward pass is the same kernels in each step, behind one another and without a look at a number."""


class CudaGraphs:
    """Calls a network in training, like itself; the kernels of the first call are those of all later ones.

    There is a graph for each shape of the images and for each set of options, all in the memory that the largest needs.
    What a pass gives, and the gradients that
    its backward pass leaves, stand in the same memory until the next: they must be used by then. The first pass that
    cannot be captured is said in the log, and from then on the network runs as it does without.

    Args:
        model: called with images and options; its parameters and buffers stay where they are.
        network: the part of it whose firing rates are recorded.
    """

    def __init__(self, model: nn.Module, network: nn.Module) -> None:
        self._model, self._network = model, network
        self._passes: dict[Hashable, _Pass] | None = {}
        self._pool: Any = None
        self.recording = False
        """Whether the next passes find firing rates."""
        self.rates: Mapping[str, Tensor] = {}
        """Of the last pass, if it was `recording`, as `meters.recorded_rates` finds them."""

    def __call__(self, images: Tensor, **options: Any) -> Any:
        """What ``model(images, **options)`` gives."""
        key = (images.shape, images.stride(), images.dtype, _hashable(options), self.recording)
        if self._passes is not None and key not in self._passes:
            self._capture(key, images, options)
        if self._passes is None:
            with _recorded(self._network, self.recording) as self.rates:
                return self._model(images, **options)
        found = self._passes[key]
        outputs = found.outputs(found.graphed(images))
        self.rates = found.rates
        return outputs

    def _capture(self, key: Hashable, images: Tensor, options: Mapping[str, Any]) -> None:
        assert self._passes is not None
        made = _Pass(self._model, self._network, options, self.recording)
        buffers = list(self._model.buffers())
        # trials move running statistics and draw random numbers, as steps do
        kept, random = [buffer.clone() for buffer in buffers], torch.cuda.get_rng_state(images.device)
        try:
            # passes run one after the other, so that all may work in the same memory
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            static = torch.empty_like(images).copy_(images)
            how: dict[str, Any] = {"allow_unused_input": True, "pool": self._pool}
            if "capture_error_mode" in inspect.signature(torch.cuda.make_graphed_callables).parameters:
                how["capture_error_mode"] = "thread_local"  # a loader's thread may pin memory meanwhile
            with warnings.catch_warnings():
                # the trials take gradients without adding them to anything
                warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
                graphed: Any = torch.cuda.make_graphed_callables(made, (static,), **how)
        except (RuntimeError, AssertionError) as error:
            self._passes = None
            torch.cuda.empty_cache()
            log.warning("steps run without CUDA graphs, slower where images are small: %s", _first_line(error))
        else:
            made.graphed = graphed
            self._passes[key] = made
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)
        torch.cuda.set_rng_state(random, images.device)


class _Pass(nn.Module):
    """The model at fixed options, from images to the tensors among its outputs."""

    graphed: Callable[[Tensor], tuple[Tensor, ...]]

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


def graphs_for(
    accelerator: Accelerator, model: nn.Module, network: nn.Module, config: TrainConfig, suits: bool
) -> CudaGraphs | None:
    """Graphs of a training where they serve: on one process's GPU, with nothing that adds up over passes.

    Args:
        model: wrapped for its devices.
        network: the same, as it was given.
        suits: whether the network's passes are the same kernels each time.
    """
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cuda"
    # a first gradient is the graph's own memory, which the next pass would overwrite before it is added to
    once = config.accumulate == 1
    if not (config.cuda_graphs and suits and alone and once and not config.grad_checkpointing):
        return None
    return CudaGraphs(model, network)


def _recorded(network: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
    return recorded_rates(network) if wanted else contextlib.nullcontext({})


def _hashable(options: Mapping[str, Any]) -> Hashable:
    return tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(options.items()))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
