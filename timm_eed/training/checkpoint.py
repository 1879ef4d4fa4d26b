"""Reading checkpoints, with messages instead of walls of keys."""
import argparse
import logging
import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from timm.models import clean_state_dict, load_state_dict
from timm.task import TrainingTask

from ..multi_exit import MultiExitWrapper
from .errors import TrainingError
from .random_state import RandomState, set_random_state
from .saver import resumable_files

__all__ = [
    'Start', 'check_run_folder', 'continues_in_place', 'find_checkpoint', 'first_lines', 'load_checkpoint',
    'load_initial_checkpoint', 'resume',
]

_logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """Where a run begins: the epoch, the place within it for a recovery checkpoint, and the random states there."""
    epoch: int = 0
    position: Optional[Dict[str, Any]] = None
    random: Optional[RandomState] = None

    def restore_random_state(self) -> None:
        """To be called when everything is built and the first epoch is about to start."""
        if self.random is not None:
            set_random_state(self.random)


def find_checkpoint(args: argparse.Namespace) -> Optional[Tuple[str, Dict[str, Any]]]:
    """Path and content of the checkpoint to continue from, None for a fresh run.

    For --resume auto that is the one furthest on; one that cannot be read is reported and the one before it taken.

    Raises:
        TrainingError: If the named file does not exist or is no checkpoint, or if no file of a run can be read.
    """
    if not args.resume:
        return None
    if args.resume != 'auto':
        if not os.path.isfile(args.resume):
            raise TrainingError(f"--resume: there is no checkpoint '{args.resume}'.")
        return args.resume, load_checkpoint(args.resume)
    folder = _run_folder(args)
    paths = resumable_files(folder)
    found: Optional[Tuple[str, Dict[str, Any]]] = None
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        if found and os.path.basename(path).startswith('checkpoint-'):
            continue  # older than what there is, or the same file
        try:
            content = load_checkpoint(path)
        except TrainingError as error:
            _logger.warning(f'{error} Taking the one before it.')
            continue
        if found is None or _progress(content) > _progress(found[1]):
            found = path, content
    if found:
        return found
    if paths:
        raise TrainingError(f"--resume auto: none of the checkpoints in '{folder}' can be read.")
    _logger.info(f"--resume auto: no checkpoint in '{folder}' yet, starting afresh.")
    return None


def check_run_folder(args: argparse.Namespace, found: Optional[Tuple[str, Dict[str, Any]]]) -> None:
    """Raise a TrainingError if the run would mix its files with those of another one."""
    folder = _run_folder(args)
    paths = resumable_files(folder) if args.experiment else []
    if not paths:
        return
    if found is None or not continues_in_place(args, found):
        raise TrainingError(
            f"'{folder}' holds a run: continue it with --resume auto, give this one another --experiment, or remove "
            'the old one.')
    if args.resume != 'auto' and any(os.path.getmtime(path) > os.path.getmtime(found[0]) for path in paths):
        raise TrainingError(
            f"'{folder}' holds later checkpoints than '{found[0]}'. To go on from there, give this run another "
            '--experiment.')


def continues_in_place(args: argparse.Namespace, found: Tuple[str, Dict[str, Any]]) -> bool:
    """Whether a checkpoint lies in the folder that the run writes to."""
    folder = _run_folder(args)
    return bool(args.experiment) and os.path.isdir(folder) and os.path.samefile(
        os.path.dirname(found[0]) or '.', folder)


def _run_folder(args: argparse.Namespace) -> str:
    return os.path.join(args.output or './output/train', args.experiment)


def _progress(checkpoint: Dict[str, Any]) -> Tuple[int, int]:
    """Epochs and batches done."""
    if position := checkpoint.get('position'):
        return checkpoint['epoch'], position['batch']
    return checkpoint['epoch'] + (checkpoint.get('version', 1) > 1), 0  # timm's version 1 counts epochs begun


def load_checkpoint(path: str) -> Dict[str, Any]:
    """The content of a training checkpoint, on the CPU; nothing but tensors, numbers, text and flags is unpickled.

    Raises:
        TrainingError: If the file cannot be read or is no training checkpoint.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # unpicklers fail in many ways
        raise TrainingError(f"'{path}' is no readable checkpoint: {first_lines(error, 1)}") from error
    if not isinstance(content, dict) or 'state_dict' not in content or not isinstance(content.get('epoch'), int):
        raise TrainingError(f"'{path}' is no training checkpoint.")
    return content


def resume(
        args: argparse.Namespace,
        task: TrainingTask,
        path: str,
        checkpoint: Dict[str, Any],
        optimizer: torch.optim.Optimizer,
        scaler: Optional[Any],
) -> Start:
    """Restore model, moving average, optimizer and loss scaler.

    Raises:
        TrainingError: If the checkpoint is one of another model.
    """
    _check_fits(checkpoint.get('args'), args, path)
    try:
        task.load_checkpoint_state(clean_state_dict(checkpoint['state_dict']), checkpoint.get('task_state'))
        if task.has_ema():
            key = 'state_dict_ema' if 'state_dict_ema' in checkpoint else 'state_dict'
            state = checkpoint.get('task_state_ema' if key.endswith('ema') else 'task_state')
            task.load_checkpoint_state(clean_state_dict(checkpoint[key]), state, ema=True)
        if not args.no_resume_opt:
            optimizer.load_state_dict(checkpoint['optimizer'])
            if scaler is not None and scaler.state_dict_key in checkpoint:
                scaler.load_state_dict(checkpoint[scaler.state_dict_key])
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(f"The checkpoint '{path}' does not fit this run: {first_lines(error)}") from error
    if args.start_epoch is not None:
        return Start(args.start_epoch)
    epoch, batch = _progress(checkpoint)
    states: List[RandomState] = checkpoint.get('random', [])
    if len(states) != args.world_size:
        _logger.warning(f"'{path}' has the random states of {len(states)} processes, this run has {args.world_size}: "
                        'it goes on, but not exactly as it would have.')
        return Start(epoch)
    _logger.info(f"Continuing from '{path}': {epoch} epochs are done" + (f', and {batch} batches.' if batch else '.'))
    return Start(epoch, checkpoint.get('position'), states[args.rank])


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
            f'{first_lines(error)}') from error


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


def first_lines(error: Exception, count: int = 4) -> str:
    """The beginning of a long message."""
    lines = str(error).splitlines()
    return '\n'.join([line[:200] for line in lines[:count]] + (['..'] if len(lines) > count else []))
