"""What the processes of a run have to have in common."""
import argparse
from typing import Any, Dict, Iterator, List, Tuple

import torch
import torch.distributed as dist
from timm.task import TrainingTask
from timm.utils import distribute_bn, unwrap_model

from .checkpoint import Start
from .data import Data
from .errors import TrainingError
from .splits import class_names

__all__ = ['check_processes_agree', 'own_statistics', 'restore_statistics', 'share_batch_norm']


def check_processes_agree(args: argparse.Namespace, data: Data, start: Start) -> None:
    """End now what would end in processes that wait for each other for ever, or learn from different labels.

    Raises:
        TrainingError: If the processes see different data, or do not all see the checkpoint of --resume.
    """
    if not args.distributed:
        return
    own: Dict[str, Any] = {'training images': len(data.train.dataset), 'class names': class_names(data.train.dataset)}
    if data.validation is not None:
        own['validation images'] = len(data.validation.dataset)
    own['epochs done'] = start.epoch
    own['batches done'] = start.position['batch'] if start.position else 0
    seen: List[Dict[str, Any]] = [{}] * args.world_size
    dist.all_gather_object(seen, own)
    for name, value in seen[0].items():
        for rank, other in enumerate(seen):
            if other.get(name) != value:
                raise TrainingError(
                    f'The processes do not agree about the {name}: {value} in process 0, {other.get(name)} in process '
                    f'{rank}. All machines need the same data (--data) and the same checkpoint (--resume).')


def own_statistics(args: argparse.Namespace, task: TrainingTask) -> Dict[str, torch.Tensor]:
    """Batch norm statistics of the model and of its moving average, which differ between processes within an epoch.

    Returns:
        Floating-point buffers by name, on the CPU; nothing where there is only one process.
    """
    if not args.distributed:
        return {}
    return {name: buffer.cpu() for name, buffer in _statistics(task)}


def restore_statistics(task: TrainingTask, saved: Dict[str, torch.Tensor]) -> None:
    """Put back what `own_statistics` gave."""
    for name, buffer in _statistics(task):
        if name in saved:
            buffer.copy_(saved[name])


def _statistics(task: TrainingTask) -> Iterator[Tuple[str, torch.Tensor]]:
    for ema in (False, True):
        module = task.get_trainable_module(ema=ema)
        for name, buffer in unwrap_model(module).named_buffers() if module is not None else ():
            if buffer.is_floating_point():
                yield ('ema.' if ema else 'model.') + name, buffer


def share_batch_norm(args: argparse.Namespace, task: TrainingTask, ema: bool = False) -> None:
    """Give all processes the same batch norm statistics, by --dist-bn.

    Without it the first process's count for all, as DDP has it in training (unless --no-ddp-bb says otherwise).

    Args:
        args: Parsed arguments.
        task: The task.
        ema: Those of the moving average.
    """
    if not args.distributed or not (args.dist_bn or not (ema or args.no_ddp_bb)):
        return
    model = unwrap_model(task.get_trainable_module(ema=ema))
    # a frozen backbone's are the same everywhere; a mean of three would change the last bit
    changed = model.exits if getattr(model, 'backbone_frozen', False) else model
    distribute_bn(changed, args.world_size, args.dist_bn == 'reduce')
