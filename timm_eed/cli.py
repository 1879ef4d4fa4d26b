"""The command `timm-eed`: what the package does without a training run."""
import argparse
import sys
from typing import Optional, Sequence

from .commands import benchmark, calibrate, export, info, publish, report, validate

__all__ = ['build_parser', 'main']


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog='timm-eed', description='Multi-exit timm models.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for command in (info, validate, calibrate, benchmark, report, export, publish):
        command.add_parser(commands)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run a subcommand; errors that the user can mend end it with one message."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        sys.exit(f'timm-eed {args.command}: error: {error}')


if __name__ == '__main__':
    main()
