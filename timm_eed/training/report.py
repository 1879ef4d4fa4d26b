"""What a run prints: a block per epoch, a table at the end."""
import csv
import io
import os
from typing import Any, Dict, List, Mapping, Optional, Union

import torch.nn as nn

from ..analysis import METRIC_TITLES, shown_metrics
from ..multi_exit import MultiExitWrapper
from ..profiling import profile_with_ensemble
from .saver import write_atomically

__all__ = ['append_summary', 'closing_table', 'epoch_lines', 'format_rate', 'summary_row', 'trim_summary']


def epoch_lines(
        epoch: int,
        num_epochs: int,
        train: Dict[str, float],
        validation: Dict[str, float],
        lr: float,
        ema: bool = False,
) -> str:
    """An epoch in a few lines: loss terms, then accuracy (%) of each exit, the main network and the ensemble."""
    losses = '  '.join(f'{name} {value:.4f}' for name, value in train.items()
                       if name.endswith('loss') and (value or name == 'loss'))  # a term that is off stays out
    lines = [f"Epoch {epoch + 1}/{num_epochs}  {losses}  lr {lr:.3g}  {format_rate(train['images_per_second'])}"]
    if validation:
        suffix = '  (moving average)' if ema else ''
        lines += [f'  {line}{suffix}' for line in _accuracy_lines(validation)]
    return '\n'.join(lines)


def summary_row(
        epoch: int,
        train: Dict[str, float],
        validation: Mapping[str, Union[float, str]],
        lr: float,
) -> Dict[str, Union[float, str]]:
    """An epoch in one row, its columns named and ordered as in timm's summary.csv."""
    return {'epoch': epoch, **{f'train_{name}': value for name, value in train.items()},
            **{f'eval_{name}': value for name, value in validation.items()}, 'lr': lr}


def append_summary(path: str, row: Dict[str, Union[float, str]]) -> None:
    """Append a row to a summary.csv; a resumed run that measures other things than before adds columns to all rows."""
    rows: List[Dict[str, Any]] = []
    names: List[str] = []
    if os.path.exists(path):
        with open(path, newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), list(reader.fieldnames or [])
    merged = [*names, *(name for name in row if name not in names)]
    if merged == names:
        with open(path, 'a', newline='', encoding='utf-8') as file:
            csv.DictWriter(file, names, restval='', lineterminator='\n').writerow(row)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, merged, restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows([*rows, row])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def trim_summary(path: str, epochs: int) -> None:
    """Keep the rows of the first `epochs` epochs of a summary.csv; the old file stays until the new one is whole.

    A last row that a kill cut short goes, too. With 0 epochs a new file is started.
    """
    if not os.path.exists(path):
        return
    with open(path, newline='', encoding='utf-8') as file:
        rows = list(csv.reader(file))
    header = rows[0] if rows else []
    kept = [row for row in rows[1:] if len(row) == len(header) and row[0].isdigit() and int(row[0]) < epochs]
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([header, *kept] if kept else [])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def format_rate(images_per_second: float) -> str:
    """Images per second, with a decimal where there are few."""
    return f'{images_per_second:,.{0 if images_per_second >= 10 else 1}f} images/s'


def accuracies(metrics: Dict[str, float]) -> List[tuple]:
    """Name and two metrics (top-1 and top-5, or mAP and macro F1) of each exit, main, ensemble, in that order."""
    first, second = shown_metrics(metrics)
    suffixes = [name[len(first):] for name in metrics if name.startswith(f'{first}_exit')]
    suffixes += [suffix for suffix in ('', '_ensemble') if f'{first}{suffix}' in metrics]
    return [(suffix.lstrip('_') or 'main', metrics[f'{first}{suffix}'], metrics[f'{second}{suffix}'])
            for suffix in suffixes]


def _accuracy_lines(metrics: Dict[str, float]) -> List[str]:
    first, second = (METRIC_TITLES[name] for name in shown_metrics(metrics))
    return [f'{name:<8}  {first} {a:6.2f} %  {second} {b:6.2f} %' for name, a, b in accuracies(metrics)]


def closing_table(model: nn.Module, metrics: Dict[str, float], input_size: Optional[tuple] = None) -> str:
    """Accuracy beside cost, a row per classifier; the ensemble costs all of them.

    Args:
        model: The trained model, with or without exits.
        metrics: Validation metrics of the last evaluation.
        input_size: Image size (C, H, W).
    """
    if not isinstance(model, MultiExitWrapper):
        return '\n'.join(_accuracy_lines(metrics))
    cost = {row.exit: row for row in profile_with_ensemble(model, input_size)}
    main = cost['main'].gflops
    first, second = (METRIC_TITLES[name] for name in shown_metrics(metrics))
    lines = [f"{'exit':<8}  {'GFLOPs':>9}  {'share':>7}  {'params':>9}  {first:>8}  {second:>8}"]
    for name, top1, top5 in accuracies(metrics):
        _, _, gflops, params = cost[name]
        lines.append(f'{name:<8}  {gflops:9.4f}  {100 * gflops / main:5.1f} %  {params / 1e6:7.2f} M'
                     f'  {top1:6.2f} %  {top5:6.2f} %')
    return '\n'.join(lines)
