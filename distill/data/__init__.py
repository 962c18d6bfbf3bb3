"""Images for distillation: what to read, how the teacher wants to see it, and loaders that repeat exactly."""

from distill.data.config import DataConfig, Preprocessing
from distill.data.datasets import ImageSet, Splits, load_data
from distill.data.loaders import eval_loader, train_loader

__all__ = ["DataConfig", "ImageSet", "Preprocessing", "Splits", "eval_loader", "load_data", "train_loader"]
