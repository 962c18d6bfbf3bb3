"""Spiking networks: what they are, how they are made, saved and loaded. Knows nothing of training."""

from models.ann import create_ann
from models.calibration import Calibration, calibrate
from models.compiling import compile_kernels
from models.dsr import DSRConfig, DSRNeuron
from models.dynamics import NeuronConfig
from models.encoding import PoissonEncoder
from models.feedback import FEEDBACK_ALGORITHMS, FeedbackConfig, FeedbackLoop, NonContractingLoopError, SolverReport
from models.io import check_saveable, load_snn, load_weights, save_snn
from models.network import ALGORITHMS, PER_STEP, TWIN_ALGORITHMS, SpikingNetwork, set_algorithm
from models.neuron import SpikingNeuron
from models.online import ONLINE
from models.prediction import Prediction
from models.preprocessing import Preprocessing
from models.registry import create_snn, list_snns
from models.spiketrain import SpikeTrain, UnsupportedOperationError
from models.sync import synchronised_batch_norm
from models.transfer import Transfer, copy_weights
from models.twin import spiking_twin

__all__ = [
    "ALGORITHMS",
    "FEEDBACK_ALGORITHMS",
    "ONLINE",
    "PER_STEP",
    "TWIN_ALGORITHMS",
    "Calibration",
    "DSRConfig",
    "DSRNeuron",
    "FeedbackConfig",
    "FeedbackLoop",
    "NeuronConfig",
    "NonContractingLoopError",
    "PoissonEncoder",
    "Prediction",
    "Preprocessing",
    "SolverReport",
    "SpikeTrain",
    "SpikingNetwork",
    "SpikingNeuron",
    "Transfer",
    "UnsupportedOperationError",
    "calibrate",
    "check_saveable",
    "compile_kernels",
    "copy_weights",
    "create_ann",
    "create_snn",
    "list_snns",
    "load_snn",
    "load_weights",
    "save_snn",
    "set_algorithm",
    "spiking_twin",
    "synchronised_batch_norm",
]
