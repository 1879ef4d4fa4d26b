"""From a run's folder to the Hub: weights, metrics and recipe are read from the run, the rest of the card is passed."""
import argparse
import csv
import inspect
import logging
import math
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Union

import timm
import yaml
from huggingface_hub import CommitInfo, ModelCard

from ..hub import check_repo_id, push_folder
from ..model_card import make_model_card, write_model_card
from ..multi_exit import MultiExitWrapper
from .config import apply_config
from .errors import TrainingError
from .flags import build_parser
from .runs import Run, load_run, read_arguments

__all__ = ['Sections', 'publish_run', 'read_sections', 'recipe', 'write_run']

_logger = logging.getLogger(__name__)

# flags about this machine and this session, which say nothing about the model
_NOT_RECIPE = {
    'config', 'data', 'data_dir', 'dataset_download', 'class_map', 'workers', 'pin_mem', 'no_prefetcher',
    'use_multi_epochs_loader', 'device', 'local_rank', 'no_ddp_bb', 'synchronize_step', 'torchcompile',
    'torchcompile_mode', 'channels_last', 'pretrained_path', 'initial_checkpoint', 'output', 'experiment', 'resume',
    'no_resume_opt', 'log_interval', 'recovery_interval', 'checkpoint_hist', 'log_wandb', 'wandb_project', 'wandb_tags',
    'wandb_resume_id', 'push_to_hub', 'validation_batch_size', 'model_ema_force_cpu',
}


# flags that a recipe tells also where they have their defaults
_ALWAYS = {
    'model', 'epochs', 'batch_size', 'opt', 'eed_method', 'eed_alpha', 'eed_beta', 'eed_output_loss', 'eed_temperature'}


class Sections(NamedTuple):
    """What a config file holds besides flags.

    results: `mean`, `std`, `n` over several runs, by metric. card: arguments of `make_model_card`.
    """
    results: Dict[str, Dict[str, float]]
    card: Dict[str, Any]


def read_sections(path: str) -> Sections:
    """The sections `results:` and `card:` of a config file, both optional.

    Raises:
        TrainingError: If the file cannot be read, or a section is not what it should be.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"cannot read '{path}': {error}") from error
    if not isinstance(content, dict):
        raise TrainingError(f"'{path}' must be a mapping of flags to values, with sections results and card.")
    names = ('results', 'card')
    sections = [content.get(name) or {} for name in names]
    for name, section in zip(names, sections):
        if not isinstance(section, dict):
            raise TrainingError(f"{path}: the section '{name}' must be a mapping.")
    results, card = sections
    known = set(inspect.signature(make_model_card).parameters) - {
        'model', 'repo_id', 'metrics', 'data_config', 'recipe', 'results', 'figure', 'rows'}
    for key in set(card) - known:
        raise TrainingError(f"{path}: card: unknown key '{key}'; choose from {', '.join(sorted(known))}.")
    return Sections({str(name): _result(path, name, value) for name, value in results.items()}, card)


def _result(path: str, name: Any, value: Any) -> Dict[str, float]:
    if not re.fullmatch(r'(top1|map)(_exit\d+|_ensemble)?', str(name)):
        raise TrainingError(f"{path}: results: '{name}' is no metric; choose top1, top1_exit1, .., top1_ensemble.")
    value = value if isinstance(value, dict) else {'mean': value}
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value.values())
    if not numbers or 'mean' not in value or not set(value) <= {'mean', 'std', 'n'}:
        raise TrainingError(f'{path}: results: {name} must be a number, or a mapping of mean, std and n.')
    return value


def publish_run(
        run_path: str,
        repo_id: str,
        sections: Optional[Sections] = None,
        config_path: str = '',
        early_exit: Optional[Dict[str, Any]] = None,
        **push_kwargs: Any,
) -> CommitInfo:
    """Publish the model of a run; see `write_run` for what, `timm_eed.hub.push_folder` for how.

    Args:
        run_path: Folder of the run (its last checkpoint is taken), or a checkpoint in it.
        repo_id: Repo as 'user/name'.
        sections: Results and card data from a config file.
        config_path: That file, for messages.
        early_exit: Settings that the model is to carry, arguments of `EarlyExit`.
        push_kwargs: Arguments of `push_folder`.

    Raises:
        ValueError: If there is no such run, it has no exits, or the Hub does not accept it.
        ConnectionError: If the Hub cannot be reached.
    """
    with TemporaryDirectory() as folder:
        write_run(run_path, repo_id, folder, sections, config_path, early_exit)
        return push_folder(folder, repo_id, **push_kwargs)


def write_run(
        run_path: str,
        repo_id: str,
        folder: Union[str, Path],
        sections: Optional[Sections] = None,
        config_path: str = '',
        early_exit: Optional[Dict[str, Any]] = None,
) -> ModelCard:
    """Write the model of a run into a folder as it is published, and return its card.

    The moving average of the weights is taken where the run kept one. Metrics are those of the checkpoint's epoch in
    summary.csv, the recipe is what args.yaml says.

    Args:
        run_path, repo_id, sections, config_path, early_exit: See `publish_run`.
        folder: The folder, made if it does not exist.

    Raises:
        ValueError: If there is no such run, it has no exits, or the repo's name is none.
    """
    check_repo_id(repo_id)
    run = load_run(run_path)
    if not isinstance(run.model, MultiExitWrapper):
        raise TrainingError(
            f"'{run_path}' trained without exits (--eed-method none); timm.models.push_to_hf_hub publishes its model.")
    run_dir = run_path if os.path.isdir(run_path) else os.path.dirname(run_path)
    args = read_arguments(run_dir)  # a loaded run no longer knows what it started from
    sections = sections or Sections({}, {})
    card = {**_from_arguments(args), **sections.card}
    metrics = _metrics(run, run_path, run_dir)
    _compare(args, config_path)
    run.model.early_exit_config = early_exit
    # the architecture's default entry tells of timm's weights, not of these
    own: Dict[str, Any] = dict(pretrained_cfg=dict(license=card.get('license'), tag=None))
    if run.args.class_names and len(run.args.class_names) == run.model.num_classes:
        own['label_names'] = run.args.class_names
    run.model.save_pretrained(folder, metrics=metrics, data_config=run.data_config, model_config=own)
    return write_model_card(
        folder, run.model, repo_id, metrics=metrics, data_config=run.data_config, recipe=recipe(args),
        results=sections.results or None, **card)


def _from_arguments(args: argparse.Namespace) -> Dict[str, Any]:
    name = args.dataset or os.path.basename(os.path.normpath(args.data_dir or ''))
    card = dict(dataset_name=name or None, dataset_split=args.val_split)
    if args.pretrained and not args.pretrained_path:
        source, _, repo = args.model.rpartition(':')
        cfg = None if source else timm.get_pretrained_cfg(args.model)
        card['base_model'] = repo.partition('@')[0] if source.startswith('hf') else cfg and cfg.hf_hub_id
    return card


def _metrics(run: Run, run_path: str, run_dir: str) -> Dict[str, float]:
    """What the run measured on these weights; nothing where it measured others or none."""
    if run.ema and run.args.model_ema_force_cpu:
        _logger.warning('The run did not evaluate its moving average (--model-ema-force-cpu), no metrics are claimed.')
        return {}
    if os.path.basename(run_path).startswith('recovery'):
        _logger.warning('The checkpoint is one from within an epoch, no metrics are claimed.')
        return {}
    try:
        with open(os.path.join(run_dir, 'summary.csv'), newline='', encoding='utf-8') as file:
            rows: List[Mapping[str, str]] = [row for row in csv.DictReader(file) if row['epoch'] == str(run.epoch - 1)]
    except (OSError, KeyError):
        rows = []
    prefix = 'eval_'
    metrics = {name[len(prefix):]: float(value) for row in rows[-1:] for name, value in row.items()
               if name.startswith(prefix) and value and math.isfinite(float(value))}
    if not metrics:
        _logger.warning(f'The run did not evaluate epoch {run.epoch - 1}, no metrics are claimed.')
    return metrics


def recipe(args: argparse.Namespace) -> Dict[str, Any]:
    """The flags of a run that differ from their defaults, and the most important ones; none about its machine."""
    defaults = vars(build_parser().parse_args([]))
    return {name: value for name, value in vars(args).items()
            if name in _ALWAYS or (name in defaults and name not in _NOT_RECIPE and value != defaults[name])}


def _compare(args: argparse.Namespace, config_path: str) -> None:
    if not config_path:
        return
    parser = build_parser()
    apply_config(parser, config_path)
    had = vars(args)
    for name, value in recipe(parser.parse_args([])).items():
        if had.get(name) != value:
            _logger.warning(f"{config_path} says {name}: {value}, the run had {had.get(name)}, which the card tells.")
