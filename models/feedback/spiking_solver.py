"""SPIDE: the gradient at the equilibrium, found by neurons that send spikes of both signs backward.

Xiao et al., Neural Networks 2023, arXiv 2302.00232. Each layer has a second membrane, of a couple of neurons that fire
+1 and -1 (together: ternary). With g the scaled loss gradient, W_i^T, m_i as in `models.feedback.linearised`, at step k

    w_n += g + F^T (m_1 z_1 of the step before / theta)        w_i += W_i+1^T (m_i+1 z_i+1 / theta)
    z_i = +-(V_b - u_rest,b) where w_i passes +-V_b, else 0    w_i -= z_i

and with u_rest,b = -V_b the constant is 2 V_b. Membranes stay bounded, so that the averages of z_i solve
beta_n = F^T ... + g, beta_i = W_i+1^T (m_i+1 beta_i+1 / theta) to an error that falls as 1 / T_b.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from models.feedback.linearised import LinearisedLoop


def spiking_couples(
    loop: LinearisedLoop, g: Tensor, timesteps: int, threshold: float, scale: float, around: bool = True
) -> tuple[list[Tensor], Tensor]:
    """
    Args:
        g: dL/da_n, (B, C, ...).
        timesteps: T_b.
        threshold: V_b.
        scale: factor of g before, divided out after.
        around: whether the spikes of layer 1 go on to layer n.

    Returns:
        beta_1 to beta_n, and the share of the neurons of each that fired in a step, (n,).
    """
    layers = len(loop.maps)
    g = g * scale
    membranes: list[Any] = [0.0] * layers
    totals: list[Any] = [0.0] * layers
    fired = g.new_zeros(layers)
    sent: Tensor | None = None  # z_1 of the step before, then of each layer in turn, from the last to the first
    for _ in range(timesteps):
        for i in range(layers - 1, -1, -1):
            into: Any = g if i == layers - 1 else 0.0
            if sent is not None and (around or i < layers - 1):
                into = into + loop.maps[(i + 1) % layers](sent)
            membrane = membranes[i] + into
            sent = _fire(membrane, threshold)
            membranes[i] = membrane - sent
            totals[i] = totals[i] + sent
            fired[i] += (sent != 0).to(fired.dtype).mean()
    return [total / (timesteps * scale) for total in totals], fired / timesteps


def _fire(membrane: Tensor, threshold: float) -> Tensor:
    signs = (membrane >= threshold).to(membrane.dtype) - (membrane <= -threshold).to(membrane.dtype)
    return 2 * threshold * signs
