"""When does exit-ensemble distillation help? The runs behind docs/study.md: prepare the images, run, collect.

    python benchmarks/study.py prepare --download --data DIR          # CIFAR-10, or --source FOLDER for an ImageFolder
    python benchmarks/study.py run --data DIR --output RUNS --jobs 2  # resumable: start it again after a stop
    python benchmarks/study.py collect --output RUNS                  # their results into docs/study/*.csv

A run is one YAML of benchmarks/study/ with one seed, trained by train_eed.py in a process of one thread and then
evaluated on the test images, once, at its last epoch, by `timm-eed validate`.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Dict, List, Tuple

from timm_eed.curves import read_curves

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'benchmarks' / 'study'
RESULTS = ROOT / 'docs' / 'study'
SEEDS = {
    'full_none': 3, 'full_ce': 3, 'full_eed_kl': 3,
    'small_none': 5, 'small_ce': 5, 'small_kd_kl': 5, 'small_eed_kl': 5, 'small_eed_mse': 5,
    'small_eed_kl_exit1_main': 3,
    'long_none': 3, 'long_ce': 3, 'long_eed_kl': 3}
SMALL, VALIDATION = 500, 200  # images per class
Row = Dict[str, str]


def main() -> None:
    """Run a step of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest='step', required=True)
    step = steps.add_parser('prepare', help='make the splits')
    step.add_argument('--data', required=True, help='folder of the splits')
    source = step.add_mutually_exclusive_group(required=True)
    source.add_argument('--source', help='folder with train/ and validation/ or test/, a folder per class in each')
    source.add_argument('--download', action='store_true', help="torchvision's CIFAR-10 instead")
    step = steps.add_parser('run', help='train and evaluate what is missing')
    step.add_argument('--data', required=True, help='folder of the splits')
    step.add_argument('--output', required=True, help='folder of the runs')
    step.add_argument('--jobs', type=int, default=1, help='processes at a time')
    step.add_argument('--only', nargs='+', metavar='NAME', help='configurations, all if not given')
    step.add_argument('--seeds', type=int, nargs='+', help="seeds; the study's if not given")
    step = steps.add_parser('collect', help='write the results of finished runs')
    step.add_argument('--output', required=True, help='folder of the runs')
    step.add_argument('--results', default=str(RESULTS), help='folder of the CSV files')
    args = parser.parse_args()
    dict(prepare=prepare, run=run, collect=collect)[args.step](args)


def prepare(args: argparse.Namespace) -> None:
    """Splits as folders of links: train_small, train_full, val (the last images of each class) and test."""
    source = export_cifar10(Path(args.data) / 'cifar10') if args.download else Path(args.source)
    test = next(folder for name in ('test', 'validation', 'val') if (folder := source / name).is_dir())
    for class_folder in sorted((source / 'train').iterdir()):
        images = sorted(class_folder.iterdir())
        train, val = images[:-VALIDATION], images[-VALIDATION:]
        splits = dict(train_small=train[:SMALL], train_full=train, val=val,
                      test=sorted((test / class_folder.name).iterdir()))
        for split, files in splits.items():
            folder = Path(args.data) / split / class_folder.name
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                if not (folder / file.name).exists():
                    os.symlink(file.resolve(), folder / file.name)
            print(f'{split:<12} {class_folder.name:<12} {len(files):5d} images')


def export_cifar10(folder: Path) -> Path:
    """torchvision's CIFAR-10 as PNG files, a folder per class."""
    from torchvision.datasets import CIFAR10
    for split, train in (('train', True), ('test', False)):
        data = CIFAR10(str(folder / 'download'), train=train, download=True)
        for index, (image, label) in enumerate(data):
            path = folder / split / data.classes[label] / f'{index:05d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return folder


def run(args: argparse.Namespace) -> None:
    """Go through the runs seed by seed, so that a study that is stopped has complete seeds."""
    names = args.only or list(SEEDS)
    seeds = args.seeds or range(max(SEEDS.values()))
    jobs = [(name, seed) for seed in seeds for name in names if args.seeds or seed < SEEDS[name]]
    jobs = [job for job in jobs if not (run_folder(args.output, *job) / 'test.json').exists()]
    print(f'{len(jobs)} runs to do', flush=True)
    lock, failed = threading.Lock(), []

    def work() -> None:
        while True:
            with lock:
                if not jobs:
                    return
                name, seed = jobs.pop(0)
            try:
                one_run(args, name, seed)
            except subprocess.CalledProcessError:
                failed.append(str(run_folder(args.output, name, seed) / 'log.txt'))
                print(f'{name} seed {seed} failed, see {failed[-1]}', flush=True)
            else:
                print(f'{name} seed {seed} done, {len(jobs)} runs wait', flush=True)

    workers = [threading.Thread(target=work) for _ in range(args.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise SystemExit(f'{len(failed)} runs failed: ' + ', '.join(failed))


def run_folder(output: str, name: str, seed: int) -> Path:
    """Folder of one run."""
    return Path(output) / f'{name}-seed{seed}'


def commands(data: str, output: str, name: str, seed: int) -> Tuple[List[str], List[str]]:
    """The training and the evaluation command of one run."""
    folder = run_folder(output, name, seed)
    train = [sys.executable, str(ROOT / 'train_eed.py'), '--config', str(CONFIGS / f'{name}.yaml'), '--data', data,
             '--seed', str(seed), '--output', output, '--experiment', folder.name, '--resume', 'auto']
    test = [sys.executable, '-m', 'timm_eed.cli', 'validate', str(folder), '--split', 'test', '--device', 'cpu',
            '--workers', '0', '--json', str(folder / 'test.json')]
    return train, test


def one_run(args: argparse.Namespace, name: str, seed: int) -> None:
    """Train, then evaluate; what they print goes to log.txt in the run's folder."""
    folder = run_folder(args.output, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    with open(folder / 'log.txt', 'a', encoding='utf-8') as log:
        for command in commands(args.data, args.output, name, seed):
            subprocess.run(command, stdout=log, stderr=log, env=environment, check=True)


def collect(args: argparse.Namespace) -> None:
    """results.csv (test metrics by run and classifier) and curves.csv (epochs) of all finished runs. Rows of other runs
    stay: a study can be made in several places."""
    results: List[Row] = []
    curves: List[Row] = []
    for name in SEEDS:
        for folder in Path(args.output).glob(f'{name}-seed*'):
            if not (folder / 'test.json').exists():
                continue
            seed = folder.name.rsplit('seed', 1)[1]
            for classifier, row in json.loads((folder / 'test.json').read_text())['metrics'].items():
                results.append(dict(config=name, seed=seed, classifier=classifier,
                                    **{key: f'{value:.4f}' for key, value in row.items()}))
            for split, by_classifier in read_curves(str(folder)).items():
                for classifier, values in by_classifier.items():
                    curves += [dict(config=name, seed=seed, epoch=str(epoch), split=split, classifier=classifier,
                                    top1=f'{value:.2f}') for epoch, value in enumerate(values)]
    if not results:
        raise SystemExit(f'{args.output} has no finished runs; they come from: python benchmarks/study.py run')
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    update(folder / 'results.csv', results)
    update(folder / 'curves.csv', curves)


def update(path: Path, rows: List[Row]) -> None:
    """Put the rows of some runs into a file, in place of older ones of the same runs."""
    runs = {(row['config'], row['seed']) for row in rows}
    if path.exists():
        with open(path, newline='', encoding='utf-8') as file:
            rows = rows + [row for row in csv.DictReader(file) if (row['config'], row['seed']) not in runs]
    order = list(SEEDS)
    rows.sort(key=lambda row: (order.index(row['config']), int(row['seed'])))  # stable: epochs stay in order
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    print(f'{path}: {len(rows)} rows, {len(runs)} runs new or anew')


if __name__ == '__main__':
    main()
