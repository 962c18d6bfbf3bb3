"""Format spikingjelly: a Python file of torch's and SpikingJelly's modules alone, and its weights."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from torch import fx, nn

from distill.export.agreement import check_of, close, exact, in_float64
from distill.export.forward_code import forward_lines, literal
from distill.export.job import Check, Job
from distill.export.leaves import Neuron
from distill.export.loops import states_of
from distill.export.plain import plain_network, refuse_gates
from distill.export.sources import spiking_network
from models.io import save_tensors

CODE, WEIGHTS = "network.py", "network.safetensors"

Takes = Literal["images", "frames", "spikes"]
"""What the written network is for; spikes are frames that an encoder has drawn."""


def export(job: Job) -> Check:
    """Writes network.py and network.safetensors; the check loads them, in float64 and as they are.

    Raises:
        ValueError: for a network that does not run step by step.
        UnsupportedOperationError: for one that has no plain form.
    """
    network = spiking_network(job)
    size = tuple(job.samples.shape[-3:])
    step = plain_network(network, size)
    refuse_gates(step, "spikingjelly")
    takes: Takes = "images" if not job.takes_frames else "frames" if network.input_encoder is None else "spikes"
    _write(job.folder, step, network.timesteps, size, takes)
    double = in_float64(network)
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), plain_network(double, size), network.timesteps, size, takes)
        in_double = exact(job, double, load(Path(folder)))
    return check_of(in_double, close(job, load(job.folder), "spikingjelly"))


def load(folder: Path) -> nn.Module:
    """The network of a folder, as its own file loads it."""
    spec = importlib.util.spec_from_file_location("exported_network", folder / CODE)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(folder / WEIGHTS)


def _write(folder: Path, step: fx.GraphModule, timesteps: int, size: tuple[int, ...], takes: Takes = "images") -> None:
    modules = {name: module for name, module in step.named_children() if _is_called(step, name)}
    constructors = [f"self.{name} = {_constructor(module)}" for name, module in modules.items()]
    buffers = [
        f'self.register_buffer("{name}", torch.zeros({tuple(buffer.shape)}))'
        for name, buffer in step.named_buffers()
        if "." not in name
    ]
    starts = [
        f'self.{name}.set_reset_value("v", {float(module.start)!r})'  # where reset_net sets the membrane
        for name, module in modules.items()
        if isinstance(module, Neuron) and module.start
    ]
    states = [f'self.register_memory("{before.target}", None)' for before in states_of(step)]
    code = _FILE.format(
        timesteps=timesteps,
        size=size,
        imports="base, functional, neuron, surrogate" if states else "functional, neuron, surrogate",
        base="base.MemoryModule" if states else "nn.Module",
        kept="membranes, and a loop its spikes," if states else "membranes",
        constructors="\n        ".join(constructors + starts + states + buffers),
        forward="\n        ".join(forward_lines(step)),
        **_INPUT[takes],
    )
    (folder / CODE).write_text(code)
    save_tensors({f"step.{name}": tensor for name, tensor in step.state_dict().items()}, folder / WEIGHTS)


def _is_called(step: fx.GraphModule, name: str) -> bool:
    return any(node.op == "call_module" and node.target == name for node in step.graph.nodes)


def _constructor(module: Any) -> str:
    if isinstance(module, Neuron):
        return _neuron(module)
    if isinstance(module, nn.Linear):
        arguments, defaults = [module.in_features, module.out_features], {}
    else:
        arguments = [module.in_channels, module.out_channels, _short(module.kernel_size)]
        settings = {name: _short(getattr(module, name)) for name in ("stride", "padding", "dilation")}
        settings["groups"] = module.groups
        if module.transposed:
            settings["output_padding"] = _short(module.output_padding)
        usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0}
        defaults = {name: value for name, value in settings.items() if value != usual[name]}
    if module.bias is None:
        defaults["bias"] = False
    words = [literal(value) for value in arguments] + [f"{name}={literal(v)}" for name, v in defaults.items()]
    return f"nn.{type(module).__name__}({', '.join(words)})"


def _neuron(module: Neuron) -> str:
    config = module.config
    words = [] if math.isinf(module.tau) else [f"tau={module.tau!r}", "decay_input=False"]
    words += [
        f"v_threshold={float(config.threshold)!r}",
        f"v_reset={None if config.reset == 'soft' else 0.0}",
        f"surrogate_function=surrogate.Sigmoid(alpha={float(config.alpha)!r})",
        f"detach_reset={config.detach_reset}",
    ]
    return f"neuron.{'LIFNode' if len(words) == 6 else 'IFNode'}({', '.join(words)})"


def _short(value: Any) -> Any:
    """3 in place of (3, 3)."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


_OF_FRAMES = {
    "argument": "frames",
    "what": "(T, B, C, H, W), normalised as network.json says",
    "drawn": "",
    "all_steps": "frames (T, B, C, H, W), one for each",
    "wrong": "frames.ndim != 5 or len(frames) != self.timesteps",
    "wanted": "{self.timesteps} frames, (T, B, C, H, W)",
    "at_step": "frames[t]",
}
_INPUT: dict[Takes, dict[str, str]] = {
    "images": {
        "argument": "images",
        "what": "(B, C, H, W), normalised as network.json says",
        "drawn": "",
        "all_steps": "images (B, C, H, W), the same at each step, or frames (T, B, C, H, W)",
        "wrong": "images.ndim == 5 and len(images) != self.timesteps",
        "wanted": "images (B, C, H, W) or {self.timesteps} frames, (T, B, C, H, W)",
        "at_step": "images[t] if images.ndim == 5 else images",
    },
    "frames": _OF_FRAMES,
    "spikes": _OF_FRAMES
    | {
        "what": "(T, B, C, H, W) of 0 and 1",
        "drawn": """
The frames are drawn: where an image, its normalisation undone as network.json says under "encoder", is p in [0, 1],
each frame has a 1 with probability p.
""",
    },
}
"""How the file speaks of its network's input, and what it refuses."""

_FILE = '''"""A spiking network of torch's and SpikingJelly's own modules, batch norms folded. Written by SpikeSwap.

    network = load()
    logits = network({argument})  # {what} -> (B, classes), the mean over all steps
{drawn}
Needs torch, spikingjelly and safetensors.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from spikingjelly.activation_based import {imports}
from torch import nn

TIMESTEPS = {timesteps}
INPUT_SIZE = {size}  # (C, H, W) of the images that paddings and sizes are for


class Step({base}):
    """One time step, (B, C, H, W) -> (B, classes); the neurons keep their {kept} until functional.reset_net."""

    def __init__(self):
        super().__init__()
        {constructors}

    def forward(self, x):
        {forward}


class Network(nn.Module):
    """All time steps from rest: {all_steps}."""

    def __init__(self, timesteps=TIMESTEPS):
        super().__init__()
        self.timesteps = timesteps
        self.step = Step()

    def forward(self, {argument}):
        if {wrong}:
            raise ValueError(f"the network takes {wanted}, found shape {{tuple({argument}.shape)}}")
        functional.reset_net(self)
        logits = [self.step({at_step}) for t in range(self.timesteps)]
        functional.reset_net(self)
        return torch.stack(logits).mean(0)


def load(path=Path(__file__).with_name("network.safetensors"), timesteps=TIMESTEPS):
    """The network with its weights, in evaluation mode."""
    state = load_file(path)
    network = Network(timesteps).to(next(iter(state.values())).dtype)
    network.load_state_dict(state)
    return network.eval()
'''
