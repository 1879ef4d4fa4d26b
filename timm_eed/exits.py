"""Exit heads: the small classifiers behind intermediate stages, where they go and how wide they are.

Widths and placement follow 'Exit-Ensemble Distillation' (its Section III-A and Table III); the `bottleneck` kind
follows 'Be Your Own Teacher', https://arxiv.org/abs/1905.08094.

Shapes: B batch, C channels of the stage, D width of the main network's pre-logits feature, K classes.
"""
from itertools import groupby
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import ConvNormAct, LayerNorm2d

__all__ = [
    'EXIT_KWARGS',
    'EXIT_TYPES',
    'ExitHead',
    'StageInfo',
    'TimmModel',
    'default_exit_indices',
    'exit_widths',
    'resolve_exit_indices',
    'stages',
]


TimmModel = Any  # an nn.Module with timm's methods, for which timm has no type


class StageInfo(NamedTuple):
    """One entry of a timm model's `feature_info`: module name, channels, reduction of the resolution."""
    module: str
    channels: int
    reduction: int


def stages(model: TimmModel) -> List[StageInfo]:
    """The stage outputs a timm model can hand out, shallow to deep (its `feature_info`).

    Raises:
        ValueError: If the model is not a timm model with `feature_info` and `forward_intermediates`.
    """
    info = getattr(model, 'feature_info', None)
    if not info or not hasattr(model, 'forward_intermediates'):
        raise ValueError(
            f'{type(model).__name__} has no feature_info / forward_intermediates, exits cannot be attached. '
            'Pass a classification model made by timm.create_model() (without features_only=True).')
    entries = getattr(info, 'info', info)  # a FeatureInfo holds its entries in .info
    return [StageInfo(e.get('module', ''), e['num_chs'], e['reduction']) for e in entries]


def default_exit_indices(stage_infos: Sequence[StageInfo]) -> List[int]:
    """Where exits go when nobody says: one rule, from the reductions alone.

    A level is a run of stages of one resolution. With three levels or more, exits sit at the ends of the (at most)
    three levels before the deepest one: every stage boundary but the stem and the last stage. Otherwise (ViTs and
    other models of equal blocks) they sit at 1/4, 1/2 and 3/4 of the depth.
    """
    indices = _distinct(stage_infos)
    depth = len(indices)
    levels = [list(run) for _, run in groupby(indices, key=lambda i: stage_infos[i].reduction)]
    if len(levels) >= 3:
        return [level[-1] for level in levels[:-1]][-3:]
    quarters = {max(depth * quarter // 4 - 1, 0) for quarter in (1, 2, 3)}
    return sorted(indices[i] for i in quarters if i < depth - 1)


def _distinct(stage_infos: Sequence[StageInfo]) -> List[int]:
    """Indices of the stages, ending with the last one; of parallel branches, which share a module, the first alone."""
    last = stage_infos[-1].module
    seen, indices = {last} if last else set(), []
    for index, stage in enumerate(stage_infos[:-1]):
        if stage.module not in seen:
            indices.append(index)
        if stage.module:
            seen.add(stage.module)
    return indices + [len(stage_infos) - 1]


def resolve_exit_indices(
        stage_infos: Sequence[StageInfo],
        exit_indices: Optional[Union[int, Sequence[int]]],
        model_name: str = 'model',
) -> List[int]:
    """Absolute, ascending stage indices for `exit_indices`, which is read like timm's `out_indices`.

    Args:
        stage_infos: The stages of the model.
        exit_indices: None for the default places, an int n for the last n stages before the main network's own,
            or indices into `feature_info` (negative ones count from the end).
        model_name: What error messages call the model.

    Raises:
        ValueError: If an index is out of range, named twice or the last stage, or if there is no stage for an exit.
    """
    depth = len(stage_infos)
    where = f"'{model_name}' ({depth} feature stages: 0..{depth - 1})"
    if exit_indices is None:
        exit_indices = default_exit_indices(stage_infos)
        if not exit_indices:
            raise ValueError(f'{where} has no stage before its last one, there is no place for an exit.')
    elif isinstance(exit_indices, int):
        if not 0 < exit_indices < depth:
            raise ValueError(
                f'exit_indices={exit_indices} asks for the last {exit_indices} stages before the main network of '
                f'{where}; choose 1..{depth - 1}, or pass a list of stage indices.')
        exit_indices = range(depth - 1 - exit_indices, depth - 1)
    resolved: List[int] = []
    if isinstance(exit_indices, str) or not all(isinstance(i, int) for i in exit_indices):
        raise ValueError(f'exit_indices={exit_indices!r} must be whole numbers, stage indices of {where}.')
    for index in exit_indices:
        absolute = index + depth if index < 0 else index
        if not 0 <= absolute < depth:
            raise ValueError(
                f'exit index {index} is out of range for {where}; use negative indices to count from the end.')
        if absolute == depth - 1:
            raise ValueError(
                f'exit index {index} is the last stage of {where}, whose exit is the main network itself; '
                f'leave it out or choose from 0..{depth - 2}.')
        if absolute in resolved:
            raise ValueError(f'exit index {index} names stage {absolute} of {where} twice; name each stage once.')
        resolved.append(absolute)
    if not resolved:
        raise ValueError(f'exit_indices is empty; name at least one stage of {where}, or pass None for the default.')
    return sorted(resolved)


def _expansion(model: TimmModel, stage: StageInfo) -> int:
    """How much wider a stage's output is than its planes: the `expansion` of its residual blocks, 1 without."""
    try:
        module = model.get_submodule(stage.module)
    except AttributeError:  # some feature_info names are not module names
        return 1
    for block in module.modules():
        expansion = getattr(block, 'expansion', None)
        if isinstance(expansion, int) and expansion > 1 and stage.channels % expansion == 0:
            return expansion
    return 1


def exit_widths(model: TimmModel, index: int, num_features: int) -> List[int]:
    """Output widths of the convolutions of an exit behind stage `index`, one per halving still to come.

    They step through the planes of the stages still to come (bottleneck ResNets: channels without the expansion)
    and end with the width of the main network's pre-logits feature, so that the features of all exits agree.
    At least one convolution, also where the resolution never falls again.

    Args:
        model: The timm model.
        index: Absolute stage index.
        num_features: D, the width of the pre-logits feature.
    """
    infos = stages(model)
    reduction, final = infos[index].reduction, infos[-1].reduction
    widths = []
    while reduction * 2 < final:
        reduction *= 2
        # the deepest stage at this resolution, or the first one beyond where a level is skipped
        stage = next(s for i, s in enumerate(infos) if s.reduction >= reduction and (
            i + 1 == len(infos) or infos[i + 1].reduction > s.reduction))
        widths.append(stage.channels // _expansion(model, stage))
    return widths + [num_features]


def _conv(in_chans: int, width: int, stride: int) -> nn.Module:
    return ConvNormAct(in_chans, width, 3, stride=stride)


def _separable(in_chans: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(
        ConvNormAct(in_chans, in_chans, 3, stride=stride, groups=in_chans),
        ConvNormAct(in_chans, width, 1),
    )


def _bottleneck(in_chans: int, width: int, stride: int) -> nn.Module:
    planes = max(width // 4, 1)
    return nn.Sequential(
        ConvNormAct(in_chans, planes, 1),
        ConvNormAct(planes, planes, 3, stride=stride),
        ConvNormAct(planes, width, 1),
    )


_STEPS: Dict[str, Callable[[int, int, int], nn.Module]] = {
    'conv': _conv, 'separable': _separable, 'bottleneck': _bottleneck}
EXIT_TYPES: Tuple[str, ...] = (*_STEPS, 'linear')
EXIT_KWARGS = ('drop_rate', 'last_stride')  # further arguments of `ExitHead` that callers may give


class ExitHead(nn.Module):
    """One exit: stage map [B, C, H, W] -> feature F_i [B, D] -> logits Z_i [B, K].

    Kinds:
        'conv': a 3x3 stride-2 convolution (+ batch norm + ReLU) per halving of resolution still to come, the paper's.
        'separable': the same with depthwise 3x3 + pointwise convolutions, about a tenth of the cost on wide networks.
        'bottleneck': per halving 1x1 to a quarter of the width, 3x3 stride 2, 1x1 back, as in be-your-own-teacher.
        'linear': layer norm, average pool, and a projection to D only where C differs: nearly free.
    Each ends in global average pooling and a fully connected layer; any height, width and aspect will do.

    Args:
        in_chans: C, channels of the stage map.
        widths: Output widths of the convolutions, the last is D (see `exit_widths`).
        num_classes: K; 0 leaves the fully connected layer out, as in timm.
        exit_type: One of EXIT_TYPES.
        drop_rate: Dropout before the fully connected layer; F_i is what comes out of it, as in timm's own heads.
        last_stride: Stride of the last convolution, 2, or 1 to pool over a map of twice the side (the paper's VGG19).

    Raises:
        ValueError: If the exit type is unknown, the stride is neither 1 nor 2, or the drop rate not within 0..1.
    """

    def __init__(
            self,
            in_chans: int,
            widths: Sequence[int],
            num_classes: int = 1000,
            exit_type: str = 'conv',
            drop_rate: float = 0.,
            last_stride: int = 2,
    ):
        super().__init__()
        if exit_type not in EXIT_TYPES:
            raise ValueError(f"Unknown exit type '{exit_type}', choose one of {', '.join(EXIT_TYPES)}.")
        if last_stride not in (1, 2):
            raise ValueError(f'last_stride={last_stride} must be 1 or 2.')
        if not isinstance(drop_rate, (int, float)) or not 0 <= drop_rate <= 1:
            raise ValueError(f'drop_rate={drop_rate} must be a number from 0 to 1.')
        self.in_chans = in_chans
        self.num_features = widths[-1]
        self.norm: nn.Module = nn.Identity()
        self.proj: nn.Module = nn.Identity()
        self.steps = nn.Sequential()
        if exit_type == 'linear':
            self.norm = LayerNorm2d(in_chans)
            if in_chans != self.num_features:
                self.proj = nn.Linear(in_chans, self.num_features)
        else:
            strides = [2] * (len(widths) - 1) + [last_stride]
            for width, stride in zip(widths, strides):
                self.steps.append(_STEPS[exit_type](in_chans, width, stride))
                in_chans = width
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)
        self._init_convs()

    def _init_convs(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the fully connected layer by a fresh one; 0 classes leave the feature as the output."""
        reference: Dict[str, Any] = {}
        if isinstance(self.fc, nn.Linear):
            reference = dict(device=self.fc.weight.device, dtype=self.fc.weight.dtype)
        elif (parameter := next(self.parameters(), None)) is not None:
            reference = dict(device=parameter.device, dtype=parameter.dtype)
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes, **reference) if num_classes > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, K] and feature [B, D] of a stage map [B, C, H, W]."""
        feature = self.drop(self.proj(self.steps(self.norm(x)).mean((2, 3))))
        return self.fc(feature), feature
