"""Residual blocks that timm does not have: parameter-free shortcuts and PyramidNet's block.

Shapes: B batch, C channels, H x W map.
"""
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath

__all__ = ['PyramidBlock', 'ZeroPadShortcut']


class ZeroPadShortcut(nn.Module):
    """Shortcut without parameters, [B, C_in, H, W] -> [B, C_out, H / stride, W / stride]: new channels are zero.

    'Option A' of https://arxiv.org/abs/1512.03385 takes every second pixel, https://arxiv.org/abs/1610.02915 averages.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        stride: Step in pixels.
        average: Average the pixels of a step instead of taking the first.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, average: bool = False):
        super().__init__()
        self.extra = out_chs - in_chs
        self.pool = nn.AvgPool2d(stride if average else 1, stride, ceil_mode=average) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The shortcut of a map."""
        return F.pad(self.pool(x), (0, 0, 0, 0, 0, self.extra))


class PyramidBlock(nn.Module):
    """Basic block of PyramidNet, https://arxiv.org/abs/1610.02915: BN, conv, BN, ReLU, conv, BN, plus the shortcut.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        stride: Step of the first convolution.
        downsample: Shortcut where the shape changes.
        drop_path: Stochastic depth rate.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            downsample: Optional[nn.Module] = None,
            drop_path: float = 0.,
    ):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chs)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output for a map."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv1(self.bn1(x))
        x = self.bn3(self.conv2(self.act(self.bn2(x))))
        return self.drop_path(x) + shortcut
