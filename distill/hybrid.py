"""Hybrids: spiking blocks up to a tap, a learnable adapter, the frozen teacher's remaining blocks.

Yang et al., CVPR 2025, arXiv 2503.16572, Figure 1. One call of `forward` gives the logits of teacher, student and all
hybrids, so that one wrapped forward is all that DDP, autocast and gradient accumulation see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.taps import Tap, append_rows, check_taps, default_tap_names, hooks, rounding
from models import SpikeTrain, SpikingNetwork
from models.kernels import at_least_float32
from models.network import probing


class HybridOutput(NamedTuple):
    """Logits (B, K), at least float32."""

    student_logits: Tensor
    teacher_logits: Tensor
    hybrid_logits: dict[str, Tensor]
    """By the teacher's module names, in the order in which the taps fire."""


class Adapter(nn.Module):
    """Firing rates into the teacher's feature space: resize, 1x1 convolution, batch norm, the teacher's activation.

    Args:
        in_channels: of the student's block.
        tap: gives the channels C and, where the feature has passed one, the activation.

    Takes (B, in_channels, h, w) and the size (H, W) of the teacher's feature, gives (B, C, H, W).
    """

    def __init__(self, in_channels: int, tap: Tap) -> None:
        super().__init__()
        channels = tap.shape[0]
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = tap.activation if tap.activation is not None else nn.Identity()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, rate: Tensor, size: torch.Size) -> Tensor:
        if rate.shape[2:] != size:
            rate = F.interpolate(rate, size, mode="bilinear", align_corners=False)
        return self.act(self.bn(self.conv(rate)))


class HybridDistiller(nn.Module):
    """Student, adapters and, held outside of the module tree, the frozen teacher.

    Args:
        teacher: a timm network; it is put in evaluation mode and frozen, and stays so.
        student: a spiking network (`models.spiking_twin`, `models.create_snn`).
        taps: teacher modules at which blocks are swapped; None for `default_tap_names`; an empty list for none
            (plain logit distillation).
        student_taps: the student's module of each tap; None: the same names.
        images: (B, C, H, W), two or more images as the teacher expects them, on which the taps are checked; None:
            random numbers of the teacher's own input size.

    Raises:
        ValueError: for a tap that cannot serve (see `distill.taps.check_taps`), by name.
        TypeError: if the student does not spike.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: SpikingNetwork,
        taps: Sequence[str] | None = None,
        student_taps: Mapping[str, str] | None = None,
        images: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, SpikingNetwork):
            raise TypeError(f"the student must be a spiking network, found {type(student).__name__}")
        self._outside = (teacher.eval().requires_grad_(False),)  # a tuple: not in state_dict, parameters(), DDP
        self.student = student
        images = _probe_images(teacher) if images is None else images
        names = default_tap_names(teacher) if taps is None else list(taps)
        self.taps = check_taps(teacher, names, images) if names else []
        self.student_taps = {tap.name: (student_taps or {}).get(tap.name, tap.name) for tap in self.taps}
        channels = self._probe_student(images)
        # module names cannot hold dots; ModuleList keeps the order of the taps
        self.adapters = nn.ModuleList(Adapter(channels[tap.name], tap) for tap in self.taps)
        self.adapters.to(images.device, images.dtype)
        self.empty_prefix = self._empty_prefix_works(images) if names else False

    @property
    def teacher(self) -> nn.Module:
        return self._outside[0]

    def _apply(self, fn, recurse: bool = True):
        self.teacher._apply(fn)  # .to() and .double() reach the teacher, though it is no submodule
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> HybridOutput:
        """Logits of student, teacher and every hybrid for images (B, C, H, W)."""
        if self.teacher.training:  # somebody's .train() must not move its statistics
            self.teacher.eval()
        names = [tap.name for tap in self.taps]
        sizes: dict[str, torch.Size] = {}
        with torch.no_grad(), hooks([(self.teacher.get_submodule(name), _keep_size(sizes, name)) for name in names]):
            teacher_logits = self.teacher(images)
        features: dict[str, Tensor] = {}
        with hooks([(self.student.get_submodule(self.student_taps[name]), _keep(features, name)) for name in names]):
            student_logits = self.student(images)
        adapted = [adapter(features[name], sizes[name]) for name, adapter in zip(names, self.adapters, strict=True)]
        hybrid_logits = self._through_teacher(images, adapted) if adapted else []
        return HybridOutput(
            at_least_float32(student_logits),
            at_least_float32(teacher_logits),
            {name: at_least_float32(logits) for name, logits in zip(names, hybrid_logits, strict=True)},
        )

    def _through_teacher(self, images: Tensor, adapted: Sequence[Tensor]) -> list[Tensor]:
        """Sends each tap's features (B, C, H, W) through the teacher's blocks behind it; (B, K) each.

        The teacher runs on no image at all where it can: then the injected rows are the only ones, and its own
        forward pass, which needs no gradient, is not run a second time.
        """
        prefix = images[:0] if self.empty_prefix else images
        modules = [self.teacher.get_submodule(tap.name) for tap in self.taps]
        with hooks([(module, append_rows(rows)) for module, rows in zip(modules, adapted, strict=True)]):
            logits = self.teacher(prefix)
        return list(logits[len(prefix) :].chunk(len(adapted)))

    def _probe_student(self, images: Tensor) -> dict[str, int]:
        """Channels of the student's module at each tap, from one image."""
        features: dict[str, Tensor] = {}
        pairs = []
        for tap, name in self.student_taps.items():
            try:
                pairs.append((self.student.get_submodule(name), _keep(features, tap)))
            except AttributeError:
                allowed = [child for child, _ in self.student.named_children()]
                raise ValueError(f"tap {tap!r}: the student has no module {name!r}; it has {allowed}") from None
        with probing(self.student, timesteps=1), hooks(pairs):
            classes = self.student(images[:1]).shape[1]
            wanted = self.teacher(images[:1]).shape[1]
        if classes != wanted:
            raise ValueError(f"the student knows {classes} classes, the teacher {wanted}")
        for tap, name in self.student_taps.items():
            if tap not in features or features[tap].ndim != 4:
                raise ValueError(f"tap {tap!r}: the student's module {name!r} yields no map (B, C, H, W) of spikes")
        return {tap: feature.shape[1] for tap, feature in features.items()}

    @torch.no_grad()
    def _empty_prefix_works(self, images: Tensor) -> bool:
        """Whether the teacher takes a batch of no image and still treats injected rows right."""
        own: dict[str, Tensor] = {}
        modules = [(self.teacher.get_submodule(tap.name), _keep(own, tap.name)) for tap in self.taps]
        with hooks(modules):
            expected = self.teacher(images)
        rows = [own[tap.name].clone() for tap in self.taps]
        for self.empty_prefix in (True, False):
            try:
                found = self._through_teacher(images, rows)
            except (RuntimeError, IndexError, ZeroDivisionError, ValueError):
                continue
            if max((logits - expected).abs().max().item() for logits in found) <= rounding(expected):
                return self.empty_prefix
        names = [tap.name for tap in self.taps]
        raise ValueError(f"{type(self.teacher).__name__} does not reproduce its logits from its features at {names}")


def _keep(features: dict[str, Tensor], name: str):
    """A forward hook that keeps a module's output: of spikes their rate, (B, C, H, W)."""

    def hook(module: nn.Module, args: tuple, output: SpikeTrain | Tensor) -> None:
        features[name] = output.rate if isinstance(output, SpikeTrain) else output

    return hook


def _keep_size(sizes: dict[str, torch.Size], name: str):
    """A forward hook that keeps the height and width of a module's output (B, C, H, W)."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        sizes[name] = output.shape[2:]

    return hook


def _probe_images(teacher: nn.Module) -> Tensor:
    size = (getattr(teacher, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    parameter = next(teacher.parameters())
    in_chans = next((m.in_channels for m in teacher.modules() if isinstance(m, nn.Conv2d)), size[0])
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, in_chans, *size[1:], generator=generator).to(parameter.device, parameter.dtype)
