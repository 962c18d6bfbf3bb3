"""The spiking network of a run: made as the configuration says, with the weights of another run where it names one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from distill.data import Preprocessing, Splits
from distill.network_config import InitConfig, StudentConfig
from models import PoissonEncoder, SpikingNetwork, create_snn, load_weights, spiking_twin
from models.io import WEIGHTS


def make_student(
    config: StudentConfig,
    ann: nn.Module | None,
    classes: int,
    images: Tensor,
    preprocessing: Preprocessing,
    init: InitConfig | None = None,
) -> SpikingNetwork:
    """A twin of an analogue network, or a network by name.

    Args:
        ann: the network whose twin is made; None where the student is none.
        classes: of the data.
        images: (B, C, H, W), of the size and on the device that the student will see.
        preprocessing: how the images were made, which the Poisson encoder undoes.
        init: a run whose student's weights are the start.

    Raises:
        FileNotFoundError: if there is no such run, or no student in it.
        ValueError: names the weights that do not fit.
    """
    poisson = config.encoder == "poisson"
    encoder = PoissonEncoder(mean=preprocessing.mean, std=preprocessing.std) if poisson else None
    if config.name == "twin":
        assert ann is not None
        size: tuple[int, int, int] = tuple(images.shape[1:])  # type: ignore[assignment]
        snn = spiking_twin(
            ann, config.timesteps, config.neuron, config.init, config.algorithm, config.gates, size, encoder
        )
    else:
        snn = create_snn(
            config.name,
            classes,
            config.timesteps,
            images.shape[1],
            config.neuron,
            config.algorithm,
            config.width,
            encoder,
            config.dsr,
        ).to(images.device)
    if init is not None and init.from_run is not None:
        _load_from_run(snn, Path(init.from_run))
    return snn


def _load_from_run(snn: SpikingNetwork, run: Path) -> None:
    folder = run / "student" if (run / "student").is_dir() else run
    if not folder.is_dir():
        raise FileNotFoundError(f"init.from_run: there is no folder {run}")
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"init.from_run: {run} holds no trained student (student/{WEIGHTS}, written when a run ends)"
        )
    try:
        load_weights(snn, folder / WEIGHTS)
    except ValueError as error:
        raise ValueError(f"init.from_run: the student in {run} is another network: {error}") from error


def probe_images(data: Splits, device: torch.device) -> Tensor:
    """A few different images as the networks will see them."""
    count = min(8, len(data.eval))
    return torch.stack([data.eval[i * len(data.eval) // count][0] for i in range(count)]).to(device)
