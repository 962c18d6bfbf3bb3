"""What makes any network a spiking one: it encodes images as a spike train and reads logits off the last layer.

`as_spiking` gives a network whose activations are neurons the class ``Spiking<Class>``, a subclass of its own class:
module names, parameters and the `forward` code stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from spikingjelly.activation_based.base import StepModule
from torch import Tensor, nn

import models.rules  # noqa: F401  (fills the table of rules)
from models.kernels import uncompiled
from models.spiketrain import Pass, SpikeTrain, UnsupportedOperationError

ALGORITHMS = ("rate_m", "bptt")
"""rate_m: rate-based backpropagation, all steps at once; bptt: surrogate gradients through time."""


class SpikingNetwork(nn.Module, StepModule):
    """Mixin of every spiking network: ``logits = snn(images)``, the mean over `timesteps` steps.

    In training the backward pass is that of `algorithm`; in evaluation there is none. The state of all neurons starts
    at rest in each call and is dropped after it. With SpikingJelly's ``functional.set_step_mode(snn, "s")`` a call
    is one time step on plain tensors, with state in the neurons, as for any SpikingJelly network.

    Attributes:
        timesteps: T, settable.
        algorithm: one of `ALGORITHMS`; change it with `set_algorithm`.
        in_chans: channels of the images.
    """

    timesteps: int
    algorithm: str
    in_chans: int
    spec: dict[str, Any]
    """How the network was made, in JSON types: what `models.save_snn` writes and `models.load_snn` rebuilds from."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """
        Args:
            images: (B, C, H, W), the same at each step, or (T, B, C, H, W), a frame for each step.

        Returns:
            logits (B, classes), the mean over time; those of one step, (B, classes), in step mode "s".

        Raises:
            ValueError: for another number of axes, channels or frames than the network takes.
            UnsupportedOperationError: names the operation that has no rule and the module that asked for it.
        """
        if self.step_mode == "s":
            return super().forward(images)  # type: ignore[misc]
        self._check(images)
        kind: Pass = ("graph" if self.algorithm == "bptt" else "rate") if self.training else "plain"
        if images.ndim == 4:
            train = SpikeTrain.constant(images, self.timesteps, kind)
        else:
            train = SpikeTrain.from_stream(images, kind)
        try:
            output = super().forward(train)  # type: ignore[misc]
        except UnsupportedOperationError as error:
            raise UnsupportedOperationError(f"{error}, in {_path_in_traceback(self, error)}") from error
        return output.rate

    def _check(self, images: Tensor) -> None:
        if images.ndim not in (4, 5):
            raise ValueError(f"images must be (B, C, H, W) or (T, B, C, H, W), found shape {tuple(images.shape)}")
        if images.shape[-3] != self.in_chans:
            raise ValueError(f"the network takes images of {self.in_chans} channels, found {images.shape[-3]}")
        if images.ndim == 5 and images.shape[0] != self.timesteps:
            raise ValueError(f"the network runs {self.timesteps} steps, found {images.shape[0]} frames")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "timesteps":
            check_timesteps(value)
        super().__setattr__(name, value)


def check_timesteps(timesteps: int) -> None:
    if not isinstance(timesteps, int) or isinstance(timesteps, bool) or timesteps < 1:
        raise ValueError(f"timesteps must be an integer of at least 1, found {timesteps!r}")


@contextlib.contextmanager
def probing(snn: SpikingNetwork, timesteps: int) -> Iterator[None]:
    """Evaluation mode at another T, without graph or compilation; T and every module's own mode come back after it."""
    modes, own = {module: module.training for module in snn.modules()}, snn.timesteps
    snn.eval()
    snn.timesteps = timesteps
    try:
        with torch.no_grad(), uncompiled():
            yield
    finally:
        snn.timesteps = own
        for module, training in modes.items():
            module.training = training


def set_algorithm(snn: nn.Module, algorithm: str) -> nn.Module:
    """Chooses the gradient of the next training step; parameters and buffers stay as they are.

    Raises:
        ValueError: if `algorithm` is not one of `ALGORITHMS`.
        TypeError: if `snn` is not a spiking network.
    """
    if not isinstance(snn, SpikingNetwork):
        raise TypeError(f"set_algorithm takes a spiking network, found {type(snn).__name__}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, found {algorithm!r}")
    snn.algorithm = algorithm
    return snn


def as_spiking(network: nn.Module, *, timesteps: int, algorithm: str, in_chans: int, spec: dict) -> SpikingNetwork:
    """Turns a network whose activations are neurons into a `SpikingNetwork`, in place."""
    network.__class__ = _spiking_class(type(network))  # type: ignore[arg-type]
    assert isinstance(network, SpikingNetwork)
    network._step_mode = "m"
    network.timesteps = timesteps
    network.in_chans = in_chans
    network.spec = spec
    set_algorithm(network, algorithm)
    return network


@functools.cache
def _spiking_class(base: type) -> type:
    return type(f"Spiking{base.__name__}", (SpikingNetwork, base), {"__module__": __name__, "__doc__": base.__doc__})


def _path_in_traceback(network: nn.Module, error: BaseException) -> str:
    """The name of the innermost module whose code was running when `error` was raised."""
    names = {id(module): name for name, module in network.named_modules()}
    path, trace = "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        path = names.get(id(module), "") or path
        trace = trace.tb_next
    if not path:
        return f"the forward of {type(network).__name__}"
    return f"module {path!r} ({type(network.get_submodule(path)).__name__})"
