"""Weights of a spiking twin that make its firing rates stand for the teacher's activations: ANN-to-SNN conversion.

Spikes stay in {0, 1} and thresholds as they are: scales go into the weights and norms around the neurons. A spike of
channel i stands for the value s_i, which whatever consumes the spikes linearly absorbs; the current of a neuron is
divided by its input scale c_i, and shifted, in the layer before it (`models.scale_tracing` says which).

The twin is calibrated from its first neurons to its last, in one pass, on the currents that the calibrated layers
before give: a layer makes up for the errors of those before it (Li et al., "A Free Lunch From ANN", ICML 2021). For
each channel, c (a percentile of the activation, Rueckauer et al., 2017, or more than its largest) and the shift of the
current (among them the threshold / 2T that turns an integrate-and-fire neuron's floor into a round; Deng & Gu, ICLR
2021) are those with the smallest E[(s r - a)^2] over sampled positions, r the rate that the neuron fires with, a the
teacher's activation and s its least-squares value. Where spikes are added to the current of a later neuron (a
shortcut), their value is that neuron's input scale, above which it saturates: its error counts in the choice, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.dynamics import step
from models.layout import at_least_float32
from models.network import SpikingNetwork, probing
from models.neuron import SpikingNeuron
from models.scale_choice import PERCENTILES, LayerCalibration, choose, shifts_at
from models.scale_trace import Site, Trace
from models.scale_tracing import trace_scales
from models.scales import scale_input, scale_output, shift_output
from models.spiketrain import SpikeTrain
from models.twin import ACTIVATIONS

POSITIONS = (256, 1024)
"""How many pairs of an image and a pixel stand for a layer, at least and at most."""

CURRENTS = 2**21
"""More positions than the fewest are taken as long as they have no more input currents, of T steps and C channels."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """What `calibrate` chose, in the order of the layers' calls."""

    layers: tuple[LayerCalibration, ...]

    def __str__(self) -> str:
        """A line for each layer, scales as medians over its channels."""
        width = max(len(layer.name) for layer in self.layers)
        return "\n".join(
            f"{layer.name:<{width}}  input scale {layer.input_scale.median().item():8.3g}  "
            f"value of a spike {layer.spike_value.median().item():8.3g}  relative error {layer.error:.3f}"
            for layer in self.layers
        )


@torch.no_grad()
def calibrate(
    ann: nn.Module,
    twin: SpikingNetwork,
    batches: Iterable[Tensor],
    percentile: float | None = None,
    recalibrate: bool = False,
) -> Calibration:
    """Changes the weights of a twin, in place, so that its firing rates represent the activations of its teacher.

    What is chosen depends on the twin's T and neurons. The pass needs the memory of one evaluation of the twin on all
    images together; a hundred images are enough.

    Args:
        ann: the teacher, left as it is.
        twin: ``spiking_twin(ann, ...)`` with the teacher's weights; keeps its training mode.
        batches: images, each (B, C, H, W), normalised as the teacher expects.
        percentile: of a channel's activation, in (0, 100], as its input scale; None tries `PERCENTILES`.
        recalibrate: afterwards replace the running statistics of the batch norms by those of the twin's own spikes.

    Raises:
        ValueError: for no images, a percentile out of range, activations that are not finite (naming the layer), or a
            network that is no twin of `ann` with its weights (naming what differs) or draws its input at random.
        UnsupportedOperationError: names the module around which no layer can take a scale.
    """
    if percentile is not None and not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100], found {percentile}")
    _check_twin(ann, twin)
    parameter = next(ann.parameters())
    parts = [batch.to(parameter.device, parameter.dtype) for batch in batches]
    if sum(len(part) for part in parts) == 0:
        raise ValueError("calibration takes at least one image, found none in the batches")
    images = torch.cat(parts)
    with _evaluating(ann):
        trace = trace_scales(ann, twin, images[:1])
        activations = _sample(ann, trace, images, twin.timesteps)
    pass_ = _Pass(twin, trace, activations, PERCENTILES if percentile is None else (percentile,))
    with probing(twin, twin.timesteps), _hooks(pass_.hooks()):
        twin(images)
    if recalibrate:
        _reestimate_norms(twin, parts)
    return Calibration(layers=tuple(pass_.chosen))


@torch.no_grad()
def check_calibration(ann: nn.Module, twin: SpikingNetwork, images: Tensor) -> None:
    """
    Args:
        images: (B, C, H, W), one is enough.

    Raises:
        UnsupportedOperationError: names the module around which no layer can take a scale, as `calibrate` does.
    """
    with _evaluating(ann):
        trace_scales(ann, twin, images[:1])


def _check_twin(ann: nn.Module, twin: nn.Module) -> None:
    if not isinstance(twin, SpikingNetwork):
        raise ValueError(f"calibrate takes a spiking twin, found {type(twin).__name__}")
    if twin.step_mode != "m":
        raise ValueError(f'the twin must be in step mode "m", found {twin.step_mode!r}')
    if twin.input_encoder is not None:
        raise ValueError(f"calibrate takes a twin of direct encoding, found {type(twin.input_encoder).__name__}")
    modules = dict(ann.named_modules())
    for name, module in twin.named_modules():
        if isinstance(module, SpikingNeuron) and not isinstance(modules.get(name), ACTIVATIONS):
            found = type(modules[name]).__name__ if name in modules else "nothing"
            raise ValueError(f"this is no twin of the network: {name!r} is a neuron, where the network has {found}")
    neurons = {f"{name}.w" for name, module in twin.named_modules() if isinstance(module, SpikingNeuron)}
    theirs = ann.state_dict()
    for name, ours in twin.state_dict().items():
        if name not in neurons and not (name in theirs and _same(ours, theirs[name])):
            raise ValueError(
                f"this is no twin with the weights of the network: {name!r} differs in value, type or device"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


# -- the teacher's activations ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Sample:
    """Activations (n, C) at n positions, each an image and a pixel."""

    values: Tensor
    images: Tensor
    pixels: Tensor

    def of(self, stream: Tensor) -> Tensor:
        """The values of a stream (S, B, C, ...) at the same positions, (S, n, C)."""
        stream = stream.reshape(*stream.shape[:3], -1)
        return torch.stack([at_least_float32(frame[self.images, :, self.pixels]) for frame in stream])


def _sample(ann: nn.Module, trace: Trace, images: Tensor, timesteps: int) -> list[_Sample]:
    """The teacher's activations at random positions, for each site."""
    generator = torch.Generator().manual_seed(0)
    samples: list[_Sample] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        name = trace.sites[len(samples)].name
        if not output.isfinite().all():
            raise ValueError(f"the activations of {name!r} are not finite")
        pixels = output.shape[2:].numel()
        count = max(POSITIONS[0], min(POSITIONS[1], CURRENTS // (timesteps * output.shape[1])))
        drawn = torch.randperm(len(output) * pixels, generator=generator)[:count].to(output.device)
        sample = _Sample(output, drawn // pixels, drawn % pixels)
        samples.append(dataclasses.replace(sample, values=sample.of(output[None])[0]))

    modules = {ann.get_submodule(site.name) for site in trace.sites}
    with _hooks([module.register_forward_hook(hook) for module in modules]):
        ann(images)
    return samples


# -- the twin, site by site ---------------------------------------------------------------------------


class _Pass:
    """One evaluation of the twin on all images, during which each site is calibrated before its neurons fire."""

    def __init__(self, twin: SpikingNetwork, trace: Trace, samples: list[_Sample], percentiles: tuple[float, ...]):
        self.twin, self.trace, self.samples, self.percentiles = twin, trace, samples, percentiles
        self.values = torch.ones(trace.units, device=samples[0].values.device, dtype=samples[0].values.dtype)
        """The value of each unit of the trace."""
        self.chosen: list[LayerCalibration] = []

    def hooks(self) -> list:
        names = dict.fromkeys(site.name for site in self.trace.sites)
        return [self.twin.get_submodule(name).register_forward_pre_hook(self._calibrate) for name in names]

    def _calibrate(self, neuron: nn.Module, args: tuple) -> tuple[SpikeTrain]:
        """Of the next site, given its input as the teacher's weights make it; returns what the new weights make."""
        assert isinstance(neuron, SpikingNeuron)
        train: SpikeTrain = args[0]
        site, sample = self.trace.sites[len(self.chosen)], self.samples[len(self.chosen)]
        stream = train.folded.unflatten(0, (train.steps, -1))  # (S, B, C, ...)
        shifted = next((a.name for a in site.shifted if self.twin.get_submodule(a.name).bias is not None), None)
        given = None if site.input_units is None else self.values[site.input_units]
        shifts = (0.0,) if shifted is None else shifts_at(train.timesteps)
        rate, threshold = _rate_of(neuron, train.timesteps), neuron.config.threshold
        currents, activations, behind = sample.of(stream), sample.values, self._behind(site)
        choice = choose(
            currents, activations, rate, self.percentiles, shifts, given=given, behind=behind, threshold=threshold
        )
        self.chosen.append(dataclasses.replace(choice, name=site.name))
        self._write(site, self.chosen[-1], shifted)
        divisor = torch.ones_like(choice.input_scale) if given is not None else choice.input_scale
        per_channel = (-1, *[1] * (stream.ndim - 3))
        stream = (stream / divisor.view(per_channel) + choice.shift.view(per_channel)).to(stream.dtype)
        if train.steps == 1:
            return (SpikeTrain.constant(stream[0], train.timesteps, train.kind),)
        return (SpikeTrain.from_stream(stream, train.kind),)

    def _behind(self, site: Site) -> list[Tensor]:
        """The activations (n, C) of all sites whose input scale follows from the value of this site's spikes."""
        found = []
        for later, sample in zip(self.trace.sites, self.samples, strict=True):
            if later.input_units is None or not (shared := torch.isin(later.input_units, site.units)).any():
                continue
            for values in (sample.values, *self._behind(later)):
                aligned = values.new_zeros(len(values), len(site.units))
                aligned[:, later.input_units[shared] - site.units[0]] = values[:, shared]
                found.append(aligned[: POSITIONS[0]])  # there are many of them in a deep stage
        return found

    def _write(self, site: Site, choice: LayerCalibration, shifted: str | None) -> None:
        """Into the layers before the site, and into all that will see its spikes."""
        if site.input_units is None:
            for layer in site.layers:
                scale_output(self.twin.get_submodule(layer.name), 1 / choice.input_scale)
        if shifted is not None:
            shift_output(self.twin.get_submodule(shifted), choice.shift)
        factors = torch.ones_like(self.values)
        self.values[site.units] = factors[site.units] = choice.spike_value
        for layer in self.trace.layers.values():
            module = self.twin.get_submodule(layer.name)
            if torch.isin(layer.input_units, site.units).any():
                scale_input(module, factors[layer.input_units])
            if layer.output_units is not None and torch.isin(layer.output_units, site.units).any():
                scale_output(module, 1 / factors[layer.output_units])


def _rate_of(neuron: SpikingNeuron, timesteps: int) -> Callable[[Tensor], Tensor]:
    """The firing rate (n, C) of the neuron on currents (S, n, C), S in {1, T}."""

    def rate(current: Tensor) -> Tensor:
        v: Tensor | float = 0.0
        total = torch.zeros_like(current[0])
        for t in range(timesteps):
            _, spikes, v = step(current[t % len(current)], v, neuron.leak, neuron.config)
            total += spikes
        return total / timesteps

    return rate


# -- around the passes --------------------------------------------------------------------------------


def _reestimate_norms(twin: SpikingNetwork, batches: list[Tensor]) -> None:
    """Running statistics of the twin's own spikes: the mean over the batches."""
    norms = [module for module in twin.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with probing(twin, twin.timesteps):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # PyTorch's sign for the cumulative average
            norm.train()
        for batch in batches:
            twin(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _hooks(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
