"""Hybrids: spiking blocks up to a tap, a learnable adapter, the frozen teacher's remaining blocks.

Yang et al., CVPR 2025, arXiv 2503.16572, Figure 1. One call of `forward` gives the logits of teacher, student and the
hybrids that are wanted, so that one wrapped forward is all that DDP, autocast and gradient accumulation see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from distill.adapters import Adapter, AdapterForm
from distill.data.event_frames import summed
from distill.hybrid_network import Hybrid
from distill.losses import feature_loss
from distill.matching import match_taps
from distill.tails import images_in_front, look, run_tails
from distill.taps import check_taps, hooks, tap_names
from models import SpikeTrain, SpikingNetwork
from models.ann import image_channels
from models.layout import at_least_float32
from models.network import probing


class HybridOutput(NamedTuple):
    """Logits (B, K), at least float32."""

    student_logits: Tensor | None
    """None where the student was not run to its end."""
    teacher_logits: Tensor
    hybrid_logits: dict[str, Tensor]
    """Of the active taps, by the teacher's module names, in the order in which the taps fire."""
    feature_losses: dict[str, Tensor] = {}  # noqa: RUF012  # nobody writes to it
    """How far each active tap's adapted rates are from the teacher's features, a scalar, where that is asked for."""


class HybridDistiller(nn.Module):
    """Student, adapters and, held outside of the module tree, the frozen teacher.

    Args:
        teacher: a timm network; it is put in evaluation mode and frozen, and stays so.
        student: a spiking network (`models.spiking_twin`, `models.create_snn`).
        taps: teacher modules at which blocks are swapped, by name, or "stages", or "blocks" (see
            `distill.taps.tap_names`); an empty list for none (plain logit distillation).
        student_taps: the student's module of a tap, where it is not the one that `distill.matching.match_taps` finds:
            the same name, or the end of the same stage.
        images: (B, C, H, W), two or more images as the teacher expects them, or event frames (T, B, C, H, W), on which
            the taps are checked; None: random numbers of the teacher's own input size.
        feature: "mse" or "cosine" to compare adapted rates with the teacher's features, too (`feature_loss`).
        adapter: of which form the adapters are (`distill.adapters.Adapter`).

    Raises:
        ValueError: for a tap that cannot serve (see `distill.taps.check_taps`) or has no such adapter, by name.
        TypeError: if the student does not spike.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: SpikingNetwork,
        taps: Sequence[str] | Literal["stages", "blocks"] = "stages",
        student_taps: Mapping[str, str] | None = None,
        images: Tensor | None = None,
        feature: Literal["none", "mse", "cosine"] = "none",
        adapter: AdapterForm = "conv1x1",
    ) -> None:
        super().__init__()
        if not isinstance(student, SpikingNetwork):
            raise TypeError(f"the student must be a spiking network, found {type(student).__name__}")
        self._outside = (teacher.eval().requires_grad_(False),)  # a tuple: not in state_dict, parameters(), DDP
        self.student = student
        self.feature = feature
        images = _probe_images(teacher) if images is None else summed(images)
        names = tap_names(teacher, taps, images)
        self.taps = check_taps(teacher, names, images) if names else []
        self.student_taps = self._student_taps(dict(student_taps or {}), images)
        channels = self._probe_student(images)
        # module names cannot hold dots; ModuleList keeps the order of the taps
        self.adapters = nn.ModuleList(Adapter(channels[tap.name], tap, adapter) for tap in self.taps)
        self.adapters.to(images.device, images.dtype)
        self.blanks = images_in_front(teacher, self.taps, images) if names else 0
        """Blank images that the teacher runs on in front of what is injected at its taps."""
        self._frozen: tuple[nn.Module, ...] = ()
        self.training = student.training
        self.adapters.train(student.training)

    @property
    def teacher(self) -> nn.Module:
        return self._outside[0]

    def _apply(self, fn, recurse: bool = True):
        self.teacher._apply(fn)  # .to() and .double() reach the teacher, though it is no submodule
        return super()._apply(fn, recurse)

    def freeze(self, modules: Iterable[nn.Module]) -> None:
        """These modules stay in evaluation mode: their statistics stand still. An empty list ends it."""
        self._frozen = tuple(modules)
        self.train(self.training)

    def train(self, mode: bool = True) -> HybridDistiller:
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def forward(self, images: Tensor, active: Sequence[str] | None = None, student: bool = True) -> HybridOutput:
        """Logits of teacher, student and hybrids for images (B, C, H, W) or event frames (T, B, C, H, W).

        The student sees the frames, the teacher their sum over time.

        Args:
            active: the taps whose hybrids are wanted; None for all.
            student: whether the student runs to its end; if not, it runs to the one active tap.
        """
        if self.teacher.training:  # somebody's .train() must not move its statistics
            self.teacher.eval()
        if self.training and not self.student.training:  # without a graph its part of the loss would train nothing
            raise ValueError(
                "the distiller is in training mode, its student in evaluation mode: call distiller.train()"
            )
        wanted = [tap.name for tap in self.taps] if active is None else list(active)
        chosen = [(tap, adapter) for tap, adapter in zip(self.taps, self.adapters, strict=True) if tap.name in wanted]
        taps = [tap for tap, _ in chosen]
        if len(taps) != len(wanted) or (not student and len(taps) != 1):
            allowed = [tap.name for tap in self.taps]
            raise ValueError(f"active must be of {allowed}, exactly one without the student's logits, found {wanted}")
        whole = summed(images)
        teacher_logits, features = look(self.teacher, taps, whole, maps=self.feature != "none")
        rates, student_logits = self._run_student(images, [tap.name for tap in taps], student)
        adapted = {tap.name: adapter(rates[tap.name], features[tap.name].size) for tap, adapter in chosen}
        hybrid_logits: dict[str, Tensor] = {}
        if taps:
            prefixes = {name: feature.prefix for name, feature in features.items()}
            blank = whole.new_zeros(self.blanks, *whole.shape[1:])
            hybrid_logits = run_tails(self.teacher, taps, adapted, prefixes, blank)
        feature_losses = {}
        if self.feature != "none":
            # the maps were asked for
            feature_losses = {n: feature_loss(self.feature, a, features[n].map) for n, a in adapted.items()}  # type: ignore[arg-type]
        return HybridOutput(
            None if student_logits is None else at_least_float32(student_logits),
            at_least_float32(teacher_logits),
            {name: at_least_float32(logits) for name, logits in hybrid_logits.items()},
            feature_losses,
        )

    def hybrid(self, tap: str) -> Hybrid:
        """One hybrid as a network of its own, which shares this one's weights.

        Raises:
            ValueError: for a name that is no tap.
        """
        names = [known.name for known in self.taps]
        if tap not in names:
            raise ValueError(f"tap must be one of {names}, found {tap!r}")
        index = names.index(tap)
        adapter: Adapter = self.adapters[index]  # type: ignore[assignment]
        hybrid = Hybrid(self.student, adapter, self.teacher, self.taps[index], self.student_taps[tap], self.blanks)
        hybrid.training = self.training  # the parts keep the modes that they are in
        return hybrid

    def _run_student(
        self, images: Tensor, names: Sequence[str], to_its_end: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The rate of the student's module at each tap, (B, c, h, w), and its logits, if it runs to its end."""
        if not to_its_end:
            return {name: self.student(images, until=self.student_taps[name]) for name in names}, None
        rates: dict[str, Tensor] = {}
        with hooks([(self.student.get_submodule(self.student_taps[name]), _keep(rates, name)) for name in names]):
            logits = self.student(images)
        return rates, logits

    def rates(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The rate of the student's module at each of these taps, (B, c, h, w), for images or event frames."""
        return self._run_student(images, names, True)[0]

    def _student_taps(self, given: dict[str, str], images: Tensor) -> dict[str, str]:
        names = [tap.name for tap in self.taps]
        if unknown := sorted(given.keys() - set(names)):
            raise ValueError(f"student_taps names no taps of the teacher: {unknown}; the taps are {names}")
        missing = [name for name in names if name not in given]
        found = match_taps(missing, self.teacher, self.student, images)
        return {name: given.get(name) or found[name] for name in names}

    def _probe_student(self, images: Tensor) -> dict[str, int]:
        """Channels of the student's module at each tap, from one image."""
        rates: dict[str, Tensor] = {}
        calls: list[str] = []
        kinds: dict[str, str | None] = {}
        pairs = []
        for tap, name in self.student_taps.items():
            try:
                module = self.student.get_submodule(name)
                look = lambda *args, tap=tap: kinds.update({tap: getattr(args[-1], "kind", None)})  # noqa: E731
                pairs += [(module, _keep(rates, tap)), (module, look), (module, lambda *_, tap=tap: calls.append(tap))]
            except AttributeError:
                allowed = [child for child, _ in self.student.named_children()]
                raise ValueError(f"tap {tap!r}: the student has no module {name!r}; it has {allowed}") from None
        with probing(self.student, timesteps=2), hooks(pairs):  # the feedback of a loop runs from the second step on
            classes = self.student(images[:1]).shape[1]
            wanted = self.teacher(images[:1]).shape[1]
        if classes != wanted:
            raise ValueError(f"the student knows {classes} classes, the teacher {wanted}")
        for tap, name in self.student_taps.items():
            if kinds.get(tap) == "plain_step":
                loop = name.partition(".")[0]
                raise ValueError(
                    f"tap {tap!r}: the student's module {name!r} is inside of a feedback loop, {loop!r}, which runs a "
                    "time step at a time without a graph: only what the loop as a whole gives has a rate that can be "
                    f"trained. Name {loop!r} itself, or a module in front of it"
                )
            if calls.count(tap) > 1:
                raise ValueError(f"tap {tap!r}: the student's module {name!r} fires more than once in a forward pass")
            if tap not in rates or rates[tap].ndim != 4:
                raise ValueError(f"tap {tap!r}: the student's module {name!r} yields no map (B, C, H, W) of spikes")
        return {tap: rate.shape[1] for tap, rate in rates.items()}


def _keep(rates: dict[str, Tensor], name: str):
    """A forward hook that keeps the rate of a module's output, (B, C, H, W)."""

    def hook(module: nn.Module, args: tuple, output: SpikeTrain | Tensor) -> None:
        rates[name] = output.rate if isinstance(output, SpikeTrain) else output

    return hook


def _probe_images(teacher: nn.Module) -> Tensor:
    size = (getattr(teacher, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    parameter = next(teacher.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, image_channels(teacher), *size[1:], generator=generator).to(parameter.device, parameter.dtype)
