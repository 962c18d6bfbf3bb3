"""Names of classes in the order of the logits: those that a saved network knows against those of the data."""

from __future__ import annotations

from collections.abc import Sequence


def check_class_names(network: str, known: Sequence[str] | None, classes: Sequence[str], way_out: str = "") -> None:
    """
    Args:
        network: what it is called in the error.
        known: by the network, as `distill.results.image_extra` saved them; None where it was saved without names.
        classes: of the data.
        way_out: what to do about it, the end of the error's text.

    Raises:
        ValueError: if they differ, or their order does: accuracies would be those of other classes.
    """
    if known is None or list(known) == list(classes):
        return
    how = ""
    if different := sorted(set(known) ^ set(classes))[:3]:
        how = f"; not in both: {different}"
    elif len(known) == len(classes):
        index = next(i for i, pair in enumerate(zip(known, classes, strict=True)) if pair[0] != pair[1])
        how = f", in another order: class {index} is {known[index]!r} there, {classes[index]!r} in the data"
    raise ValueError(f"{network} knows {len(known)} classes, the data has {len(classes)}{how}{way_out}")
