"""`timm-eed benchmark`: time of every exit and of early exit."""
import argparse
import itertools
import json
import time
from typing import Any, Dict, List

import torch

from ..early_exit import EarlyExit
from ..latency import Timing, time_exits
from ..multi_exit import MultiExitWrapper
from ..policies import POLICIES
from ..repo_config import check_early_exit_config
from .inputs import (
    Inputs,
    add_data_arguments,
    add_model_arguments,
    file_to_write,
    load_data,
    load_model,
    load_settings,
    positive,
)

__all__ = ['add_parser']

CLOCKS = {'wall': time.perf_counter, 'cpu': time.thread_time}


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `timm-eed`."""
    parser = commands.add_parser('benchmark', help='time of every exit and of early exit', description=(
        'Latency and throughput of every exit, of the main network and of early exit with the thresholds given, on the '
        'same images, in turns after a warm-up; time and FLOPs as shares of the main network. Images are random where '
        'no data is named, else from all over it.'))
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument('--settings', metavar='FILE', help='thresholds from `timm-eed calibrate --json FILE`')
    parser.add_argument('--thresholds', type=float, nargs='+', metavar='T',
                        help='one per exit, or one for all (inf: off); default 0.9, or those that came with the model')
    parser.add_argument('--policy', choices=POLICIES, help='what --thresholds are compared with (default: confidence)')
    parser.add_argument('--images', type=positive, default=64, metavar='N', help='how many images are timed')
    parser.add_argument('--rounds', type=positive, default=20, metavar='N', help='how often all are timed')
    parser.add_argument('--threads', type=positive, metavar='N', help="threads of PyTorch; its own number if not given")
    parser.add_argument('--clock', default='wall', choices=CLOCKS,
                        help='wall clock, or CPU time of the thread (for one thread of a busy machine)')
    parser.add_argument('--json', type=file_to_write, metavar='FILE', help='write the rows to a file, too')
    parser.set_defaults(run=_run, batch_size=32)


def _run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    inputs = load_model(args)
    if not isinstance(inputs.model, MultiExitWrapper):
        raise ValueError(f"'{args.model}' has no exits, nothing can leave it early.")
    early = EarlyExit(inputs.model, **_settings(args, inputs.model))
    if args.split and not _has_data(args):
        raise ValueError('--split is one of DATA, which is not named; images are random without it.')
    batches = _batches(args, inputs)
    rows = time_exits(early, batches, args.rounds, clock=CLOCKS[args.clock])
    images, way = sum(len(x) for x in batches), early.prepare(batches[0]).name
    print(f'{inputs.title}, {images} {"real" if _has_data(args) else "random"} images in batches of '
          f'{len(batches[0])}, {args.rounds} rounds, {args.clock} time, {torch.get_num_threads()} thread(s), '
          f'{args.device}; rows leave by: {way}\n')
    print('\n'.join(table(rows)))
    taken = torch.cat([early(x).exit_index for x in batches])
    shares = torch.bincount(taken, minlength=inputs.model.num_exits) / len(taken)
    print('\nleaving at: ' + ', '.join(
        f'{row.name} {100 * share:.0f} %' for row, share in zip(rows, shares.tolist())))
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as file:
            json.dump(dict(model=args.model, settings=early.rule.settings(), way=way, images=images,
                           rows=[row._asdict() for row in rows]), file, indent=2)


def table(rows: List[Timing]) -> List[str]:
    """Rows as aligned text."""
    lines = [f"{'':<10}  {'p50':>10}  {'p95':>10}  {'images/s':>9}  {'time':>7}  {'FLOPs':>7}"]
    return lines + [
        f'{row.name:<10}  {row.p50:7.2f} ms  {row.p95:7.2f} ms  {row.throughput:9.1f}  {100 * row.time_share:5.1f} %  '
        f'{100 * row.flops_share:5.1f} %' for row in rows]


def _settings(args: argparse.Namespace, model: MultiExitWrapper) -> Dict[str, Any]:
    if args.settings and (args.thresholds or args.policy):
        raise ValueError('--settings FILE has thresholds and policy; drop --thresholds and --policy.')
    if args.settings:
        return dict(check_early_exit_config(load_settings(args.settings), model.num_exits) or {})
    if args.thresholds:
        thresholds = args.thresholds * len(model.exits) if len(args.thresholds) == 1 else args.thresholds
        return dict(thresholds=thresholds, policy=args.policy or 'confidence')
    if model.early_exit_config and not args.policy:
        return model.early_exit_config
    return dict(policy=args.policy or 'confidence', thresholds=2 if args.policy == 'patience' else .9)


def _has_data(args: argparse.Namespace) -> bool:
    return bool(args.data or args.dataset)


def _batches(args: argparse.Namespace, inputs: Inputs) -> List[torch.Tensor]:
    """Full batches of the images, on the device."""
    size = min(args.batch_size, args.images)
    count = args.images // size
    if not _has_data(args):
        generator = torch.Generator().manual_seed(0)
        shape = (count * size, *inputs.data_config['input_size'])
        images = torch.randn(shape, generator=generator)
    else:
        loader = load_data(args, inputs, count * size)
        loaded = [x for x, _ in itertools.islice(loader, -(-count * size // args.batch_size))]
        images = torch.cat(loaded)[:count * size]
        if len(images) < size:
            raise ValueError(f'the data has {len(images)} images, fewer than a batch of {size}; try -b {len(images)}.')
        images = images[:len(images) // size * size]
    return list(images.to(args.device).split(size))
