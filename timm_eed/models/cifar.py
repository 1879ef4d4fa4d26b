"""Networks for 32x32 images, the ones of 'Exit-Ensemble Distillation', in timm's manner and from timm's blocks.

    ResNet      https://arxiv.org/abs/1512.03385    ResNeXt     https://arxiv.org/abs/1611.05431
    WideResNet  https://arxiv.org/abs/1605.07146    PyramidNet  https://arxiv.org/abs/1610.02915
    VGG         https://arxiv.org/abs/1409.1556

All start with a 3x3 convolution at full resolution and have no max-pool in the stem.
Shapes: B batch, C channels, H x W input, D width of the last stage, K classes.
"""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, ConvNormAct, DropPath, create_classifier, create_conv2d
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from timm.models.resnetv2 import DownsampleConv, PreActBasic

from .blocks import PyramidBlock, ZeroPadShortcut

__all__ = ['CifarNet']

BLOCKS = ('basic', 'bottleneck', 'preact', 'pyramid', 'conv')


class CifarNet(nn.Module):
    """A stem convolution, stages of equal blocks (each but the first halves the resolution), pooling, one linear layer.

    Args:
        block: 'basic' and 'bottleneck' (ResNet, ResNeXt), 'preact' (WideResNet), 'pyramid' (PyramidNet), or 'conv':
            plain convolutions without stem, a 2x2 max-pool behind every stage but the last, whose pool is the global
            one (VGG).
        depths: Blocks per stage.
        channels: Planes per stage; a bottleneck's output has four times as many.
        stem_width: Channels of the stem.
        widening: Channels added by each block, instead of `channels` ('pyramid').
        cardinality: Groups of a bottleneck's 3x3 convolution.
        base_width: Width per group of a bottleneck at 64 planes.
        pad_shortcut: Parameter-free shortcuts for 'basic' (option A of the ResNet paper) instead of projections.
        num_classes: K.
        in_chans: Channels of the image.
        global_pool: Pooling before the classifier.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.

    Raises:
        ValueError: If the kind of block is unknown.
    """

    def __init__(
            self,
            block: str = 'basic',
            depths: Sequence[int] = (2, 2, 2, 2),
            channels: Sequence[int] = (64, 128, 256, 512),
            stem_width: int = 64,
            widening: int = 0,
            cardinality: int = 1,
            base_width: int = 64,
            pad_shortcut: bool = False,
            num_classes: int = 100,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
    ):
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"Unknown block '{block}', choose one of {', '.join(BLOCKS)}.")
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.stem, width = _stem(block, in_chans, stem_width)
        options: Dict[str, Any] = dict(cardinality=cardinality, base_width=base_width, pad_shortcut=pad_shortcut)
        drop_paths = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        reduction, stages = 1, []
        self.feature_info: List[Dict[str, Any]] = []
        for index, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                planes = width + widening if widening else channels[index]
                stride = 2 if i == 0 and index > 0 and block != 'conv' else 1
                blocks.append(_block(block, width, planes, stride, drop_paths.pop(0), **options))
                width = planes * (Bottleneck.expansion if block == 'bottleneck' else 1)
                reduction *= stride
            if block == 'conv' and index + 1 < len(depths):
                blocks.append(nn.MaxPool2d(2))
                reduction *= 2
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=width, reduction=reduction, module=f'stages.{index}'))
        self.stages = nn.ModuleList(stages)
        self.norm = BatchNormAct2d(width) if block in ('preact', 'pyramid') else nn.Identity()
        self.num_features = width
        self.global_pool, self.head_drop, self.fc = create_classifier(
            width, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = width * self.global_pool.feat_mult()
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns of parameter groups, a group per stage or per block."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [(r'^stages\.(\d+)\.(\d+)', None), (r'^norm', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass, to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A fresh linear layer (none for 0 classes), and other pooling where it is named ('' for none)."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        parameter = next(self.parameters())
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool, device=parameter.device, dtype=parameter.dtype)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def _run_stage(self, stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Stage maps [B, C, H, W] beside the final features.

        Args:
            x: Images [B, C, H, W].
            indices: Stages: the last n for an int, all for None, else the listed ones.
            norm: Apply the final norm to the last map, where the network has one.
            stop_early: Stop behind the last stage asked for.
            output_fmt: 'NCHW', the only one.
            intermediates_only: Return the maps alone.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        last = len(self.feature_info) - 1
        intermediates = []
        x = self.stem(x)
        for index, stage in enumerate(self.stages[:max_index + 1] if stop_early else self.stages):
            x = self._run_stage(stage, x)
            if index in take_indices:
                intermediates.append(self.norm(x) if norm and index == last else x)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the stages behind the last one asked for; returns the stages kept as indices."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        cut = max_index + 1 < len(self.feature_info)
        self.stages = self.stages[:max_index + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or cut:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Final map [B, D, H', W'] of images [B, C, H, W]."""
        x = self.stem(x)
        for stage in self.stages:
            x = self._run_stage(stage, x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits [B, K] of a final map, or the pooled feature [B, D] for `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        return self.forward_head(self.forward_features(x))


def _stem(block: str, in_chans: int, width: int) -> Tuple[nn.Module, int]:
    """The first layer and its channels; pre-activation networks norm later, VGG has none."""
    if block == 'conv':
        return nn.Identity(), in_chans
    if block == 'preact':
        return create_conv2d(in_chans, width, 3), width
    return ConvNormAct(in_chans, width, 3, apply_act=block != 'pyramid'), width


def _block(
        kind: str, in_chs: int, planes: int, stride: int, drop_path: float,
        cardinality: int, base_width: int, pad_shortcut: bool,
) -> nn.Module:
    if kind == 'conv':
        return ConvNormAct(in_chs, planes, 3)
    if kind == 'preact':
        return PreActBasic(
            in_chs, planes, stride=stride, conv_layer=create_conv2d, norm_layer=BatchNormAct2d,
            proj_layer=DownsampleConv, drop_path_rate=drop_path)
    if kind == 'pyramid':
        shortcut = ZeroPadShortcut(in_chs, planes, stride, average=True)
        return PyramidBlock(in_chs, planes, stride, shortcut if planes != in_chs or stride > 1 else None, drop_path)
    block: Callable[..., nn.Module] = BasicBlock if kind == 'basic' else Bottleneck
    out_chs = planes * (Bottleneck.expansion if kind == 'bottleneck' else 1)
    downsample: Optional[nn.Module] = None
    if stride > 1 or in_chs != out_chs:
        downsample = ZeroPadShortcut(in_chs, out_chs, stride) if pad_shortcut else downsample_conv(
            in_chs, out_chs, 1, stride)
    return block(
        in_chs, planes, stride, downsample, cardinality=cardinality, base_width=base_width,
        drop_path=DropPath(drop_path) if drop_path > 0. else None)


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    """CIFAR-100's classes, size and statistics, which serve CIFAR-10 as well."""
    return dict(
        num_classes=100, input_size=(3, 32, 32), crop_pct=1., interpolation='bilinear', classifier='fc',
        mean=(.5071, .4865, .4409), std=(.2673, .2564, .2762),
        **{'pool_size': (4, 4), 'first_conv': 'stem.conv', **kwargs})


default_cfgs = generate_default_cfgs({
    'cifar_resnet18.untrained': _cfg(),
    'cifar_resnet50.untrained': _cfg(),
    'cifar_resnet101.untrained': _cfg(),
    'cifar_resnet152.untrained': _cfg(),
    'cifar_resnet20.untrained': _cfg(pool_size=(8, 8)),
    'cifar_vgg19.untrained': _cfg(pool_size=(2, 2), first_conv='stages.0.0.conv'),
    'cifar_resnext29_4x64d.untrained': _cfg(pool_size=(8, 8)),
    'cifar_wide_resnet28_10.untrained': _cfg(pool_size=(8, 8), first_conv='stem'),
    'cifar_wide_resnet16_4.untrained': _cfg(pool_size=(8, 8), first_conv='stem'),
    'cifar_pyramidnet110_a270.untrained': _cfg(pool_size=(8, 8)),
})


def _create(variant: str, pretrained: bool, kwargs: Dict[str, Any], **definition: Any) -> CifarNet:
    args = {**definition, **kwargs}
    feature_cfg = dict(out_indices=tuple(range(len(args.get('depths', (2, 2, 2, 2))))), feature_cls='getter')
    return build_model_with_cfg(CifarNet, variant, pretrained, feature_cfg=feature_cfg, **args)


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-18: 11,220,132 parameters with 100 classes."""
    return _create('cifar_resnet18', pretrained, kwargs)


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-50."""
    return _create('cifar_resnet50', pretrained, kwargs, block='bottleneck', depths=(3, 4, 6, 3))


@register_model
def cifar_resnet101(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-101."""
    return _create('cifar_resnet101', pretrained, kwargs, block='bottleneck', depths=(3, 4, 23, 3))


@register_model
def cifar_resnet152(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-152."""
    return _create('cifar_resnet152', pretrained, kwargs, block='bottleneck', depths=(3, 8, 36, 3))


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-20 of the ResNet paper, 16-32-64 channels, shortcuts without parameters: 0.27 M parameters."""
    return _create(
        'cifar_resnet20', pretrained, kwargs, depths=(3, 3, 3), channels=(16, 32, 64), stem_width=16, pad_shortcut=True)


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """VGG19 with batch norm and one linear layer; the fifth pool of its 32x32 input is the global one."""
    return _create(
        'cifar_vgg19', pretrained, kwargs,
        block='conv', depths=(2, 2, 4, 4, 4), channels=(64, 128, 256, 512, 512), global_pool='max')


@register_model
def cifar_resnext29_4x64d(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNeXt-29, 4x64d: the ResNeXt paper's CIFAR network (there 8x64d, 16x64d) with 4 groups."""
    return _create(
        'cifar_resnext29_4x64d', pretrained, kwargs,
        block='bottleneck', depths=(3, 3, 3), channels=(64, 128, 256), cardinality=4)


@register_model
def cifar_wide_resnet28_10(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """WideResNet-28-10: 36.5 M parameters."""
    return _create(
        'cifar_wide_resnet28_10', pretrained, kwargs,
        block='preact', depths=(4, 4, 4), channels=(160, 320, 640), stem_width=16)


@register_model
def cifar_wide_resnet16_4(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """WideResNet-16-4: 2.8 M parameters with 100 classes."""
    return _create(
        'cifar_wide_resnet16_4', pretrained, kwargs,
        block='preact', depths=(2, 2, 2), channels=(64, 128, 256), stem_width=16)


@register_model
def cifar_pyramidnet110_a270(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """PyramidNet-110 with basic blocks, widening 270 (5 channels a block): 28.5 M parameters."""
    return _create(
        'cifar_pyramidnet110_a270', pretrained, kwargs,
        block='pyramid', depths=(18, 18, 18), stem_width=16, widening=5)
