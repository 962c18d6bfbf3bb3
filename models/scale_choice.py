"""Scales and shift of a layer of neurons: of those that are tried the ones whose rates miss the activations least."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

PERCENTILES = (50.0, 75.0, 90.0, 97.0, 99.0, 99.9, 100.0, 125.0, 160.0, 200.0, 300.0)
"""Of a channel's activation: the input scales that are tried; above 100 they are that many percent of the largest."""

SHIFTS = tuple(eighths / 8 for eighths in range(-2, 7))
"""Of the current, in units of the threshold: those that are tried, beside 1 / 2T. On a constant current a neuron of
leak 0.5 fires once in four steps from 0.53 of the threshold on, and always from 1 on: its rate follows activations that
are scaled down and shifted into between."""

AN_OCTAVE = 2
"""How many of `RATIOS` double the value."""

RATIOS = tuple(2 ** (part / AN_OCTAVE) for part in range(-6, 5))
"""Of a spike's value to the largest activation that it has to stand for, at which the error behind is computed."""

SHARE_BEHIND = 0.25
"""Weight of the mean relative error of the neurons whose input scale is set, beside that of the neuron that sets it."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerCalibration:
    """One call of a neuron layer of C channels."""

    name: str
    input_scale: Tensor
    """c, (C,): what a current of 1 stands for; the value of the spikes in the current where there are any."""
    shift: Tensor
    """What was added to the current, (C,)."""
    spike_value: Tensor
    """s, (C,): the activation that a rate of 1 stands for."""
    percentile: Tensor | None
    """Which percentile of the activation c is, (C,), above 100 in percent of the largest; None where spikes in the
    current say what c is."""
    error: float
    """Sum of (s r - a)^2 over that of a^2, at the sampled positions."""


def shifts_at(timesteps: int) -> tuple[float, ...]:
    """Those to try, in units of the threshold: the smallest first, which wins where several do equally well."""
    return tuple(sorted({*SHIFTS, 0.5 / timesteps}, key=lambda shift: (abs(shift), -shift)))


def choose(
    current: Tensor,
    activation: Tensor,
    rate: Callable[[Tensor], Tensor],
    percentiles: tuple[float, ...],
    shifts: tuple[float, ...],
    *,
    given: Tensor | None = None,
    behind: Sequence[Tensor] = (),
    threshold: float = 1.0,
) -> LayerCalibration:
    """Input scale, shift and spike value of each channel with the smallest squared error of s * rate.

    Args:
        current: at n positions, (S, n, C), S in {1, T}: in the teacher's units, or in those of `given`.
        activation: the teacher's at the same positions, (n, C).
        rate: the firing rate (n, C) on a current (S, n, C).
        percentiles: of each channel's activation: the input scales to try, in units of the threshold; above 100 they
            are that many percent of the largest activation.
        shifts: of the divided current, to try, in units of the threshold.
        given: the input scale, (C,), where it is not free: `current` has been divided by it.
        behind: activations (m, C) whose input scale s will be: the mean of their relative errors, each with the best
            of the shifts, counts, too, with the weight `SHARE_BEHIND`.
    """
    smallest = torch.finfo(activation.dtype).tiny
    energy, ones = activation.square().sum(0), torch.ones_like(activation[0])
    # a channel that is silent at all positions: the largest activation of the layer does for it
    spare = ones * (activation.amax() if activation.amax() > 0 else 1.0)
    best = {"scale": spare / threshold, "value": spare, "shift": 0 * ones, "percentile": 100 * ones, "error": energy}
    least = torch.full_like(energy, torch.inf)
    their_error = error_behind(behind, rate, shifts, threshold) if behind else None
    for percentile, tried in [(100.0, ones)] if given is not None else _scales(activation, behind, percentiles):
        tried = tried / threshold if given is None else tried
        valid = tried > 0
        scaled = current / torch.where(valid, tried, ones)
        for part in shifts:
            value, error = _fit(rate(scaled + part * threshold), activation)
            valued = valid & (value > 0)
            loss = error / energy.clamp_min(smallest)
            if their_error is not None:
                loss = loss + SHARE_BEHIND * their_error(torch.where(valued, value, ones))
            better = valued & (loss < least)
            least[better] = loss[better]
            new = {"scale": tried, "value": value, "shift": part * threshold * ones, "error": error}
            for name, values in {**new, "percentile": percentile * ones}.items():
                best[name] = torch.where(better, values, best[name])
    return LayerCalibration(
        name="",
        input_scale=best["scale"] if given is None else given,
        shift=best["shift"],
        spike_value=best["value"],
        percentile=best["percentile"] if given is None else None,
        error=(best["error"].sum() / energy.sum().clamp_min(smallest)).item(),
    )


def _fit(rate: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    """The s of each channel with the smallest sum of (s * rate - activation)^2, and that sum."""
    projection, power = (activation * rate).sum(0), rate.square().sum(0)
    value = projection / power.clamp_min(torch.finfo(rate.dtype).tiny)
    return value, (activation.square().sum(0) - value * projection).clamp_min(0)


def error_behind(
    behind: Sequence[Tensor], rate: Callable[[Tensor], Tensor], shifts: tuple[float, ...], threshold: float
) -> Callable[[Tensor], Tensor]:
    """The mean relative error of neurons behind, (C,), by the value (C,) of the spikes that set their input scale.

    A table of `RATIOS`, between which it is interpolated: there are many neurons behind in a deep stage.
    """
    smallest = torch.finfo(behind[0].dtype).tiny
    largest = torch.stack([later.amax(0) for later in behind]).amax(0).clamp_min(smallest)
    table = torch.zeros(len(RATIOS), len(largest), dtype=largest.dtype, device=largest.device)
    for row, ratio in zip(table, RATIOS, strict=True):
        for later in behind:
            current = (later / (ratio * largest))[None]
            errors = [_fit(rate(current + part * threshold), later)[1] for part in shifts]
            row += torch.stack(errors).amin(0) / later.square().sum(0).clamp_min(smallest) / len(behind)

    def error(value: Tensor) -> Tensor:
        place = (AN_OCTAVE * torch.log2(value / (RATIOS[0] * largest))).clamp(0, len(RATIOS) - 1)
        below = place.floor().clamp(max=len(RATIOS) - 2)
        low, high = (table.gather(0, (below.long() + next_)[None])[0] for next_ in (0, 1))
        return torch.lerp(low, high, place - below)

    return error


def _scales(
    activation: Tensor, behind: Sequence[Tensor], percentiles: tuple[float, ...]
) -> Iterator[tuple[float, Tensor]]:
    """Percentiles of the activation, (C,), and the largest of it and of those whose input scale it sets."""
    ranked = [x.sort(0).values for x in (activation, *behind)]
    for percentile in percentiles:
        part = percentile / 100
        found = [x[min(int(part * len(x)), len(x) - 1)] * max(part, 1) for x in ranked]
        if len(percentiles) > 1:
            yield percentile, found[0]
        if behind or len(percentiles) == 1:
            yield percentile, torch.stack(found).amax(0)
