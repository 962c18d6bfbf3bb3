"""Analogue networks by their timm name, with the changes that small images need.

`create_ann` remembers how it made a network, so that a spiking twin of it can be rebuilt from a file.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
from torch import nn


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
        cifar_stem: replace the first convolution by a 3x3 one of stride 1 and drop the max pool behind it, the usual
            stem for images of about 32x32 pixels.
        pretrained: load timm's weights (from the hub or its cache); not together with `cifar_stem`.
        kwargs: further arguments of the timm network, e.g. ``{"channels": [32, 64, 128, 256]}``.

    Raises:
        ValueError: for a name that timm does not know, an argument that the network does not take, a stem that
            cannot be replaced, or weights that could not be loaded.
    """
    kwargs = dict(kwargs or {})
    if not name.startswith(("hf_hub:", "hf-hub:", "local-dir:")) and not timm.is_model(name):
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
            raise
        raise ValueError(f"the pretrained weights of {name!r} could not be loaded: {error}") from error
    if cifar_stem:
        _use_cifar_stem(ann, name)
    ann.ann_spec = {
        "name": name,
        "num_classes": ann.num_classes,
        "in_chans": in_chans,
        "cifar_stem": cifar_stem,
        "kwargs": {k: v for k, v in kwargs.items() if k != "num_classes"},
    }
    return ann


def _use_cifar_stem(ann: nn.Module, name: str) -> None:
    path = getattr(ann, "pretrained_cfg", {}).get("first_conv")
    path = path[0] if isinstance(path, (tuple, list)) else path
    try:
        conv = ann.get_submodule(path or "")
    except AttributeError:
        conv = None
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"cifar_stem: the first convolution of {name!r} could not be found")
    parent, _, child = path.rpartition(".")
    stem = nn.Conv2d(conv.in_channels, conv.out_channels, 3, 1, padding=1, bias=conv.bias is not None)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    setattr(ann.get_submodule(parent), child, stem)
    if isinstance(getattr(ann, "maxpool", None), nn.Module):
        ann.maxpool = nn.Identity()
