"""Analogue networks by their timm name, with the changes that small images need.

`create_ann` remembers how it made a network, so that a spiking twin of it can be rebuilt from a file.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
from torch import nn

REACHING_FILES = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
"""Arguments of `timm.create_model` that make it read files or the network, pickles among them."""


def create_ann(
    name: str,
    num_classes: int | None = None,
    in_chans: int = 3,
    cifar_stem: bool = False,
    pretrained: bool = False,
    kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Makes a timm network.

    Args:
        name: timm's name of it, with a tag if wanted, or ``hf_hub:owner/model``.
        num_classes: number of logits; None for timm's own.
        in_chans: channels of the images.
        cifar_stem: replace the first convolution, of stride 2, by a 3x3 one of stride 1 and drop the stem's max pool:
            the usual stem for images of about 32x32 pixels.
        pretrained: load timm's weights (from the hub or its cache); not together with `cifar_stem`.
        kwargs: further arguments of the timm network, e.g. ``{"channels": [32, 64, 128, 256]}``.

    Raises:
        ValueError: for a name that timm does not know, an argument that the network does not take, a stem that
            cannot be replaced, or weights that could not be loaded.
    """
    kwargs = dict(kwargs or {})
    if reaching := sorted(kwargs.keys() & REACHING_FILES):
        raise ValueError(
            f"kwargs are arguments of the network; {reaching} would read files: give weights as safetensors"
        )
    from_hub = name.startswith(("hf_hub:", "hf-hub:", "local-dir:"))
    if not from_hub and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm knows no network {name!r}" + (f"; close to it: {close}" if close else ""))
    if pretrained and cifar_stem:
        raise ValueError("cifar_stem replaces the pretrained first convolution: use it without pretrained weights")
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    try:
        ann = timm.create_model(name, pretrained=pretrained, in_chans=in_chans, **kwargs)
    except TypeError as error:
        raise ValueError(f"timm network {name!r} does not take these arguments: {error}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise ValueError(f"timm cannot make {name!r}: {error}") from error
        raise ValueError(f"the pretrained weights of {name!r} could not be loaded: {error}") from error
    if cifar_stem:
        _use_cifar_stem(ann, name)
    # what was made of a hub's name is rebuilt without the hub, by name and arguments
    spec = timm_spec(ann)
    if not from_hub:
        spec |= {"name": name, "kwargs": {k: v for k, v in kwargs.items() if k != "num_classes"}}
    spec |= {"in_chans": in_chans, "cifar_stem": cifar_stem}
    ann.ann_spec = spec  # type: ignore[assignment]  # nn.Module takes attributes of any kind
    return ann


def timm_spec(ann: nn.Module) -> dict[str, Any]:
    """How `timm.create_model` made a network, as far as timm remembers it, in arguments of `create_ann`.

    Raises:
        ValueError: if timm did not make it.
    """
    name = (getattr(ann, "pretrained_cfg", None) or {}).get("architecture")
    if name is None:
        raise ValueError(f"{type(ann).__name__} was not made by timm: how to rebuild it is not known")
    remembered: dict[str, Any] = getattr(ann, "_model_args", None) or {}  # type: ignore[assignment]
    kwargs = {k: v for k, v in remembered.items() if k not in ("num_classes", "in_chans")}
    return {"name": name, "num_classes": ann.num_classes, "in_chans": image_channels(ann), "kwargs": kwargs}


def image_channels(ann: nn.Module) -> int:
    """Channels of a network's images: as timm remembers, else those of its first convolution."""
    size = (getattr(ann, "pretrained_cfg", None) or {}).get("input_size") or (3, 0, 0)
    remembered: dict[str, Any] | None = getattr(ann, "_model_args", None)  # type: ignore[assignment]
    if remembered is not None:  # the first convolution may stand behind a space-to-depth
        return remembered.get("in_chans", size[0])
    return next((m.in_channels for m in ann.modules() if isinstance(m, nn.Conv2d)), size[0])


def _use_cifar_stem(ann: nn.Module, name: str) -> None:
    path = getattr(ann, "pretrained_cfg", {}).get("first_conv") or ""
    path = path[0] if isinstance(path, (tuple, list)) else path
    try:
        conv: nn.Module | None = ann.get_submodule(path)
    except AttributeError:
        conv = None
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"cifar_stem: the first convolution of {name!r} could not be found")
    if conv.stride != (2, 2):
        raise ValueError(
            f"cifar_stem replaces a first convolution of stride 2; that of {name!r}, {path}, has stride {conv.stride}"
        )
    stem = nn.Conv2d(conv.in_channels, conv.out_channels, 3, 1, padding=1, bias=conv.bias is not None)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    _replace(ann, path, stem)
    info: Any = getattr(ann, "feature_info", None) or []
    first_stage = info[1]["module"] if len(info) > 1 else None
    for child, module in ann.named_modules():  # the stem's pool stands between the first convolution and the stages
        if child == first_stage:
            break
        if isinstance(module, nn.MaxPool2d):
            _replace(ann, child, nn.Identity())
            break


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
