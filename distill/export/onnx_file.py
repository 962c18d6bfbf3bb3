"""Format onnx: one ONNX file of all T steps, for any number of images."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from distill.export.agreement import Logits, check_of, close
from distill.export.extras import need
from distill.export.job import Check, Job
from distill.export.sources import spiking_network
from distill.export.torch_program import unrolled_network

FILE = "network.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "images", "logits"


def export(job: Job) -> Check:
    """Writes network.onnx; the check runs it in onnxruntime.

    Raises:
        ValueError: for a network that is not a spiking one up to its logits, or a package that is missing.
        UnsupportedOperationError: for a network that has no plain form.
    """
    need(*PACKAGES, extra="onnx")
    network = spiking_network(job)
    unrolled, example, shapes = unrolled_network(job, network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter says of its own insides
        torch.onnx.export(
            unrolled,
            (example,),
            job.folder / FILE,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=[INPUT],
            output_names=[OUTPUT],
            external_data=False,
            verbose=False,
        )
    return check_of(close(job, load(job.folder), "onnxruntime"), packages=PACKAGES)


def load(folder: Path) -> Logits:
    """The file in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return run
