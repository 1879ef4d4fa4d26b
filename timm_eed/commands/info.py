"""`timm-eed info`: the exits a model would get, and what each costs."""
import argparse
import os
from typing import Any, Callable, Tuple

import timm
import torch
from huggingface_hub.errors import HTTPError

from ..exits import TimmModel
from ..hub_errors import first_line, why_not_loaded
from ..multi_exit import MultiExitWrapper, check_model_name, wrap
from ..probe import input_size
from ..profiling import profile
from ..training.flags import add_exit_arguments
from .inputs import positive

__all__ = ['add_parser']


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `timm-eed`."""
    parser = commands.add_parser('info', help='the exits a model would get', description=(
        'Show the exits that a timm model would get and what each costs; no weights are made or loaded. '
        'GFLOPs count 2 per multiply-add of convolutions, linear layers and attention products.'))
    parser.add_argument('model', metavar='MODEL', help='timm model, or a pattern as in "convnext*" for a line each')
    add_exit_arguments(parser.add_argument)
    parser.add_argument('--num-classes', type=positive, metavar='N', help="classes; the model's own if not given")
    parser.add_argument('--img-size', type=positive, metavar='N', help="image size; the model's own if not given")
    parser.add_argument('--norms', action='store_true', help="count normalisation too, as the paper's Table III does")
    parser.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> None:
    if not any(c in args.model for c in '*?['):
        if os.path.exists(args.model.removeprefix('local-dir:')):
            raise ValueError(f"info shows the exits that a timm model would get; timm-eed benchmark '{args.model}' "
                             'shows those that a run or saved model has.')
        check_model_name(args.model)
        return print(_shown(args.model, args, _table))
    names = timm.list_models(args.model)
    if not names:
        raise ValueError(f"no timm model matches '{args.model}'; timm-eed info \"resnet*\" shows a pattern.")
    width = max(map(len, names))
    print(f"{'model':<{width}}  {'input':>11}  {'GFLOPs':>8}  {'params':>9}  exits and their share of the GFLOPs")
    for name in names:
        try:
            print(f'{name:<{width}}  {_shown(name, args, _line)}')
        except ValueError as error:
            print(f'{name:<{width}}  {error}')


def _shown(name: str, args: argparse.Namespace, show: Callable[..., str]) -> str:
    try:
        model, size = _model_without_weights(name, args)
        return show(name, model, size, args.norms)
    except (RuntimeError, AssertionError) as error:
        images = f' with images of {args.img_size} x {args.img_size}' if args.img_size else ''
        raise ValueError(f"'{name}' does not run{images} ({first_line(error)}).") from error


def _model_without_weights(name: str, args: argparse.Namespace) -> Tuple[MultiExitWrapper, Tuple[int, int, int]]:
    """A multi-exit model on the meta device, and its input size [C, H, W]."""
    kwargs = {} if args.num_classes is None else dict(num_classes=args.num_classes)
    with torch.device('meta'):
        try:
            backbone: TimmModel = timm.create_model(name, **kwargs)
        except (HTTPError, OSError) as error:
            raise ValueError(f"cannot make '{name}': {why_not_loaded(error, name)}") from error
        if args.img_size and backbone.pretrained_cfg.get('fixed_input_size'):
            backbone = timm.create_model(name, img_size=args.img_size, **kwargs)
    channels, height, width = input_size(backbone)
    size = (channels, args.img_size or height, args.img_size or width)
    return wrap(backbone, args.exit_indices, args.exit_type, **args.exit_kwargs).eval(), size


def _table(name: str, model: MultiExitWrapper, size: Tuple[int, int, int], norms: bool) -> str:
    with torch.no_grad():
        maps = model.backbone.forward_intermediates(
            torch.empty(1, *size, device='meta'), indices=model.exit_indices, output_fmt='NCHW',
            intermediates_only=True)
    rows = profile(model, size, norms)
    infos = model.exit_info()
    width = max(len(info.module) for info in infos)
    lines = [f"{name}, input {'x'.join(map(str, size))}, {model.num_classes} classes, {model.exit_type} exits", '',
             f"{'exit':<6}  {'module':<{width}}  {'depth':>6}  {'channels':>8}  {'map':>9}  {'GFLOPs':>9}  {'share':>7}"
             f"  {'params':>10}"]
    for row, info, stage_map in zip(rows, infos, maps):
        side = 'x'.join(map(str, stage_map.shape[2:]))
        lines.append(f'{row.exit:<6}  {info.module:<{width}}  {100 * info.depth:4.0f} %  {info.channels:8d}  {side:>9}'
                     f'  {row.gflops:9.3f}  {100 * row.gflops / rows[-1].gflops:5.1f} %  {row.params / 1e6:8.2f} M')
    main_row = rows[-1]
    lines.append(f"{'main':<6}  {'':<{width}}  {100:4.0f} %  {'':>8}  {'':>9}  {main_row.gflops:9.3f}  {100:5.1f} %  "
                 f'{main_row.params / 1e6:8.2f} M')
    return '\n'.join(lines)


def _line(_: str, model: MultiExitWrapper, size: Tuple[int, int, int], norms: bool) -> str:
    rows = profile(model, size, norms)
    main_row = rows[-1]
    exits = '  '.join(f'{info.module} {100 * row.gflops / main_row.gflops:.0f} %'
                      for row, info in zip(rows, model.exit_info()))
    return (f"{'x'.join(map(str, size)):>11}  {main_row.gflops:8.2f}  {main_row.params / 1e6:7.2f} M  {exits}")
