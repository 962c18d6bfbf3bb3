"""One hybrid as a network of its own: spiking blocks up to a tap, adapter, the teacher's blocks behind it.

It holds and saves no more than these: what the student has behind the tap and the teacher in front of it has no part.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from distill.adapters import Adapter
from distill.data.event_frames import summed
from distill.layouts import Layout
from distill.parts import Calls
from distill.tails import look, run_tails
from distill.taps import Tap, hooks
from models import SpikingNetwork, create_ann
from models.ann import timm_spec
from models.card import CARD
from models.hub import Download
from models.io import (
    CONFIG,
    WEIGHTS,
    ann_of_file,
    build_snn,
    check_rebuilt,
    check_saveable,
    config_text,
    fill,
    read_weights,
    replace_text,
    save_tensors,
    saved_network,
)
from models.layout import at_least_float32
from models.network import probing
from models.prediction import Prediction, Source, predict
from models.twin import ACTIVATIONS

KIND = "hybrid"


class Hybrid(nn.Module):
    """Student up to a tap, adapter, teacher behind it: images (B, C, H, W) to logits (B, K), at least float32.

    Of event frames (T, B, C, H, W) the teacher's part is made for the sum over time.

    The teacher runs on no image in front of the tap, but for a teacher with class tokens: those at the tap are its
    own, from a pass over the images (`runs_whole_teacher`).

    Args:
        student: the whole spiking network, of which the part up to `student_tap` runs.
        adapter: from the student's rates to the teacher's features.
        teacher: the whole analogue network, frozen and in evaluation mode.
        tap: the cut of the teacher.
        student_tap: the student's module at the cut.
        blanks: blank images that the teacher runs on in front of the adapted features (`tails.images_in_front`).
    """

    def __init__(
        self, student: SpikingNetwork, adapter: Adapter, teacher: nn.Module, tap: Tap, student_tap: str, blanks: int
    ) -> None:
        super().__init__()
        self.student = student
        self.adapter = adapter
        self.teacher = teacher
        self.tap = tap
        self.student_tap = student_tap
        self.blanks = blanks
        self.spec: dict[str, Any] = {}
        """What `save_hybrid` was given as `extra`, under "extra"."""
        self.card: str | None = None
        """The model card that the network was loaded with."""

    @property
    def timesteps(self) -> int:
        """T of the spiking part, settable."""
        return self.student.timesteps

    @timesteps.setter
    def timesteps(self, value: int) -> None:
        self.student.timesteps = value

    @property
    def runs_whole_teacher(self) -> bool:
        return self.tap.layout.prefix_tokens > 0

    def train(self, mode: bool = True) -> Hybrid:
        super().train(mode)
        self.teacher.eval()  # frozen: its statistics are those it came with
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self._behind_tap(self.student(images, until=self.student_tap), *self._images_and_prefix(images))

    def cumulative_logits(self, images: Tensor) -> Tensor:
        """Logits (T, B, K) from the mean of the rates up to each step: the teacher's blocks run T times."""
        streams: list[Tensor] = []
        module = self.student.get_submodule(self.student_tap)
        with hooks([(module, lambda module, args, output: streams.append(output.stream))]):
            self.student(images, until=self.student_tap)
        rest = self._images_and_prefix(images)
        return torch.stack([self._behind_tap(rate, *rest) for rate in running_mean(at_least_float32(streams[0]))])

    def _images_and_prefix(self, images: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """The images as the teacher sees them, its class tokens at the tap, (H, W) of its feature there."""
        images = summed(images)
        if not self.runs_whole_teacher:
            return images, None, self._size(images)
        feature = look(self.teacher, [self.tap], images)[1][self.tap.name]
        return images, feature.prefix, feature.size

    def _behind_tap(self, rate: Tensor, images: Tensor, prefix: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Adapter and teacher: rates (B, c, h, w) to logits (B, K)."""
        name = self.tap.name
        adapted = self.adapter(rate, size)
        blank = images.new_zeros(self.blanks, *images.shape[1:])
        return at_least_float32(run_tails(self.teacher, [self.tap], {name: adapted}, {name: prefix}, blank)[name])

    def predict(
        self, images: Source | Sequence[Source], topk: int = 5, batch_size: int = 32
    ) -> Prediction | list[Prediction]:
        """Classes and probabilities of image files; all of it as of ``snn.predict``, but for an early exit."""

        def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
            return self(pixels), torch.full((len(pixels),), self.timesteps)

        return predict(self, self.spec, images, run, topk, batch_size)

    def _size(self, images: Tensor) -> tuple[int, int]:
        """(H, W) of the teacher's feature: from its own pass over a blank image, once for each size of images."""
        sizes = self.__dict__.setdefault("_sizes", {})
        key = tuple(images.shape[1:])
        if key not in sizes:
            sizes[key] = look(self.teacher, [self.tap], images.new_zeros(1, *key))[1][self.tap.name].size
        return sizes[key]


def running_mean(stream: Tensor) -> Tensor:
    """The mean of a stream (T, B, ...) up to each step."""
    steps = torch.arange(1, len(stream) + 1, device=stream.device, dtype=stream.dtype)
    return stream.cumsum(0) / steps.view(-1, *[1] * (stream.ndim - 1))


def save_hybrid(
    hybrid: Hybrid, folder: str | os.PathLike[str], size: tuple[int, ...], extra: dict[str, Any] | None = None
) -> None:
    """Writes `model.safetensors` and `config.json`; `load_hybrid` gives the network back with equal logits.

    Args:
        size: (C, H, W) of its images: a pass over a blank one tells which weights have a part.
        extra: further entries of config.json in JSON types; `load_hybrid` keeps them in ``hybrid.spec["extra"]``.

    Raises:
        ValueError: if student or teacher cannot be rebuilt from what is known of them, or `extra` has other types;
            nothing is written then.
    """
    size = tuple(size)
    spec = check_hybrid(hybrid) | {"input_size": list(size)} | ({} if extra is None else {"extra": extra})
    text, state = config_text(spec), hybrid.state_dict()
    tensors = {name: state[name] for name in _own_state(hybrid, size)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / WEIGHTS)
    replace_text(folder / CONFIG, text)


def check_hybrid(hybrid: Hybrid) -> dict[str, Any]:
    """The configuration that `save_hybrid` would write, but for the images; worth a call before a long training.

    Raises:
        ValueError: if student or teacher cannot be rebuilt from it.
    """
    tap = hybrid.tap
    teacher = getattr(hybrid.teacher, "ann_spec", None) or timm_spec(hybrid.teacher)
    check_rebuilt(hybrid.teacher, lambda: create_ann(**teacher), teacher)
    return {
        "kind": KIND,
        "student": check_saveable(hybrid.student),
        "teacher": teacher,
        "student_tap": hybrid.student_tap,
        "blanks": hybrid.blanks,
        "in_channels": hybrid.adapter.in_channels,
        "adapter": hybrid.adapter.form,
        "tap": {
            "name": tap.name,
            "shape": list(tap.shape),
            "activation": _activation_spec(tap.activation),
            "layout": {"kind": tap.layout.kind, "prefix_tokens": tap.layout.prefix_tokens},
        },
    }


def load_hybrid(folder: str | os.PathLike[str], **download: Unpack[Download]) -> Hybrid:
    """Rebuilds the network that `save_hybrid` wrote, in evaluation mode, on the CPU.

    Args:
        folder: where it lies, or its id on the hub, "owner/name".
        download: of an id: revision, cache_dir, token, local_files_only, force_download, as of huggingface_hub.

    Raises:
        FileNotFoundError: names the folder or id, and the missing file.
        ValueError: if the configuration is unreadable or does not fit the weights.
    """
    folder = saved_network(folder, "hybrid", **download)
    try:
        spec = json.loads((folder / CONFIG).read_text())
        if spec["kind"] != KIND:
            raise ValueError(f"kind must be {KIND!r}, found {spec['kind']!r} (models.load_snn loads spiking networks)")
        cut = spec["tap"]
        activation, layout = _activation(cut["activation"]), Layout(**cut["layout"])
        tap = Tap(cut["name"], tuple(cut["shape"]), activation, layout)
        student = build_snn(spec["student"])
        teacher = ann_of_file(spec["teacher"]).eval().requires_grad_(False)
        adapter = _adapter(spec, tap, folder)
        hybrid = Hybrid(student, adapter, teacher, tap, spec["student_tap"], spec["blanks"])
        names = _own_state(hybrid, tuple(spec["input_size"]))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a hybrid: {error!r}") from error
    state = read_weights(folder / WEIGHTS)
    types = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(types) == 1:  # a network that was saved in float64 comes back in float64
        hybrid.to(types.pop())
    fill(hybrid, state, folder / WEIGHTS, names=names)
    if "extra" in spec:
        hybrid.spec["extra"] = spec["extra"]
    if (folder / CARD).is_file():
        hybrid.card = (folder / CARD).read_text(errors="replace")
    return hybrid.eval()


def _adapter(spec: dict[str, Any], tap: Tap, folder: Path) -> Adapter:
    try:
        return Adapter(spec["in_channels"], tap, spec.get("adapter", "conv1x1"))  # those of before had no other
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} does not describe a hybrid: {error}") from error


def parameters_that_run(hybrid: Hybrid, size: tuple[int, ...]) -> int:
    """How many parameters have a part, those of the teacher's blocks included.

    Args:
        size: (C, H, W) of its images.
    """
    parameters = dict(hybrid.named_parameters())
    return sum(parameters[name].numel() for name in _own_state(hybrid, size) if name in parameters)


def _own_state(hybrid: Hybrid, size: tuple[int, ...]) -> list[str]:
    """The names in the `state_dict` of what has a part, found on a blank image (C, H, W)."""
    parameter = next(hybrid.adapter.parameters())
    blank = torch.zeros(1, *size, dtype=parameter.dtype, device=parameter.device)
    student, teacher, name = hybrid.student, hybrid.teacher, hybrid.tap.name
    with probing(student, timesteps=1):
        calls = Calls(student, hybrid.student_tap, lambda: student(blank))
        names = [f"student.{key}" for key in calls.state_of(student, before=True)]
        _, features = look(teacher, [hybrid.tap], blank, maps=True)
        maps, prefixes = {name: features[name].map}, {name: features[name].prefix}
        calls = Calls(teacher, name, lambda: run_tails(teacher, [hybrid.tap], maps, prefixes, blank))  # type: ignore[arg-type]
    own = list(teacher.state_dict()) if hybrid.runs_whole_teacher else calls.state_of(teacher, before=False)
    return names + [f"adapter.{key}" for key in hybrid.adapter.state_dict()] + [f"teacher.{key}" for key in own]


def _activation_spec(activation: nn.Module | None) -> dict[str, Any] | None:
    """An activation by type and arguments, in JSON types."""
    if activation is None:
        return None
    parameters = inspect.signature(type(activation)).parameters
    arguments = {name: getattr(activation, name) for name in parameters if hasattr(activation, name)}
    spec = {"type": _type_name(type(activation)), "arguments": arguments}
    if _activation(spec).extra_repr() != activation.extra_repr():  # type: ignore[union-attr]
        raise ValueError(f"the activation {activation!r} behind the tap cannot be rebuilt from a file")
    return spec


def _activation(spec: dict[str, Any] | None) -> nn.Module | None:
    if spec is None:
        return None
    types = {_type_name(activation): activation for activation in ACTIVATIONS}
    if spec["type"] not in types:
        raise ValueError(f"activation must be one of {sorted(types)}, found {spec['type']!r}")
    return types[spec["type"]](**spec["arguments"])


def _type_name(activation: type[nn.Module]) -> str:
    """timm and PyTorch have activations of the same name."""
    return f"{activation.__module__.partition('.')[0]}.{activation.__name__}"
