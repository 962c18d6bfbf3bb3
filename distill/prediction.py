"""What a saved network makes of image files."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distill.checks import check
from distill.hybrid_network import Hybrid
from distill.saved_evaluation import load_network
from models import Prediction


@dataclass(frozen=True, kw_only=True)
class PredictionConfig:
    """Names what is on images: the likeliest classes of a saved network, with their probabilities."""

    images: list[str]
    """Image files."""
    model: str
    """Folder of a saved network (runs/NAME/student, runs/NAME/hybrids/TAP), or its id on the Hugging Face hub."""
    topk: int = 5
    """Number of classes to print, at least 1."""
    timesteps: int | None = None
    """T; None: the network's own."""
    early_exit: float | None = None
    """Stop an image at the step at which the probability of its likeliest class exceeds that of the second by so much,
    in (0, 1]; None: run all T steps."""

    def __post_init__(self) -> None:
        check(self.topk >= 1, "topk", self.topk, "at least 1")
        check(self.timesteps is None or self.timesteps >= 1, "timesteps", self.timesteps, "at least 1, or none")
        check(self.early_exit is None or 0 < self.early_exit <= 1, "early_exit", self.early_exit, "in (0, 1], or none")


def run(config: PredictionConfig) -> list[Prediction]:
    """The job of scripts/predict.py: prints the classes of each image and returns the predictions.

    Raises:
        FileNotFoundError: if there is no such network or image.
        ValueError: if an image cannot be read, or the network takes none.
    """
    network = load_network(config.model)
    if config.timesteps is not None:
        network.timesteps = config.timesteps
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    if config.early_exit is None:
        predictions = network.predict(config.images, config.topk)
    elif isinstance(network, Hybrid):
        raise ValueError(f"early_exit is {config.early_exit}; a hybrid has no logits of single steps: leave it out")
    else:
        predictions = network.predict(config.images, config.topk, config.early_exit)
    assert isinstance(predictions, list)
    for image, prediction in zip(config.images, predictions, strict=True):
        print(text(image, prediction, steps=config.early_exit is not None))
    return predictions


def text(image: str, prediction: Prediction, steps: bool) -> str:
    """Lines of text: the image, and each class with its probability in percent.

    Args:
        steps: whether to say how many time steps it took.
    """
    taken = f" (after {prediction.timesteps} step{'s' * (prediction.timesteps > 1)})" if steps else ""
    rows = zip(prediction.probabilities, prediction.classes, strict=True)
    return "\n".join([f"{image}{taken}", *(f"  {100 * probability:6.2f} %  {name}" for probability, name in rows)])
