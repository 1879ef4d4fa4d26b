"""Loading checkpoints, with messages instead of walls of keys."""
import argparse
import logging
import os
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from timm.models import clean_state_dict, load_state_dict
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from ..multi_exit import MultiExitWrapper
from .errors import TrainingError

__all__ = ['load_initial_checkpoint', 'resume', 'resume_path']

_logger = logging.getLogger(__name__)


def resume_path(args: argparse.Namespace) -> Optional[str]:
    """The checkpoint to continue from, None for a fresh run.

    Raises:
        TrainingError: If the named file does not exist.
    """
    if args.resume == 'auto':
        path = os.path.join(args.output or './output/train', args.experiment, 'last.pth.tar')
        if not os.path.exists(path):
            _logger.info(f"--resume auto: no checkpoint at '{path}' yet, starting afresh.")
            return None
        return path
    if args.resume and not os.path.isfile(args.resume):
        raise TrainingError(f"--resume: there is no checkpoint '{args.resume}'.")
    return args.resume or None


def resume(
        args: argparse.Namespace,
        task: TrainingTask,
        path: str,
        optimizer: torch.optim.Optimizer,
        scaler: Optional[Any],
) -> int:
    """Restore model, moving average, optimizer and loss scaler, and return the epoch to go on with.

    Raises:
        TrainingError: If the file is no checkpoint, or one of another model.
    """
    metadata = _metadata(path)
    _check_fits(metadata.get('args'), args, path)
    try:
        epoch = resume_task_checkpoint(
            task,
            path,
            optimizer=None if args.no_resume_opt else optimizer,
            loss_scaler=None if args.no_resume_opt else scaler,
            log_info=args.primary,
        )
        if task.has_ema():
            load_task_ema_checkpoint(task, path)
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(f"The checkpoint '{path}' does not fit this run: {_first_lines(error)}") from error
    return epoch or 0


def load_initial_checkpoint(model: nn.Module, path: str) -> None:
    """Weights to start from: those of a multi-exit model, or of the plain backbone (its exits start fresh).

    Raises:
        TrainingError: If the file does not exist, is no checkpoint, or does not fit the model.
    """
    if not os.path.isfile(path):
        raise TrainingError(f"--initial-checkpoint: there is no file '{path}'.")
    try:
        state = load_state_dict(path)
    except Exception as error:  # unpicklers and parsers fail in many ways
        raise TrainingError(f"--initial-checkpoint: '{path}' is no readable checkpoint: {error}") from error
    target = model
    if isinstance(model, MultiExitWrapper) and not any(key.startswith('backbone.') for key in state):
        target = model.backbone
        _logger.info(f"'{path}' holds no exits, they start fresh.")
    try:
        target.load_state_dict(clean_state_dict(state))
    except RuntimeError as error:
        raise TrainingError(
            f"The weights in '{path}' do not fit this model, check --model, --num-classes and the exits: "
            f'{_first_lines(error)}') from error


def _metadata(path: str) -> Dict[str, Any]:
    try:
        metadata = load_checkpoint_metadata(path)
    except Exception as error:
        raise TrainingError(f"'{path}' is no readable checkpoint: {_first_lines(error)}") from error
    if not isinstance(metadata, dict):
        raise TrainingError(f"'{path}' is no training checkpoint.")
    return metadata


def _check_fits(saved: Optional[argparse.Namespace], args: argparse.Namespace, path: str) -> None:
    """Name the flag that differs, where the checkpoint says what made it."""
    differences = []
    names = ('model', 'eed_method', 'exit_type', 'exit_indices', 'num_classes')
    for name in names if args.no_resume_opt else (*names, 'opt'):
        was, now = getattr(saved, name, None), getattr(args, name)
        if name == 'eed_method' and 'none' not in (was, now):
            continue  # losses may change, having exits or not may not
        if was is not None and now is not None and was != now:
            differences.append(f"--{name.replace('_', '-')} was {was} and is {now}")
    if differences:
        raise TrainingError(
            f"The checkpoint '{path}' was made by another run: {'; '.join(differences)}. "
            'Repeat its flags (args.yaml beside it holds them), or start afresh without --resume; '
            'for another optimizer add --no-resume-opt.')


def _first_lines(error: Exception, count: int = 4) -> str:
    lines = str(error).splitlines()
    return '\n'.join([line[:200] for line in lines[:count]] + (['..'] if len(lines) > count else []))
