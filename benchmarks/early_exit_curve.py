"""A trained model: accuracy against FLOPs and time, of one exit for all images and of early exit.

    python benchmarks/early_exit_curve.py RUN DATA --calibration-split val --test-split test --output docs/NAME

Thresholds are chosen on the calibration split, for targets from cheap to dear. Accuracy, FLOPs and time are then
measured on the test split with `EarlyExit` itself: time on a part of the images, in batches, one thread, all ways in
turns, CPU time relative to the main network's in the same round. Writes NAME.csv and NAME.png.
"""
import argparse
import csv
import os
import statistics
import time
from typing import Any, Callable, Dict, List, Tuple

import torch

import timm_eed
from timm_eed.calibration import Calibration
from timm_eed.commands.inputs import add_data_arguments, add_model_arguments, load_data, load_model
from timm_eed.figures import TradeOff, trade_off_figure
from timm_eed.latency import by_round, measure
from timm_eed.multi_exit import classifier_names
from timm_eed.profiling import early_exit_gflops, leaving_gflops
from timm_eed.training.splits import spread_rows

Way = Callable[[torch.Tensor], timm_eed.EarlyExitOutput]


def main() -> None:
    """Calibrate, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument('--calibration-split', required=True, metavar='NAME', help='split that thresholds come from')
    parser.add_argument('--test-split', required=True, metavar='NAME', help='split that is measured')
    parser.add_argument('--points', type=int, default=10, metavar='N', help='points of the early-exit curve')
    parser.add_argument('--timed-batch', type=int, default=32, metavar='N', help='images per timed batch')
    parser.add_argument('--timed-images', type=int, default=512, metavar='N', help='images that are timed')
    parser.add_argument('--rounds', type=int, default=7, metavar='N', help='how often they are timed')
    parser.add_argument('--output', required=True, metavar='NAME', help='files to write, without suffix')
    args = parser.parse_args()
    torch.set_num_threads(1)
    inputs = load_model(args)
    args.split = args.calibration_split
    calibration = timm_eed.calibrate(inputs.model, load_data(args, inputs), max_accuracy_drop=0.)
    args.split = args.test_split
    batches = list(load_data(args, inputs))
    rows = measured(inputs.model, ways(inputs.model, calibration, args.points), batches, args)
    os.makedirs(os.path.dirname(args.output) or '.', exist_ok=True)
    with open(f'{args.output}.csv', 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    trade_off_figure([TradeOff(
        row['name'], row['top1'], {'GFLOPs per image': row['gflops'], 'time, main network = 1': row['time_share']})
        for row in rows]).savefig(f'{args.output}.png')
    for row in rows:
        print(' '.join(f'{key}={value}' for key, value in row.items()))


def ways(
        model: timm_eed.MultiExitWrapper, calibration: Calibration, points: int,
) -> List[Tuple[str, timm_eed.EarlyExit]]:
    """Each classifier for all images, points evenly spread over the curve, and what was saved with the model."""
    curve = calibration.curve
    low, high = curve[0].cost, curve[-1].cost
    wanted = [low + (high - low) * i / (points - 1) for i in range(points)]
    chosen = {min(curve, key=lambda point: abs(point.cost - cost)) for cost in wanted}
    named = list(zip(classifier_names(model.num_exits), calibration.classifiers))
    named += [('early exit', point) for point in sorted(chosen)]
    found = [(name, timm_eed.EarlyExit(model, **{**calibration.settings, 'thresholds': point.thresholds}))
             for name, point in named]
    if model.early_exit_config:
        found.append(('early exit, as saved', timm_eed.EarlyExit(model, **model.early_exit_config)))
    return found


def measured(
        model: timm_eed.MultiExitWrapper,
        named: List[Tuple[str, timm_eed.EarlyExit]],
        batches: List[Tuple[torch.Tensor, torch.Tensor]],
        args: argparse.Namespace,
) -> List[Dict[str, Any]]:
    """A row per way."""
    images = torch.cat([x for x, _ in batches])
    timed = list(images[spread_rows(len(images), args.timed_images)].split(args.timed_batch))
    functions: Dict[str, Way] = {'plain': model.backbone, **{str(i): early for i, (_, early) in enumerate(named)}}
    with torch.no_grad():
        times = by_round(measure(functions, timed, args.rounds, 1, time.thread_time))
    trunk, heads = early_exit_gflops(model, tuple(timed[0].shape[1:]))  # type: ignore[arg-type]
    rows = []
    for i, (name, early) in enumerate(named):
        outputs = [early(x) for x, _ in batches]
        taken = torch.cat([out.exit_index for out in outputs])
        right = torch.cat([out.logits.argmax(1) == y for out, (_, y) in zip(outputs, batches)])
        costs = torch.tensor(leaving_gflops(trunk, heads, early.rule.enabled))
        gflops = float(costs[taken].mean())
        low, middle, high = statistics.quantiles([a / b for a, b in zip(times[str(i)], times['plain'])], n=4)
        rows.append(dict(
            name=name, top1=round(100 * float(right.double().mean()), 3), images=len(right), gflops=round(gflops, 5),
            flops_share=round(gflops / trunk[-1], 4), time_share=round(middle, 4), time_low=round(low, 4),
            time_high=round(high, 4), thresholds=' '.join(
                'off' if t is None else f'{t:.5f}' for t in early.rule.thresholds)))
    return rows


if __name__ == '__main__':
    main()
