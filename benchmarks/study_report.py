"""The tables and figures of docs/study.md, docs/early_exit.md and the README, from docs/study/*.csv.

    python benchmarks/study_report.py

results.csv and curves.csv come from `benchmarks/study.py collect`, early_exit_*.csv from
`benchmarks/early_exit_curve.py`. What stands between the marks `<!-- NAME -->` and `<!-- /NAME -->` is written anew.
Needs SciPy (quantiles of the t distribution) and matplotlib.
"""
import csv
import re
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from timm_eed.curves import Group
from timm_eed.figures import curves_figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'docs' / 'study'
SMALL = {'small_none': 'no exits', 'small_ce': 'exits, labels alone (2)', 'small_kd_kl': 'main network teaches, KL (4)',
         'small_eed_kl': 'EED, KL (8)', 'small_eed_mse': 'EED, MSE (8)'}
FULL = {'full_none': 'no exits', 'full_ce': 'exits, labels alone (2)', 'full_eed_kl': 'EED, KL (8)'}
LONG = {'long_none': 'no exits', 'long_ce': 'exits, labels alone (2)', 'long_eed_kl': 'EED, KL (8)'}
REGIMES = {'small': ('small data, wide network', SMALL), 'full': ('all data, small network', FULL),
           'long': ('small data, small network, 200 epochs', LONG)}
TEACHERS = {'small_kd_kl': 'main', 'small_eed_kl_exit1_main': 'exit1 + main', 'small_eed_kl': 'all (ensemble)'}
PAIRS = [  # what is compared: first minus second
    ('small_eed_kl', 'small_ce'), ('small_eed_kl', 'small_none'), ('small_eed_mse', 'small_ce'),
    ('small_eed_mse', 'small_none'), ('small_ce', 'small_none'), ('small_kd_kl', 'small_none'),
    ('small_eed_kl', 'small_kd_kl'), ('full_eed_kl', 'full_ce'), ('full_eed_kl', 'full_none'),
    ('full_ce', 'full_none'), ('long_eed_kl', 'long_ce'), ('long_eed_kl', 'long_none'), ('long_ce', 'long_none')]
CLASSIFIERS = ('exit1', 'exit2', 'main', 'ensemble')  # both networks have three stages
LAST = 10  # epochs over which fluctuation is measured
SHARE = .95  # of the plain network's last accuracy: when a run counts as there

BySeed = Dict[int, float]


class Difference(NamedTuple):
    """Mean of the differences of runs with the same seed, its 95 % interval (t distribution), and how many."""
    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f'{self.interval}, n = {self.n}' if self.n > 1 else f'{self.interval} (n = 1, no interval)'

    @property
    def interval(self) -> str:
        """Mean and interval, as +1.23 (-0.50 to +3.00); the mean alone for one seed."""
        return f'{self.mean:+.2f}' + (f' ({self.low:+.2f} to {self.high:+.2f})' if self.n > 1 else '')

    @property
    def verdict(self) -> str:
        """What the interval says."""
        if self.n < 2 or self.low <= 0 <= self.high:
            return 'no difference shown'
        return 'better' if self.low > 0 else 'worse'


class Study:
    """The two files of results.

    results: Test metrics by configuration, classifier, metric and seed. curves: Top-1 (%) over epochs [epochs] by
    configuration, split, classifier and seed.
    """

    def __init__(self, folder: Path):
        self.results: Dict[Tuple[str, str, str], BySeed] = {}
        for row in _read(folder / 'results.csv'):
            for metric in ('top1', 'top5', 'ece', 'loss'):
                key = row['config'], row['classifier'], metric
                self.results.setdefault(key, {})[int(row['seed'])] = float(row[metric])
        epochs: Dict[Tuple[str, str, str], Dict[int, Dict[int, float]]] = {}
        for row in _read(folder / 'curves.csv'):
            by_seed = epochs.setdefault((row['config'], row['split'], row['classifier']), {})
            by_seed.setdefault(int(row['seed']), {})[int(row['epoch'])] = float(row['top1'])
        self.curves = {key: {seed: np.array([values[e] for e in sorted(values)]) for seed, values in by_seed.items()}
                       for key, by_seed in epochs.items()}

    def test(self, config: str, classifier: str = 'main', metric: str = 'top1') -> BySeed:
        """A test metric by seed; empty where there is none."""
        return self.results.get((config, classifier, metric), {})

    def fluctuation(self, config: str, classifier: str = 'main') -> BySeed:
        """Mean absolute change of validation accuracy (points) from epoch to epoch, over the last ones, by seed."""
        return {seed: float(np.abs(np.diff(curve[-LAST - 1:])).mean())
                for seed, curve in self.curves.get((config, 'eval', classifier), {}).items()}

    def epochs_to_plain(self, config: str, plain: str) -> BySeed:
        """First epoch (from 1) with 95 % of the validation accuracy that the plain network of that seed ends with; inf
        where that is never reached."""
        goals = {seed: SHARE * curve[-1] for seed, curve in self.curves.get((plain, 'eval', 'main'), {}).items()}
        curves = self.curves.get((config, 'eval', 'main'), {})
        reached = {seed: np.flatnonzero(curves[seed] >= goals[seed]) for seed in sorted(set(curves) & set(goals))}
        return {seed: float(epochs[0] + 1) if len(epochs) else float('inf') for seed, epochs in reached.items()}


def paired(first: BySeed, second: BySeed) -> Optional[Difference]:
    """First minus second over the seeds that both have; None if there are none."""
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    differences = np.array([first[seed] - second[seed] for seed in seeds])
    n, mean = len(seeds), float(differences.mean())
    if n < 2:
        return Difference(mean, float('nan'), float('nan'), n)
    half = float(stats.t.ppf(.975, n - 1) * differences.std(ddof=1) / n ** .5)
    return Difference(mean, mean - half, mean + half, n)


def mean_and_std(values: BySeed) -> str:
    """As 76.54 ± 0.32; without a deviation for one value; how many are finite where not all are."""
    if not values:
        return '-'
    numbers = np.array([value for value in values.values() if np.isfinite(value)])
    if not len(numbers):
        return 'never'
    text = f'{numbers.mean():.2f}' + (f' ± {numbers.std(ddof=1):.2f}' if len(numbers) > 1 else '')
    return text + (f' ({len(numbers)} of {len(values)})' if len(numbers) < len(values) else '')


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    return '\n'.join([*lines, *('| ' + ' | '.join(row) + ' |' for row in rows)])


def accuracy_table(study: Study, methods: Dict[str, str], metric: str = 'top1') -> str:
    """Mean and standard deviation of every classifier."""
    if not any(map(study.test, methods)):
        return 'No runs yet.'
    return _table(['method', 'n', *CLASSIFIERS], [
        [label, str(len(study.test(config))), *(mean_and_std(study.test(config, name, metric)) for name in CLASSIFIERS)]
        for config, label in methods.items() if study.test(config)])


def pairs_table(study: Study) -> str:
    """Paired differences of the main network's test accuracy, and what they show."""
    rows = []
    for first, second in PAIRS:
        if (difference := paired(study.test(first), study.test(second))) is not None:
            regime = first.partition('_')[0]
            labels = REGIMES[regime][1]
            rows.append([regime, f'{labels[first]} against {labels[second]}', str(difference), difference.verdict])
    return _table(['regime', 'main network', 'difference in points (95 % interval)', ''], rows)


def by_classifier_table(study: Study) -> str:
    """Paired differences of every classifier to the same one trained with labels alone, beside its own accuracy."""
    rows = []
    for regime, (_, methods) in REGIMES.items():
        for config, label in methods.items():
            differences = [paired(study.test(config, name), study.test(f'{regime}_ce', name)) for name in CLASSIFIERS]
            if config != f'{regime}_ce' and all(differences):
                rows.append([regime, label, str(max(d.n for d in differences if d)),
                             *(d.interval for d in differences if d)])
    return _table(['regime', 'method, against labels alone (2)', 'n', *CLASSIFIERS], rows)


def ensemble_table(study: Study) -> str:
    """Is the teacher better than its best student? Ensemble minus main network of the same runs."""
    rows = []
    for regime, (_, methods) in REGIMES.items():
        for config, label in methods.items():
            if difference := paired(study.test(config, 'ensemble'), study.test(config)):
                rows.append([regime, label, str(difference)])
    return _table(['regime', 'method', 'ensemble minus main network, points (95 % interval)'], rows)


def behaviour_table(study: Study) -> str:
    """Fluctuation, convergence and calibration of the main network."""
    rows = []
    for regime, (_, methods) in REGIMES.items():
        for config, label in methods.items():
            if study.test(config):
                rows.append([regime, label, mean_and_std(study.fluctuation(config)),
                             mean_and_std(study.epochs_to_plain(config, f'{regime}_none')),
                             mean_and_std(study.test(config, 'main', 'ece'))])
    return _table(['regime', 'method', 'change from epoch to epoch (points)',
                   f"epochs to {SHARE:.0%} of the plain network's accuracy", 'calibration error (%)'], rows)


def teacher_table(study: Study) -> str:
    """Who teaches, on the seeds that all three have."""
    common = set.intersection(*(set(study.test(config)) for config in TEACHERS))
    if not common:
        return 'No seed has all three yet.'
    rows = []
    for config, label in TEACHERS.items():
        own = [{seed: value for seed, value in study.test(config, name).items() if seed in common}
               for name in CLASSIFIERS]
        rows.append([label, str(len(common)), *map(mean_and_std, own)])
    return _table(['teacher (KL)', 'n', *CLASSIFIERS], rows)


def readme_table(study: Study) -> str:
    """Main network and ensemble of every regime, with the paired difference to no exits; no single runs."""
    rows = []
    for name, (regime, methods) in REGIMES.items():
        for config, label in methods.items():
            if len(study.test(config)) > 1:
                plain = f'{name}_none'
                difference = paired(study.test(config), study.test(plain)) if config != plain else None
                rows.append([regime, label, str(len(study.test(config))), mean_and_std(study.test(config)),
                             difference.interval if difference else '',
                             mean_and_std(study.test(config, 'ensemble'))])
    return _table(['regime', 'method', 'n', 'main network, top-1 (%)', 'difference to no exits (95 % interval)',
                   'ensemble, top-1 (%)'], rows)


def early_exit_table(folder: Path) -> str:
    """Accuracy, FLOPs and time of each exit for all images and of early exit."""
    parts = []
    for path in sorted(folder.glob('early_exit_*.csv')):
        rows = [[row['name'], f"{float(row['top1']):.2f}", f"{100 * float(row['flops_share']):.1f} %",
                 f"{100 * float(row['time_share']):.1f} % ({100 * float(row['time_low']):.0f}-"
                 f"{100 * float(row['time_high']):.0f})", row['thresholds']] for row in _read(path)]
        parts.append(f"`{path.stem.removeprefix('early_exit_')}`:\n\n" + _table(
            ['', 'top-1 (%)', 'FLOPs', 'time (quartiles)', 'thresholds'], rows))
    return '\n\n'.join(parts)


def draw(study: Study, methods: Dict[str, str], classifiers: Sequence[str], path: Path) -> None:
    """Accuracy over epochs of some classifiers, a line per method with a band over seeds."""
    groups = []
    for config, label in methods.items():
        curves = {split: {name: np.stack(list(study.curves[config, split, name].values()))
                          for name in classifiers if (config, split, name) in study.curves}
                  for split in ('train', 'eval')}
        if curves['eval']:
            groups.append(Group(label, [str(seed) for seed in study.test(config)], curves))
    if groups:
        curves_figure(groups).savefig(path)


def draw_differences(study: Study, path: Path) -> None:
    """Main network against the plain one: a dot per seed; mean and 95 % interval where there are several."""
    figure = Figure(figsize=(7.2, 3.4), layout='constrained', dpi=100)
    axes, labels = figure.subplots(), []
    for regime, (_, methods) in REGIMES.items():
        plain = study.test(f'{regime}_none')
        for config, label in methods.items():
            difference = paired(study.test(config), plain)
            if config == f'{regime}_none' or difference is None:
                continue
            row, seeds = len(labels), sorted(set(study.test(config)) & set(plain))
            axes.plot([study.test(config)[seed] - plain[seed] for seed in seeds], [row + .25] * len(seeds), '.',
                      color='tab:gray')
            axes.plot([difference.low, difference.high], [row, row], color='tab:blue')
            axes.plot(difference.mean, row, 'o', color='tab:blue')
            labels.append(f'{regime}: {label}, n = {difference.n}')
    axes.axvline(0, color='black', linewidth=.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(axis='x', alpha=.3)
    axes.set_xlabel('main network against no exits, test top-1 (points)')
    figure.savefig(path)


def fill(path: Path, parts: Dict[str, Callable[[], str]]) -> None:
    """Write what stands between the marks of a file anew."""
    text = path.read_text(encoding='utf-8')
    for name, part in parts.items():
        pattern = re.compile(f'(<!-- {name} -->\n).*?(<!-- /{name} -->)', re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f'{path} has no marks <!-- {name} --> and <!-- /{name} -->.')
        body = part()
        text = pattern.sub(lambda match, body=body: f'{match[1]}\n{body}\n\n{match[2]}', text)  # type: ignore[misc]
    path.write_text(text, encoding='utf-8')


def _read(path: Path) -> List[Dict[str, str]]:
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Write everything."""
    fill(ROOT / 'docs' / 'early_exit.md', dict(early_exit=lambda: early_exit_table(RESULTS)))
    if not (RESULTS / 'results.csv').exists():
        raise SystemExit(f'{RESULTS} has no results yet: python benchmarks/study.py collect --output RUNS')
    study = Study(RESULTS)
    fill(ROOT / 'docs' / 'study.md', dict(
        small=lambda: accuracy_table(study, SMALL), full=lambda: accuracy_table(study, FULL),
        long=lambda: accuracy_table(study, LONG),
        pairs=lambda: pairs_table(study), classifiers=lambda: by_classifier_table(study),
        ensemble=lambda: ensemble_table(study), behaviour=lambda: behaviour_table(study),
        teachers=lambda: teacher_table(study), short=lambda: accuracy_table(Study(RESULTS / 'short'), SMALL)))
    fill(ROOT / 'README.md', dict(study=lambda: readme_table(study)))
    for name, (_, methods) in REGIMES.items():
        draw(study, methods, ['main', 'ensemble'], RESULTS / f'curves_{name}.png')
    draw_differences(study, RESULTS / 'differences.png')


if __name__ == '__main__':
    main()
