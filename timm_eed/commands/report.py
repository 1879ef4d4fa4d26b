"""`timm-eed report`: pictures and tables of trained runs, in one HTML file."""
import argparse
import base64
import html
import io
import os
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch

from ..analysis import (
    Predictions,
    class_contrast,
    collect,
    dissimilarity,
    right_wrong_counts,
    score_classifiers,
)
from ..curves import Group, group_runs, measured_epochs
from ..figures import SPLITS, curves_figure, dissimilarity_figure, right_wrong_figure
from ..model_card import accuracy_figure, exit_results
from ..multi_exit import MultiExitWrapper, classifier_names
from .inputs import Inputs, add_data_arguments, load_data, load_model

__all__ = ['add_parser']

_STYLE = '''body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:1rem auto;padding:0 1rem;color:#222}
img{max-width:100%;height:auto}table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
p{color:#555}h2{margin-top:2rem}'''


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `timm-eed`."""
    parser = commands.add_parser('report', help='figures and tables of runs, as one HTML file', description=(
        'Accuracy over epochs of all runs (seeds of one kind as a band); of the first run also accuracy by GFLOPs, '
        'right and wrong counts and dissimilarity matrices, for which its images are read.'))
    parser.add_argument('runs', nargs='+', metavar='RUN_DIR', help='folders of runs')
    parser.add_argument('--output', default='report', metavar='DIR', help='folder of report.html and the PNGs')
    parser.add_argument('--checkpoint', default='last', metavar='WHICH', help='last, best or a file name')
    parser.add_argument('--curves-only', action='store_true', help='only what needs no images')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='device')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='seed of the images and classes drawn')
    add_data_arguments(parser, positional=False)
    parser.set_defaults(run=_run, no_ema=False)


def _run(args: argparse.Namespace) -> None:
    groups = group_runs(args.runs)
    if args.curves_only:
        write_report(args.output, curve_parts(groups), f'{len(args.runs)} runs')
        return
    args.model = args.runs[0]
    inputs = load_model(args)
    if not isinstance(inputs.model, MultiExitWrapper):
        raise ValueError(f"'{args.model}' has no exits; put a run with exits first, or add --curves-only.")
    predictions = collect(inputs.model, load_data(args, inputs))
    parts = curve_parts(groups) + model_parts(inputs, predictions, args.seed)
    write_report(args.output, parts, inputs.title)


Part = Tuple[str, str, Any]  # heading, text under it, a figure or the rows of a table


def curve_parts(groups: List[Group]) -> List[Part]:
    """Accuracy over epochs, and at the last one that all runs of a kind have measured."""
    rows: List[List[str]] = []
    split = 'eval' if any(group.curves['eval'] for group in groups) else 'train'
    for group in groups:
        for name, values in group.curves[split].items():
            epochs = measured_epochs(values)
            if not len(epochs):
                continue
            last = values[:, epochs[-1]]
            std = f'{last.std(ddof=1):.2f}' if len(last) > 1 else ''
            rows.append([f'{group.label}, {name}', str(epochs[-1] + 1), f'{last.mean():.2f}', std, str(len(last))])
    return [
        ('Accuracy over epochs', 'Bands: one standard deviation over runs.', curves_figure(groups)),
        ('Last epoch', f'Accuracy on the {SPLITS[split]}.', [['', 'epoch', 'top-1 (%)', 'std', 'n'], *rows]),
    ]


def model_parts(inputs: Inputs, predictions: Predictions, seed: int) -> List[Part]:
    """What the images show about one model."""
    logits, targets, _ = predictions
    scores = score_classifiers(logits, targets)
    metrics = {('top1' if name == 'main' else f'top1_{name}'): row['top1'] for name, row in scores.items()}
    rows = [[name, *(f'{row[key]:.2f}' for key in ('top1', 'top5', 'ece')), f"{row['loss']:.4f}"]
            for name, row in scores.items()]
    picture = io.BytesIO()
    accuracy_figure(exit_results(inputs.model, metrics, inputs.data_config['input_size']), picture)
    matrices, contrasts = _dissimilarities(predictions, seed)
    return [
        ('Classifiers', f'{len(targets)} images.', [['', 'top-1 (%)', 'top-5 (%)', 'ECE (%)', 'loss'], *rows]),
        ('Accuracy against GFLOPs', '', picture.getvalue()),
        ('Right and wrong', 'Images by the main network against each exit.',
         right_wrong_figure(right_wrong_counts(logits, targets).numpy(), classifier_names(len(logits))[:-1])),
        ('Dissimilarity of images', 'Before and after the fully connected layer of the main network, sorted by class; '
         'class contrast: mean dissimilarity between classes minus within.', dissimilarity_figure(matrices, contrasts)),
    ]


def _dissimilarities(predictions: Predictions, seed: int) -> Tuple[Dict[str, Any], Dict[str, float]]:
    """Fig. 4: 500 images of all classes, and where there are more than 10 classes images of 10, both at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(predictions.targets), generator=generator)
    classes = predictions.targets.unique()
    chosen = classes[torch.randperm(len(classes), generator=generator)[:10]]
    selections = {f'{min(500, len(order))} images': order[:500]}
    if len(classes) > len(chosen):
        selections[f'{len(chosen)} classes'] = order[torch.isin(predictions.targets[order], chosen)][:500]
    matrices, contrasts = {}, {}
    for title, index in selections.items():
        index = index[predictions.targets[index].argsort(stable=True)]
        for place, activations in (('before', predictions.features), ('after', predictions.logits[-1])):
            matrix = dissimilarity(activations[index])
            name = f'{title}, {place}'
            if len(predictions.targets[index].unique()) not in (1, len(index)):
                contrasts[name] = class_contrast(matrix, predictions.targets[index])
            matrices[name] = matrix.numpy()
    return matrices, contrasts


def write_report(output: str, parts: List[Part], title: str) -> None:
    """report.html with everything in it, and the pictures as PNG files beside it."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    body = [f'<h1>{html.escape(title)}</h1>']
    for heading, text, content in parts:
        body += [f'<h2>{html.escape(heading)}</h2>', f'<p>{html.escape(text)}</p>' if text else '']
        if isinstance(content, list):
            body.append(_html_table(content))
            continue
        data = content if isinstance(content, bytes) else _png(content)
        name = heading.lower().replace(' ', '_') + '.png'
        (folder / name).write_bytes(data)
        body.append(f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">')
    page = ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f'<title>{html.escape(title)}</title><style>{_STYLE}</style><body>' + '\n'.join(body) + '</body></html>\n')
    (folder / 'report.html').write_text(page, encoding='utf-8')
    print(f"wrote {os.path.join(output, 'report.html')} and {sum(not isinstance(p[2], list) for p in parts)} pictures")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', metadata={'Software': None})
    return buffer.getvalue()


def _html_table(rows: List[List[str]]) -> str:
    cells = [''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)
             for tag, row in zip(['th'] + ['td'] * len(rows), rows)]
    return '<table>' + ''.join(f'<tr>{row}</tr>' for row in cells) + '</table>'
