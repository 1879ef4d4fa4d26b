"""The command `timm-eed`: what the package does without a training run."""
import argparse
import sys
from typing import Optional, Sequence

from .commands import info, publish, report, validate

__all__ = ['main']


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run a subcommand; errors that the user can mend end it with one message."""
    parser = argparse.ArgumentParser(prog='timm-eed', description='Multi-exit timm models.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for command in (info, validate, report, publish):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        sys.exit(f'timm-eed {args.command}: error: {error}')


if __name__ == '__main__':
    main()
