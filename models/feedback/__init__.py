"""Feedback networks: layers in a loop, trained by the gradient at the equilibrium of their average firing rates.

Xiao et al., NeurIPS 2021, arXiv 2109.14247 (IDE) and Neural Networks 2023, arXiv 2302.00232 (SPIDE).
"""

from models.feedback.config import FEEDBACK_ALGORITHMS, FEEDBACK_NEURON, FeedbackConfig
from models.feedback.loop import FeedbackLoop
from models.feedback.maps import AverageNorm, Current
from models.feedback.solvers import NonContractingLoopError, SolverReport

__all__ = [
    "FEEDBACK_ALGORITHMS",
    "FEEDBACK_NEURON",
    "AverageNorm",
    "Current",
    "FeedbackConfig",
    "FeedbackLoop",
    "NonContractingLoopError",
    "SolverReport",
]
