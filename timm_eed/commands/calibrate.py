"""`timm-eed calibrate`: thresholds for early exit from labelled images."""
import argparse
import json
from typing import Any, List

from ..analysis import classifier_names
from ..calibration import Calibration, calibrate
from ..figures import TradeOff, trade_off_figure
from ..multi_exit import MultiExitWrapper
from ..policies import POLICIES
from .inputs import add_data_arguments, add_model_arguments, file_to_write, load_data, load_model

__all__ = ['add_parser']


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `timm-eed`."""
    parser = commands.add_parser('calibrate', help='thresholds for early exit', description=(
        'Choose the thresholds at which samples leave early: the cheapest that lose at most so much accuracy, or the '
        'most accurate that cost at most so much. Use images that the model was not trained on and that no result is '
        'reported on (--split).'))
    add_model_arguments(parser)
    add_data_arguments(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument('--max-accuracy-drop', type=float, metavar='POINTS',
                        help='percentage points that early exit may lose against the main network')
    target.add_argument('--max-gflops', type=float, metavar='N', help='GFLOPs per image that may be spent in the mean')
    parser.add_argument('--policy', default='confidence', choices=POLICIES, help='what is compared with the thresholds')
    parser.add_argument('--ensemble', action='store_true', help='the exits passed so far answer together')
    parser.add_argument('--no-temperature-scaling', action='store_true', help='leave the temperatures at 1')
    parser.add_argument('--no-switch-off', action='store_true', help='all exits stay on')
    parser.add_argument('--risk-control', action='store_true',
                        help='guarantee the accuracy drop for images to come (conformal risk control)')
    parser.add_argument('--json', type=file_to_write, metavar='FILE', help=(
        'write settings, figures and curve to a file, too; `timm-eed benchmark --settings FILE` reads it'))
    parser.add_argument('--figure', type=file_to_write, metavar='FILE', help='draw the curve (PNG, SVG or PDF)')
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.max_accuracy_drop is not None and not -100 < args.max_accuracy_drop < 100:
        raise ValueError(f'--max-accuracy-drop {args.max_accuracy_drop:g} must be percentage points, as in 0.5.')
    inputs = load_model(args)
    if not isinstance(inputs.model, MultiExitWrapper):
        raise ValueError(f"'{args.model}' has no exits, nothing can leave it early.")
    result = calibrate(
        inputs.model, load_data(args, inputs),
        max_accuracy_drop=None if args.max_accuracy_drop is None else args.max_accuracy_drop / 100,
        max_flops=None if args.max_gflops is None else args.max_gflops * 1e9,
        policy=args.policy, ensemble=args.ensemble, temperature_scaling=not args.no_temperature_scaling,
        switch_off=not args.no_switch_off, risk_control=args.risk_control)
    print(f'{inputs.title}, {result.images} images, policy {args.policy}\n')
    print('\n'.join(table(result)))
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as file:
            json.dump(dict(model=args.model, **result.to_dict()), file, indent=2)
    if args.figure:
        figure(result).savefig(args.figure)


def table(result: Calibration) -> List[str]:
    """The outcome as aligned text: a row per classifier, the figures, and the curve."""
    lines = [f"{'exit':<6}  {'threshold':>9}  {'temperature':>11}  {'leaving':>8}"]
    thresholds = [*('off' if t is None else f'{t:.4f}' for t in result.settings['thresholds']), '']
    for name, threshold, temperature, share in zip(
            classifier_names(len(thresholds)), thresholds, result.settings['temperatures'], result.exit_shares):
        lines.append(f'{name:<6}  {threshold:>9}  {temperature:11.3f}  {100 * share:6.1f} %')
    lines += ['', f"{'':<12}  {'top-1':>8}  {'GFLOPs':>9}  {'share':>7}"]
    for name, accuracy, gflops in (('early exit', result.accuracy, result.gflops),
                                   ('main network', result.main_accuracy, result.main_gflops)):
        lines.append(f'{name:<12}  {100 * accuracy:6.2f} %  {gflops:9.4f}  {100 * gflops / result.main_gflops:5.1f} %')
    which = 'other half of the images than chose' if result.guaranteed_drop is not None else 'images that chose'
    lines += ['', f'These figures are of the {which} the thresholds. {result.message}']
    if result.guaranteed_drop is not None:
        lines.append(f'Expected accuracy drop on images like these: at most {100 * result.guaranteed_drop:.2f} points.')
    step = max(1, len(result.curve) // 12)
    lines += ['', 'The curve:', f"{'GFLOPs':>9}  {'share':>7}  {'top-1':>8}"]
    lines += [f'{point.cost:9.4f}  {100 * point.cost / result.main_gflops:5.1f} %  {100 * point.accuracy:6.2f} %'
              for point in [*result.curve[:-1:step], result.curve[-1]]]
    return lines


def figure(result: Calibration) -> Any:
    """The curve, and the classifiers as the only one for all images."""
    kind = 'GFLOPs per image'
    rows = [TradeOff('early exit', 100 * point.accuracy, {kind: point.cost}) for point in result.curve]
    rows += [TradeOff(name, 100 * point.accuracy, {kind: point.cost})
             for name, point in zip(classifier_names(len(result.classifiers)), result.classifiers)]
    return trade_off_figure(rows)
