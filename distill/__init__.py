"""How a spiking network is trained, judged and shipped: distilled from an analogue one, or on labels alone."""

from distill.config import (
    DistillConfig,
    InitConfig,
    LossConfig,
    RunConfig,
    SnnTrainingConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from distill.data import DataConfig
from distill.hybrid import Adapter, HybridDistiller, HybridOutput
from distill.losses import distillation_losses, kd_loss
from distill.snn_losses import SnnLossConfig, snn_losses

__all__ = [
    "Adapter",
    "DataConfig",
    "DistillConfig",
    "HybridDistiller",
    "HybridOutput",
    "InitConfig",
    "LossConfig",
    "RunConfig",
    "SnnLossConfig",
    "SnnTrainingConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "distillation_losses",
    "kd_loss",
    "snn_losses",
]
