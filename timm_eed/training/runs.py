"""Runs on disk: what train_eed.py left in a folder, read back."""
import argparse
import json
import os
from typing import Any, Dict, List, NamedTuple, Optional

from timm.data import resolve_data_config
from timm.models import clean_state_dict

from ..exits import TimmModel
from .build import make_model
from .checkpoint import first_lines, load_checkpoint
from .config import apply_config
from .errors import TrainingError
from .flags import build_parser

__all__ = ['CLASSES', 'Run', 'load_run', 'read_arguments']

CLASSES = 'classes.json'  # names of a run's classes in index order, where its data has names
_CHECKPOINTS = {'last': 'last.pth.tar', 'best': 'model_best.pth.tar'}


class Run(NamedTuple):
    """A trained model and what made it.

    model: The model, in evaluation mode, on the CPU. args: All flags of the run, and `class_names` of its data in
    index order, None where they are not known. data_config: Input size, mean, std, ..
    epoch: Number of epochs trained. ema: Whether the weights are the moving average.
    """
    model: TimmModel
    args: argparse.Namespace
    data_config: Dict[str, Any]
    epoch: int
    ema: bool


def read_arguments(run_dir: str) -> argparse.Namespace:
    """All flags of a run, from its args.yaml, with today's defaults for flags it does not know.

    Raises:
        TrainingError: If the folder is not one of a run.
    """
    path = os.path.join(run_dir, 'args.yaml')
    if not os.path.isfile(path):
        raise TrainingError(f"'{run_dir}' is no run of train_eed.py: it has no args.yaml.")
    parser = build_parser()
    apply_config(parser, path)
    return parser.parse_args([])


def load_run(path: str, checkpoint: str = 'last', ema: bool = True) -> Run:
    """The model of a run.

    Args:
        path: The run's folder, or one of the checkpoint files in it.
        checkpoint: 'last', 'best' (by the run's --eval-metric), or a file name in the folder.
        ema: Take the moving average of the weights where the run kept one.

    Raises:
        TrainingError: If there is no such run or checkpoint, or the weights do not fit.
    """
    run_dir, file = (path, _CHECKPOINTS.get(checkpoint, checkpoint)) if os.path.isdir(path) else os.path.split(path)
    args = read_arguments(run_dir)
    args.pretrained, args.initial_checkpoint = False, ''  # the checkpoint has all weights
    args.class_names = _class_names(os.path.join(run_dir, CLASSES))
    file = os.path.join(run_dir, file)
    if not os.path.isfile(file):
        raise TrainingError(f"The run has no checkpoint '{file}' (yet).")
    saved = load_checkpoint(file)
    use_ema = ema and 'state_dict_ema' in saved
    model = make_model(args)
    state = clean_state_dict(saved['state_dict_ema' if use_ema else 'state_dict'])
    if args.split_bn:  # the further statistics are those of augmented images, which evaluation has not
        state = {name: tensor for name, tensor in state.items() if '.aux_bn.' not in name}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise TrainingError(
            f"The weights in '{file}' do not fit the flags in args.yaml: {first_lines(error)}") from error
    model.eval()
    return Run(model, args, resolve_data_config(vars(args), model=model), saved['epoch'] + 1, use_ema)


def _class_names(path: str) -> Optional[List[str]]:
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding='utf-8') as file:
            names = json.load(file)
    except ValueError as error:
        raise TrainingError(f"'{path}' is damaged, remove it: {error}") from error
    return [str(name) for name in names]
