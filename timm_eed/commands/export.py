"""`timm-eed export`: main network, all exits or one exit as ONNX or `torch.export` program."""
import argparse
import os
from typing import Any

import torch

from ..analysis import classifier_names
from ..export import export_onnx, export_program, truncate
from ..multi_exit import MultiExitWrapper
from .inputs import add_model_arguments, file_to_write, load_model

__all__ = ['add_parser']

_FORMATS = {'.onnx': 'ONNX', '.pt2': 'torch.export'}


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `timm-eed`."""
    parser = commands.add_parser('export', help='ONNX or torch.export of the network or of an exit', description=(
        'Write the main network, all classifiers, or the part of the network that one exit needs, for batches of any '
        'size: ONNX (needs the extra "export") or a program of torch.export.'))
    add_model_arguments(parser)
    parser.add_argument('--output', required=True, type=file_to_write, metavar='FILE',
                        help='file to write: *.onnx or *.pt2')
    parser.add_argument('--exit', default='main', metavar='WHO',
                        help='main, exit1, exit2, .. (the network cut behind it), or all (one output each)')
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    suffix = os.path.splitext(args.output)[1]
    if suffix not in _FORMATS:
        raise ValueError(f"'{args.output}' must end in .onnx or .pt2 (torch.export).")
    inputs = load_model(args)
    model, size = inputs.model, tuple(inputs.data_config['input_size'])
    if isinstance(model, MultiExitWrapper):
        names = classifier_names(model.num_exits)
        if args.exit not in (*names, 'all'):
            raise ValueError(f"no exit '{args.exit}'; choose {', '.join(names)} or all.")
        if args.exit != 'all':
            model = truncate(model, names.index(args.exit))
    elif args.exit != 'main':
        raise ValueError(f"'{args.model}' has no exits; only --exit main can be exported.")
    if suffix == '.onnx':
        try:
            outputs = export_onnx(model, args.output, size, all_exits=args.exit == 'all')
        except ImportError as error:
            raise ValueError(error) from error
        told = f'outputs {", ".join(outputs)}'
    else:
        torch.export.save(export_program(model, size, all_exits=args.exit == 'all'), args.output)
        told = 'torch.export.load() reads it'
    shape = 'x'.join(map(str, size))
    print(f'{args.output}: {args.exit} of {inputs.title}, images {shape}, any batch; {told}')
