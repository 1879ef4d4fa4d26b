"""Checks of JSON that comes from anywhere.

A check takes a value and what to call it, and returns the value or raises a ValueError that names the place. Sizes are
bounded, and no type passes as another (true is no number).
"""
import json
import math
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

__all__ = [
    'MAX_INT', 'Check', 'Fields', 'list_of', 'mapping', 'mapping_of', 'matching', 'number', 'one_of', 'optional',
    'plain', 'read_json', 'text', 'whole',
]

MAX_INT = 100_000

Check = Callable[[Any, str], Any]
_MISSING: Any = object()


def read_json(path: Path, name: str, max_bytes: int) -> Any:
    """The content of a JSON file; no NaN, no infinities, no key twice.

    Args:
        path: The file.
        name: What messages call it.
        max_bytes: Its greatest size.

    Raises:
        ValueError: If it is too large or no such JSON.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f'{name} has {size} bytes, at most {max_bytes} are read.')
    try:
        return json.loads(path.read_bytes().decode('utf-8'), parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # decoders raise subclasses of ValueError
        raise ValueError(f'{name} is not readable as JSON: {error}') from error


def _no_constant(name: str) -> Any:
    raise ValueError(f'{name} is no number')


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError('a key occurs twice')
    return content


class Fields:
    """The keys of a mapping, taken one by one; what nobody took is refused by `finish`."""

    def __init__(self, content: Any, where: str):
        self.rest = dict(mapping(content, where))
        self.where = where

    def take(self, key: str, check: Check, default: Any = _MISSING) -> Any:
        """The value of a key, checked; the default is checked, too."""
        value = self.rest.pop(key, default)
        if value is _MISSING:
            raise ValueError(f"{self.where}: '{key}' is missing.")
        return check(value, f'{self.where}: {key}')

    def finish(self) -> None:
        """Raise a ValueError if a key is left."""
        if self.rest:
            raise ValueError(f"{self.where}: unknown key '{str(min(self.rest, key=str))[:100]}'.")


def mapping(value: Any, where: str) -> Dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f'{where} must be a mapping, not {_shown(value)}.')
    return value


def mapping_of(check: Check, most: int) -> Check:
    """A JSON object of at most so many values that pass `check`."""
    def checked(value: Any, where: str) -> Dict[str, Any]:
        if len(mapping(value, where)) > most:
            raise ValueError(f'{where} has {len(value)} entries, at most {most} are read.')
        key_check = text(100)
        return {key_check(key, f'{where}: a key'): check(item, f'{where}: {key[:100]}') for key, item in value.items()}
    return checked


def list_of(check: Check, least: int, most: int) -> Check:
    """A list of at least and at most so many values that pass `check`."""
    def checked(value: Any, where: str) -> List[Any]:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            count = str(least) if least == most else f'{least} to {most}'
            raise ValueError(f'{where} must be a list of {count} values, not {_shown(value)}.')
        return [check(item, where) for item in value]
    return checked


def optional(check: Check) -> Check:
    """Null, or what passes `check`."""
    return lambda value, where: None if value is None else check(value, where)


def flag(value: Any, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f'{where} must be true or false, not {_shown(value)}.')
    return value


def whole(least: int, most: int) -> Check:
    """A whole number in a range."""
    def checked(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f'{where} must be a whole number from {least} to {most}, not {_shown(value)}.')
        return value
    return checked


def number(least: float = -1e12, most: float = 1e12) -> Check:
    """A number in a range."""
    def checked(value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f'{where} must be a number from {least:g} to {most:g}, not {_shown(value)}.')
        return value
    return checked


def text(most: int) -> Check:
    """A string of at most so many characters."""
    def checked(value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) > most:
            raise ValueError(f'{where} must be text of at most {most} characters, not {_shown(value)}.')
        return value
    return checked


def one_of(choices: Tuple[str, ...]) -> Check:
    """One of some strings."""
    def checked(value: Any, where: str) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{where} must be one of {', '.join(choices)}, not {_shown(value)}.")
        return value
    return checked


def matching(pattern: str, what: str) -> Check:
    """A string that is a full match of a regular expression, called `what` in messages."""
    def checked(value: Any, where: str) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f'{where} must be {what}, not {_shown(value)}.')
        return value
    return checked


def plain(value: Any, where: str, depth: int = 4) -> None:
    """Numbers, words, and short lists and mappings of them: what constructors of models take."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        whole(-MAX_INT, MAX_INT)(value, where)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f'{where} is not finite.')
    elif isinstance(value, str):
        text(1000)(value, where)
    elif depth and isinstance(value, (list, dict)) and len(value) <= 1000:
        for item in value.values() if isinstance(value, dict) else value:
            plain(item, where, depth - 1)
    else:
        raise ValueError(f'{where} is too long or too deep.')


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except RecursionError:
        return f'a deep {type(value).__name__}'
    return shown if len(shown) <= 60 else shown[:57] + '..'
