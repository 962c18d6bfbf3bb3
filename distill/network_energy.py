"""Energy of a saved network, and of the analogue network that it is compared with."""

from __future__ import annotations

from typing import cast

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill.energy import Cost, adapter_cost, analogue_costs, hybrid_cost, spiking_costs
from distill.hybrid_network import Hybrid
from models import SpikingNetwork
from models.io import ann_of_file


class NetworkEnergy:
    """Of a student or a hybrid, on its device and in evaluation mode.

    Args:
        image: (1, C, H, W), of the size that the network sees.
        teacher: what it is compared with; None: the network that a twin was made of, or the teacher in a hybrid.
    """

    def __init__(self, network: SpikingNetwork | Hybrid, image: Tensor, teacher: nn.Module | None) -> None:
        self._network = network
        self._image = image
        teacher = _source(network, image) if teacher is None else teacher
        self.reference: Cost | None = None if teacher is None else analogue_costs(teacher, image).whole
        """Of the analogue network; None where none is known."""

    def cost(self, accelerator: Accelerator, loader: DataLoader) -> Cost:
        """Of the network at its T, on the images of a prepared loader."""
        if not isinstance(self._network, Hybrid):
            return spiking_costs(accelerator, loader, self._network).whole
        hybrid = cast(Hybrid, self._network)  # mypy thinks of networks that are both
        front = spiking_costs(accelerator, loader, hybrid.student, until=hybrid.student_tap).whole
        teacher = analogue_costs(hybrid.teacher, self._image, [hybrid.tap.name])
        return hybrid_cost(hybrid.tap, front, adapter_cost(hybrid.adapter, hybrid.tap), teacher)


def _source(network: SpikingNetwork | Hybrid, image: Tensor) -> nn.Module | None:
    """The analogue network that is known without weights, which its costs do not depend on."""
    if isinstance(network, Hybrid):
        return cast(Hybrid, network).teacher
    spec = network.spec.get("ann") if network.spec.get("kind") == "twin" else None
    return None if spec is None else ann_of_file(spec).to(image.device).eval()
