"""How a spiking network is trained, judged and shipped: distilled from an analogue one, or on labels alone."""

from distill.adapters import Adapter
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
from distill.hybrid import HybridDistiller, HybridOutput
from distill.hybrid_network import Hybrid, load_hybrid, save_hybrid
from distill.losses import distillation_losses, kd_loss
from distill.snn_losses import SnnLossConfig, snn_losses

__all__ = [
    "Adapter",
    "DataConfig",
    "DistillConfig",
    "Hybrid",
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
    "load_hybrid",
    "save_hybrid",
    "snn_losses",
]
