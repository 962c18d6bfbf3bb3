"""Solvers of beta = J^T beta + g, the gradient at the equilibrium of a loop, and what tells whether the loop contracts.

Shapes: B images; g and beta are (B, C, ...). J is block-diagonal over images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Turn = Callable[[Tensor], Tensor]
"""v -> J^T v."""

POWER_ITERATIONS = 10
"""Turns of the loop by which its contraction is estimated where the solver itself does not show it."""


class NonContractingLoopError(RuntimeError):
    """A feedback loop lets what goes around it grow: it has no equilibrium to differentiate."""


@dataclass(frozen=True, slots=True)
class SolverReport:
    """How the last backward pass through a loop went."""

    iterations: int
    """Turns of the loop, or time steps of spide."""
    residual: float
    """Norm of J^T beta + g - beta as a share of that of g."""
    converged: bool
    """Whether the residual is at most the tolerance."""
    growth: float
    """By how much the loop multiplies in one turn what goes around it: below 1 it contracts."""


def fixed_point(turn: Turn, g: Tensor, tolerance: float, max_iterations: int) -> tuple[Tensor, SolverReport]:
    """beta <- J^T beta + g. The steps that it takes are the powers (J^T)^k g, whose growth it reports."""
    size = norm(g)
    beta, step, iterations = g, g, 0
    sizes = [size]
    while iterations < max_iterations:
        step = turn(step)
        sizes.append(norm(step))
        iterations += 1
        if (sizes[-1] <= tolerance * size) | ~torch.isfinite(sizes[-1]):
            break
        beta = beta + step
    residual = sizes[-1]
    return beta, _report(iterations, residual, size, tolerance, growth_of(sizes))


def broyden(turn: Turn, g: Tensor, tolerance: float, max_iterations: int) -> tuple[Tensor, SolverReport]:
    """Broyden's "good" method for f(beta) = J^T beta + g - beta = 0, every image with an inverse Jacobian of its own.

    The inverse starts at -1 and gains a rank with each iteration, kept as the pairs of which it is made (Broyden, 1965;
    for equilibrium models Bai et al., NeurIPS 2019). Of all iterates the one of the smallest residual is given.
    """
    size = norm(g)

    def residual_at(beta: Tensor) -> Tensor:
        return (turn(beta.view_as(g)) + g).flatten(1) - beta

    beta = torch.zeros_like(g).flatten(1)
    f = g.flatten(1).clone()  # at beta = 0
    best, least, iterations = beta, norm(f), 0
    going_on = bool(least > tolerance * size)
    left: list[Tensor] = []  # H = -1 + sum_i left_i right_i^T
    right: list[Tensor] = []
    while going_on and iterations < max_iterations:
        move = -_times(left, right, f)
        new = beta + move
        f_new = residual_at(new)
        change, h_change = f_new - f, _times(left, right, f_new - f)
        row = _times(right, left, move)  # move^T H
        slope = (row * change).sum(1, keepdim=True)
        left.append(torch.where(slope == 0, 0, (move - h_change) / torch.where(slope == 0, 1, slope)))
        right.append(row)
        beta, f = new, f_new
        iterations += 1
        now = norm(f)
        better = now < least
        least = torch.where(better, now, least)
        # all that the host asks for in one answer: each waits for a GPU
        finite, is_best, going_on = torch.stack([torch.isfinite(now), better, least > tolerance * size]).tolist()
        if not finite:
            break
        if is_best:
            best = beta
    return best.view_as(g), _report(iterations, least, size, tolerance, growth(turn, g))


def report_of(turn: Turn, g: Tensor, beta: Tensor, iterations: int) -> SolverReport:
    """Of a solution that was found elsewhere, by spikes: it counts as one if what is left is less than g."""
    size = norm(g)
    return _report(iterations, norm(turn(beta) + g - beta), size, 1.0, growth(turn, g))


def growth(turn: Turn, g: Tensor, turns: int = POWER_ITERATIONS) -> float:
    """The factor by which a turn of the loop multiplies the gradient, estimated by power iteration."""
    step, sizes = g, [norm(g)]
    for _ in range(turns):
        step = turn(step)
        sizes.append(norm(step))
    return growth_of(sizes)


def growth_of(sizes: list[Tensor]) -> float:
    """The mean growth over the second half of a sequence of norms: at first a loop may amplify and still contract."""
    sizes = [size for size in torch.stack(sizes).cpu() if torch.isfinite(size)]  # one answer of a GPU for all
    if not sizes:
        return math.nan  # the gradient itself is not finite: nothing is known of the loop
    start = (len(sizes) - 1) // 2
    if sizes[start] == 0 or sizes[-1] == 0:
        return 0.0
    return float((sizes[-1] / sizes[start]) ** (1 / max(1, len(sizes) - 1 - start)))


def norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x)


def _times(left: list[Tensor], right: list[Tensor], x: Tensor) -> Tensor:
    """(-1 + sum_i left_i right_i^T) x for each image."""
    result = -x
    for u, v in zip(left, right, strict=True):
        result = result + u * (v * x).sum(1, keepdim=True)
    return result


def _report(iterations: int, residual: Tensor, size: Tensor, tolerance: float, growth: float) -> SolverReport:
    share = float((residual / size).masked_fill(size == 0, 0.0))
    return SolverReport(iterations, share, share <= tolerance, growth)
