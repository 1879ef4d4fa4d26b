"""Shared by all tests: one thread, a hub on the loopback interface, and a small folder of real images."""
from hub_session import HUB  # first: huggingface_hub reads its settings when it is imported

# isort: split
import argparse
import csv
import io
import json
import os
import tarfile
import time
from itertools import islice
from pathlib import Path
from typing import Any, Dict, List, Sequence

import pytest
import torch
from PIL import Image

from timm_eed.training.digits import Digits

os.environ.setdefault('OMP_NUM_THREADS', '1')  # also for the processes that tests start
torch.set_num_threads(1)


def rows_of(folder: Path) -> List[Dict[str, str]]:
    """The rows of a run's summary.csv."""
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def load(path: Path) -> Dict[str, Any]:
    """A training checkpoint, read without the package's own code."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True, map_location='cpu')


def write_images(root: Path, per_class: int, classes: int = 3, train: bool = True) -> None:
    """Digits as PNG files, a folder per class."""
    written = [0] * classes
    for image, label in Digits(train=train):
        if label < classes and written[label] < per_class:
            folder = root / f'class{label}'
            folder.mkdir(parents=True, exist_ok=True)
            image.convert('RGB').resize((40, 40), Image.Resampling.NEAREST).save(folder / f'{written[label]}.png')
            written[label] += 1


def write_shards(folder: Path, images: Path, **sizes: Sequence[int]) -> None:
    """WebDataset shards of the first images in folders: for each split the numbers of samples in its shards."""
    folder.mkdir(exist_ok=True)
    splits = {}
    for split, lengths in sizes.items():
        paths = iter(sorted((images / split).rglob('*.png'), key=lambda path: (path.stem, path.parent)))
        files = [f'{split}-{number}.tar' for number in range(len(lengths))]
        for file, length in zip(files, lengths):
            with tarfile.open(folder / file, 'w') as tar:
                for path in islice(paths, length):
                    for ending, data in (('png', path.read_bytes()), ('cls', path.parent.name[-1].encode())):
                        entry = tarfile.TarInfo(f'{path.parent.name}-{path.stem}.{ending}')
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
        splits[split] = dict(name=split, num_samples=sum(lengths), filenames=files, shard_lengths=list(lengths))
    (folder / '_info.json').write_text(json.dumps({'splits': splits}))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """An ImageFolder of 3 classes: 12 training and 4 validation images each."""
    root = tmp_path / 'images'
    write_images(root / 'train', 12)
    write_images(root / 'val', 4, train=False)
    return root


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub that knows `me` (hf_me, which is set) and `you` (hf_you); waiting is short."""
    HUB.reset()
    HUB.tokens.update(hf_me='me', hf_you='you')
    monkeypatch.setenv('HF_TOKEN', 'hf_me')
    sleep = time.sleep
    monkeypatch.setattr(time, 'sleep', lambda seconds: sleep(min(seconds, .01)))
    return HUB


@pytest.fixture
def one_thread():
    """For networks that are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
