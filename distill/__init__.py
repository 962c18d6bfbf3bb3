"""Distillation of analogue networks into spiking ones: how a spiking network is trained, judged and shipped."""

from distill.config import DistillConfig, LossConfig, RunConfig, StudentConfig, TeacherConfig, TrainConfig
from distill.data import DataConfig
from distill.hybrid import Adapter, HybridDistiller, HybridOutput
from distill.losses import distillation_losses, kd_loss

__all__ = [
    "Adapter",
    "DataConfig",
    "DistillConfig",
    "HybridDistiller",
    "HybridOutput",
    "LossConfig",
    "RunConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "distillation_losses",
    "kd_loss",
]
