#!/usr/bin/env python3
"""Train a timm model with exits: timm's own flags, and a group for exit-ensemble distillation.

    python train_eed.py --config hub_configs/quickstart.yaml
    python train_eed.py --model resnet50 --eed-alpha 1 --data imagenet
    torchrun --nproc_per_node 8 train_eed.py --model resnet50 --data imagenet
"""
import json
import logging
import os
import shlex
import sys
import time
from argparse import Namespace
from datetime import datetime
from typing import Any, Dict, Optional, Sequence, Tuple

import timm
import torch
import yaml
from timm.data import resolve_data_config
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.task import TrainingTask
from timm.utils import get_outdir, setup_default_logging
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_eed.exits import TimmModel
from timm_eed.training.arguments import parse_args
from timm_eed.training.build import Precision, build_model, build_optimizer, build_scheduler, build_task, setup_device
from timm_eed.training.checkpoint import Start, check_run_folder, continues_in_place, find_checkpoint, resume
from timm_eed.training.data import Data, create_data
from timm_eed.training.distributed import check_processes_agree, share_batch_norm
from timm_eed.training.engine import evaluate, mean_lr, train_one_epoch, updates_per_epoch
from timm_eed.training.errors import TrainingError
from timm_eed.training.publish import Sections, publish_run, read_sections
from timm_eed.training.random_state import gather_random_states, get_random_state
from timm_eed.training.report import append_summary, closing_table, epoch_lines, summary_row, trim_summary
from timm_eed.training.runs import CLASSES
from timm_eed.training.saver import RunSaver, write_atomically

_logger = logging.getLogger('train_eed')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the script; errors that the user can mend end it with one message.

    One process that fails ends the job: its launcher (torchrun) sees it end, and is told the cause.
    """
    setup_default_logging()
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # lists all files after every epoch
    try:
        with logging_redirect_tqdm():
            run(parse_args(argv))
    except Exception as error:
        distributed = torch.distributed.is_initialized()
        if distributed and type(error) is RuntimeError:
            time.sleep(2)  # of a lost connection, mostly: the process that failed tells why, and torchrun ends this one
        get_error_handler().record_exception(error)  # for torchrun's summary
        if not isinstance(error, TrainingError):
            raise
        rank = f' in process {torch.distributed.get_rank()}' if distributed else ''
        sys.exit(f'train_eed.py: error{rank}: {error}')
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # not after an error: it may wait for the other processes


def run(args: Namespace) -> Dict[str, float]:
    """Train as the arguments say and return the metrics of the last evaluation."""
    command = dict(vars(args))
    sections = read_sections(args.config) if args.push_to_hub and args.config else None
    device = setup_device(args)
    found = find_checkpoint(args)
    check_run_folder(args, found)
    model = build_model(args, device)
    data_config = input_config(args, model)
    data = create_data(args, data_config, model.num_classes, device)
    if args.torchscript:
        model = torch.jit.script(model)  # behind what reads the model's data settings, which scripting loses
    task = build_task(args, model, device, data_config)
    check_metric(args, task)
    optimizer = build_optimizer(args, task)
    precision = Precision(args, device)
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay, use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None)
    start = resume(args, task, *found, optimizer, precision.scaler) if found else Start(args.start_epoch or 0)
    check_processes_agree(args, data, start)
    prepare_task(args, task)
    updates = updates_per_epoch(data.num_batches, args.grad_accum_steps)
    scheduler, num_epochs = build_scheduler(args, optimizer, updates)
    num_epochs = min(num_epochs, args.stop_epoch or num_epochs)
    set_schedule(args, scheduler, start.epoch, updates, found[1] if found else {})
    complete = start.epoch >= num_epochs
    saver = None
    if not complete or (found and continues_in_place(args, found)):  # a kill may have left links to be made
        saver = open_run(
            args, command, model, task, optimizer, precision, scheduler, data_config, found, start, complete)
    del found  # the weights in it
    if complete:
        _logger.info(f'The run is complete, there is nothing left to train ({start.epoch} of {num_epochs} epochs).')
        if saver is not None and args.push_to_hub:
            push(args, sections)
        return {}
    if args.primary:
        write_classes(args, data)
        log_plan(args, model, data, data_config, start.epoch, num_epochs)
    start.restore_random_state()
    metrics = fit(args, task, data, optimizer, precision, scheduler, saver, start, num_epochs)
    if args.primary and metrics:
        print(f"\n{args.model} after {num_epochs} epochs, {args.run_dir}")
        print(closing_table(model, metrics, data_config['input_size']))
    if args.primary and args.push_to_hub:
        push(args, sections)
    return metrics


def push(args: Namespace, sections: Optional[Sections]) -> None:
    """Publish the run that just ended; should that fail, it is told how to try again."""
    try:
        commit = publish_run(args.run_dir, args.push_to_hub, sections)
    except (ValueError, ConnectionError) as error:
        config = args.config or os.path.join(args.run_dir, 'args.yaml')
        again = shlex.join(
            ['timm-eed', 'publish', config, '--checkpoint', args.run_dir, '--repo', args.push_to_hub])
        raise TrainingError(f'the run is complete, but was not published: {error}\nTry again with: {again}') from error
    print(f'\nPublished: {commit.commit_url}')


def input_config(args: Namespace, model: TimmModel) -> Dict[str, Any]:
    """Input size, normalisation, crop and interpolation, from the flags over the model's own."""
    try:
        return resolve_data_config(vars(args), model=model)
    except AssertionError as error:
        raise TrainingError('--mean and --std take one value, or one per input channel.') from error


def set_schedule(
        args: Namespace, scheduler: Optional[Any], epoch: int, updates: int, checkpoint: Dict[str, Any],
) -> None:
    """Put the schedule where the run starts: all but plateau follow from the epoch alone."""
    if scheduler is None or not epoch:
        return
    if isinstance(scheduler, PlateauLRScheduler) and 'plateau' in checkpoint:
        scheduler.lr_scheduler.load_state_dict(checkpoint['plateau'])
    elif args.sched_on_updates:
        scheduler.step_update(epoch * updates)
    else:
        scheduler.step(epoch)


def prepare_task(args: Namespace, task: TrainingTask) -> None:
    """Compile before DDP, as timm does."""
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if task.has_ema() and not args.model_ema_force_cpu:
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        task.prepare_distributed(
            device_ids=[torch.device(args.device)] if args.device.startswith('cuda') else None,
            **(dict(broadcast_buffers=False) if args.no_ddp_bb else {}))  # newer PyTorch warns wherever it is named


def open_run(
        args: Namespace,
        command: Dict[str, Any],
        model: TimmModel,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        scheduler: Optional[Any],
        data_config: Dict[str, Any],
        found: Optional[Tuple[str, Dict[str, Any]]],
        start: Start,
        complete: bool,
) -> Optional[RunSaver]:
    """Make the run's folder with args.yaml in it, and the checkpoint saver; on the first process only.

    The record of a run that is complete stays as it is, whatever the flags of this command are.
    """
    args.run_dir = None
    if not args.primary:
        return None
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'), timm.models.safe_model_name(args.model),
        str(data_config['input_size'][-1])])
    try:
        args.run_dir = get_outdir(args.output or './output/train', name)
    except OSError as error:
        raise TrainingError(f'--output: cannot make the folder of the run: {error}') from error
    if not complete:
        text = yaml.safe_dump(command, sort_keys=False)
        write_atomically(os.path.join(args.run_dir, 'args.yaml'), lambda file: file.write(text.encode()))
    saved_args = Namespace(**command)  # what the command said; devices and dtypes are this machine's matter
    saver = RunSaver(
        model, optimizer, args=saved_args, amp_scaler=precision.scaler, checkpoint_dir=args.run_dir,
        recovery_dir=args.run_dir, decreasing='loss' in args.eval_metric, max_history=args.checkpoint_hist, task=task,
        scheduler=scheduler)
    if found and continues_in_place(args, found):
        saver.continue_run(found[1], found[0])
    trim_summary(os.path.join(args.run_dir, 'summary.csv'), start.epoch)
    if args.log_wandb and not complete:
        start_wandb(args, command)
    return saver


def write_classes(args: Namespace, data: Data) -> None:
    """Keep the names of the classes with the run, so that it is evaluated on no others."""
    if data.classes and not args.class_map:
        text = json.dumps([str(name) for name in data.classes], indent=0)
        write_atomically(os.path.join(args.run_dir, CLASSES), lambda file: file.write(text.encode()))


def start_wandb(args: Namespace, command: Dict[str, Any]) -> None:
    """Open a Weights & Biases run."""
    try:
        import wandb
    except ImportError:
        raise TrainingError('--log-wandb needs the package: pip install wandb') from None
    resuming = dict(resume='must', id=args.wandb_resume_id) if args.wandb_resume_id else {}
    wandb.init(
        project=args.wandb_project, name=args.experiment or None, config=command, tags=args.wandb_tags, **resuming)


def log_wandb(row: Dict[str, Any]) -> None:
    """Send a row of the summary to Weights & Biases."""
    import wandb
    wandb.log({name: value for name, value in row.items() if value != ''})  # empty where nothing was evaluated


def log_plan(
        args: Namespace, model: TimmModel, data: Data, data_config: Dict[str, Any], start_epoch: int, num_epochs: int,
) -> None:
    """Say once what is about to happen."""
    size = 'x'.join(map(str, data_config['input_size']))
    params = sum(p.numel() for p in model.parameters()) / 1e6
    _logger.info(f'{args.model}: {params:.2f} M parameters, input {size}, {model.num_classes} classes, '
                 f'on {args.device}')
    for number, info in enumerate(getattr(model, 'exit_info', list)(), start=1):
        _logger.info(f'  exit{number} behind {info.module} ({info.channels} channels, 1/{info.reduction} of the size), '
                     f'{info.parameters / 1e6:.2f} M parameters')
    if args.warmup_epochs >= num_epochs and args.sched != 'none':
        _logger.warning(f'All {num_epochs} epochs are warm-up (--warmup-epochs {args.warmup_epochs}).')
    images = f'{len(data.train.dataset)} training'
    images += f', {len(data.validation.dataset)} validation images' if data.validation else ' images, no validation'
    _logger.info(f'{images}; epochs {start_epoch + 1} to {num_epochs}; writing to {args.run_dir}')


def fit(
        args: Namespace,
        task: TrainingTask,
        data: Data,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        scheduler: Optional[Any],
        saver: Optional[RunSaver],
        start: Start,
        num_epochs: int,
) -> Dict[str, float]:
    """The loop over epochs; returns the metrics of the last evaluation."""
    metrics: Dict[str, float] = {}
    not_evaluated = dict.fromkeys(task.create_evaluator().metric_names, '') if data.validation else {}
    for epoch in range(start.epoch, num_epochs):
        position = start.position if epoch == start.epoch else None
        train_metrics = train_one_epoch(epoch, task, data, optimizer, args, precision, scheduler, saver, position)
        share_batch_norm(args, task)
        lr = mean_lr(optimizer)
        milestone = epoch + 1 in (args.save_epochs or [])
        evaluated = data.validation is not None and (
            (epoch + 1) % args.val_interval == 0 or epoch + 1 == num_epochs or milestone)
        use_ema = task.has_ema() and not args.model_ema_force_cpu
        if evaluated:
            metrics = evaluate_epoch(args, task, data, precision, use_ema)
        current = metrics if evaluated else {}
        if scheduler is not None:
            scheduler.step(epoch + 1, current.get(args.eval_metric))
        random_states = gather_random_states(get_random_state())
        if saver is not None:
            saver.random_states = random_states
            _logger.info(epoch_lines(epoch, num_epochs, train_metrics, current, lr, ema=use_ema))
            if skipped := data.take_skipped():
                _logger.warning(f'{skipped} unreadable images were replaced by their neighbours in this epoch.')
            row = summary_row(epoch, train_metrics, current or not_evaluated, lr)
            append_summary(os.path.join(args.run_dir, 'summary.csv'), row)
            if args.log_wandb:
                log_wandb(row)
            saver.save_checkpoint(epoch, metric=current.get(args.eval_metric))
            if milestone:
                saver.save_milestone(epoch + 1)
    return metrics


def evaluate_epoch(
        args: Namespace, task: TrainingTask, data: Data, precision: Precision, use_ema: bool,
) -> Dict[str, float]:
    """Metrics of the weights, or of their moving average where the run keeps one."""
    if use_ema:
        share_batch_norm(args, task, ema=True)
        return evaluate(task.get_eval_model(ema=True), task, data.validation, args, precision, 'test (EMA)')
    return evaluate(task.get_eval_model(), task, data.validation, args, precision)


def check_metric(args: Namespace, task: TrainingTask) -> None:
    """End now what would end after the first epoch."""
    names = task.create_evaluator().metric_names
    if args.eval_metric not in names:
        raise TrainingError(f"--eval-metric '{args.eval_metric}' is not measured; choose from {', '.join(names)}.")


if __name__ == '__main__':
    main()
