"""Shared by all tests: two threads, and a small folder of real images made on the spot."""
from pathlib import Path

import pytest
import torch
from PIL import Image

from timm_eed.training.digits import Digits

torch.set_num_threads(2)


def write_images(root: Path, per_class: int, classes: int = 3, train: bool = True) -> None:
    """Digits as PNG files, a folder per class."""
    written = [0] * classes
    for image, label in Digits(train=train):
        if label < classes and written[label] < per_class:
            folder = root / f'class{label}'
            folder.mkdir(parents=True, exist_ok=True)
            image.convert('RGB').resize((40, 40), Image.Resampling.NEAREST).save(folder / f'{written[label]}.png')
            written[label] += 1


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """An ImageFolder of 3 classes: 12 training and 4 validation images each."""
    root = tmp_path / 'images'
    write_images(root / 'train', 12)
    write_images(root / 'val', 4, train=False)
    return root
