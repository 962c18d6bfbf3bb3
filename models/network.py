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
from huggingface_hub import ModelHubMixin
from spikingjelly.activation_based.base import StepModule
from torch import Tensor, nn

import models.rules  # noqa: F401  (fills the table of rules)
from models.checkpointing import check_checkpointing, checkpointing
from models.compiling import uncompiled
from models.dsr import DSRNeuron
from models.encoding import PoissonEncoder
from models.feedback import FEEDBACK_ALGORITHMS, FeedbackLoop
from models.hub import OnHub
from models.inference import Inference
from models.online import ONLINE, reset_online_nodes, use_online_nodes
from models.spiketrain import Pass, SpikeTrain, UnsupportedOperationError
from models.tape import Tape
from models.traversal import Reached, counting_no_batch, path_in_traceback, random_numbers

ALGORITHMS = ("rate_m", "rate_s", "bptt", "ottt", "sltt", "dsr", *FEEDBACK_ALGORITHMS)
"""The gradient in training. rate_m: rate-based backpropagation, all steps at once; rate_s: the same a step at a time,
in memory that does not grow with T; bptt: surrogate gradients through time; ottt, sltt: forward in time, a backward
pass each step (`models.online`); dsr: differentiation on spike representation, with neurons of its own (`models.dsr`);
ide, spide: of feedback networks, implicit differentiation on their equilibrium, spide by backward spikes
(`models.feedback`).
"""

TWIN_ALGORITHMS = ("rate_m", "rate_s", "bptt")
"""Those that train a spiking twin; the others serve the networks of the papers."""

RATE_PASS = ("rate_m", *FEEDBACK_ALGORITHMS)
"""The algorithms that train on spike trains with a rate, all steps in one pass."""

PER_STEP = ("bptt", "ottt", "sltt")
"""The algorithms whose logits of each step have a gradient of their own."""


class SpikingNetwork(Inference, OnHub, nn.Module, StepModule):
    """Mixin of every spiking network: ``logits = snn(images)``, the mean over `timesteps` steps.

    In training the backward pass is that of `algorithm`; in evaluation there is none. The state of all neurons starts
    at rest in each call and is dropped after it. With SpikingJelly's ``functional.set_step_mode(snn, "s")`` a call
    is one time step on plain tensors, with state in the neurons, as for any SpikingJelly network.

    Attributes:
        timesteps: T, settable.
        algorithm: one of `ALGORITHMS`; change it with `set_algorithm`.
        in_chans: channels of the images.
        input_encoder: makes frames (T, B, C, H, W) of images (B, C, H, W) and T; None for the same image each step.
    """

    timesteps: int
    algorithm: str
    in_chans: int
    input_encoder: PoissonEncoder | None
    _next_step: int
    _checkpoints_blocks: bool
    spec: dict[str, Any]
    """How the network was made, in JSON types: what `models.save_snn` writes and `models.load_snn` rebuilds from."""

    def forward(  # type: ignore[override]
        self, images: Tensor, *, step: int | None = None, per_step: bool = False, until: str | None = None
    ) -> Tensor:
        """
        Args:
            images: (B, C, H, W), or (T, B, C, H, W), a frame for each step.
            step: of the algorithms "ottt" and "sltt" in training: which step to run, from 0 to T - 1 in turn, each
                followed by its backward pass.
            per_step: give the logits of each step.
            until: a module's name: run nothing behind it and give the rate of its output instead of logits.

        Returns:
            logits (B, classes), the mean over time; (T, B, classes) if `per_step`; those of one step, (B, classes),
            with `step` or in step mode "s"; with `until` the mean over time of that module's output, (B, C, ...).

        Raises:
            ValueError: for another number of axes, channels or frames than the network takes, values that the encoder
                does not take, logits of each step where the algorithm has no gradient of them, or a module to stop at
                that is none or does not run.
            UnsupportedOperationError: names the operation that has no rule and the module that asked for it.
        """
        if until is not None:
            return self._until(images, until, step, per_step)
        if self.step_mode == "s":
            for name, module in self.named_modules():
                # an export puts another forward in the place of a gate's, to note what it is given
                if getattr(module, "needs_all_steps", False) and "forward" not in vars(module):
                    raise UnsupportedOperationError(
                        f'{name!r}, a gate, is computed on the rate of all steps: there is no step mode "s"'
                    )
            if self.input_encoder is not None:
                images = self.input_encoder(images, 1)[0]
            return super().forward(images)  # type: ignore[misc]
        self._check(images)
        online = self.training and self.algorithm in ONLINE
        if online != (step is not None):
            wanted = "needs step=0 to T - 1 in turn, a backward pass each" if online else "runs all steps in one call"
            raise ValueError(f"{self.algorithm} {wanted}" + ("" if self.training else " in evaluation mode"))
        if per_step and step is not None:
            raise ValueError("per_step gives the logits of all steps, step those of one: not both")
        if per_step and self.training and self.algorithm not in PER_STEP:
            raise ValueError(f"{self.algorithm} has no gradient of each step's logits; those that have: {PER_STEP}")
        if online:
            return self._online_step(images, step)
        images = (
            images if self.input_encoder is None or images.ndim == 5 else self.input_encoder(images, self.timesteps)
        )
        if self.training and self.algorithm == "rate_s":
            return self._step_by_step(images).rate
        kind: Pass = ("rate" if self.algorithm in RATE_PASS else "graph") if self.training else "plain"
        if images.ndim == 4:
            output = self._traverse(SpikeTrain.constant(images, self.timesteps, kind))
        else:
            output = self._traverse(SpikeTrain.from_stream(images, kind))
        return output.stream if per_step else output.rate

    def _until(self, images: Tensor, name: str, step: int | None, per_step: bool) -> Tensor:
        """The rate of a module's output: its hook ends each traversal of the network there."""
        if step is not None or per_step or self.step_mode == "s":
            raise ValueError("until runs whole images: it goes with neither step, per_step nor step mode s")
        try:
            module = self.get_submodule(name)
        except AttributeError:
            allowed = [child for child, _ in self.named_children()]
            raise ValueError(f"until: the network has no module {name!r}; it has {allowed}") from None
        reached = False

        def stop(module: nn.Module, args: tuple, output: Any) -> None:
            nonlocal reached
            if not isinstance(output, SpikeTrain):
                raise ValueError(f"until: the module {name!r} yields {type(output).__name__}, not one spike train")
            if output.kind == "plain_step":
                raise ValueError(f"until: the module {name!r} is inside of a feedback loop, which runs step by step")
            reached = True
            raise Reached(output)

        handle = module.register_forward_hook(stop)
        try:
            rate = self.forward(images)
        finally:
            handle.remove()
        if not reached:
            raise ValueError(f"until: the module {name!r} does not run in a forward pass")
        return rate

    def _traverse(self, train: SpikeTrain) -> SpikeTrain:
        """The network's own code on a train, up to its end or to the module at which somebody stops it."""
        try:
            with checkpointing(self) if self._checkpoints_blocks else contextlib.nullcontext():
                return super().forward(train)  # type: ignore[misc]
        except Reached as reached:
            return reached.output
        except UnsupportedOperationError as error:
            raise UnsupportedOperationError(f"{error}, in {path_in_traceback(self, error)}") from error

    def _step_by_step(self, images: Tensor) -> SpikeTrain:
        """rate_s: T traversals without a graph, then one of the rates that has it."""
        tape = Tape(self.timesteps)
        same_numbers = random_numbers(images.device)
        with torch.no_grad():
            for t in range(self.timesteps):
                same_numbers()  # one dropout mask for all steps
                tape.rewind()
                self._traverse(SpikeTrain.constant(images if images.ndim == 4 else images[t], 1, "step", tape))
        tape.rewind()
        same_numbers()
        rate = images if images.ndim == 4 else images.mean(0)
        with counting_no_batch(self):
            return self._traverse(SpikeTrain.constant(rate, 1, "replay", tape))

    def _online_step(self, images: Tensor, step: int | None) -> Tensor:
        """OTTT and SLTT: one step with its own graph; the neurons' nodes keep the state, without one."""
        if step not in (0, self._next_step):
            allowed = f"{self._next_step} or 0" if self._next_step else "0"
            raise ValueError(f"step must be {allowed}, found {step}: the {self.timesteps} steps of a batch run in turn")
        assert step is not None
        if step == 0:
            reset_online_nodes(self)
        if images.ndim == 4 and self.input_encoder is not None:
            images = self.input_encoder(images, 1)[0]
        frame = images if images.ndim == 4 else images[step]
        kind: Pass = self.algorithm  # type: ignore[assignment]
        logits = self._traverse(SpikeTrain.constant(frame, 1, kind)).rate
        self._next_step = (step + 1) % self.timesteps
        if step == self.timesteps - 1:
            reset_online_nodes(self)
        return logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory in training: a block keeps its input alone and runs again in the backward pass.

        Gradients, running statistics and logits stay what they are (`models.checkpointing`). Most is saved with "bptt",
        in deep networks, and where blocks pass spikes, not currents, on to one another.

        Raises:
            ValueError: with another algorithm than rate_m, bptt or dsr, or for a network without blocks.
        """
        if enable:
            check_checkpointing(self, self.algorithm)
        self._checkpoints_blocks = enable

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
            self._next_step = 0  # an online batch that was under way is over
        super().__setattr__(name, value)


def check_timesteps(timesteps: int) -> None:
    if not isinstance(timesteps, int) or isinstance(timesteps, bool) or timesteps < 1:
        raise ValueError(f"timesteps must be an integer of at least 1, found {timesteps!r}")


@contextlib.contextmanager
def probing(snn: SpikingNetwork, timesteps: int) -> Iterator[None]:
    """Evaluation mode at another T, without graph, encoder or compilation; all that comes back after it."""
    modes, own = {module: module.training for module in snn.modules()}, (snn.timesteps, snn.input_encoder)
    snn.eval()
    snn.timesteps, snn.input_encoder = timesteps, None
    try:
        with torch.no_grad(), uncompiled():
            yield
    finally:
        snn.timesteps, snn.input_encoder = own
        for module, training in modes.items():
            module.training = training


def set_algorithm(snn: nn.Module, algorithm: str) -> nn.Module:
    """Chooses the gradient of the next training step; parameters and buffers stay as they are.

    Raises:
        ValueError: if `algorithm` is not one of `ALGORITHMS`, or the network is not made for it: dsr has neurons of its
            own, a twin trains with rate_m, rate_s or bptt, and feedback networks with ide and spide, which train no
            other.
        TypeError: if `snn` is not a spiking network.
    """
    if not isinstance(snn, SpikingNetwork):
        raise TypeError(f"set_algorithm takes a spiking network, found {type(snn).__name__}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, found {algorithm!r}")
    if snn.spec.get("kind") == "twin" and algorithm not in TWIN_ALGORITHMS:
        raise ValueError(
            f"{algorithm} trains the networks of models.list_snns(); a twin takes one of {TWIN_ALGORITHMS}"
        )
    has_dsr = any(isinstance(module, DSRNeuron) for module in snn.modules())
    if has_dsr != (algorithm == "dsr"):
        raise ValueError(f"dsr has neurons of its own: make the network with algorithm={algorithm!r} from the start")
    loops = [module for module in snn.modules() if isinstance(module, FeedbackLoop)]
    if bool(loops) != (algorithm in FEEDBACK_ALGORITHMS):
        allowed = FEEDBACK_ALGORITHMS if loops else tuple(a for a in ALGORITHMS if a not in FEEDBACK_ALGORITHMS)
        what = f"has {'a' if loops else 'no'} feedback loop"
        raise ValueError(f"{type(snn).__name__} {what}: algorithm must be one of {allowed}, found {algorithm!r}")
    for loop in loops:
        loop.algorithm = algorithm
    if snn._checkpoints_blocks:
        check_checkpointing(snn, algorithm)
    use_online_nodes(snn, algorithm)
    snn._next_step = 0  # what was under way is over
    snn.algorithm = algorithm
    return snn


def as_spiking(
    network: nn.Module,
    *,
    timesteps: int,
    algorithm: str,
    in_chans: int,
    encoder: PoissonEncoder | None = None,
    spec: dict[str, Any],
) -> SpikingNetwork:
    """Turns a network whose activations are neurons into a `SpikingNetwork`, in place.

    Raises:
        ValueError: if a module or parameter of the network has the name of an attribute of spiking networks.
    """
    own = {name for name, _ in network.named_children()} | network._parameters.keys() | network._buffers.keys()
    if taken := sorted(own & _attributes()):
        raise ValueError(f"{type(network).__name__} has a module or parameter of a name that is taken: {taken}")
    if callable(switch := getattr(network, "set_grad_checkpointing", None)):
        switch(False)  # timm's own knows no spike trains: a teacher may have it
    network.__class__ = _spiking_class(type(network))  # type: ignore[arg-type]
    assert isinstance(network, SpikingNetwork)
    network._step_mode = "m"
    network.timesteps = timesteps
    network.in_chans = in_chans
    network.input_encoder = encoder
    network._next_step = 0
    network._checkpoints_blocks = False
    network.spec = spec
    network.card = None
    set_algorithm(network, algorithm)
    return network


@functools.cache
def _attributes() -> set[str]:
    """The names under which a spiking network is asked for what it is and does."""
    classes = (
        SpikingNetwork,
        *(base for base in SpikingNetwork.__mro__ if issubclass(base, (Inference, ModelHubMixin))),
    )
    return {name for base in classes for name in {*vars(base), *base.__annotations__} if not name.startswith("__")}


@functools.cache
def _spiking_class(base: type) -> type:
    return type(f"Spiking{base.__name__}", (SpikingNetwork, base), {"__module__": __name__, "__doc__": base.__doc__})
