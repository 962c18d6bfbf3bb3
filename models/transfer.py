"""Weights of one network in another one: what has the same kind, shape and place in depth is copied, nothing else.

Both networks are read as a sequence of *units* in the order of definition: a convolution or linear layer with the batch
norm behind it, or any other module with parameters of its own. Units of equal signature are paired by an alignment of
the two sequences that never crosses itself (the longest common subsequence), so that early layers go to early layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What `copy_weights` did.

    Args:
        copied: the student's parameter or buffer -> the teacher's.
        zeroed: the student's biases set to nought, because the layer they were copied from has none.
        kept: the student's parameters and buffers left as they were.
        share: of the student's parameters (numbers, not tensors), in [0, 1], that are no longer its own.
    """

    copied: dict[str, str]
    zeroed: list[str]
    kept: list[str]
    share: float

    def __str__(self) -> str:
        kept = _layers(self.kept)
        count = len(dict.fromkeys([*_layers([*self.copied, *self.zeroed]), *kept]))
        line = f"copied {count - len(kept)} of {count} layers ({100 * self.share:.1f} % of the parameters)"
        if kept:
            line += "; not copied: " + ", ".join(kept[:5]) + (f" and {len(kept) - 5} more" if len(kept) > 5 else "")
        return line


def _layers(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A layer, with the batch norm behind it if there is one."""

    modules: dict[str, nn.Module]
    signature: tuple
    """Kinds and shapes, without the bias of a convolution or linear layer."""
    bias: bool

    @property
    def name(self) -> str:
        return next(iter(self.modules))

    def takes(self, other: Unit) -> bool:
        """Whether the other's weights fit; a bias of theirs must have a place here."""
        return self.signature == other.signature and self.bias >= other.bias


@torch.no_grad()
def copy_weights(ann: nn.Module, snn: nn.Module) -> Transfer:
    """Copies a network's weights into another one's layers where they agree.

    Layers agree in kind, in the shape of every parameter and buffer, in the groups of a convolution, and in whether a
    batch norm stands behind them. Among all pairings that keep the order of definition, that with most equal names is
    taken, and among those the one with most layers; what has the same name elsewhere in the order follows. Each layer
    of the source serves once. A layer with a bias takes the weights of one without and a bias of nought; the reverse
    would drop a bias and is not done. Neurons have no analogue counterpart and keep their learned leaks.

    Args:
        ann: the source, left as it is.
        snn: changed in place; its values are copies.
    """
    theirs, ours = _units(ann), _units(snn)
    pairs = _align(theirs, ours)
    by_name = {unit.name: i for i, unit in enumerate(theirs)}
    taken = set(pairs.values())
    for j, unit in enumerate(ours):
        i = by_name.get(unit.name)
        if j not in pairs and i is not None and i not in taken and unit.takes(theirs[i]):
            pairs[j] = i
    copied: dict[str, str] = {}
    zeroed: list[str] = []
    for j in sorted(pairs):
        for (name, module), (source, original) in zip(
            ours[j].modules.items(), theirs[pairs[j]].modules.items(), strict=True
        ):
            values = _tensors(original)
            for key, tensor in _tensors(module).items():
                if key in values:
                    tensor.copy_(values[key])
                    copied[_join(name, key)] = _join(source, key)
                else:
                    tensor.zero_()
                    zeroed.append(_join(name, key))
    everything = [_join(name, key) for name, module in snn.named_modules() for key in _tensors(module)]
    kept = [name for name in everything if name not in copied and name not in zeroed]
    parameters = {name: p.numel() for name, p in snn.named_parameters()}
    left = sum(parameters.get(name, 0) for name in kept)
    total = sum(parameters.values())
    return Transfer(copied=copied, zeroed=zeroed, kept=kept, share=1 - left / total if total else 0.0)


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, those that a state_dict holds."""
    own = {**module._parameters, **module._buffers}
    return {k: v for k, v in own.items() if v is not None and k not in module._non_persistent_buffers_set}


def _units(network: nn.Module) -> list[Unit]:
    modules = [(name, module) for name, module in network.named_modules() if _tensors(module)]
    units: list[Unit] = []
    for (name, module), (next_name, behind) in zip(modules, [*modules[1:], ("", nn.Identity())], strict=True):
        if units and name in units[-1].modules:
            continue
        group = {name: module}
        if _has_bias_apart(module) and _is_norm(behind, module.weight.shape[0]):  # type: ignore[union-attr]
            group[next_name] = behind
        signature = tuple(_signature(m) for m in group.values())
        units.append(Unit(modules=group, signature=signature, bias=getattr(module, "bias", None) is not None))
    return units


def _is_norm(module: nn.Module, channels: int) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_features == channels


_SAME = {"Conv2dSame": "Conv2d", "NonDynamicallyQuantizableLinear": "Linear"}
"""Classes that do the same with their weights; others, such as weight-standardised convolutions, do not."""


def _has_bias_apart(module: nn.Module) -> bool:
    """Whether it is a layer whose bias may be missing on one side."""
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


def _signature(module: nn.Module) -> tuple:
    kind = type(module).__name__
    kind = "BatchNorm" if isinstance(module, nn.modules.batchnorm._BatchNorm) else _SAME.get(kind, kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(module).items()}
    if _has_bias_apart(module):
        shapes.pop("bias", None)
    return kind, getattr(module, "groups", 1), tuple(sorted(shapes.items()))


def _align(theirs: list[Unit], ours: list[Unit]) -> dict[int, int]:
    """Ours -> theirs by index: the alignment in order with most equal names, then most pairs, then the earliest."""
    rows, columns = len(ours), len(theirs)
    best = [[(0, 0)] * (columns + 1) for _ in range(rows + 1)]  # of ours[j:] with theirs[i:]: (equal names, pairs)
    for j, i in _backwards(rows, columns):
        skipped = max(best[j + 1][i], best[j][i + 1])
        best[j][i] = max(skipped, _with(ours[j], theirs[i], best[j + 1][i + 1]))
    pairs, j, i = {}, 0, 0
    while j < rows and i < columns:
        if ours[j].takes(theirs[i]) and best[j][i] == _with(ours[j], theirs[i], best[j + 1][i + 1]):
            pairs[j] = i
            j, i = j + 1, i + 1
        elif best[j][i] == best[j][i + 1]:
            i += 1
        else:
            j += 1
    return pairs


def _backwards(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    return ((j, i) for j in reversed(range(rows)) for i in reversed(range(columns)))


def _with(ours: Unit, theirs: Unit, rest: tuple[int, int]) -> tuple[int, int]:
    """The score of an alignment that starts with this pair."""
    if not ours.takes(theirs):
        return (-1, -1)
    return (rest[0] + (ours.name == theirs.name), rest[1] + 1)
