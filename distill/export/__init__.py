"""Networks in forms that others read, each checked against the network before it is handed over.

A format is a function from a `Job` to a `Check`: it writes its files to ``job.folder``, reads them back as a stranger
would, and compares. `FORMATS` names them; each lives in a module of its own, which alone imports what the format needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import get_args

from distill.export.config import ExportConfig, FormatName
from distill.export.job import Check, Job

Format = Callable[[Job], Check]

_MODULES: dict[str, str] = {
    "snn": "snn",
    "spikingjelly": "spikingjelly_code",
    "torch_export": "torch_program",
    "onnx": "onnx_file",
    "nir": "nir_graph",
}


def _format(name: str) -> Format:
    def export(job: Job) -> Check:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}").export(job)

    return export


FORMATS: dict[str, Format] = {name: _format(name) for name in get_args(FormatName)}
"""From the name of a format to what writes and checks it."""

__all__ = ["FORMATS", "Check", "ExportConfig", "Format", "Job"]
