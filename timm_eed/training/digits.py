"""The UCI handwritten digits that ship with the package, as a data set like torchvision's."""
from importlib.resources import files
from typing import Any, Callable, List, Optional, Tuple

import numpy as np
import torch.utils.data
from PIL import Image

__all__ = ['Digits']

_SIDE = 8


class Digits(torch.utils.data.Dataset):
    """1,797 grey 8x8 images of the digits 0..9; `digits.md` beside the file has source, licence and splits.

    Args:
        train: The four fifths to train on, or the held-out fifth.
        transform: Applied to each PIL image.
        input_img_mode: PIL mode that images are converted to.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(self, train: bool = True, transform: Optional[Callable] = None, input_img_mode: str = 'L'):
        self.transform = transform
        self.input_img_mode = input_img_mode
        with files(__package__).joinpath('digits.png').open('rb') as file:
            sheet = np.asarray(Image.open(file))
        self.samples: List[Tuple[np.ndarray, int]] = []
        for label, row in enumerate(np.split(sheet, len(self.classes))):
            tiles = [tile for tile in np.split(row, row.shape[1] // _SIDE, axis=1) if tile.any()]
            self.samples += [(tile, label) for i, tile in enumerate(tiles) if (i % 5 != 4) == train]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        tile, label = self.samples[index]
        image: Any = Image.fromarray(tile).convert(self.input_img_mode)
        return (self.transform(image) if self.transform is not None else image), label
