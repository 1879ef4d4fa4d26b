"""`timm-eed validate`: accuracy and calibration of every classifier and of ensembles."""
import argparse
import json
from typing import Any, Dict, List, Sequence

from ..analysis import METRIC_TITLES, collect, score, score_classifiers, subset_logits
from ..losses import ExitEnsembleDistillationLoss
from ..training.arguments import parse_teacher
from .inputs import add_data_arguments, add_model_arguments, file_to_write, load_data, load_model

__all__ = ['add_parser', 'validate']


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `timm-eed`."""
    parser = commands.add_parser('validate', help='accuracy of every exit and ensemble', description=(
        'Accuracy and calibration of every exit, the main network, the ensemble of all (mean of logits), '
        'and of any ensembles asked for.'))
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument('--subset', action='append', default=[], metavar='WHO',
                        help='an ensemble to add, as in exit2+main; can be repeated')
    parser.add_argument('--json', type=file_to_write, metavar='FILE', help='write the metrics to a file, too')
    parser.set_defaults(run=_run)


def validate(model: Any, loader: Any, subsets: Sequence[str] = ()) -> Dict[str, Dict[str, float]]:
    """Metrics by classifier: exit1, .., main, ensemble, and each subset as in 'exit2+main'.

    Raises:
        ValueError: If a subset names a classifier that the model has not.
    """
    num_exits = getattr(model, 'num_exits', 1)
    members = {name: _members(name, num_exits) for name in subsets}
    logits, targets, _ = collect(model, loader)
    metrics = score_classifiers(logits, targets)
    for name, indices in members.items():
        metrics[name] = score(subset_logits(logits, indices), targets)
    return metrics


def _members(name: str, num_exits: int) -> List[int]:
    teacher = parse_teacher(name)
    return ExitEnsembleDistillationLoss(teacher=teacher).teacher_indices(num_exits)


def _run(args: argparse.Namespace) -> None:
    inputs = load_model(args)
    loader = load_data(args, inputs)
    metrics = validate(inputs.model, loader, args.subset)
    images = len(loader.dataset)
    print(f'{inputs.title}, {images} images\n')
    print(table(metrics))
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as file:
            json.dump(dict(model=args.model, images=images, metrics=metrics), file, indent=2)


def table(metrics: Dict[str, Dict[str, float]]) -> str:
    """Metrics as aligned text, a row per classifier."""
    width = max(8, *map(len, metrics))
    percents = [key for key in next(iter(metrics.values())) if key != 'loss']
    lines = ['  '.join([f"{'exit':<{width}}", *(f'{METRIC_TITLES[key]:>8}' for key in percents), f"{'loss':>8}"])]
    lines += ['  '.join([f'{name:<{width}}', *(f'{row[key]:6.2f} %' for key in percents), f"{row['loss']:8.4f}"])
              for name, row in metrics.items()]
    return '\n'.join(lines)
