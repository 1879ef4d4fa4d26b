"""WebDataset shards and Hugging Face data sets through timm's readers, made here."""

import pytest
import timm
import torch
from conftest import load, rows_of, write_images, write_shards
from timm.data import resolve_data_config

import train_eed
from timm_eed.training.arguments import parse_args
from timm_eed.training.build import setup_device
from timm_eed.training.data import create_data

SMALL = ('--model test_resnet --img-size 32 -b 4 -vb 3 --epochs 2 --warmup-epochs 0 --lr .01 --sched none --device cpu '
         '--num-classes 3').split()
TRAIN_SHARDS, VAL_SHARDS = (6, 6, 6, 6), (5, 4, 2)  # samples


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
    write_shards(folder, images, train=TRAIN_SHARDS, validation=VAL_SHARDS)
    return folder


@pytest.fixture
def train(tmp_path, monkeypatch, one_thread):
    """Run the script; gives the folder of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_eed, 'setup_default_logging', lambda: None)  # adds a handler at every call

    def run(*flags, experiment='run'):
        train_eed.main([*SMALL, '--output', str(tmp_path), '--experiment', experiment, *flags])
        return tmp_path / experiment
    return run


def loaders(*flags):
    args = parse_args([*SMALL, '--no-aug', *flags])
    device = setup_device(args)
    config = resolve_data_config(vars(args), model=timm.create_model('test_resnet'))
    return create_data(args, config, 3, device)


def seen(loader):
    """Every image of an epoch as text, sorted, with its label."""
    return sorted((str(image.sum().item()), int(label)) for x, y in loader for image, label in zip(x, y))


@pytest.fixture(params=['wds-0', 'wds-2', 'hfds-2', 'hfids-0', 'hfids-2'])
def source(request, images, tmp_path):
    """Flags of each way to the same images, with the number of loader processes."""
    kind, workers = request.param.split('-')
    if kind == 'wds':
        return ['--dataset', 'wds/digits', '--data', str(request.getfixturevalue('shards')), '-j', workers]
    pytest.importorskip('datasets')
    flags = ['--dataset', f'{kind}/{images}', '--data', str(tmp_path / 'cache'), '-j', workers]
    if kind == 'hfids':
        flags += ['--train-num-samples', '24', '--val-num-samples', '11']
        flags += ['--dataset-download'] if workers != '0' else []  # a folder is one shard, prepared it is split
    return flags


def test_streams_give_what_the_folder_gives(source, images):
    folder, data = loaders('--data', str(images), '-j', '0'), loaders(*source)
    assert len(data.train) == 6
    for epoch in (0, 1):
        data.set_epoch(epoch)
        assert [len(x) for x, _ in data.train] == [4] * 6
        assert seen(data.validation) == seen(folder.validation)  # each of the 11 once
    assert len({image for image, _ in seen(data.train)}) > 12  # of 24, which shuffling or workers may repeat


def test_a_stream_trains_and_resumes(train, source):
    whole = train(*source, experiment='whole')
    rows = rows_of(whole)
    assert len(rows) == 2 and 0 < float(rows[0]['train_loss'])
    for name in ('top1', 'top1_exit1', 'top5_exit3', 'top1_ensemble'):
        correct = float(rows[1][f'eval_{name}']) * .11
        assert correct == pytest.approx(round(correct), abs=1e-6)
    train(*source, '--epochs', '1', experiment='parts')
    parts = train(*source, '--resume', 'auto', experiment='parts')
    assert [row['epoch'] for row in rows_of(parts)] == ['0', '1']
    straight, resumed = (load(folder / 'last.pth.tar')['state_dict'] for folder in (whole, parts))
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_numbers_of_samples_from_the_command_line(shards):
    data = loaders('--dataset', 'wds/digits', '--data', str(shards), '--train-num-samples', '13', '-j', '0')
    assert len(data.train) == 4  # whole batches
    assert [len(x) for x, _ in data.train] == [4] * 4
    braces = loaders(
        '--dataset', 'wds/digits', '--data', str(shards), '--train-split', 'train-{0..1}.tar|12', '--val-split',
        'validation-{0..2}.tar', '--val-num-samples', '11', '-j', '0')
    assert (len(braces.train), len(braces.validation)) == (3, 4)
    assert len(seen(braces.validation)) == 11


def test_what_is_wrong_with_a_stream_is_said(train, shards):
    def fails(*flags):
        with pytest.raises(SystemExit) as stop:
            train(*flags)
        return str(stop.value)
    wds = ['--dataset', 'wds/digits', '--data', str(shards)]
    assert 'name the folder or address of the shards with --data' in fails('--dataset', 'wds/digits', '-j', '0')
    assert 'training data ended after 1 of 2 batches' in fails(*wds, '--train-split', 'train-0.tar|6', '-j', '2')
    assert "Cannot read split 'test'" in fails(*wds, '--val-split', 'test', '-j', '0')
