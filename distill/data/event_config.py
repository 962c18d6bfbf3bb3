"""Which settings of `DataConfig` belong to event data, and which to images alone."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

EVENTS = ("nmnist", "cifar10_dvs", "dvs128_gesture")
"""The values of `data.name` that are event data: recordings of an event camera, read as frames (T, B, 2, H, W)."""

FOR_EVENTS = ("cache", "event_shift")
FOR_IMAGES = (
    *("train_split", "eval_split", "class_map", "crop_padding"),
    *("random_resized_crop", "auto_augment", "random_erasing", "on_corrupt"),
)


def is_events(config: Any) -> bool:
    """Whether a `DataConfig` names event data."""
    return config.name in EVENTS


def check_event_fields(config: Any) -> None:
    """Refuses settings that have no effect on the data that a `DataConfig` names.

    Raises:
        ValueError: names the field.
    """
    defaults = {field.name: field.default for field in fields(config)}
    kind, wrong = ("event data", FOR_IMAGES) if is_events(config) else ("images", FOR_EVENTS)
    for name in wrong:
        value = getattr(config, name)
        if value != defaults[name]:
            raise ValueError(f"{name} is {value!r}; name={config.name!r} is {kind}: leave it out")
    if is_events(config) and not config.root:
        raise ValueError(f"root is {config.root!r}; name={config.name!r} needs the path of a folder or an archive")
    if config.event_shift < 0:
        raise ValueError(f"event_shift is {config.event_shift}; allowed: integers from 0 up")
