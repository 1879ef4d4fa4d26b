"""YAML files of flags, checked like the command line."""
import argparse
import difflib
import logging
from typing import Any, Dict

import yaml
from timm.utils import ParseKwargs

__all__ = ['SECTIONS', 'apply_config']

# what a file may hold besides flags: for `timm-eed publish`, and the paper's figures for docs/paper.md
SECTIONS = ('results', 'card', 'paper')

_logger = logging.getLogger(__name__)


def apply_config(parser: argparse.ArgumentParser, path: str) -> None:
    """Make the flags of a YAML file the parser's defaults.

    A wrong type or choice ends the program with a message; an unknown key only warns, naming the nearest flag.

    Args:
        parser: Parser of all flags.
        path: YAML file, a mapping of flag names (with - or _) to values; SECTIONS are left to who publishes.
    """
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    defaults: Dict[str, Any] = {}
    for key, value in _read(parser, path).items():
        name = str(key).replace('-', '_')
        dest = 'data_dir' if name == 'data' else name
        if dest in SECTIONS:
            continue
        if dest not in actions:
            close = difflib.get_close_matches(name, actions, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ''
            _logger.warning(f"{path}: unknown key '{key}' is ignored{hint}")
            continue
        try:
            defaults[dest] = _convert(actions[dest], value)
        except (ValueError, TypeError) as error:
            parser.error(f'{path}: {key}: {error}')
    parser.set_defaults(**defaults)


def _read(parser: argparse.ArgumentParser, path: str) -> Dict[Any, Any]:
    try:
        with open(path, encoding='utf-8') as file:
            content = yaml.safe_load(file)
    except OSError as error:
        parser.error(f"--config: cannot read '{path}': {error.strerror}.")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config: '{path}' is not YAML: {error}")
    if not isinstance(content, dict):
        parser.error(f"--config: '{path}' must be a mapping of flags to values, as in 'model: resnet50'.")
    return content


def _convert(action: argparse.Action, value: Any) -> Any:
    """The value as the command line would give it."""
    if value is None:
        if action.default is not None:
            raise ValueError(f'must have a value (the default is {action.default!r}).')
        return None
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise ValueError(f'must be a mapping, not {value!r}.')
        return value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f'must be true or false, not {value!r}.')
        return value
    if action.nargs in ('+', '*') or isinstance(action.nargs, int):
        values = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            raise ValueError(f'must be {action.nargs} values, not {len(values)}.')
        return [_convert_one(action, item) for item in values]
    return _convert_one(action, value)


def _convert_one(action: argparse.Action, value: Any) -> Any:
    kind: Any = action.type or str
    if isinstance(value, (bool, list, dict)):
        raise ValueError(f'must be one {kind.__name__}, not {value!r}.')
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError(f'must be a whole number, not {value!r}.')
    try:
        converted = kind(value)  # also numeric strings: YAML 1.1 reads 3e-4 as one
    except ValueError:
        raise ValueError(f'must be {kind.__name__}, not {value!r}.') from None
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"must be one of {', '.join(map(repr, action.choices))}, not {value!r}.")
    return converted
