"""What running a network on a spike train takes besides: stopping it, repeating it, naming where it failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class Reached(Exception):
    """Ends a traversal at a module; carries what it gave."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def random_numbers(device: torch.device) -> Callable[[], None]:
    """A function that puts the random numbers back to where they are now.

    Raises:
        ValueError: for a device whose random numbers cannot be put back.
    """
    if device.type not in ("cpu", "cuda", "xpu"):
        raise ValueError(
            f"rate_s runs on cpu, cuda and xpu, found {device.type}: it draws one dropout mask for all steps"
        )
    generator = None if device.type == "cpu" else getattr(torch, device.type)
    state = torch.get_rng_state()
    on_device = None if generator is None else generator.get_rng_state(device)

    def restore() -> None:
        torch.set_rng_state(state)
        if generator is not None:
            generator.set_rng_state(on_device, device)

    return restore


@contextlib.contextmanager
def counting_no_batch(network: nn.Module) -> Iterator[None]:
    """The batches that norms have seen stay as they are: a replay is no further one."""
    counters = {name: buffer for name, buffer in network.named_buffers() if name.endswith("num_batches_tracked")}
    before = {name: counter.clone() for name, counter in counters.items()}
    try:
        yield
    finally:
        for name, counter in counters.items():
            counter.copy_(before[name])


def path_in_traceback(network: nn.Module, error: BaseException) -> str:
    """The name of the innermost module whose code was running when `error` was raised."""
    names = {id(module): name for name, module in network.named_modules()}
    path, trace = "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        path = names.get(id(module), "") or path
        trace = trace.tb_next
    if not path:
        return f"the forward of {type(network).__name__}"
    return f"module {path!r} ({type(network.get_submodule(path)).__name__})"
