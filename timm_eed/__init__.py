"""timm_eed: multi-exit timm models, trained with exit-ensemble distillation."""
from . import models  # noqa: F401  # registers the CIFAR networks with timm
from .calibration import Calibration, calibrate
from .early_exit import EarlyExit
from .exits import EXIT_TYPES, ExitHead
from .export import truncate
from .hub import from_pretrained, push_to_hub
from .losses import ExitEnsembleDistillationLoss, create_multi_exit_loss
from .multi_exit import MultiExitOutput, MultiExitWrapper, create_model, wrap
from .policies import EarlyExitOutput
from .profiling import profile
from .task import MultiExitEvaluator, MultiExitTask

__version__ = '0.1.0'

__all__ = [
    'EXIT_TYPES',
    'Calibration',
    'EarlyExit',
    'EarlyExitOutput',
    'ExitEnsembleDistillationLoss',
    'ExitHead',
    'MultiExitEvaluator',
    'MultiExitOutput',
    'MultiExitTask',
    'MultiExitWrapper',
    'calibrate',
    'create_model',
    'create_multi_exit_loss',
    'from_pretrained',
    'profile',
    'push_to_hub',
    'truncate',
    'wrap',
]
