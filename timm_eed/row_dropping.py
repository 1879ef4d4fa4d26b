"""How rows leave the network in the middle of its forward pass: which way works for a network, tried before it is used.

    cut     module outputs are cut down to the rows that stay (`cuts`), nearly free
    replay  finished submodules hand out their recorded rows (`replay`), where a cut does not work
    whole   the network computes all rows of the batch to its end: right, but nothing is saved
"""
from typing import List, NamedTuple, Optional, Sequence

import torch

from .cuts import Decide, NetworkChanged, Tap, find_taps, run_cut
from .multi_exit import MultiExitWrapper
from .replay import Replay, Rows, find_rows

__all__ = ['Way', 'find_way', 'run']


class Way(NamedTuple):
    """A way for rows to leave one network at one input size.

    name: 'cut', 'replay' or 'whole'. taps: With 'cut', one per exit. rows: With 'replay'.
    """
    name: str
    taps: Sequence[Tap] = ()
    rows: Optional[Rows] = None


def run(
        model: MultiExitWrapper,
        way: Way,
        exits: Sequence[int],
        x: torch.Tensor,
        decide: Decide,
) -> Optional[torch.Tensor]:
    """One forward pass in which `decide` is called with the stage map of each exit and tells which rows stay.

    Args:
        model: A multi-exit model in evaluation mode.
        way: What `find_way` found for it.
        exits: The exits to stop at, 0 is exit1.
        x: Images [B, C, H, W].
        decide: From exit and stage map [B, C, H, W] of the rows present to the indices of those that stay (ascending),
            None for all.

    Returns:
        Main network's logits of the rows that stayed to the end; None if all left.

    Raises:
        NetworkChanged: If the way does not fit the network any more.
    """
    if way.name == 'cut':
        return run_cut(model.backbone, {i: way.taps[i] for i in exits}, x, decide)
    if way.name == 'replay':
        return _run_replay(model, way, exits, x, decide)
    return _run_whole(model, exits, x, decide)


def _run_replay(
        model: MultiExitWrapper, way: Way, exits: Sequence[int], x: torch.Tensor, decide: Decide,
) -> Optional[torch.Tensor]:
    replay = Replay(model.backbone, x, way.rows)
    for i in exits:
        keep = decide(i, replay.stage_map(model.exit_indices[i]))
        if keep is not None and len(keep) == 0:
            return None
        if keep is not None:
            replay.keep(keep)
    return replay.logits()


def _run_whole(
        model: MultiExitWrapper, exits: Sequence[int], x: torch.Tensor, decide: Decide,
) -> Optional[torch.Tensor]:
    x, maps = model.backbone.forward_intermediates(
        x, indices=[model.exit_indices[i] for i in exits], output_fmt='NCHW', stop_early=False)
    rows = torch.arange(len(maps[0]), device=maps[0].device)
    for i, stage_map in zip(exits, maps):
        keep = decide(i, stage_map[rows])
        if keep is not None:
            rows = rows[keep]
        if len(rows) == 0:
            return None
    return model.backbone.forward_head(x)[rows]


def find_way(model: MultiExitWrapper, x: torch.Tensor) -> Way:
    """The best way that gives right answers for images like x [B, C, H, W], tried on a few made-up ones.

    Costs some forward passes of a batch of five (or of the next prime number above the number of exits).
    """
    x = _made_up(x, _prime(max(5, model.num_exits + 1)))
    expected = model.forward_exits(x).logits
    if (taps := find_taps(model.backbone, model.exit_indices, x)) is not None:
        way = Way('cut', taps)
        if _works(model, way, x, expected):
            return way
    try:
        way = Way('replay', rows=find_rows(model.backbone, model.exit_indices, x))
    except KeyError:  # other submodules for another batch size
        return Way('whole')
    return way if _works(model, way, x, expected) else Way('whole')


def _works(model: MultiExitWrapper, way: Way, x: torch.Tensor, expected: Sequence[torch.Tensor]) -> bool:
    """Whether rows that stay get the logits that they get without any leaving; one row leaves at every exit."""
    rows = list(range(len(x)))
    right: List[bool] = []

    def decide(i: int, stage_map: torch.Tensor) -> torch.Tensor:
        right.append(_equal(model.exits[i](stage_map)[0], expected[i], rows))
        gone = len(rows) // 2
        del rows[gone]
        return torch.tensor([j for j in range(len(rows) + 1) if j != gone], device=x.device)

    try:
        logits = run(model, way, range(model.num_exits - 1), x, decide)
    except (RuntimeError, ValueError, IndexError, AssertionError, NetworkChanged):
        return False  # rows are missing where the network counts on them
    return logits is not None and all(right) and _equal(logits, expected[-1], rows)


def _equal(logits: torch.Tensor, expected: torch.Tensor, rows: List[int]) -> bool:
    """Whether logits are those of these rows: much nearer to them than they are to one another."""
    if logits.shape != expected[rows].shape:
        return False
    expected = expected.double()
    error = (logits.double() - expected[rows]).abs().max()
    apart = torch.cdist(expected, expected, p=torch.inf) + torch.eye(len(expected), device=expected.device) * 1e30
    noise = 16 * torch.finfo(logits.dtype).eps * expected.abs().max()
    return bool(error <= max(0.1 * apart.min(), noise))


def _made_up(x: torch.Tensor, batch: int) -> torch.Tensor:
    """Images of the shape of those in x, of different brightness and contrast; global random state is left alone."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *x.shape[1:], generator=generator)
    contrast, brightness = torch.rand(2, batch, 1, 1, 1, generator=generator)
    images = images * (0.5 + contrast) + 2 * brightness - 1
    return images.to(device=x.device, dtype=x.dtype)


def _prime(low: int) -> int:
    while any(low % i == 0 for i in range(2, low)):
        low += 1
    return low
