"""A spiking network in a folder or on the hub: `model.safetensors` (weights) and `config.json` (how to build it)."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.ann import create_ann, timm_spec
from models.card import CARD
from models.dsr import DSRConfig, DSRNeuron
from models.dynamics import NeuronConfig
from models.encoding import PoissonEncoder
from models.feedback import FeedbackConfig
from models.hub import CONFIG, WEIGHTS, Download, local_folder, saved_network
from models.network import SpikingNetwork
from models.registry import create_snn
from models.twin import spiking_twin

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "ann_of_file",
    "build_snn",
    "check_rebuilt",
    "check_saveable",
    "config_text",
    "fill",
    "load_snn",
    "load_weights",
    "local_folder",
    "read_weights",
    "replace_text",
    "save_snn",
    "save_tensors",
    "save_weights",
    "saved_network",
]


def save_snn(snn: SpikingNetwork, folder: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> None:
    """Writes weights and configuration; `load_snn` gives the network back with equal logits.

    Args:
        folder: made where missing; the two files in it are replaced.
        extra: further entries of config.json in JSON types (class names, normalisation, ...); `load_snn` keeps
            them in ``snn.spec["extra"]``.

    Raises:
        ValueError: if the network cannot be rebuilt from what is known of it (a twin of a network that was changed by
            hand: make it with `models.create_ann`), or `extra` has other types; nothing is written then.
    """
    text = config_text(check_saveable(snn) | ({} if extra is None else {"extra": extra}))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(snn, folder / WEIGHTS)
    replace_text(folder / CONFIG, text)


def config_text(spec: dict[str, Any]) -> str:
    """What config.json holds, made before anything is written: new weights beside an old configuration are neither's.

    Args:
        spec: of which `extra` alone is the caller's own.

    Raises:
        ValueError: for what JSON does not have.
    """
    try:
        return json.dumps(spec, indent=2) + "\n"
    except TypeError as error:
        raise ValueError(f"extra takes JSON types: {error}") from error


def check_saveable(snn: SpikingNetwork) -> dict[str, Any]:
    """The configuration that `save_snn` would write; worth a call before a long training.

    Raises:
        ValueError: if the network could not be rebuilt from it.
    """
    spec = dict(snn.spec, timesteps=snn.timesteps, algorithm=snn.algorithm)
    spec["encoder"] = None if snn.input_encoder is None else dataclasses.asdict(snn.input_encoder)
    if spec["kind"] == "twin" and spec["ann"] is None:  # made from a network that create_ann did not make
        spec["ann"] = timm_spec(snn)
    try:
        spec = json.loads(json.dumps(spec))
    except TypeError as error:
        raise ValueError(
            f"the arguments of this network cannot be written to a file: {spec.get('ann')} ({error})"
        ) from error
    check_rebuilt(snn, lambda: build_snn(spec), spec.get("ann"))
    return spec


def check_rebuilt(network: nn.Module, build: Callable[[], nn.Module], source: Any) -> None:
    """
    Args:
        build: makes the network again.
        source: what from, for the message.

    Raises:
        ValueError: if what `build` makes has other modules or tensors than the network.
    """
    with torch.random.fork_rng(devices=[]):  # building draws weights: the caller's stream of numbers stays as it is
        own, other = _anatomy(network), _anatomy(build())
    wrong = sorted(own.keys() ^ other.keys()) or [name for name in own if own[name] != other[name]]
    if wrong:
        raise ValueError(
            f"this network was changed by hand and could not be rebuilt from {source}: {wrong[:3]} differ. "
            "Make the analogue network with models.create_ann, which remembers its arguments"
        )


def load_snn(folder: str | os.PathLike[str], **download: Unpack[Download]) -> SpikingNetwork:
    """Rebuilds the network that `save_snn` or `save_pretrained` wrote, in evaluation mode, on the CPU.

    Args:
        folder: where it lies, or its id on the hub, "owner/name".
        download: of an id: revision, cache_dir, token, local_files_only, force_download, as of huggingface_hub.

    Raises:
        FileNotFoundError: names the folder or id, and the missing file.
        ValueError: if the configuration is unreadable or does not fit the weights.
    """
    folder = saved_network(folder, "spiking network", **download)
    try:
        spec = json.loads((folder / CONFIG).read_text())
        snn = build_snn(spec)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a spiking network: {error!r}") from error
    state = read_weights(folder / WEIGHTS)
    types = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(types) == 1:  # a network that was saved in float64 comes back in float64
        snn.to(types.pop())
    fill(snn, state, folder / WEIGHTS)
    if "extra" in spec:
        snn.spec["extra"] = spec["extra"]
    if (folder / CARD).is_file():
        snn.card = (folder / CARD).read_text(errors="replace")
    return snn.eval()


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a safetensors file into a network, strictly.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file, or keys or shapes differ; names the first of them.
    """
    fill(network, read_weights(Path(path)), Path(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        converted = path.with_suffix(".safetensors")
        raise ValueError(
            f"{path} is not a safetensors file: {error}. A pickle can run code and is not loaded; weights that you "
            'trust are converted by: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path}', weights_only=True), '{converted}')\""
        ) from error


def fill(network: nn.Module, state: dict[str, Tensor], path: Path, names: Collection[str] | None = None) -> None:
    """Copies tensors into a network's parameters and buffers.

    Args:
        path: where they come from, for the message.
        names: those that must be there, and no others; None for all of the network's.

    Raises:
        ValueError: if keys or shapes differ; names the first of them.
    """
    own = network.state_dict()
    own = own if names is None else {name: own[name] for name in names}
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


def build_snn(spec: dict[str, Any]) -> SpikingNetwork:
    """The network that a configuration describes, with fresh weights."""
    if spec["kind"] not in ("network", "twin"):
        raise ValueError(f"kind must be one of 'network', 'twin', found {spec['kind']!r}")
    neuron = NeuronConfig(**spec["neuron"])
    encoder = PoissonEncoder(**spec["encoder"]) if spec.get("encoder") else None
    if spec["kind"] == "network":
        arguments = {name: spec[name] for name in ("name", "num_classes", "timesteps", "in_chans", "algorithm")}
        dsr = DSRConfig(**spec.get("dsr", {}))
        feedback = FeedbackConfig(**spec["feedback"]) if spec.get("feedback") else None
        return create_snn(
            **arguments, neuron=neuron, width=spec.get("width"), encoder=encoder, dsr=dsr, feedback=feedback
        )
    twin = {name: spec[name] for name in ("timesteps", "algorithm", "gates")}
    size = tuple(spec["input_size"])
    return spiking_twin(ann_of_file(spec["ann"]), **twin, neuron=neuron, input_size=size, encoder=encoder)


def ann_of_file(spec: dict[str, Any]) -> nn.Module:
    """The analogue network that a file's configuration describes, with fresh weights; no file is read for it.

    Raises:
        TypeError: for other entries than `create_ann` takes without reading anything.
        ValueError: for a name that is not one of timm's own.
    """
    allowed = {"name", "num_classes", "in_chans", "cifar_stem", "kwargs"}
    more = sorted(spec.keys() - allowed) if isinstance(spec, dict) else spec
    if more or not spec:
        raise TypeError(f"a network is described by {sorted(allowed)}, found {more}")
    if ":" in spec["name"]:
        raise ValueError(f"a saved network is named as timm names it, found {spec['name']!r}")
    return create_ann(**spec)


def _anatomy(network: nn.Module) -> dict[str, Any]:
    """Every module by type and arguments, every parameter and buffer by shape."""
    # SpikingJelly's nodes show what they have learned, too: the arguments of DSR's are those of the module around them
    nodes = {id(module.node) for module in network.modules() if isinstance(module, DSRNeuron)}
    modules = {
        name or "the network": (type(m), "" if id(m) in nodes else m.extra_repr())
        for name, m in network.named_modules()
    }
    return modules | {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def save_weights(network: nn.Module, path: Path) -> None:
    """Writes a network's parameters and buffers as safetensors, in one move."""
    save_tensors(network.state_dict(), path)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes tensors by name as safetensors, in one move."""
    # copies: safetensors refuses tensors that share their memory
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(state, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(f"{path} could not be written: {error}") from error

    _replace(path, write)


def replace_text(path: Path, text: str) -> None:
    """Writes a text file in one move."""
    _replace(path, lambda temporary: temporary.write_text(text))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside the file and moves it into place, so that a crash never leaves half a file."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)
