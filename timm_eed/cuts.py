"""Rows that leave a running network: where its outputs can be cut down to the rows that stay.

A forward hook may replace what a module returns. Where a module's output is all that the rest of the network sees, the
hook hands on the rows that stay and the network never knows that the batch was larger. That holds for most of timm, not
for all (some keep the batch size, or a tensor of the whole batch, in a frame further out), so nothing is assumed: taps
are found by comparing module outputs with timm's own stage maps, and `early_exit` tries every cut before it uses it.

Shapes: B rows of the batch, C channels, H x W stage map, N tokens.
"""
import threading
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from .exits import TimmModel, stages

__all__ = ['NetworkChanged', 'Tap', 'find_taps', 'leaves', 'map_leaves', 'run_cut', 'take_rows']

# exit number and its stage map [B, C, H, W] -> indices of the rows that stay, None for all of them
Decide = Callable[[int, torch.Tensor], Optional[torch.Tensor]]
_REGISTERING = threading.Lock()  # torch counts hook handles without one


class _AllLeft(Exception):
    """No row is left, the rest of the network need not run."""


class NetworkChanged(Exception):
    """A network calls other modules than it did when its taps were found, gradient checkpointing for example does."""


class Tap(NamedTuple):
    """A place in a network where a stage map can be read and rows can be taken out.

    module: Name of the submodule. leaf: Which of the tensors it returns is the stage map. layout: Its layout: NCHW,
    NHWC, NLC or NCL (prefix tokens come first). size: H x W of the map. rows: Which of the tensors carry rows.
    """
    module: str
    leaf: int
    layout: str
    size: Tuple[int, int]
    rows: Tuple[bool, ...]

    def stage_map(self, output: Any) -> torch.Tensor:
        """The stage map [B, C, H, W] in what the module returned, as timm's `forward_intermediates` gives it."""
        return _to_nchw(leaves(output)[self.leaf], self.layout, self.size)

    def keep(self, output: Any, batch: int, keep: torch.Tensor) -> Any:
        """What the module returned, cut down from `batch` rows to those in `keep`."""
        which = iter(self.rows)
        return map_leaves(output, lambda leaf: take_rows(leaf, batch, keep) if next(which) else leaf)


def take_rows(x: torch.Tensor, batch: int, rows: torch.Tensor) -> torch.Tensor:
    """Some of the rows of a tensor [B, ...] or [B * n, ...] (windows, pixels), in the memory format it has.

    `index_select` copies whole rows, several times faster than indexing does, if rows are contiguous in memory.
    """
    if len(x) != batch:
        return take_rows(x.unflatten(0, (batch, -1)), batch, rows).flatten(0, 1)
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    if order[0] != 0:
        return x.index_select(0, rows)
    back = sorted(range(x.ndim), key=order.__getitem__)
    return x.permute(order).index_select(0, rows).permute(back)


def run_cut(backbone: TimmModel, taps: Dict[int, Tap], x: torch.Tensor, decide: Decide) -> Optional[torch.Tensor]:
    """The network's own forward pass, in which rows leave at the taps.

    The hooks live as long as the call and know the thread it runs in, so that calls in other threads pass by.

    Args:
        backbone: The network.
        taps: A tap per exit number.
        x: Images [B, C, H, W].
        decide: Called at each tap.

    Returns:
        The network's logits for the rows that stayed to the end, None if all left.

    Raises:
        NetworkChanged: If a tapped module was not called.
    """
    call = _CutCall(len(x), decide)
    hooks = [(backbone.get_submodule(tap.module), partial(call.cut, i, tap)) for i, tap in taps.items()]
    with _hooks(hooks):
        try:
            logits = backbone(x)
        except _AllLeft:
            return None
    if call.fired != len(taps):
        raise NetworkChanged
    return logits


class _CutCall:
    """State of one call: how many rows are in the network, and how many taps have fired."""

    def __init__(self, batch: int, decide: Decide):
        self.batch = batch
        self.decide = decide
        self.fired = 0
        self.thread = threading.get_ident()

    @torch.compiler.disable  # what rows do depends on their values; compiled modules around a tap break here
    def cut(self, exit_number: int, tap: Tap, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Forward hook: the rows of the output that stay."""
        if threading.get_ident() != self.thread:
            return None
        self.fired += 1
        keep = self.decide(exit_number, tap.stage_map(output))
        if keep is None:
            return None
        if len(keep) == 0:
            raise _AllLeft
        output = tap.keep(output, self.batch, keep)
        self.batch = len(keep)
        return output


@contextmanager
def _hooks(hooks: Sequence[Tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = []
    try:
        for module, hook in hooks:
            with _REGISTERING:
                handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_taps(backbone: TimmModel, indices: Sequence[int], x: torch.Tensor) -> Optional[List[Tap]]:
    """For each stage index a tap, or None if a stage map is nobody's output.

    Stage maps of `forward_intermediates` are compared, value by value, with what every submodule returns in the
    network's own forward pass.

    Args:
        backbone: The network, in evaluation mode.
        indices: Stages, as in `forward_intermediates`.
        x: Images [B, C, H, W] that differ, B a prime number.
    """
    maps = backbone.forward_intermediates(
        x, indices=list(indices), output_fmt='NCHW', intermediates_only=True, stop_early=False)
    found: List[List[Tap]] = [[] for _ in maps]
    calls: Dict[str, int] = {}
    thread = threading.get_ident()

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                calls[name] = calls.get(name, 0) + 1
                for stage_map, taps in zip(maps, found):
                    taps.extend(_taps(name, output, stage_map))
        return hook

    with _hooks([(module, compare(name)) for name, module in backbone.named_modules() if name]):
        backbone(x)
    chosen = []
    for index, taps in zip(indices, found):
        by_name = {tap.module: tap for tap in taps if calls[tap.module] == 1}
        if not by_name:
            return None
        chosen.append(by_name[_place(backbone, stages(backbone)[index].module, list(by_name))])
    return chosen if len({tap.module for tap in chosen}) == len(chosen) else None


def _place(backbone: TimmModel, stage: str, names: List[str]) -> str:
    """The submodule to tap, of those that return the same stage map: timm's own name of the stage, else the outermost.

    Of containers the last child is taken: gradient checkpointing calls the children one by one.
    """
    name = stage if stage in names else min(reversed(names), key=lambda name: name.count('.'))
    while type(container := backbone.get_submodule(name)) is nn.Sequential:
        child = f'{name}.{list(container._modules)[-1]}'
        if child not in names:
            break
        name = child
    return name


def _taps(module: str, output: Any, stage_map: torch.Tensor) -> Iterator[Tap]:
    batch, _, height, width = stage_map.shape
    tensors = leaves(output)
    for i, leaf in enumerate(tensors):
        for layout in ('NCHW', 'NHWC', 'NLC', 'NCL'):
            candidate = _to_nchw(leaf, layout, (height, width))
            if candidate is not None and candidate.shape == stage_map.shape and torch.equal(candidate, stage_map):
                rows = tuple(t.ndim > 0 and len(t) > 0 and len(t) % batch == 0 for t in tensors)
                yield Tap(module, i, layout, (height, width), rows)
                break


def _to_nchw(x: torch.Tensor, layout: str, size: Tuple[int, int]) -> Any:
    """A tensor of this layout as [B, C, H, W], None if it cannot be."""
    tokens = size[0] * size[1]
    if layout == 'NCHW':
        return x if x.ndim == 4 else None
    if layout == 'NHWC':
        return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else None
    if x.ndim != 3:
        return None
    if layout == 'NLC':
        x = x.transpose(1, 2)
    if x.shape[2] < tokens:
        return None
    return x[:, :, x.shape[2] - tokens:].reshape(*x.shape[:2], *size).contiguous()


def leaves(output: Any) -> List[torch.Tensor]:
    """Every tensor in nested tuples, lists and dictionaries."""
    tensors: List[torch.Tensor] = []
    map_leaves(output, tensors.append)
    return tensors


def map_leaves(output: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """`function` of every tensor in nested tuples, lists and dictionaries."""
    if isinstance(output, torch.Tensor):
        return function(output)
    if isinstance(output, dict):
        return type(output)((key, map_leaves(value, function)) for key, value in output.items())
    if isinstance(output, tuple) and hasattr(output, '_fields'):
        return type(output)(*(map_leaves(value, function) for value in output))
    if isinstance(output, (tuple, list)):
        return type(output)(map_leaves(value, function) for value in output)
    return output
