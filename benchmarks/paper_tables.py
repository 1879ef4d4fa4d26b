"""The rows of Tables I and II of 'Exit-Ensemble Distillation' as training configurations, and a page about them.

    python benchmarks/paper_tables.py --write    # hub_configs/cifar100_*.yaml, imagenet_*.yaml from the numbers here
    python benchmarks/paper_tables.py            # docs/paper.md from the configurations

A configuration's `paper:` holds the printed top-1 (%), one seed at its best test epoch; `results:` is for ours.
"""
import argparse
import glob
import os
from typing import Any, Dict, List, Tuple

import yaml

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
CONFIGS = os.path.join(ROOT, 'hub_configs')
TITLES = {
    'cifar_vgg19': 'VGG19', 'cifar_resnet18': 'ResNet-18', 'cifar_resnet50': 'ResNet-50',
    'cifar_resnet101': 'ResNet-101', 'cifar_resnet152': 'ResNet-152', 'cifar_resnext29_4x64d': 'ResNeXt29-4',
    'cifar_wide_resnet28_10': 'WideResNet28-10', 'cifar_pyramidnet110_a270': 'PyramidNet110-270',
    'resnet18': 'ResNet-18', 'resnet50': 'ResNet-50'}
LOSSES: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'none': ('no exits', dict(eed_method='none')),
    'ce': ('(2)', dict(eed_method='ce')),
    **{f'{method}_{output}{suffix}': (
        f'({equation}) {output.upper()}, beta = {beta}',
        dict(eed_method=method, eed_alpha=1., eed_beta=float(beta), eed_output_loss=output, eed_temperature=3.))
       for method, equation in (('kd', 4), ('eed', 8)) for suffix, beta in (('', 0), ('_features', 1))
       for output in ('kl', 'mse')}}

# Table I, CIFAR-100: exits and main network by loss, in the order of LOSSES
TABLE_1 = {
    'cifar_vgg19': '''73.27 | 68.29 71.46 74.81 74.60
        68.59 71.46 75.02 74.78 | 68.87 71.67 74.86 74.87 | 68.67 71.85 74.75 75.29 | 69.17 71.52 74.44 74.26
        68.80 72.31 75.89 75.98 | 69.87 72.81 76.22 76.02 | 69.38 72.28 75.68 75.69 | 70.11 72.70 75.89 75.79''',
    'cifar_resnet18': '''77.71 | 70.70 74.95 78.00 78.58
        71.96 75.51 77.72 78.02 | 73.27 77.17 78.30 78.31 | 72.45 75.31 77.92 78.29 | 73.38 76.37 78.03 78.07
        71.89 75.81 78.20 78.83 | 73.26 76.34 78.75 79.25 | 71.67 75.39 78.38 78.92 | 73.58 76.21 78.59 79.24''',
    'cifar_resnet50': '''78.27 | 71.09 75.35 80.08 80.11
        71.77 76.92 80.94 80.99 | 73.25 78.18 80.24 80.20 | 71.14 77.06 80.58 80.45 | 73.87 78.81 80.51 80.23
        72.28 77.42 81.28 81.34 | 74.27 78.51 81.10 81.26 | 71.56 76.92 81.34 81.35 | 73.89 78.66 81.71 82.01''',
    'cifar_resnet101': '''79.15 | 71.96 76.61 81.35 81.14
        72.01 77.06 81.19 81.01 | 72.10 78.23 80.34 80.18 | 71.33 76.70 80.83 80.94 | 72.56 78.28 80.29 80.27
        72.33 77.64 81.89 81.88 | 73.34 78.31 81.15 81.19 | 72.52 78.02 82.19 82.03 | 73.45 78.01 81.40 81.24''',
}
# Table II: (2), (4), (8) with KL and beta = 0
TABLE_2 = {
    'cifar_resnet152': '71.05 78.60 81.87 81.80 | 72.03 79.85 81.99 82.07 | 71.62 78.67 82.07 82.29',
    'cifar_resnext29_4x64d': '68.71 77.87 79.62 | 70.77 78.84 79.75 | 68.99 78.12 80.14',
    'cifar_wide_resnet28_10': '73.82 79.38 80.45 | 73.24 79.60 80.29 | 72.44 79.73 80.58',
    'cifar_pyramidnet110_a270': '76.04 81.77 82.95 | 77.16 82.29 82.93 | 76.13 82.20 83.36',
    'resnet18': '47.71 55.49 62.44 66.74 | 48.15 55.71 62.59 66.66 | 48.54 55.89 62.36 66.94',
    'resnet50': '51.36 62.73 73.03 74.31 | 51.86 63.13 73.30 74.24 | 52.33 63.02 73.09 74.46',
}
CIFAR = dict(
    num_classes=100, dataset='torch/cifar100', mean=[.5071, .4865, .4409], std=[.2673, .2564, .2762],
    epochs=200, batch_size=128, opt='momentum', lr=.1, momentum=.9, weight_decay=5e-4, sched='multistep',
    decay_milestones=[75, 130, 180], decay_rate=.1, warmup_epochs=0, smoothing=0., crop_padding=4, hflip=.5,
    color_jitter=0.)
# the paper does not give its ImageNet recipe: these are the settings usual for ResNets, over 90 epochs
IMAGENET = dict(
    epochs=90, batch_size=256, opt='momentum', lr=.1, momentum=.9, weight_decay=1e-4, sched='multistep',
    decay_milestones=[30, 60], decay_rate=.1, warmup_epochs=0, smoothing=0., color_jitter=0.)


def rows() -> List[Tuple[str, str, List[float]]]:
    """Network, loss and printed accuracies of every row."""
    found = []
    for table, losses in ((TABLE_1, list(LOSSES)), (TABLE_2, ['ce', 'kd_kl', 'eed_kl'])):
        for model, text in table.items():
            cells = [cell for line in text.splitlines() for cell in line.split('|')]
            assert len(cells) == len(losses), model
            found += [(model, loss, [float(v) for v in cell.split()]) for loss, cell in zip(losses, cells)]
    return found


def by_classifier(values: List[float]) -> Dict[str, float]:
    """exit1, .., main."""
    return {**{f'exit{i + 1}': value for i, value in enumerate(values[:-1])}, 'main': values[-1]}


def configuration(model: str, loss: str, values: List[float]) -> Tuple[str, str]:
    """File name and text of a row's configuration."""
    cifar = model in TABLE_1 or model.startswith('cifar_')
    name = f"{'cifar100' if cifar else 'imagenet'}_{model.removeprefix('cifar_')}_{loss}"
    flags = {**(CIFAR if cifar else IMAGENET), **LOSSES[loss][1]}
    if model == 'cifar_vgg19' and loss != 'none':
        flags['exit_kwargs'] = dict(last_stride=1)
    data = '--dataset-download' if cifar else '--data imagenet'
    lines = [f"# {TITLES[model]}, {'CIFAR-100' if cifar else 'ImageNet'}, {LOSSES[loss][0]}",
             f'#   python train_eed.py --config hub_configs/{name}.yaml {data}']
    body = yaml.safe_dump(dict(model=model, **flags), sort_keys=False, default_flow_style=None, width=110)
    sections = yaml.safe_dump(dict(paper=by_classifier(values), results={}), sort_keys=False, default_flow_style=None)
    return name, '\n'.join(lines) + '\n' + body + '\n' + sections


def write_configs() -> None:
    """A YAML per row."""
    for row in rows():
        name, text = configuration(*row)
        with open(os.path.join(CONFIGS, f'{name}.yaml'), 'w', encoding='utf-8') as file:
            file.write(text)


def page() -> str:
    """docs/paper.md, read from the configurations."""
    lines = [
        '# The paper, row by row', '',
        'Made by `python benchmarks/paper_tables.py` from `hub_configs/`. Printed: top-1 (%) of one seed at its best '
        'test epoch, exit 1 / .. / main. Ours: mean and std over n runs at the last epoch, once there are any (these '
        'runs need a GPU). A row is `python train_eed.py --config hub_configs/NAME.yaml --dataset-download`, or '
        '`--data imagenet`. The ImageNet recipe is not given in the paper; the usual one is taken.', '',
        '| configuration | network | loss | printed | ours |', '|---|---|---|---|---|']
    for path in sorted(glob.glob(os.path.join(CONFIGS, '*.yaml'))):
        with open(path, encoding='utf-8') as file:
            config = yaml.safe_load(file)
        if 'paper' not in config:
            continue
        name = os.path.basename(path)[:-len('.yaml')]
        loss = next(title for title, flags in LOSSES.values() if all(config.get(k) == v for k, v in flags.items()))
        printed = ' '.join(f'{value:.2f}' for value in config['paper'].values())
        ours = ', '.join(f"{metric} {value['mean']:.2f} ± {value.get('std', 0):.2f} (n = {value.get('n', 1)})"
                         for metric, value in config['results'].items())
        lines.append(f"| {name} | {TITLES[config['model']]} | {loss} | {printed} | {ours} |")
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Write the configurations or the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='write the configurations')
    if parser.parse_args().write:
        write_configs()
    with open(os.path.join(ROOT, 'docs', 'paper.md'), 'w', encoding='utf-8') as file:
        file.write(page())


if __name__ == '__main__':
    main()
