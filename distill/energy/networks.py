"""What a hybrid costs, of the costs of its parts."""

from __future__ import annotations

from distill.energy.analogue import AnalogueCosts
from distill.energy.costs import Cost
from distill.taps import Tap


def hybrid_cost(tap: Tap, spiking: Cost, adapter: Cost, teacher: AnalogueCosts) -> Cost:
    """Of one image: the student up to the tap, the adapter, the teacher's blocks behind the tap.

    Where there are class tokens at the tap, they are the teacher's own: it runs as a whole.

    Args:
        spiking: of the student up to its module of the tap.
        adapter: of the adapter.
        teacher: of the teacher, cut at the tap.
    """
    tail = teacher.whole if tap.layout.prefix_tokens else teacher.behind[tap.name]
    return spiking.named("student") + adapter.named("adapter") + tail.named("teacher")
