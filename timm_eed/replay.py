"""Going on where a network stopped: finished submodules hand out what they returned before, without the rows that left.

A network is run from its start again and again, each time a stage further, yet computes nothing twice: a submodule that
was finished in an earlier pass returns its recorded output instead of running, and only the glue between submodules
(reshapes, sums) is executed anew. That resumes networks whose outputs cannot be cut down on the fly, and any network
that is to wait between two exits, at the price of keeping the recorded outputs.

For this `nn.Module._call_impl` is replaced while a replay is running, and restored when the last one is done; other
threads are let through to the original. (`torch.fx` replaces `__call__` while it traces, which costs a millisecond as
it touches every subclass. Submodules that are compiled in place are not seen, and run again.)

Shapes: B rows of the batch, C channels, H x W stage map.
"""
import threading
from collections import Counter
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from .cuts import NetworkChanged, leaves, map_leaves, take_rows
from .exits import TimmModel

__all__ = ['Replay', 'Rows', 'find_rows']

Key = Tuple[str, int]  # name of a submodule, number of its call
Rows = Dict[Key, Tuple[bool, ...]]  # which of the tensors that a call returns carry rows of the batch

_here = threading.local()
_lock = threading.Lock()
_running = 0
_original_call = nn.Module._call_impl


class _Record(NamedTuple):
    """A finished call: what it returned, the call that finished before it, and the calls inside it.

    With another call before it a module has other inputs, and runs again.
    """
    output: Any
    after: Optional[Key]
    inside: List[Key]


class Replay:
    """A batch on its way through a network.

    Args:
        backbone: The network, in evaluation mode.
        x: Images [B, C, H, W].
        rows: What `find_rows` gives, needed if rows are to leave.
    """

    def __init__(self, backbone: TimmModel, x: torch.Tensor, rows: Optional[Rows] = None):
        self.backbone = backbone
        self.x = x
        self.rows = rows or {}
        self.recorded: Dict[Key, _Record] = {}
        self._names = {module: name for name, module in backbone.named_modules() if _is_recorded(name, module)}
        self._counts: Counter[str] = Counter()
        self._log: List[Key] = []
        self._finished: Optional[Key] = None

    def stage_map(self, index: int) -> torch.Tensor:
        """Go on to the end of a stage; its map [B, C, H, W] as timm's `forward_intermediates` gives it."""
        with self._pass():
            return self.backbone.forward_intermediates(
                self.x, indices=[index], output_fmt='NCHW', stop_early=True, intermediates_only=True)[0]

    def logits(self) -> torch.Tensor:
        """Go on to the end of the network; its logits [B, K]."""
        with self._pass():
            return self.backbone(self.x)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only.

        Raises:
            NetworkChanged: If a submodule was called of which `find_rows` knew nothing.
        """
        batch = len(self.x)
        self.x = take_rows(self.x, batch, rows)
        for key, record in self.recorded.items():
            if key not in self.rows:
                raise NetworkChanged
            which = iter(self.rows[key])
            output = map_leaves(
                record.output, lambda leaf: take_rows(leaf, batch, rows) if next(which) else leaf)  # noqa: B023
            self.recorded[key] = record._replace(output=output)

    @contextmanager
    def _pass(self) -> Iterator[None]:
        self._counts.clear()
        self._log.clear()
        self._finished = None
        outer = getattr(_here, 'replay', None)
        _here.replay = self
        _install()
        try:
            yield
        finally:
            _uninstall()
            _here.replay = outer

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a submodule returned in an earlier pass, or what it returns now."""
        name = self._names.get(module)
        if name is None:
            return _original_call(module, *args, **kwargs)
        self._counts[name] += 1
        key = name, self._counts[name]
        self._log.append(key)
        record = self.recorded.get(key)
        if record is not None and record.after == self._finished:
            self._log.extend(record.inside)
            self._counts.update(child for child, _ in record.inside)
        else:
            start, after = len(self._log), self._finished
            output = _original_call(module, *args, **kwargs)
            record = _Record(output, after, self._log[start:])
            for child in record.inside:
                self.recorded.pop(child, None)
            self.recorded[key] = record
        self._finished = key
        return record.output


def find_rows(backbone: TimmModel, indices: Sequence[int], x: torch.Tensor) -> Rows:
    """Which outputs of submodules carry rows: those that grow with the batch, from B - 2 to B images.

    Args:
        backbone: The network, in evaluation mode.
        indices: The stages from which the network will be resumed.
        x: Images [B, C, H, W].
    """
    lengths: List[Dict[Key, List[int]]] = []
    for batch in (x[2:], x):
        replay = Replay(backbone, batch)
        for index in indices:
            replay.stage_map(index)
        lengths.append({key: [len(leaf) if leaf.ndim else 0 for leaf in leaves(output)]
                        for key, (output, *_) in replay.recorded.items()})
    few, many = lengths
    return {key: tuple(0 < a < b for a, b in zip(few[key], many[key])) for key in many}


def _is_recorded(name: str, module: nn.Module) -> bool:
    """Not the network itself, nor plain containers, whose children are called with or without them."""
    return bool(name) and type(module) is not nn.Sequential


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    replay = getattr(_here, 'replay', None)
    if replay is None:
        return _original_call(module, *args, **kwargs)
    return replay.call(module, *args, **kwargs)


def _install() -> None:
    global _running, _original_call
    with _lock:
        if _running == 0:
            _original_call = nn.Module._call_impl
            nn.Module._call_impl = _call  # type: ignore[method-assign, assignment]
        _running += 1


def _uninstall() -> None:
    global _running
    with _lock:
        _running -= 1
        if _running == 0:
            nn.Module._call_impl = _original_call  # type: ignore[method-assign]
