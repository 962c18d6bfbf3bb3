"""The spiking network of a run: made as the configuration says, with the weights of another run where it names one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.data import Preprocessing, Splits, train_loader
from distill.data.event_frames import summed
from distill.network_config import InitConfig, StudentConfig
from models import PoissonEncoder, SpikingNetwork, calibrate, copy_weights, create_snn, load_weights, spiking_twin
from models.calibration import check_calibration
from models.io import WEIGHTS
from models.registry import FEEDBACK_NETWORKS

log = logging.getLogger(__name__)

CALIBRATION_BATCH = 64
"""Images of one pass when a network is calibrated, at most."""
LONG = 1.5
"""The bound of a gradient's growth in one layer of neurons that is worth a warning; a leak of 0.5 has 1.53 at T = 4."""


def make_student(
    config: StudentConfig,
    ann: nn.Module | None,
    classes: int,
    images: Tensor,
    preprocessing: Preprocessing,
    init: InitConfig | None = None,
    batches: Iterable[Tensor] | None = None,
    say: bool = True,
) -> SpikingNetwork:
    """A twin of an analogue network, or a network by name.

    Args:
        ann: the network whose twin is made or whose weights are copied; None for a network by name that learns alone.
        classes: of the data.
        images: (B, C, H, W), of the size and on the device that the student will see.
        preprocessing: how the images were made, which the Poisson encoder undoes.
        init: a run whose student's weights are the start, and how a twin is calibrated.
        batches: images (B, C, H, W) to calibrate a twin on, where `config.init` asks for it; None: it is not
            calibrated, because its weights come from elsewhere later, but it is checked that it can be.
        say: whether to log which weights were copied, and to warn of gradients that grow.

    Raises:
        FileNotFoundError: if there is no such run, or no student in it.
        ValueError: names the weights that do not fit.
        UnsupportedOperationError: names the module around which a twin that is to be calibrated cannot be.
    """
    poisson = config.encoder == "poisson"
    encoder = PoissonEncoder(mean=preprocessing.mean, std=preprocessing.std) if poisson else None
    if config.name == "twin":
        assert ann is not None
        size: tuple[int, int, int] = tuple(images.shape[1:])  # type: ignore[assignment]
        start = "scratch" if config.init == "scratch" else "teacher"
        snn = spiking_twin(ann, config.timesteps, config.neuron, start, config.algorithm, config.gates, size, encoder)  # type: ignore[arg-type]
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
            config.feedback,
        ).to(images.device)
        if ann is not None and config.init == "teacher":
            copied = copy_weights(ann, snn)
            log.log(logging.INFO if say else logging.DEBUG, "%s", copied)
    if say:
        _warn_of_long_gradients(config)
    if init is not None and init.from_run is not None:
        _load_from_run(snn, Path(init.from_run))
    elif config.init == "calibrated" and ann is not None and batches is None:
        check_calibration(ann, snn, images)
    elif config.init == "calibrated" and ann is not None and batches is not None:
        layers = calibrate(ann, snn, batches, None if init is None else init.percentile).layers
        error = sum(layer.error for layer in layers) / len(layers)
        log.info("calibrated %d layers; their rates miss %.1f %% of the activations", len(layers), 100 * error)
    return snn


def _warn_of_long_gradients(config: StudentConfig) -> None:
    """Where the rate rule counts a current at all later steps and no reset takes it away.

    Its factor is kappa = mean_t e_t h_t (docs/maths.md): e_t is then the sum of leak^i, i < t, h_t at most alpha / 4.
    """
    neuron = config.neuron
    if not (config.algorithm in ("rate_m", "rate_s") and neuron.reset == "soft" and neuron.detach_reset):
        return
    steps = config.timesteps
    gain = neuron.alpha / 4 * sum((steps - i) * neuron.leak**i for i in range(steps)) / steps  # of the mean of e_t
    if gain > LONG:
        log.warning(
            "warning: student.neuron: with leak %g and a reset that gradients do not go through, %s lets them grow "
            "by up to %.1f in each layer of T = %d; student.neuron.detach_reset false keeps them near those of BPTT",
            *(neuron.leak, config.algorithm, gain, steps),
        )


def check_precision(config: StudentConfig, precision: str) -> None:
    """
    Args:
        precision: "no", "bf16" or "fp16", the run's or the launcher's.

    Raises:
        ValueError: for float16 and a feedback network: the factor that keeps the loss's gradient in the range of
            float16 would multiply what backward spikes are made of, and its overflow looks like a loop that does not
            contract.
    """
    if config.name in FEEDBACK_NETWORKS and precision == "fp16":
        raise ValueError(
            f"run.mixed_precision (or what accelerate launch was told): must be no or bf16 with {config.name}, found "
            "'fp16', whose factor of the loss would multiply what its backward pass is made of"
        )


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
    """A few different images (B, C, H, W), as an analogue network sees them: of event frames their sums."""
    return summed(sample_images(data, device))


def sample_images(data: Splits, device: torch.device) -> Tensor:
    """A few different images (B, C, H, W) or event frames (T, B, C, H, W), as a student sees them."""
    count = min(8, len(data.eval))
    images = [data.eval[i * len(data.eval) // count][0] for i in range(count)]
    return torch.stack(images, images[0].ndim - 3).to(device)


def calibration_batches(data: Splits, count: int, seed: int, device: torch.device) -> Iterable[Tensor]:
    """Training images (B, C, H, W) or event frames, augmented as for training, the same on all processes.

    Args:
        count: of images, rounded up to whole batches.
    """
    size = min(CALIBRATION_BATCH, count, len(data.train))
    loader = train_loader(data.train, size, seed=seed, workers=0)
    for images, _ in itertools.islice(loader, -(-count // size)):
        yield images.to(device)
