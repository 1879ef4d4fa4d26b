"""Command line of train_eed.py: timm's flags under timm's names, and one group for exits."""
import argparse
import os
from typing import Any, Dict, List, Optional, Sequence, Union

from huggingface_hub import get_token

from ..losses import create_multi_exit_loss
from .config import apply_config
from .flags import build_parser, config_parser

__all__ = ['loss_kwargs', 'parse_args', 'parse_teacher']


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Arguments from the command line, over those of a YAML file given by `--config`, over the defaults.

    Ends the program with a message if a value is wrong or flags cannot go together.
    """
    parser = build_parser()
    known, _ = argparse.ArgumentParser(add_help=False, parents=[config_parser()]).parse_known_args(argv)
    if known.config:
        apply_config(parser, known.config)
    args = parser.parse_args(argv)
    args.data_dir = args.data or args.data_dir  # the positional never comes from the file
    if args.task == 'multilabel' and args.eval_metric == parser.get_default('eval_metric') == 'top1':
        args.eval_metric = 'map'
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    try:
        if args.eed_method != 'none':
            create_multi_exit_loss(**loss_kwargs(args))
    except ValueError as error:
        parser.error(f'exit-ensemble distillation: {error}')
    if args.eed_method == 'none' and args.freeze_backbone:
        parser.error('--freeze-backbone trains the exits alone, and --eed-method none has no exits; drop one of them.')
    if args.eed_method != 'eed' and args.eed_teacher != 'ensemble':
        parser.error(f'--eed-teacher goes with --eed-method eed, not with {args.eed_method}.')
    _check_unsupported(parser, args)
    if args.push_to_hub:
        _check_push(parser, args)
    if args.resume == 'auto' and not args.experiment:
        parser.error('--resume auto needs --experiment, the name of the run to continue.')
    for name in ('batch_size', 'grad_accum_steps', 'epochs', 'log_interval', 'val_interval', 'checkpoint_hist'):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}.")
    for name in ('workers', 'seed', 'crop_padding'):
        if (getattr(args, name) or 0) < 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, not {getattr(args, name)}.")
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        value = getattr(args, name)
        if value is not None and len(value) != 2:
            parser.error(f"--{name.replace('_', '-')} takes two numbers, least and greatest, not {len(value)}.")
    if args.validation_batch_size is not None and args.validation_batch_size < 1:
        parser.error(f'--validation-batch-size must be at least 1, not {args.validation_batch_size}.')
    if args.pretrained_path and not (args.pretrained and os.path.isfile(args.pretrained_path)):
        parser.error(f"--pretrained-path '{args.pretrained_path}' needs --pretrained, and the file must exist.")
    if args.bce_loss and args.jsd_loss:
        parser.error('--bce-loss and --jsd-loss are two losses; choose one.')
    if args.aug_splits == 1:
        parser.error('--aug-splits must be 0 or at least 2.')
    if (args.jsd_loss or args.loss == 'jsd') and args.aug_splits < 2:
        parser.error('The jsd loss compares augmentations of one image; add --aug-splits 3.')
    if args.split_bn and args.aug_splits < 2:
        parser.error('--split-bn keeps batch norm statistics per augmentation split; add --aug-splits 2 or more.')
    if args.model_dtype not in (None, 'float32') and args.amp:
        parser.error('--amp keeps the model in float32; drop --amp or --model-dtype.')


def _check_unsupported(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What timm's script can do and this one, or one with exits, cannot."""
    exits = args.eed_method != 'none'
    if args.naflex_loader:
        parser.error("--naflex-loader is not supported: NaFlex patches have no maps for exits; use images of one size.")
    if args.tta > 1:
        parser.error("--tta is not supported: timm's loader makes no augmented copies of an image, averaging would mix "
                     'different images.')
    if args.torchscript and (exits or args.sync_bn or args.kd_model_name):
        parser.error('--torchscript is for plain models: add --eed-method none, drop --sync-bn and --kd-model-name.')
    if args.kd_model_name and exits and (args.kd_distill_type != 'logit' or args.kd_loss_type != 'kl'):
        parser.error('With exits an external teacher teaches logits: --kd-distill-type logit, --kd-loss-type kl; or '
                     'train a plain model by --eed-method none.')
    if args.kd_model_name and args.task == 'multilabel':
        parser.error('--kd-model-name distils softmax outputs, which --task multilabel has not; drop one of them.')
    if args.task == 'multilabel' and (args.aug_splits or args.jsd_loss):
        parser.error('--task multilabel does not go with --aug-splits and --jsd-loss.')
    if args.loss == 'db':
        parser.error("--loss db needs counts of the classes, which no flag gives; use timm's "
                     'DistributionBalancedLoss in a loop of your own.')
    if args.use_multi_epochs_loader and args.mixup_off_epoch and args.workers and not args.no_prefetcher:
        parser.error('--use-multi-epochs-loader keeps loader processes alive, which would not hear of '
                     '--mixup-off-epoch; drop one of the two, or add --no-prefetcher.')
    if args.train_img_sizes and args.crop_padding is not None:
        parser.error('--crop-padding crops to one size; drop it or --train-img-sizes.')
    if any(size % 2 for size in args.train_batch_sizes or []) and (
            args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        parser.error('Mixup pairs images, so all of --train-batch-sizes must be even.')
    if not args.train_img_sizes and (args.train_batch_sizes or args.train_size_probs):
        parser.error('--train-batch-sizes and --train-size-probs go with --train-img-sizes.')
    if args.stop_epoch is not None and not 1 <= args.stop_epoch <= args.epochs:
        parser.error(f'--stop-epoch must be from 1 to --epochs ({args.epochs}), not {args.stop_epoch}.')
    for epoch in args.save_epochs or []:
        if not 1 <= epoch <= args.epochs:
            parser.error(f'--save-epochs: {epoch} is not from 1 to --epochs ({args.epochs}).')


def _check_push(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End now what would end after the last epoch."""
    if args.eed_method == 'none':
        parser.error('--push-to-hub publishes models with exits, and --eed-method none has none; '
                     'timm.models.push_to_hf_hub publishes plain models.')
    if args.push_to_hub.count('/') != 1:
        parser.error(f"--push-to-hub: '{args.push_to_hub}' is no repo of the form user/name.")
    if get_token() is None:
        parser.error('--push-to-hub needs a token: log in with `hf auth login`, or set HF_TOKEN.')


def loss_kwargs(args: argparse.Namespace) -> Dict[str, Any]:
    """What the flags say about exits, as arguments of `create_multi_exit_loss`."""
    return dict(
        method=args.eed_method,
        alpha=args.eed_alpha,
        beta=args.eed_beta,
        output_loss=args.eed_output_loss,
        temperature=args.eed_temperature,
        teacher=parse_teacher(args.eed_teacher) if args.eed_method == 'eed' else None,
    )


def parse_teacher(text: str) -> Union[str, List[int]]:
    """The teacher named on the command line: 'ensemble', 'main', or members joined by '+' as in 'exit1+exit3+main'.

    Raises:
        ValueError: If a member is not called exitN or main.
    """
    if text in ('ensemble', 'main'):
        return text
    members = []
    for name in text.split('+'):
        number = name[len('exit'):]
        if name == 'main':
            members.append(-1)
        elif name.startswith('exit') and number.isdigit() and int(number) > 0:
            members.append(int(number) - 1)
        else:
            raise ValueError(f"teacher '{text}' is not known; say ensemble, main, or members as in exit1+exit3+main.")
    return members
