"""What commands read: a model by name or from a run, and images to run it on."""
import argparse
import json
import os
from typing import Any, Dict, NamedTuple, Optional, Tuple

import timm
import torch
from huggingface_hub.errors import HTTPError
from timm.data import resolve_data_config

from ..exits import TimmModel
from ..hub import Source, load_source
from ..hub_errors import why_not_loaded
from ..multi_exit import MultiExitWrapper, check_model_name, wrap
from ..training.data import create_evaluation_loader
from ..training.flags import add_exit_arguments, build_parser
from ..training.runs import load_run

__all__ = [
    'Inputs', 'add_data_arguments', 'add_model_arguments', 'file_to_write', 'load_data', 'load_model', 'load_settings',
    'positive',
]


class Inputs(NamedTuple):
    """A model, how its images are prepared, and the flags of the run that trained it (defaults without one)."""
    model: TimmModel
    data_config: Dict[str, Any]
    args: argparse.Namespace
    title: str


def positive(text: str) -> int:
    """Type of a flag: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number from 1.")
    return int(text)


def file_to_write(path: str) -> str:
    """Type of a flag: a file in a folder that exists, so that no work is lost at its end."""
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or '.'):
        raise argparse.ArgumentTypeError(f"'{path}' must be a file in a folder that exists.")
    return path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and the flags that belong to it."""
    parser.add_argument('model', metavar='MODEL', help=(
        'folder of a run, a checkpoint in it, a timm model, or a saved model: its folder, or hf-hub:user/name'))
    parser.add_argument('--checkpoint', default='last', metavar='WHICH',
                        help='checkpoint of a run: last, best or a file name (default: last)')
    parser.add_argument('--no-ema', action='store_true', help='not the moving average, where the run kept one')
    parser.add_argument('--pretrained', action='store_true', help="a timm model's pretrained weights (exits are fresh)")
    parser.add_argument('--num-classes', type=int, metavar='N', help="classes of a timm model; its own if not given")
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='device')
    add_exit_arguments(parser.add_argument)
    parser.set_defaults(exit_type=None)  # a saved model has its own


def add_data_arguments(parser: argparse.ArgumentParser, positional: bool = True) -> None:
    """DATA (or --data) and the flags that belong to it."""
    name: Dict[str, Any] = dict(nargs='?') if positional else {}
    parser.add_argument('data' if positional else '--data', metavar='DATA', **name,
                        help="data folder; the run's own data if not given")
    parser.add_argument('--dataset', metavar='NAME', help='type/name of a data set, as in training')
    parser.add_argument('--dataset-download', action='store_true', help='download data sets that support it')
    parser.add_argument('--split', metavar='NAME', help="split to read; the run's validation split if not given")
    parser.add_argument('-b', '--batch-size', type=positive, default=128, metavar='N', help='images per batch')
    parser.add_argument('-j', '--workers', type=int, default=2, metavar='N', help='data loading processes')


def load_model(args: argparse.Namespace) -> Inputs:
    """The model that the flags of `add_model_arguments` name, in evaluation mode on its device.

    Raises:
        ValueError: If there is no such run, checkpoint or model, or a flag has no meaning for it.
    """
    _check_device(args.device)
    saved = os.path.isfile(os.path.join(args.model, 'eed', 'config.json'))
    if os.path.exists(args.model) and not saved:
        _refuse(args, 'a run', 'exit_indices', 'exit_type', 'exit_kwargs', 'pretrained', 'num_classes')
        run = load_run(args.model, args.checkpoint, ema=not args.no_ema)
        kind = ' (moving average)' if run.ema else ''
        title = f'{args.model}: {run.args.model} after {run.epoch} epochs{kind}'
        return Inputs(run.model.to(args.device), run.data_config, run.args, title)
    name = f'local-dir:{args.model}' if saved else args.model
    if os.sep in name and ':' not in name:
        raise ValueError(
            f"there is no run and no checkpoint '{name}'; a model of the Hub is called 'hf-hub:{name}'.")
    flags = build_parser().parse_args([])
    if ':' in name:
        model, title = _load_saved(args, name)
        flags.label_names = model.pretrained_cfg.get('label_names')
    else:
        model, title = _load_timm(args, name)
    return Inputs(model.eval().to(args.device), resolve_data_config({}, model=model), flags, title)


def _load_saved(args: argparse.Namespace, name: str) -> Tuple[MultiExitWrapper, str]:
    _refuse(args, 'a saved model', 'exit_kwargs', 'pretrained', 'checkpoint', 'no_ema')
    try:
        source = Source(name)
    except ConnectionError as error:
        raise ValueError(error) from error
    title = name.partition(':')[2]
    if source.has_exits:
        _refuse(args, 'a saved model with trained exits', 'exit_indices', 'exit_type', 'num_classes')
        return load_source(source), title
    model = load_source(source, args.exit_indices, args.exit_type, **_num_classes(args))
    return model, f'{title} ({_fresh(model)} untrained)'


def _load_timm(args: argparse.Namespace, name: str) -> Tuple[MultiExitWrapper, str]:
    check_model_name(name)
    _refuse(args, 'a timm model', 'checkpoint', 'no_ema')
    try:
        backbone = timm.create_model(name, pretrained=args.pretrained, **_num_classes(args))
    except (HTTPError, OSError, RuntimeError) as error:
        raise ValueError(f"cannot make '{name}': {why_not_loaded(error, name)}") from error
    model = wrap(backbone, args.exit_indices, args.exit_type or 'conv', **args.exit_kwargs)
    return model, f'{name} (pretrained, {_fresh(model)} untrained)' if args.pretrained else f'{name} (untrained)'


def _num_classes(args: argparse.Namespace) -> Dict[str, Any]:
    return {} if args.num_classes is None else dict(num_classes=args.num_classes)


def _fresh(model: MultiExitWrapper) -> str:
    """What is untrained where the backbone's weights were loaded: a classifier for other classes is, too."""
    return 'exits' if model.num_classes == model.pretrained_cfg.get('num_classes') else 'all classifiers'


def _refuse(args: argparse.Namespace, kind: str, *names: str) -> None:
    """Raise a ValueError if a flag is given that would be ignored."""
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    for name in names:
        if vars(args).get(name, parser.get_default(name)) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for '{args.model}', which is {kind}.")


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use --device '{name}': {str(error).splitlines()[0]}") from error


def load_settings(path: str) -> Dict[str, Any]:
    """Arguments of `EarlyExit` from a file of `timm-eed calibrate --json`.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        with open(path, encoding='utf-8') as file:
            return dict(json.load(file)['settings'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is no file of `timm-eed calibrate --json`: {error}") from error


def load_data(args: argparse.Namespace, inputs: Inputs, images: Optional[int] = None) -> Any:
    """A loader of the images that the flags of `add_data_arguments` name, prepared for the model.

    Args:
        args: The flags.
        inputs: The model.
        images: Only so many, from all over the data and in random order (of streamed data the first ones); all if None.

    Raises:
        ValueError: If the data is missing or does not fit the model.
    """
    flags = argparse.Namespace(**vars(inputs.args))
    if args.data or args.dataset:
        flags.data_dir, flags.dataset = args.data, args.dataset or ''
    flags.dataset_download = args.dataset_download
    flags.batch_size = flags.validation_batch_size = args.batch_size
    flags.workers = args.workers
    flags.distributed, flags.img_dtype, flags.primary = False, torch.float32, True
    split = args.split or flags.val_split
    return create_evaluation_loader(
        flags, split, inputs.data_config, inputs.model.num_classes, torch.device(args.device), images)
