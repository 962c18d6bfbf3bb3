"""Training that goes forward in time, one backward pass for each step: OTTT and SLTT, with SpikingJelly's nodes.

Both cut the graph between two steps. OTTT (Xiao et al., NeurIPS 2022, arXiv 2210.04195) makes up for it with a trace of
the spikes that came in, a_t = leak a_{t-1} + s_t, which stands for s_t in the gradients of weights; SLTT (Meng et al.,
ICCV 2023, arXiv 2302.14311) leaves it at the step's own spikes. Memory does not depend on T.
"""

from __future__ import annotations

import math

from spikingjelly.activation_based import surrogate
from spikingjelly.activation_based.neuron import OTTTLIFNode, SLTTLIFNode
from torch import nn

from models.dynamics import NeuronConfig
from models.neuron import SpikingNeuron

ONLINE = {"ottt": OTTTLIFNode, "sltt": SLTTLIFNode}
"""The online algorithms and SpikingJelly's node of each."""


def use_online_nodes(network: nn.Module, algorithm: str) -> None:
    """Gives every neuron SpikingJelly's node of an online algorithm, or takes it away under the others.

    Raises:
        ValueError: for neurons with a learned leak, whose gradient goes through time.
    """
    neurons = [module for module in network.modules() if isinstance(module, SpikingNeuron)]
    if algorithm in ONLINE and any(module.config.learnable_leak for module in neurons):
        raise ValueError(
            f"{algorithm} cuts the graph between steps, in which a leak is learned: use learnable_leak=false"
        )
    for module in neurons:
        module.online = _node(algorithm, module.config) if algorithm in ONLINE else None


def reset_online_nodes(network: nn.Module) -> None:
    """Back to rest: before the first step and after the last."""
    for module in network.modules():
        if isinstance(module, SpikingNeuron) and module.online is not None:
            module.online.reset()  # type: ignore[operator]


def _node(algorithm: str, config: NeuronConfig) -> nn.Module:
    return ONLINE[algorithm](
        tau=math.inf if config.leak == 1 else 1 / (1 - config.leak),  # SpikingJelly's leak is 1 - 1/tau
        decay_input=False,
        v_threshold=config.threshold,
        v_reset=None if config.reset == "soft" else 0.0,
        surrogate_function=surrogate.Sigmoid(alpha=config.alpha),
        detach_reset=config.detach_reset,
    )
