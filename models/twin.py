"""The spiking twin of an analogue network: its module tree, copied, with neurons in place of the activations.

Nothing is hard-coded for a family: activations are found by type wherever timm puts them, and a probe image that runs
through the finished twin finds whatever cannot spike (functional activations, gates, layer norm) and names it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import Literal

import timm.layers.activations as timm_activations
import timm.layers.activations_me as timm_activations_me
import torch
from torch import Tensor, nn

from models.ann import create_ann, image_channels
from models.dynamics import NeuronConfig
from models.encoding import PoissonEncoder
from models.network import SpikingNetwork, as_spiking, check_timesteps, probing
from models.neuron import SpikingNeuron
from models.rules import constant_of_rate
from models.spiketrain import SpikeTrain, UnsupportedOperationError


def _timm_types(*names: str) -> tuple[type[nn.Module], ...]:
    modules = (timm_activations, timm_activations_me)
    return tuple(getattr(module, name) for module in modules for name in names if hasattr(module, name))


ACTIVATIONS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU),
    *(nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish),
    *_timm_types("Swish", "SwishMe", "Mish", "MishMe", "HardSwish", "HardSwishMe", "HardMish", "HardMishMe"),
    *_timm_types("GELU", "GELUTanh", "QuickGELU", "PReLU"),
)
"""What becomes a neuron."""

GATES: tuple[type[nn.Module], ...] = (
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softmax),
    *_timm_types("Sigmoid", "Tanh", "HardSigmoid", "HardSigmoidMe"),
)
"""What multiplies a signal rather than passes one on: kept analogue or refused."""


class OnRate(nn.Module):
    """An analogue activation inside a gate: computed on the firing rate, constant over all steps."""

    needs_all_steps = True

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        if hasattr(activation, "inplace"):
            activation.inplace = False  # type: ignore[assignment]  # the rate belongs to the layer before, too

    def forward(self, x: SpikeTrain | Tensor) -> SpikeTrain | Tensor:
        return constant_of_rate(x, self.activation) if isinstance(x, SpikeTrain) else self.activation(x)


def spiking_twin(
    ann: nn.Module,
    timesteps: int = 4,
    neuron: NeuronConfig | None = None,
    init: Literal["teacher", "scratch"] = "teacher",
    algorithm: str = "rate_m",
    gates: Literal["refuse", "keep"] = "refuse",
    input_size: tuple[int, int, int] | None = None,
    encoder: PoissonEncoder | None = None,
) -> SpikingNetwork:
    """Copies a network with neurons in place of its activations. The source is left as it is.

    Args:
        ann: a timm network (or one of its manner: images in, logits out).
        timesteps: T, at least 1.
        neuron: the neurons' constants; None for the defaults.
        init: "teacher" copies the weights; "scratch" draws them anew as the network's own initialisation does.
        algorithm: the gradient in training: "rate_m", "rate_s" (not with gates) or "bptt".
        gates: "refuse" raises on a gate (squeeze-and-excitation and the like); "keep" leaves it analogue: it is
            computed on the rate and multiplied onto every step.
        input_size: (C, H, W) of the probe image; None for what the network's pretrained configuration says.
        encoder: of images; None for the same image at each step.

    Raises:
        ValueError: for a value outside of those named above, a gate under ``gates="refuse"`` (naming it), or a
            network without a single activation to replace.
        UnsupportedOperationError: names the operation and the module that cannot run on spikes.
        TypeError: if `ann` is no network.
    """
    _check_choice("init", init, ("teacher", "scratch"))
    _check_choice("gates", gates, ("refuse", "keep"))
    if not isinstance(ann, nn.Module):
        raise TypeError(f"spiking_twin takes a network, found {ann!r}; make one with models.create_ann(name)")
    check_timesteps(timesteps)
    neuron = neuron or NeuronConfig()
    ann_spec = getattr(ann, "ann_spec", None)
    twin = _fresh_copy(ann, ann_spec) if init == "scratch" else copy.deepcopy(ann)
    twin.__dict__.pop("ann_spec", None)
    _drop_instance_forward(twin)
    input_size = input_size or _input_size(ann)
    twin.zero_grad(set_to_none=True)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)  # a frozen teacher has a trainable twin
    _replace_activations(twin, neuron, gates)
    spec = {
        "kind": "twin",
        "ann": ann_spec,
        "timesteps": timesteps,
        "neuron": dataclasses.asdict(neuron),
        "algorithm": algorithm,
        "gates": gates,
        "input_size": list(input_size),
        "encoder": None if encoder is None else dataclasses.asdict(encoder),
    }
    snn = as_spiking(twin, timesteps=timesteps, algorithm=algorithm, in_chans=input_size[0], encoder=encoder, spec=spec)
    _probe(snn, input_size)
    return snn


def _drop_instance_forward(twin: nn.Module) -> None:
    """Accelerate wraps `forward` on the instance, where it would hide that of the spiking network."""
    wrapped = vars(twin).pop("_original_forward", None)
    forward = vars(twin).pop("forward", None)
    if forward is not None and wrapped is None and getattr(forward, "__func__", None) is not type(twin).forward:
        raise ValueError(f"the forward of this {type(twin).__name__} was replaced by hand: a twin would not run it")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, found {value!r}")


def _input_size(ann: nn.Module) -> tuple[int, int, int]:
    """What the network says of its images: enough for the probe, whose size matters to few networks."""
    in_chans = image_channels(ann)
    size = (getattr(ann, "pretrained_cfg", None) or {}).get("input_size") or (in_chans, 64, 64)
    return (in_chans, size[1], size[2])


def _replace_activations(network: nn.Module, neuron: NeuronConfig, gates: str) -> None:
    """One traversal: every activation becomes a neuron, but for those of a gate."""
    names = sorted(name for name, m in network.named_modules() if isinstance(m, GATES))
    if names and gates == "refuse":
        shown = ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"{type(network).__name__} has gates, which do not spike: {shown}. "
            'gates="keep" leaves them analogue, computed on the firing rate'
        )
    parents = {name.rpartition(".")[0] for name in names}
    gate_modules = [p for p in parents if p and _computes_only_a_gate(network.get_submodule(p))]
    device = next(network.parameters()).device  # a learned leak belongs there, too
    replaced = 0
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if not isinstance(module, ACTIVATIONS + GATES):
            continue
        parent, _, child = name.rpartition(".")
        analogue = isinstance(module, GATES) or any(parent == g or parent.startswith(f"{g}.") for g in gate_modules)
        new = (OnRate(module) if analogue else SpikingNeuron(neuron).to(device)).train(module.training)
        setattr(network.get_submodule(parent), child, new)
        replaced += not analogue
    if replaced == 0:
        raise ValueError(f"{type(network).__name__} has no activation module that could become a neuron")


def _computes_only_a_gate(module: nn.Module) -> bool:
    """Whether the activations in a gate's module belong to the gate (squeeze-and-excitation: layers without pixels),
    or to a block that has a gate among its convolutions: those become neurons."""
    return all(set(m.kernel_size) == {1} for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))


def _fresh_copy(ann: nn.Module, ann_spec: dict | None) -> nn.Module:
    """The same network with weights drawn anew: made again where it is known how, else layer by layer."""
    parameter = next(ann.parameters())
    if ann_spec is not None:
        return create_ann(**ann_spec).to(parameter.device, parameter.dtype).train(ann.training)
    network = copy.deepcopy(ann)
    for module in network.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    if callable(initialise := getattr(network, "init_weights", None)):
        initialise()
    return network


def _probe(snn: SpikingNetwork, input_size: tuple[int, int, int]) -> None:
    """Runs one image through two steps: what has no rule raises and is named; counts the calls of each neuron."""
    parameter = next(snn.parameters())
    image = torch.zeros(1, *input_size, dtype=parameter.dtype, device=parameter.device)
    calls: Counter[nn.Module] = Counter()
    neurons = [m for m in snn.modules() if isinstance(m, SpikingNeuron)]
    handles = [m.register_forward_hook(lambda m, *_: calls.update([m])) for m in neurons]
    try:
        with probing(snn, timesteps=2):  # with one step everything is constant over time, and a gate would pass
            snn(image)
    except UnsupportedOperationError as error:
        raise UnsupportedOperationError(f"{type(snn).__name__} cannot be built: {error}") from error.__cause__
    finally:
        for handle in handles:
            handle.remove()
    for module in neurons:
        module.calls_per_step = calls[module]
