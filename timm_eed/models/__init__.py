"""The paper's networks for 32x32 images; importing this registers them with timm."""
from .blocks import PyramidBlock, ZeroPadShortcut
from .cifar import CifarNet

__all__ = ['CifarNet', 'PyramidBlock', 'ZeroPadShortcut']
