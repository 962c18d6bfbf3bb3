"""What a few neurons do while a spiking network looks at a few images: `raster.json`, which the report draws.

    {"timesteps": T,
     "layers": [{"name", "shape": [C, H, W], "fired": neurons that fire at all, "neurons": [flat index, ...]}, ...],
     "images": [{"index": in the evaluation set, "label": class name, "picture": PNG as a data URI,
                 "predictions": [class name after step 1, ..., after step T], "confidences": [softmax, ...],
                 "spikes": [[[steps, from 1, at which this neuron fires], ...] for each layer]}, ...]}

Shapes: T time steps, B images, C channels, H x W the input size, N neurons of a layer.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from distill.data import Preprocessing, Splits
from distill.meters import neuron_layers
from distill.preparation import channels_last
from distill.random_numbers import repeatable
from distill.taps import hooks
from models import SpikeTrain, SpikingNetwork

RASTER = "raster.json"
IMAGES, LAYERS, NEURONS = 4, 3, 24
"""The most of each that is shown."""
PICTURE = 96
"""The longer side of a picture in pixels; larger images are made smaller."""


@torch.no_grad()
def spike_examples(
    accelerator: Accelerator, student: SpikingNetwork, layers: Sequence[str], preprocessing: Preprocessing, data: Splits
) -> dict[str, Any]:
    """Spikes and predictions of a network for images of different classes, the same ones each time; in JSON types.

    The neurons of a layer are spread over those that fire for any of the images; they are the same for all images.

    Args:
        layers: the names of the layers of neurons that run, in their order; some of them are shown.
        preprocessing: how the images were normalised, which is undone in the pictures.
        data: its evaluation images are looked at.
    """
    indices = spread_over_classes(data.eval.labels)
    images, labels = data.eval.collate([data.eval[index] for index in indices])
    names = [layers[i] for i in spread(len(layers), LAYERS)]
    device = next(student.parameters()).device
    calls: dict[str, list[Tensor]] = {name: [] for name in names}
    shapes: dict[str, list[int]] = {}

    def look(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: SpikeTrain) -> None:
            # a spike of DSR is as large as its threshold
            calls[name].append((output.stream != 0).flatten(2).cpu())  # (T or 1, B, N)
            shapes.setdefault(name, list(output.shape[1:]))

        return hook

    modules = neuron_layers(student)
    with repeatable(device), hooks([(modules[name], look(name)) for name in names]), accelerator.autocast():
        logits = student.eval()(channels_last(images.to(device)), per_step=True)  # (T, B, K)
    steps = torch.arange(1, len(logits) + 1, device=device).view(-1, 1, 1)
    confidence, predicted = (logits.float().cumsum(0) / steps).softmax(2).max(2)  # after each step, (T, B)
    fired = {name: _of_first_place(calls[name], len(logits)) for name in names}
    neurons = {name: _spread_over_firing(fired[name]) for name in names}
    return {
        "timesteps": len(logits),
        "layers": [
            {
                "name": name,
                "shape": shapes[name],
                "fired": int(fired[name].flatten(0, 1).any(0).sum()),
                "neurons": neurons[name],
            }
            for name in names
        ],
        "images": [
            {
                "index": index,
                "label": data.classes[int(labels[b])],
                "picture": picture(images[:, b] if images.ndim == 5 else images[b], preprocessing),
                "predictions": [data.classes[k] for k in predicted[:, b].tolist()],
                "confidences": [round(value, 4) for value in confidence[:, b].tolist()],
                "spikes": [[_steps(fired[name][:, b, neuron]) for neuron in neurons[name]] for name in names],
            }
            for b, index in enumerate(indices)
        ],
    }


def spread_over_classes(labels: np.ndarray) -> list[int]:
    """The first image of each of some classes, which are spread over those that there are."""
    classes, first = np.unique(labels, return_index=True)
    return [int(first[i]) for i in spread(len(classes), IMAGES)]


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers 0 to count - 1, the first and the last among them, evenly spread."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def picture(image: Tensor, preprocessing: Preprocessing) -> str:
    """What a network sees, for people: a PNG as a data URI.

    Args:
        image: (C, H, W), normalised: grey for one channel, colours for three, else the mean over the channels; or event
            frames (T, C, H, W): the number of events of both polarities over all steps, the most is white.
    """
    image = image.float().cpu()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    if image.ndim == 4:
        counts = (image * std).sum((0, 1)) + mean.sum()  # the mean is that of the sum over all frames
        pixels = (counts / counts.max().clamp(min=1e-6)).unsqueeze(0)
    else:
        pixels = image * std + mean
    if len(pixels) not in (1, 3):
        pixels = pixels.mean(0, keepdim=True)
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    shown = Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0))
    shown.thumbnail((PICTURE, PICTURE))
    file = io.BytesIO()
    shown.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _of_first_place(calls: Sequence[Tensor], timesteps: int) -> Tensor:
    """Of a module that is called at several places the spikes at its first, (T, B, N).

    Args:
        calls: in their order: of all steps, (T, B, N) each, or a step at a time, (1, B, N) each.
    """
    return calls[0] if len(calls[0]) == timesteps else torch.cat(list(calls[:: len(calls) // timesteps]))


def _spread_over_firing(fired: Tensor) -> list[int]:
    """Of spikes (T, B, N) the neurons to show, in their order."""
    firing = fired.flatten(0, 1).any(0).nonzero().flatten().tolist()
    return [firing[i] for i in spread(len(firing), NEURONS)]


def _steps(fired: Tensor) -> list[int]:
    return [t for t, spike in enumerate(fired.tolist(), 1) if spike]
