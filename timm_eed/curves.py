"""Accuracy over epochs, from the summary.csv of runs; runs that differ in the seed alone are put together."""
import csv
import os
from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np

from .training.runs import read_arguments

__all__ = ['Group', 'group_runs', 'measured_epochs', 'read_curves']

# flags that do not make a run another one
_INCIDENTAL = ('seed', 'experiment', 'output', 'resume', 'config', 'workers', 'log_interval', 'recovery_interval',
               'local_rank', 'device', 'push_to_hub', 'checkpoint_hist', 'wandb_resume_id')


class Group(NamedTuple):
    """Runs of one kind: what sets them apart from the others, their folders, and curves [runs, epochs] of top-1 (%).

    curves: By split ('train', 'eval'), then by classifier ('exit1', .., 'main', 'ensemble'); NaN where not measured.
    Epochs that only some of the runs have reached are left out.
    """
    label: str
    folders: List[str]
    curves: Dict[str, Dict[str, np.ndarray]]


def read_curves(run_dir: str) -> Dict[str, Dict[str, np.ndarray]]:
    """Top-1 (%) over epochs of one run, by split and classifier, each [epochs], from the first epoch on.

    NaN where an epoch was not measured, or was one of the run that this one continues.

    Raises:
        ValueError: If the folder has no summary.csv with rows and top-1 columns.
    """
    path = os.path.join(run_dir, 'summary.csv')
    if not os.path.isfile(path):
        raise ValueError(f"'{run_dir}' has no summary.csv (yet).")
    with open(path, newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"'{path}' has no epochs (yet).")
    curves: Dict[str, Dict[str, np.ndarray]] = {'train': {}, 'eval': {}}
    for key in rows[0]:
        split, _, metric = key.partition('_')
        if split in curves and metric.startswith('top1'):
            values = np.full(int(rows[-1]['epoch']) + 1, np.nan)
            for row in rows:
                if row[key]:
                    values[int(row['epoch'])] = float(row[key])
            curves[split][metric[len('top1'):].lstrip('_') or 'main'] = values
    if not any(curves.values()):
        raise ValueError(f"'{path}' has no top-1 accuracy; runs with multi-label targets have no curves of it.")
    return curves


def group_runs(run_dirs: Sequence[str]) -> List[Group]:
    """Runs put together by their flags, in the order given; a group is labelled by the flags in which groups differ."""
    flags = [_flags(folder) for folder in run_dirs]
    kinds: List[Dict[str, Any]] = []
    for kind in flags:
        if kind not in kinds:
            kinds.append(kind)
    differing = [key for key in flags[0] if any(kind[key] != kinds[0][key] for kind in kinds)]
    groups = []
    for kind in kinds:
        folders = [folder for folder, other in zip(run_dirs, flags) if other == kind]
        label = ', '.join(f"{key.removeprefix('eed_')} {kind[key]}" for key in differing) or kind['model']
        groups.append(Group(label, folders, _stack([read_curves(folder) for folder in folders])))
    return groups


def _flags(run_dir: str) -> Dict[str, Any]:
    flags = {name: value for name, value in vars(read_arguments(run_dir)).items() if name not in _INCIDENTAL}
    if flags['data_dir']:  # the same data may lie elsewhere on another machine
        flags['data_dir'] = os.path.basename(os.path.normpath(flags['data_dir']))
    return flags


def measured_epochs(values: np.ndarray) -> np.ndarray:
    """Indices of the epochs that all runs have measured, of curves [runs, epochs]."""
    return np.flatnonzero(~np.isnan(values).any(0))


def _stack(runs: List[Dict[str, Dict[str, np.ndarray]]]) -> Dict[str, Dict[str, np.ndarray]]:
    """[runs, epochs], cut to the shortest run."""
    return {split: {
        name: np.stack([run[split][name][:min(len(r[split][name]) for r in runs)] for run in runs])
        for name in curves} for split, curves in runs[0].items()}
