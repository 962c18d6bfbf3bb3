"""Format nir: the Neuromorphic Intermediate Representation, a graph of one time step that readers run on their own.

Neurons. Ours is u_t = leak v_{t-1} + c_t, s_t = [u_t >= threshold], v_t = (1 - s_t) u_t. NIR's LIF is
tau dv/dt = (v_leak - v) + r I with a spike at v > v_threshold that sets v to v_reset. A forward Euler step of length
dt, which is what its readers take, is v += dt/tau ((v_leak - v) + r I): with v_leak = v_reset = 0,
tau = dt / (1 - leak) and r = tau / dt it is ours. For leak 1 NIR's IF, dv/dt = r I with r = 1 / dt. v_threshold is the
number below ours, because NIR fires above it and we fire at it. dt is 0.1 ms, readers' usual one.

`distill.export.nir_writer` says how the other layers are put.
"""

from __future__ import annotations

from pathlib import Path

from torch import fx

from distill.export.agreement import Logits, check_of, close, dtype_of
from distill.export.extras import need
from distill.export.job import Check, Job
from distill.export.loops import refuse_loops
from distill.export.plain import neurons_of, plain_network, refuse_gates
from distill.export.sources import spiking_network
from models import SpikingNetwork

FILE = "network.nir"


def export(job: Job) -> Check:
    """Writes network.nir; the check reads it back and runs it step by step.

    Raises:
        ValueError: for a network that NIR cannot express, naming what, or a package that is missing.
        UnsupportedOperationError: for one that has no plain form.
    """
    need("nir", extra="nir")
    import nir

    from distill.export.nir_writer import Writer

    network = spiking_network(job)
    step = plain_network(network, tuple(job.samples.shape[-3:]))
    refuse_gates(step, "nir")
    refuse_loops(step, "nir")
    refuse_soft_reset(step)
    nir.write(job.folder / FILE, Writer(step, dtype_of(network)).graph())
    return check_of(close(job, load(job.folder, network), "nir"), packages=("nir",))


def load(folder: Path, network: SpikingNetwork) -> Logits:
    """The file read back, run for as many steps as the network by `distill.export.nir_simulation`."""
    import nir

    from distill.export.nir_simulation import Simulation
    from distill.export.nir_writer import DT

    return Simulation(nir.read(folder / FILE), network.timesteps, DT)


def refuse_soft_reset(step: fx.GraphModule) -> None:
    """
    Raises:
        ValueError: names the first layer whose spikes subtract the threshold.
    """
    soft = [name for name, neuron in neurons_of(step).items() if neuron.config.reset == "soft"]
    if soft:
        raise ValueError(
            "a spike of NIR's LIF and IF sets the membrane to v_reset, none of its neurons subtracts the threshold, "
            f"and {len(soft)} layers of this network do (the first is {soft[0]!r}): train it with hard reset "
            "(--student.neuron.reset hard; with --student.neuron.leak 1 its neurons are NIR's IF), or use another "
            "format"
        )
