"""Energy of one image in a spiking network, a hybrid or an analogue network: arithmetic and memory traffic, apart."""

from distill.energy.analogue import AnalogueCosts, adapter_cost, analogue_costs
from distill.energy.costs import Cost, LayerCost, assumptions
from distill.energy.networks import hybrid_cost
from distill.energy.spiking import SpikingCosts, spiking_costs

__all__ = [
    "AnalogueCosts",
    "Cost",
    "LayerCost",
    "SpikingCosts",
    "adapter_cost",
    "analogue_costs",
    "assumptions",
    "hybrid_cost",
    "spiking_costs",
]
