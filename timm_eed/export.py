"""Taking a part of a multi-exit model elsewhere: truncated to one exit, as a `torch.export` program, as ONNX.

ONNX needs the extra: pip install "timm-eed[export]".

Shapes: B batch, C channels, H x W input, K classes.
"""
import copy
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn

from .exits import TimmModel
from .multi_exit import MultiExitWrapper, check_has_exits
from .probe import input_size as model_input_size

__all__ = ['AllLogits', 'TruncatedModel', 'export_onnx', 'export_program', 'truncate']


class TruncatedModel(nn.Module):
    """The stages of a backbone that one exit needs, and that exit: images [B, C, H, W] to logits [B, K].

    Args:
        trunk: A timm model, pruned behind the stage.
        stage: The stage, an index into `feature_info`.
        exit_head: The exit.
    """

    def __init__(self, trunk: TimmModel, stage: int, exit_head: nn.Module):
        super().__init__()
        self.trunk: TimmModel = trunk
        self.stage = stage
        self.exit = exit_head

    @property
    def num_classes(self) -> int:
        """K, as the exit has it."""
        return int(self.exit.num_classes)  # type: ignore[arg-type]

    @property
    def pretrained_cfg(self) -> Dict[str, Any]:
        """The backbone's `pretrained_cfg`, so that timm resolves data settings."""
        return self.trunk.pretrained_cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of the exit."""
        stage_map = self.trunk.forward_intermediates(
            x, indices=[self.stage], output_fmt='NCHW', stop_early=True, intermediates_only=True)[0]
        return self.exit(stage_map)[0]


class AllLogits(nn.Module):
    """All classifiers of a multi-exit model as one function of images [B, C, H, W]: a tuple of logits [B, K].

    Args:
        model: A multi-exit model.
    """

    def __init__(self, model: MultiExitWrapper):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Z_1 .. Z_k."""
        return tuple(self.model.forward_exits(x).logits)


def truncate(model: MultiExitWrapper, exit_index: int) -> nn.Module:
    """A model of its own that holds and computes only what one exit needs; logits are bit-equal to that exit's.

    Weights are copied, the model stays as it is. timm's `prune_intermediate_layers` cuts the network.

    Args:
        model: A multi-exit model.
        exit_index: 0 is exit1; k - 1 or -1 the main network, of which a plain timm model is returned.

    Raises:
        ValueError: If the model has no exits, or there is no such exit.
    """
    check_has_exits(model)
    last = model.num_exits - 1
    if not -last - 1 <= exit_index <= last:
        raise ValueError(
            f'exit_index={exit_index} is out of range, choose 0 (exit1) to {last} (the main network), or -1.')
    exit_index %= last + 1
    if exit_index == last:
        return copy.deepcopy(model.backbone)
    stage = model.exit_indices[exit_index]
    trunk = copy.deepcopy(model.backbone)
    trunk.prune_intermediate_layers([stage], prune_norm=True, prune_head=True)
    truncated = TruncatedModel(trunk, stage, copy.deepcopy(model.exits[exit_index]))
    truncated.training = model.training
    return truncated


def export_program(
        model: nn.Module,
        input_size: Optional[Tuple[int, int, int]] = None,
        all_exits: bool = False,
) -> 'torch.export.ExportedProgram':
    """A `torch.export` program for batches of any size.

    Args:
        model: A multi-exit model, a truncated or a plain timm one; put into evaluation mode.
        input_size: Image size (C, H, W); the model's own when None.
        all_exits: Whether a multi-exit model gives the logits of all classifiers, not of the main network alone.

    Raises:
        ValueError: If all exits are asked of a model that has none.
    """
    module, x = _module_and_input(model, input_size, all_exits)
    with torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes=(_batch_is_free(),))


def export_onnx(
        model: nn.Module,
        path: Union[str, Path],
        input_size: Optional[Tuple[int, int, int]] = None,
        all_exits: bool = False,
) -> List[str]:
    """Write an ONNX file for batches of any size; the input is called `images`.

    Args:
        model: A multi-exit model, a truncated or a plain timm one; put into evaluation mode.
        path: The file.
        input_size: Image size (C, H, W); the model's own when None.
        all_exits: Whether a multi-exit model gives the logits of all classifiers, not of the main network alone.

    Returns:
        Names of the outputs: `logits`, or with all exits `exit1`, `exit2`, .., `main`.

    Raises:
        ImportError: If the extra `export` is not installed.
        ValueError: If all exits are asked of a model that has none.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('ONNX export needs further packages: pip install "timm-eed[export]".') from error
    module, x = _module_and_input(model, input_size, all_exits)
    names = ['logits']
    if isinstance(module, AllLogits):
        names = [f'exit{i}' for i in range(1, module.model.num_exits)] + ['main']
    with torch.no_grad():
        torch.onnx.export(
            module, (x,), str(path), dynamo=True, dynamic_shapes=(_batch_is_free(),), external_data=False,
            input_names=['images'], output_names=names, verbose=False)
    return names


def _batch_is_free() -> Dict[int, Any]:
    return {0: torch.export.Dim('batch')}


def _module_and_input(
        model: nn.Module,
        input_size: Optional[Tuple[int, int, int]],
        all_exits: bool,
) -> Tuple[nn.Module, torch.Tensor]:
    if all_exits:
        check_has_exits(model)
    timm_model = model.trunk if isinstance(model, TruncatedModel) else getattr(model, 'backbone', model)
    parameter = next(model.parameters())
    size = input_size or model_input_size(timm_model)
    x = torch.zeros(2, *size, device=parameter.device, dtype=parameter.dtype)
    return (AllLogits(model) if isinstance(model, MultiExitWrapper) and all_exits else model).eval(), x
