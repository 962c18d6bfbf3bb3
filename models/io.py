"""A spiking network in a folder: `model.safetensors` (weights) and `config.json` (how to build it)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from models.ann import create_ann
from models.dynamics import NeuronConfig
from models.network import SpikingNetwork
from models.registry import create_snn
from models.twin import spiking_twin

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_snn(snn: SpikingNetwork, folder: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> None:
    """Writes weights and configuration; `load_snn` gives the network back with equal logits.

    Args:
        folder: made where missing; the two files in it are replaced.
        extra: further entries of config.json in JSON types (class names, normalisation, ...); `load_snn` keeps
            them in ``snn.spec["extra"]``.

    Raises:
        ValueError: if the network cannot be rebuilt from what is known of it (a twin of a network that was changed by
            hand: make it with `models.create_ann`).
    """
    spec = _complete_spec(snn)
    if extra is not None:
        spec["extra"] = extra
    _check_rebuilds(snn, spec)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in snn.state_dict().items()}
    _replace(folder / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG, lambda path: path.write_text(json.dumps(spec, indent=2) + "\n"))


def load_snn(folder: str | os.PathLike[str]) -> SpikingNetwork:
    """Rebuilds the network that `save_snn` wrote, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: names the missing file.
        ValueError: if the configuration is unreadable or does not fit the weights.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no saved spiking network: {name} is missing")
    try:
        spec = json.loads((folder / CONFIG).read_text())
        snn = _build(spec)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a spiking network: {error!r}") from error
    snn.to(_stored_type(folder / WEIGHTS))
    load_weights(snn, folder / WEIGHTS)
    if "extra" in spec:
        snn.spec["extra"] = spec["extra"]
    return snn.eval()


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a safetensors file into a network, strictly.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file, or keys or shapes differ; names the first of them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    own = network.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = [f"{k}: {tuple(state[k].shape)}, wanted {tuple(own[k].shape)}" for k in own.keys() & state.keys()
             if state[k].shape != own[k].shape]  # fmt: skip
    if missing or unknown or other:
        raise ValueError(
            f"{path} does not fit {type(network).__name__}: {len(missing)} missing keys {missing[:3]}, "
            f"{len(unknown)} unknown keys {unknown[:3]}, {len(other)} other shapes {sorted(other)[:3]}"
        )
    with torch.no_grad():
        for name, tensor in own.items():  # keeps the network's type, device and memory format
            tensor.copy_(state[name])


def _stored_type(path: Path) -> torch.dtype:
    """The type of the weights in a file: a network that was saved in float64 comes back in float64."""
    try:
        types = {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    return types.pop() if len(types) == 1 else torch.get_default_dtype()


def _build(spec: dict[str, Any]) -> SpikingNetwork:
    neuron = NeuronConfig(**spec["neuron"])
    if spec["kind"] == "network":
        names = ("name", "num_classes", "timesteps", "in_chans", "algorithm")
        return create_snn(**{name: spec[name] for name in names}, neuron=neuron)
    if spec["kind"] == "twin":
        twin = {name: spec[name] for name in ("timesteps", "algorithm", "gates")}
        return spiking_twin(create_ann(**spec["ann"]), **twin, neuron=neuron, input_size=tuple(spec["input_size"]))
    raise ValueError(f"kind must be one of 'network', 'twin', found {spec['kind']!r}")


def _complete_spec(snn: SpikingNetwork) -> dict[str, Any]:
    spec = dict(snn.spec, timesteps=snn.timesteps, algorithm=snn.algorithm)
    if spec["kind"] == "twin" and spec["ann"] is None:  # made from a timm network that create_ann did not make
        name = (getattr(snn, "pretrained_cfg", None) or {}).get("architecture")
        if name is None:
            raise ValueError("the twin's source is not a timm network: it can be trained but not saved")
        spec["ann"] = {"name": name, "num_classes": snn.num_classes, "in_chans": snn.in_chans}
    return spec


def _check_rebuilds(snn: SpikingNetwork, spec: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):  # building draws weights: the caller's stream of numbers stays as it is
        rebuilt = _build(spec)
    own, other = _anatomy(snn), _anatomy(rebuilt)
    wrong = sorted(own.keys() ^ other.keys()) or [name for name in own if own[name] != other[name]]
    if wrong:
        raise ValueError(
            f"this network was changed by hand and could not be rebuilt from {spec.get('ann')}: {wrong[:3]} differ. "
            "Make the analogue network with models.create_ann, which remembers its arguments"
        )


def _anatomy(network: nn.Module) -> dict[str, Any]:
    """Every module by type and arguments, every parameter and buffer by shape."""
    modules = {name or "the network": (type(m), m.extra_repr()) for name, m in network.named_modules()}
    return modules | {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _replace(path: Path, write: Any) -> None:
    """Writes beside the file and moves it into place, so that a crash never leaves half a file."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)
