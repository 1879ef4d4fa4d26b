"""What each classifier of a multi-exit model costs: multiply-adds and parameters up to and including its head."""
import math
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from .exits import TimmModel
from .multi_exit import MultiExitWrapper, check_has_exits
from .probe import input_size as model_input_size
from .probe import meta_twin

__all__ = ['ExitProfile', 'early_exit_gflops', 'leaving_gflops', 'profile', 'profile_with_ensemble']


class ExitProfile(NamedTuple):
    """Cost of one classifier for one image, all up to and including its own head (other exits not counted).

    exit: exit1, exit2, .., main. gmacs: 10^9 multiply-adds of convolutions, linear layers and attention products, and
    of normalisation where it was asked for. gflops: 2 x gmacs. params: number of parameters.
    """
    exit: str
    gmacs: float
    gflops: float
    params: int


def profile(
        model: MultiExitWrapper,
        input_size: Optional[Tuple[int, int, int]] = None,
        norms: bool = False,
) -> List[ExitProfile]:
    """Cost of each classifier, shallow to deep, counted on a twin without weights (nothing is computed).

    Activations and pooling are not counted, as is usual, nor normalisation unless asked for: the paper's Table III
    counts 2 multiply-adds per normalised element.

    Args:
        model: A multi-exit model.
        input_size: Image size (C, H, W); the model's own when None.
        norms: Count normalisation layers too.

    Raises:
        ValueError: If the model has no exits.
    """
    check_has_exits(model)
    twin, x = _twin_and_input(model, input_size)
    rows = []
    for number, (index, exit_head) in enumerate(zip(twin.exit_indices, twin.exits), start=1):
        flops = _count(_run_exit, twin.backbone, exit_head, index, x, norms=norms)
        trunk = meta_twin(twin.backbone)
        trunk.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
        rows.append(_row(f'exit{number}', flops, _num_params(trunk) + _num_params(exit_head)))
    rows.append(_row('main', _count(twin.backbone, x, norms=norms), _num_params(twin.backbone)))
    return rows


def early_exit_gflops(
        model: MultiExitWrapper,
        input_size: Optional[Tuple[int, int, int]] = None,
) -> Tuple[List[float], List[float]]:
    """What early exit pays for an image, counted as in `profile`.

    Returns:
        10^9 FLOPs of the network up to each exit's stage and of the whole (k of them), and of each exit (k - 1).
    """
    twin, x = _twin_and_input(model, input_size)
    with torch.no_grad():
        maps = twin.backbone.forward_intermediates(
            x, indices=twin.exit_indices, output_fmt='NCHW', intermediates_only=True, stop_early=False)
    exits = [_count(exit_head, stage_map) / 1e9 for exit_head, stage_map in zip(twin.exits, maps)]
    rows = profile(model, input_size)
    return [row.gflops - own for row, own in zip(rows, [*exits, 0.])], exits


def leaving_gflops(trunk: Sequence[float], heads: Sequence[float], enabled: Sequence[int]) -> List[float]:
    """What an image costs by where it leaves, k values: the network up to there, and the exits on the way that are on.

    Args:
        trunk, heads: As `early_exit_gflops` gives them.
        enabled: Exits that are on, 0 is exit1.
    """
    return [own + sum(heads[j] for j in enabled if j <= i) for i, own in enumerate(trunk)]


def profile_with_ensemble(
        model: MultiExitWrapper,
        input_size: Optional[Tuple[int, int, int]] = None,
) -> List[ExitProfile]:
    """The rows of `profile`, and one for the ensemble, which costs all classifiers together."""
    rows = profile(model, input_size)
    twin, x = _twin_and_input(model, input_size)
    return [*rows, _row('ensemble', _count(twin.forward_exits, x), _num_params(twin))]


def _twin_and_input(
        model: MultiExitWrapper,
        input_size: Optional[Tuple[int, int, int]],
) -> Tuple[Any, torch.Tensor]:
    twin = meta_twin(model).eval().requires_grad_(False)  # the counter's hooks trip over leaves that want gradients
    dtype = next(model.parameters()).dtype
    return twin, torch.empty(1, *(input_size or model_input_size(model.backbone)), device='meta', dtype=dtype)


def _run_exit(backbone: TimmModel, exit_head: nn.Module, index: int, x: torch.Tensor) -> None:
    exit_head(backbone.forward_intermediates(
        x, indices=[index], output_fmt='NCHW', stop_early=True, intermediates_only=True)[0])


def _norm_flops(x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 4 * math.prod(x_shape)  # 2 multiply-adds


_aten = torch.ops.aten
_NORMS = dict.fromkeys(
    (_aten.native_batch_norm, _aten._native_batch_norm_legit_no_training, _aten.native_layer_norm,
     _aten.native_group_norm), _norm_flops)


def _count(function: Callable[..., Any], *inputs: Any, norms: bool = False) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_NORMS if norms else None) as counter:
        function(*inputs)
    return counter.get_total_flops()


def _row(name: str, flops: int, params: int) -> ExitProfile:
    return ExitProfile(name, flops / 2e9, flops / 1e9, params)


def _num_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
