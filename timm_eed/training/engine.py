"""One epoch of training, one evaluation."""
import argparse
import logging
import math
import os
import sys
import time
from contextlib import nullcontext
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from timm.task import TrainingTask, evaluation_sample_limit
from timm.utils import dispatch_clip_grad
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image
from tqdm import tqdm

from .build import Precision
from .data import Data
from .distributed import own_statistics, restore_statistics
from .errors import TrainingError
from .loss_terms import LossTerms, batch_accuracy
from .random_state import RandomState, gather_random_states, get_random_state, set_random_state
from .report import format_rate
from .saver import RunSaver

__all__ = ['evaluate', 'mean_lr', 'train_one_epoch', 'updates_per_epoch']

_logger = logging.getLogger(__name__)


def updates_per_epoch(num_batches: int, grad_accum_steps: int) -> int:
    """Optimizer steps per epoch; the batches left over at its end make one more."""
    return -(-num_batches // grad_accum_steps)


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """Learning rate, averaged over parameter groups."""
    return sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)


def train_one_epoch(
        epoch: int,
        task: TrainingTask,
        data: Data,
        optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        precision: Precision,
        scheduler: Optional[Any] = None,
        saver: Optional[RunSaver] = None,
        position: Optional[Dict[str, Any]] = None,
) -> Dict[str, float]:
    """Train for one epoch, or the rest of one behind `position`, and return the means of the loss terms.

    Raises:
        TrainingError: If the loss is not finite, or a streamed data set ends early.
    """
    device = torch.device(args.device)
    data.set_epoch(epoch, args.mixup_off_epoch)
    task.train()
    optimizer.zero_grad()
    terms = LossTerms(device)
    num_batches, accum = data.num_batches, args.grad_accum_steps
    updates, first = epoch * updates_per_epoch(num_batches, accum), 0
    at_start = gather_random_states(get_random_state()) if args.recovery_interval else []
    batches = iter(_progress(data.train, f'epoch {epoch}', args))
    if position is not None and _same_batches(position, num_batches, args):
        first, updates = position['batch'], position['updates']
        _go_behind(position, batches, terms, scheduler, args)
        if 'statistics' in position:
            restore_statistics(task, position['statistics'][args.rank])
    start, seen = time.time(), 0
    for step in range(first, num_batches):
        recovery = _saves_recovery(step, num_batches, args)
        before = get_random_state() if recovery else {}
        batch = next(batches, None)
        if batch is None:
            raise _ended_early(epoch, step, num_batches, args)
        x, y = _to_device(batch[0], batch[1], device, args)
        if data.mixup is not None:
            x, y = data.mixup(x, y)
        last = step == num_batches - 1
        need_update = last or (step + 1) % accum == 0
        group = accum if step < num_batches - num_batches % accum else num_batches % accum
        with nullcontext() if need_update else task.no_sync():
            with precision.autocast():
                result = task(x, y)
            loss = result['loss'] * _batch_scale(len(x), args)
            _backward(loss / group, task, optimizer, args, precision, need_update)
        terms.add(step, {**result, **batch_accuracy(result, y)}, len(x))
        seen += len(x) * args.world_size
        if need_update:
            updates += 1
            _after_update(updates, task, optimizer, scheduler, args)
        if last or (step + 1) % args.log_interval == 0:
            means = terms.check(epoch)
            if args.primary and not last:
                _log_step(epoch, step, num_batches, means, optimizer, seen / (time.time() - start))
                if args.save_images:
                    _save_images(x, epoch, step, args)
        if recovery:
            terms.check(epoch)
            here = dict(
                _position(step + 1, updates, before, terms), batches=_batches(num_batches, args),
                statistics=gather_random_states(own_statistics(args, task)))
            if saver is not None:
                saver.random_states = at_start
                saver.save_recovery(epoch, step, here)
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    metrics = terms.reduced() if args.distributed else terms.check(epoch)
    metrics['images_per_second'] = seen / (time.time() - start)
    return metrics


def _after_update(
        updates: int,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        scheduler: Optional[Any],
        args: argparse.Namespace,
) -> None:
    optimizer.zero_grad()
    task.update_ema(step=updates)
    if args.synchronize_step and torch.device(args.device).type == 'cuda':
        torch.cuda.synchronize()
    if scheduler is not None:
        scheduler.step_update(num_updates=updates)


def _save_images(x: torch.Tensor, epoch: int, step: int, args: argparse.Namespace) -> None:
    save_image(x, os.path.join(args.run_dir, f'train-epoch-{epoch}-step-{step}.jpg'), padding=0, normalize=True)


def _batch_scale(size: int, args: argparse.Namespace) -> float:
    """Factor on the loss of a batch of another size than --batch-size."""
    if args.variable_batch_loss_scale == 'none':
        return 1.
    ratio = size / args.batch_size
    return ratio if args.variable_batch_loss_scale == 'linear' else math.sqrt(ratio)


def _ended_early(epoch: int, step: int, num_batches: int, args: argparse.Namespace) -> TrainingError:
    """A stream has fewer images than it announced; of many processes one that ends early would be waited for."""
    return TrainingError(
        f'In epoch {epoch} the training data ended after {step} of {num_batches} batches. Each of the '
        f'{args.world_size} x {max(args.workers, 1)} loader processes needs a shard of its own that can be read; '
        'check the shards, or lower --workers (-j).')


def _saves_recovery(step: int, num_batches: int, args: argparse.Namespace) -> bool:
    """Whether a recovery checkpoint follows a batch: the first update behind each interval but not the epoch's end."""
    interval, accum = args.recovery_interval, args.grad_accum_steps
    return bool(interval) and (step + 1) % accum == 0 and (step + 1) % interval < accum and step + 1 < num_batches


def _position(done: int, updates: int, before_last: RandomState, terms: LossTerms) -> Dict[str, Any]:
    """The place behind the batches that are done, for `_go_behind`, of all processes.

    timm's loader prepares one batch ahead, drawing between the training steps' own random numbers; `before_last` is the
    state in which it prepared the batch that is trained on next.
    """
    ranks = gather_random_states({**get_random_state(), **terms.state()})
    return dict(
        batch=done, updates=updates, ranks=ranks, before_last=gather_random_states(before_last), terms=terms.names)


def _batches(num_batches: int, args: argparse.Namespace) -> List[int]:
    """What a place within an epoch is counted in."""
    return [num_batches, args.batch_size, args.grad_accum_steps]


def _same_batches(position: Dict[str, Any], num_batches: int, args: argparse.Namespace) -> bool:
    """Whether a place within an epoch means the same images now; says so where it does not."""
    now = _batches(num_batches, args)
    if position.get('batches', now) == now:
        return True
    if args.primary:
        was = '{} batches of {}, {} to an update'.format(*position['batches'])
        _logger.warning(f'The checkpoint was written within an epoch of {was}; this run has {now[0]} of {now[1]}, '
                        f'{now[2]} to an update, so that the epoch begins anew.')
    return False


def _go_behind(
        position: Dict[str, Any],
        batches: Iterator[Any],
        terms: LossTerms,
        scheduler: Optional[Any],
        args: argparse.Namespace,
) -> None:
    """Draw the batches that were trained on before, so that the loader, its workers and all else are as they were."""
    if args.primary:
        _logger.info(f"Going through the {position['batch']} batches of this epoch that are done ..")
    for _ in range(position['batch'] - 1):
        next(batches)
    set_random_state(position['before_last'][args.rank])
    next(batches)
    terms.load_state(position['ranks'][args.rank], position.get('terms', []))
    set_random_state(position['ranks'][args.rank])
    if scheduler is not None:
        scheduler.step_update(num_updates=position['updates'])


def _backward(
        loss: torch.Tensor,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        precision: Precision,
        need_update: bool,
) -> None:
    clip = None if args.clip_grad is None else dict(
        parameters=list(task.get_clip_parameters(exclude_head='agc' in args.clip_mode)))
    second_order = getattr(optimizer, 'is_second_order', False)
    if precision.scaler is not None:
        precision.scaler(
            loss, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, create_graph=second_order,
            need_update=need_update, **(clip or {}))
        return
    loss.backward(create_graph=second_order)
    if need_update:
        if clip is not None:
            dispatch_clip_grad(clip['parameters'], args.clip_grad, mode=args.clip_mode)
        optimizer.step()


def evaluate(
        model: Any,
        task: TrainingTask,
        loader: Any,
        args: argparse.Namespace,
        precision: Precision,
        name: str = 'test',
) -> Dict[str, float]:
    """Metrics of a model on a loader, over all processes; each exit is computed once.

    Args:
        model: The task's eval model, plain or its moving average.
        task: The task, which makes the evaluator.
        loader: Validation loader.
        args: Parsed arguments.
        precision: Mixed precision settings.
        name: What the progress bar calls it.
    """
    device = torch.device(args.device)
    if isinstance(model, DistributedDataParallel):
        model = model.module  # DDP would communicate in every batch, and processes may have more or fewer of them
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader) if args.distributed else None)
    model.eval()
    with torch.inference_mode():
        for x, y in _progress(loader, name, args):
            x, y = _to_device(x, y, device, args)
            with precision.autocast():
                output = model(x)
            evaluator.update(output, y)
    return dict(evaluator.compute(distributed=args.distributed))


def _to_device(
        x: torch.Tensor,
        y: torch.Tensor,
        device: torch.device,
        args: argparse.Namespace,
) -> Tuple[torch.Tensor, torch.Tensor]:
    if args.no_prefetcher:
        x, y = x.to(device=device, dtype=args.img_dtype), y.to(device)
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, y


def _progress(loader: Any, name: str, args: argparse.Namespace) -> Iterable[Any]:
    """The loader, under a bar on a terminal."""
    return tqdm(
        loader, desc=name, unit='batch', leave=False, dynamic_ncols=True,
        disable=not (args.primary and sys.stderr.isatty()))


def _log_step(
        epoch: int,
        step: int,
        num_batches: int,
        means: Dict[str, float],
        optimizer: torch.optim.Optimizer,
        rate: float,
) -> None:
    losses = '  '.join(f'{name} {value:.4f}' for name, value in means.items() if name.endswith('loss'))
    width = len(str(num_batches))
    _logger.info(
        f'epoch {epoch}  step {step + 1:>{width}}/{num_batches}  {losses}  '
        f'lr {mean_lr(optimizer):.3g}  {format_rate(rate)}')
