"""The images of a check: of a data set, or noise where none is at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data import eval_loader, load_data
from distill.data.event_config import is_events
from distill.export.config import ExportConfig
from distill.hybrid_network import Hybrid
from distill.saved_evaluation import images_of
from models import PoissonEncoder, SpikingNetwork
from models.encoding import takes_event_frames

BATCH = 100
FEWEST = 100
"""Images on which a share of 99 % says something."""


def takes_frames(config: ExportConfig, network: SpikingNetwork | Hybrid) -> bool:
    """Whether what is written takes a frame for each step.

    Raises:
        ValueError: if event data is to be taken as images, or the network's folder does not say how images are made.
    """
    if config.check_images == "data":
        events = is_events(config.data)
        if events and config.input == "images":
            raise ValueError(f"input must be frames with data.name={config.data.name}, found images")
    else:  # the network alone tells
        events = takes_event_frames(images_of(network, config.model).input_size[0])
    drawn = _encoder(network) is not None and config.format != "snn"  # which holds the encoder, too
    return config.input == "frames" or (config.input is None and (events or drawn))


def samples_for(config: ExportConfig, network: SpikingNetwork | Hybrid) -> Tensor:
    """Images (N, C, H, W), normalised as the network expects, or frames (T, N, C, H, W) where `takes_frames`.

    Held-out images come first, then training images where `config.samples` asks for more.

    Raises:
        ValueError: if the network's folder does not say how images are made, or the data has other classes.
    """
    frames, encoder = takes_frames(config, network), _encoder(network)
    if config.check_images == "random":
        samples = _noise(config, network, frames and encoder is None)
    else:
        samples = _images(config, network)
    if samples.ndim == 5 or not frames:
        return samples
    return samples.repeat(network.timesteps, 1, 1, 1, 1) if encoder is None else encoder(samples, network.timesteps)


def _encoder(network: SpikingNetwork | Hybrid) -> PoissonEncoder | None:
    return network.input_encoder if isinstance(network, SpikingNetwork) else None


def _noise(config: ExportConfig, network: SpikingNetwork | Hybrid, frames: bool) -> Tensor:
    """Images (N, C, H, W), or frames (T, N, C, H, W) that differ, so that an error in the order of steps shows."""
    pre = images_of(network, config.model)
    mean, std = (torch.tensor(values)[:, None, None] for values in (pre.mean, pre.std))
    count = (network.timesteps, config.samples) if frames else (config.samples,)
    values = torch.rand(*count, *pre.input_size, generator=torch.Generator().manual_seed(0))
    return (values - mean) / std


def _images(config: ExportConfig, network: SpikingNetwork | Hybrid) -> Tensor:
    events = is_events(config.data)
    data = load_data(config.data, images_of(network, config.model), timesteps=network.timesteps)
    known = network.spec["extra"].get("classes")
    if known is not None and list(known) != list(data.classes):
        raise ValueError(
            f"data.name={config.data.name} has {len(data.classes)} classes, the network in {config.model} knows "
            f"{len(known)} or others: name the run's data (--data.name, --data.root), or use --check_images random"
        )
    batches: list[Tensor] = []
    wanted = config.samples
    for part in (data.eval, data.train):
        for images, _ in eval_loader(part, BATCH, workers=config.data.workers) if wanted > 0 else ():
            taken = images[:, :wanted] if events else images[:wanted]
            batches.append(taken)
            wanted -= taken.shape[1 if events else 0]
            if wanted == 0:
                break
    found = config.samples - wanted
    if found < FEWEST:
        raise ValueError(
            f"data.name={config.data.name} has {found} images, a check needs {FEWEST}: name the run's data, or use "
            "--check_images random"
        )
    return torch.cat(batches, 1 if events else 0)
