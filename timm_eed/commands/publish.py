"""`timm-eed publish`: a trained run to the Hugging Face Hub, or into a folder."""
import argparse
from typing import Any

from ..training.publish import publish_run, read_sections, write_run
from .inputs import load_settings

__all__ = ['add_parser']


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `timm-eed`."""
    parser = commands.add_parser('publish', help='a trained run to the Hugging Face Hub', description=(
        'Publish the model of a run: plain timm loads the repo as an ordinary model, timm_eed.from_pretrained with all '
        'exits. The moving average of the weights is taken where the run kept one. The token is the one of '
        '`hf auth login` or of the variable HF_TOKEN.'))
    add = parser.add_argument
    add('config', metavar='CONFIG', help='YAML file of training flags with sections results: and card:, as in '
                                         "hub_configs; a run's args.yaml will do")
    add('--checkpoint', required=True, metavar='RUN_DIR', help='folder of the run (its last checkpoint), or a '
                                                               'checkpoint in it as in RUN_DIR/model_best.pth.tar')
    add('--repo', required=True, metavar='USER/NAME', help='repo, made if it does not exist')
    add('--early-exit', metavar='FILE', help='thresholds from `timm-eed calibrate --json FILE` that go with the model')
    add('--dry-run', metavar='DIR', help='write the files into this folder and print the card, push nothing')
    add('--private', action='store_true', help='a new repo is private')
    add('--revision', metavar='BRANCH', help='branch to push to; main if not given')
    add('--create-pr', action='store_true', help='open a pull request')
    add('--commit-message', default='Add multi-exit model', metavar='TEXT', help='title of the commit')
    add('--overwrite-card', action='store_true', help='replace a model card that is there')
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    sections = read_sections(args.config)
    early_exit = load_settings(args.early_exit) if args.early_exit else None
    if args.dry_run:
        card = write_run(args.checkpoint, args.repo, args.dry_run, sections, args.config, early_exit)
        return print(card)
    try:
        commit = publish_run(
            args.checkpoint, args.repo, sections, args.config, early_exit,
            private=args.private or None, revision=args.revision,
            create_pr=args.create_pr, commit_message=args.commit_message, overwrite_card=args.overwrite_card)
    except ConnectionError as error:
        raise ValueError(error) from error
    print(commit.pr_url or commit.commit_url)
