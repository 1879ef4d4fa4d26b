"""Several processes under torchrun (gloo, CPU) against one."""
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import rank_steps
import torch
from conftest import load, rows_of, write_images, write_shards
from launch import TESTS, torchrun

from timm_eed.task import MultiExitEvaluator
from timm_eed.training.build import build_model, setup_device
from timm_eed.training.data import create_data
from timm_eed.training.errors import TrainingError
from timm_eed.training.runs import load_run

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = ('--model test_resnet --img-size 32 -b 4 -j 0 --warmup-epochs 0 --lr .01 --sched none --device cpu '
         '--data images --num-classes 3 --output out').split()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images of 3 classes: 36 for training; 13 for validation, which no number of processes divides."""
    root = tmp_path_factory.mktemp('distributed')
    write_images(root / 'images/train', 12)
    write_images(root / 'images/val', 5, train=False)
    for name in ('class0/0.png', 'class2/4.png'):
        (root / 'images/val' / name).unlink()
    return root


def commands():
    """Whole, stopped and resumed, frozen and streamed runs."""
    whole = [*SMALL, '--eed-beta', '1', '--model-ema', '--model-ema-decay', '.9', '--mixup', '.2', '--experiment']
    runs = [
        [*whole, 'whole', '--epochs', '2', '--recovery-interval', '2'],
        [*whole, 'behind', '--epochs', '2', '--resume', 'out/whole/recovery-1-1.pth.tar'],
        [*whole, 'parts', '--epochs', '1'],
        [*whole, 'parts', '--epochs', '2', '--resume', 'auto'],
        [*SMALL, '--epochs', '1', '--eed-method', 'none', '--experiment', 'plain'],
        [*SMALL, '--epochs', '2', '--freeze-backbone', '--model-ema', '--initial-checkpoint', 'out/plain/last.pth.tar',
         '--experiment', 'frozen'],
    ]
    if find_spec('webdataset'):
        runs.append([*SMALL, '--epochs', '1', '--dataset', 'wds/digits', '--data', 'shards', '--val-split', 'val', '-j',
                     '1', '-vb', '3', '--experiment', 'streamed'])
    return runs


def run_ranks(folder: Path, processes: int, commands) -> list:
    """Results of `rank_steps` by process."""
    done = torchrun(processes, str(TESTS / 'rank_steps.py'), str(folder), str(folder / 'images'), json.dumps(commands),
                    cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f'{processes}-{rank}.pt') for rank in range(processes)]


@pytest.fixture(scope='module')
def two_ranks(folder):
    write_shards(folder / 'shards', folder / 'images', train=(12, 12), val=(6, 5, 2))
    return run_ranks(folder, 2, commands())


@pytest.fixture(scope='module')
def four_ranks(folder):
    return run_ranks(folder, 4, [])


@pytest.fixture(params=['two_ranks', 'four_ranks'])
def ranks(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def runs(two_ranks, folder):
    return folder / 'out'


def difference(tensors, expected):
    """Greatest deviation, as a share of the greatest expected value."""
    assert set(tensors) == set(expected)
    scale = max(float(t.abs().max()) for t in expected.values())
    return max(float((tensors[name] - t).abs().max()) for name, t in expected.items()) / scale


@pytest.mark.parametrize('norm', ['layer', 'batch'])
def test_a_step_equals_that_of_one_process(ranks, norm):
    expected = rank_steps.one_step(norm)
    gradients = {name: grad for name, grad in expected.items() if name.startswith('grad')}
    assert any('exits.0' in name for name in gradients) and any('backbone' in name for name in gradients)
    for rank in ranks:
        assert difference({name: rank[f'step {norm}'][name] for name in gradients}, gradients) < 1e-5
        assert difference(rank[f'step {norm}'], expected) < 1e-5


def test_sync_bn_on_the_cpu_is_refused():
    args = rank_steps.arguments('batch', '--sync-bn')
    device = setup_device(args)
    args.distributed = True
    with pytest.raises(TrainingError, match='--sync-bn: PyTorch shares batch norm statistics on GPUs only'):
        build_model(args, device)


def test_accumulated_batches_are_exchanged_once_per_update(ranks):
    expected = rank_steps.accumulated(2)['weights']
    for rank in ranks:
        assert difference(rank['accumulated']['weights'], expected) < 1e-5
        first, second, third, end = rank['accumulated']['exchanged']
        assert first == second == 0 and 0 < third < end
    untrained = rank_steps.one_step('layer')
    assert {name.removeprefix('grad ') for name in untrained} == set(expected)  # every weight takes part


def test_metrics_are_those_of_one_process(ranks, folder):
    expected = rank_steps.metrics(str(folder / 'images'))
    assert {'loss', 'top1', 'top1_exit1', 'top5_exit3', 'top1_ensemble'} <= set(expected)
    assert expected['top1'] * .13 == pytest.approx(round(expected['top1'] * .13), abs=1e-9)  # of 13 images
    for rank in ranks:
        assert rank['metrics'] == pytest.approx(expected, rel=1e-6)


def test_shared_batch_norm_statistics(ranks):
    mean = (len(ranks) + 1) / 2
    for number, rank in enumerate(ranks, start=1):
        for flags, value in {'--dist-bn reduce': mean, '--dist-bn broadcast': 1, '--dist-bn=': 1,
                             '--dist-bn= --no-ddp-bb': number}.items():
            assert all((t == value).all() for t in rank[flags].values()), flags
        for name, t in rank['--freeze-backbone'].items():
            assert (t == (number if name.startswith('backbone') else mean)).all(), name


def test_processes_that_disagree_say_so(ranks):
    for rank in ranks:
        agreed, images, epochs = rank['disagreement']
        assert agreed == '' and 'about the training images: 10 in process 0, 9 in process 1. All machines' in images
        assert 'about the epochs done: 0 in process 0, 2 in process 1.' in epochs


def test_resumed_run_ends_with_the_same_weights(runs):
    whole, parts = load(runs / 'whole/last.pth.tar'), load(runs / 'parts/last.pth.tar')
    assert whole['epoch'] == parts['epoch'] == 1
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(parts[key][name], value) for name, value in whole[key].items())
    assert [{**row, 'train_images_per_second': ''} for row in rows_of(runs / 'parts')] == [
        {**row, 'train_images_per_second': ''} for row in rows_of(runs / 'whole')]


def test_within_an_epoch_too(runs):
    """There each process has batch norm statistics of its own, which the end of the epoch averages."""
    whole, behind = load(runs / 'whole/last.pth.tar'), load(runs / 'behind/last.pth.tar')
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(behind[key][name], value) for name, value in whole[key].items())
    assert [{**row, 'train_images_per_second': ''} for row in rows_of(runs / 'behind')] == [
        {**row, 'train_images_per_second': ''} for row in rows_of(runs / 'whole')[1:]]


def test_frozen_backbone_stays_bit_for_bit(runs):
    plain, frozen = load(runs / 'plain/last.pth.tar')['state_dict'], load(runs / 'frozen/last.pth.tar')
    for key in ('state_dict', 'state_dict_ema'):
        backbone = {name.removeprefix('backbone.'): value for name, value in frozen[key].items() if 'backbone.' in name}
        assert all(torch.equal(backbone[name], value) for name, value in plain.items())
    first = load(runs / 'frozen/checkpoint-0.pth.tar')['state_dict']
    moved = {name for name, value in frozen['state_dict'].items() if not torch.equal(first[name], value)}
    assert moved == {name for name in first if name.startswith('exits.')}
    assert rows_of(runs / 'frozen')[0]['eval_top1'] == rows_of(runs / 'plain')[-1]['eval_top1']


def test_streamed_samples_are_counted_once(runs, folder):
    """3 validation shards of unequal size: 8 samples for one process, 5 for the other."""
    pytest.importorskip('webdataset')
    row, run = rows_of(runs / 'streamed')[0], load_run(str(runs / 'streamed'))
    args = rank_steps.arguments('batch', '--data', str(folder / 'images'), '-b', '3')
    device = setup_device(args)
    evaluator = MultiExitEvaluator(run.model.num_exits)
    with torch.no_grad():
        for x, y in create_data(args, run.data_config, 3, device).validation:
            evaluator.update(run.model.forward_exits(x), y)
    for name, value in evaluator.compute().items():
        assert float(row[f'eval_{name}']) == pytest.approx(value, rel=1e-5), name


def spoil(folder: Path, how: str) -> str:
    """Damage a folder of images; returns the message to expect."""
    if how == 'missing':
        shutil.rmtree(folder)
        return "in process 1: The data folder 'images' does not exist"
    for path in (folder / 'train').rglob('*.png'):
        path.write_bytes(b'no image')
    return 'in process 1: 10 images in a row are unreadable'


@pytest.mark.parametrize('how', ['missing', 'unreadable'])
def test_what_one_process_lacks_ends_the_job_with_its_error(folder, tmp_path, how):
    """Each process has a folder of its own, as on two machines."""
    for rank in '01':
        shutil.copytree(folder / 'images', tmp_path / rank / 'images')
    message = spoil(tmp_path / '1/images', how)
    done = torchrun(
        2, '--no-python', 'bash', '-c', 'cd $RANK && exec "$0" "$@"', sys.executable,
        str(TESTS.parent / 'train_eed.py'), *SMALL, '--epochs', '1', cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert 'Connection' not in done.stderr  # what the other process makes of it
