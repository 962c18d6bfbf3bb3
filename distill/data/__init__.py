"""Images for distillation: what to read, how the teacher wants to see it, and loaders that repeat exactly."""

from distill.data.config import DataConfig, Preprocessing
from distill.data.datasets import Splits, load_data
from distill.data.faults import skipped_images
from distill.data.image_set import ImageSet
from distill.data.loaders import eval_loader, prepare_loader, sample_indices, sample_loader, skip_batches, train_loader

__all__ = [
    "DataConfig",
    "ImageSet",
    "Preprocessing",
    "Splits",
    "eval_loader",
    "load_data",
    "prepare_loader",
    "sample_indices",
    "sample_loader",
    "skip_batches",
    "skipped_images",
    "train_loader",
]
