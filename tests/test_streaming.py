"""WebDataset shards and Hugging Face data sets through timm's readers, made here."""
import argparse
import csv
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from conftest import write_images
from launch import TESTS, torchrun
from timm.data import resolve_data_config

import train_eed
from timm_eed.training.arguments import parse_args
from timm_eed.training.build import setup_device
from timm_eed.training.data import create_data

SMALL = ('--model test_resnet --img-size 32 -b 4 -vb 3 --epochs 2 --warmup-epochs 0 --lr .01 --sched none --device cpu '
         '--num-classes 3').split()
TRAIN_SHARDS, VAL_SHARDS = (6, 6, 6, 6), (5, 4, 2)  # samples


def write_shards(folder: Path, images: Path, name: str, sizes) -> dict:
    """WebDataset shards of PNGs with class indices; gives their part of _info.json."""
    folder.mkdir(exist_ok=True)
    paths = sorted(images.rglob('*.png'), key=lambda path: path.stem)
    files = [f'{name}-{number}.tar' for number in range(len(sizes))]
    for file, size in zip(files, sizes):
        with tarfile.open(folder / file, 'w') as tar:
            for path in [paths.pop() for _ in range(size)]:
                for ending, data in (('png', path.read_bytes()), ('cls', path.parent.name[-1].encode())):
                    entry = tarfile.TarInfo(f'{path.parent.name}-{path.stem}.{ending}')
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return dict(name=name, num_samples=sum(sizes), filenames=files, shard_lengths=sizes)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """24 training and 11 validation images of 3 classes in folders, as imagefolder data sets have them."""
    root = tmp_path_factory.mktemp('images')
    write_images(root / 'train', 8)
    write_images(root / 'validation', 4, train=False)
    (root / 'validation/class1/2.png').unlink()
    return root


@pytest.fixture(scope='module')
def shards(images, tmp_path_factory):
    """The same images in shards."""
    pytest.importorskip('webdataset')
    folder = tmp_path_factory.mktemp('shards')
    splits = {name: write_shards(folder, images / name, name, sizes)
              for name, sizes in (('train', TRAIN_SHARDS), ('validation', VAL_SHARDS))}
    (folder / '_info.json').write_text(json.dumps({'splits': splits}))
    return folder


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run the script; gives the folder of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_eed, 'setup_default_logging', lambda: None)  # adds a handler at every call

    def run(*flags, experiment='run'):
        train_eed.main([*SMALL, '--output', str(tmp_path), '--experiment', experiment, *flags])
        return tmp_path / experiment
    return run


def rows_of(folder: Path):
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def load(path: Path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def loaders(*flags):
    args = parse_args([*SMALL, '--no-aug', *flags])
    device = setup_device(args)
    config = resolve_data_config(vars(args), model=timm.create_model('test_resnet'))
    return create_data(args, config, 3, device)


def seen(loader):
    """Every image of an epoch as text, sorted, with its label."""
    return sorted((str(image.sum().item()), int(label)) for x, y in loader for image, label in zip(x, y))


def sources(images, shards):
    """Flags of each way to the same 24 + 11 images."""
    return {
        'wds': ['--dataset', 'wds/digits', '--data', str(shards)],
        'hfds': ['--dataset', f'hfds/{images}'],
        'hfids': ['--dataset', f'hfids/{images}', '--train-num-samples', '24', '--val-num-samples', '11'],
    }


@pytest.fixture(params=['wds', 'hfds', 'hfids'])
def source(request, images, tmp_path, monkeypatch):
    """Flags of each way to the same images."""
    if request.param == 'wds':
        return ['--dataset', 'wds/digits', '--data', str(request.getfixturevalue('shards'))]
    pytest.importorskip('datasets')
    flags = ['--dataset', f'{request.param}/{images}', '--data', str(tmp_path / 'cache')]
    if request.param == 'hfids':
        flags += ['--train-num-samples', '24', '--val-num-samples', '11', '--dataset-download']
    return flags


@pytest.mark.parametrize('workers', ['0', '2'])
def test_streams_give_what_the_folder_gives(source, images, workers):
    folder = loaders('--data', str(images), '-j', '0')
    data = loaders(*source, '-j', workers)
    assert len(data.train) == 6 and data.train.dataset is not None
    for epoch in (0, 1):
        data.set_epoch(epoch)
        assert sum(len(x) for x, _ in data.train) == 24
        assert seen(data.validation) == seen(folder.validation)  # each of the 11 once


@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_stream_trains_and_resumes(train, source, workers):
    flags = [*source, '-j', workers]
    whole = train(*flags, experiment='whole')
    rows = rows_of(whole)
    assert len(rows) == 2 and 0 < float(rows[0]['train_loss']) and 'eval_top1_exit1' in rows[0]
    correct = float(rows[1]['eval_top1_ensemble']) * .11
    assert correct == pytest.approx(round(correct), abs=1e-6)
    train(*flags, '--epochs', '1', experiment='parts')
    parts = train(*flags, '--resume', 'auto', experiment='parts')
    assert [row['epoch'] for row in rows_of(parts)] == ['0', '1']
    straight, resumed = (load(folder / 'last.pth.tar')['state_dict'] for folder in (whole, parts))
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
