"""train_eed.py on small real images, from the command line down."""
import json
import logging
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import load, rows_of
from launch import torchrun
from timm.data import create_dataset, create_loader, resolve_data_config

import train_eed
from timm_eed import cli
from timm_eed.training.arguments import parse_args
from timm_eed.training.build import setup_device
from timm_eed.training.data import create_data
from timm_eed.training.digits import Digits
from timm_eed.training.errors import TrainingError
from timm_eed.training.loss_terms import LossTerms
from timm_eed.training.splits import SkippingImageDataset

SMALL = '--model test_resnet --img-size 32 -b 12 -j 0 --epochs 2 --warmup-epochs 0 --lr .01 --device cpu'.split()


@pytest.fixture
def train(image_folder, tmp_path, monkeypatch, caplog):
    """Run the script on the image folder; gives the folder of the run."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(train_eed, 'setup_default_logging', lambda: None)  # adds a handler at every call

    def run(*flags, experiment='run', data=True):
        data_flags = ['--data', str(image_folder), '--num-classes', '3'] if data else []
        train_eed.main([*SMALL, *data_flags, '--output', str(tmp_path / 'out'), '--experiment', experiment, *flags])
        return tmp_path / 'out' / experiment
    return run


def test_a_run_leaves_what_a_timm_user_expects(train, capsys):
    folder = train('--eed-beta', '1')
    rows = rows_of(folder)
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert {'train_loss', 'train_task_loss', 'train_distill_loss', 'train_feature_loss', 'eval_loss', 'eval_top1',
            'eval_top5', 'eval_top1_exit1', 'eval_top1_exit2', 'eval_top1_exit3', 'eval_top1_ensemble', 'lr',
            } <= set(rows[0])
    for name in ('last.pth.tar', 'model_best.pth.tar', 'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar'):
        assert (folder / name).exists()
    recorded = yaml.safe_load((folder / 'args.yaml').read_text())
    assert recorded['eed_beta'] == 1. and recorded['model'] == 'test_resnet' and recorded['lr'] == .01
    table = capsys.readouterr().out.splitlines()[-6:]
    assert [line.split()[0] for line in table] == ['exit', 'exit1', 'exit2', 'exit3', 'main', 'ensemble']
    assert float(table[4].split()[6]) == pytest.approx(float(rows[-1]['eval_top1']), abs=.01)


def test_args_yaml_is_a_config(train):
    folder = train()
    again = train('--config', str(folder / 'args.yaml'), experiment='again', data=False)
    assert rows_of(again)[-1]['train_loss'] == rows_of(folder)[-1]['train_loss']


def test_loss_terms_add_up_in_the_summary(train):
    row = rows_of(train('--eed-alpha', '.5', '--eed-beta', '2', '--epochs', '1'))[0]
    loss, task, distill, feature = (
        float(row[f'train_{n}']) for n in ('loss', 'task_loss', 'distill_loss', 'feature_loss'))
    assert distill > 0 and feature > 0
    assert loss == pytest.approx(task + .5 * distill + 2 * feature, rel=1e-5)


def test_without_exits_it_is_plain_timm(train):
    """The same final weights as a loop of timm's pieces written here."""
    folder = train('--eed-method', 'none', '--sched', 'none', '--no-aug', '--smoothing', '0', '--epochs', '2')
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    timm.utils.random_seed(42, 0)
    model = timm.create_model('test_resnet', num_classes=3)
    config = resolve_data_config({'img_size': 32}, model=model)
    dataset = create_dataset('', args['data_dir'], split='train', is_training=True)
    loader = create_loader(
        dataset, config['input_size'], 12, is_training=True, no_aug=True, num_workers=0, mean=config['mean'],
        std=config['std'], interpolation=config['interpolation'], device=torch.device('cpu'))
    optimizer = timm.optim.create_optimizer_v2(model, 'sgd', lr=.01, momentum=.9, weight_decay=2e-5)
    for _ in range(2):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    state = load(folder / 'last.pth.tar')['state_dict']
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not any('exit' in name for name in rows_of(folder)[0])


def test_everything_at_once_and_resumed(train):
    flags = ('--mixup .2 --cutmix 1 --smoothing .1 --model-ema --model-ema-decay .9 --amp --amp-dtype bfloat16 '
             '--grad-accum-steps 2 --clip-grad 1 --eed-beta 1 --opt adamw').split()
    whole = train(*flags, '--epochs', '2', experiment='whole')
    train(*flags, '--epochs', '2', experiment='parts')
    folder = whole.parent / 'parts'
    shutil.copy(folder / 'checkpoint-0.pth.tar', folder / 'last.pth.tar')
    train(*flags, '--epochs', '2', '--resume', 'auto', experiment='parts')
    assert [row['epoch'] for row in rows_of(folder)] == ['0', '1']
    resumed, straight = load(folder / 'last.pth.tar'), load(whole / 'last.pth.tar')
    assert resumed['epoch'] == straight['epoch'] == 1
    # 3 batches per epoch make 2 steps: a pair and a remainder
    assert resumed['optimizer']['state'][0]['step'] == straight['optimizer']['state'][0]['step'] == 4
    assert set(resumed['state_dict_ema']) == set(resumed['state_dict'])
    assert rows_of(folder)[0]['train_loss'] == rows_of(whole)[0]['train_loss']


def test_a_resumed_run_may_measure_other_things(train):
    """Mixup leaves no training accuracy; without it there are more columns, and none shifts."""
    folder = train('--epochs', '3', '--stop-epoch', '1', '--sched', 'none')
    first = rows_of(folder)
    train('--epochs', '3', '--stop-epoch', '2', '--sched', 'none', '--mixup', '.2', '--resume', 'auto')
    rows = rows_of(folder)
    assert [row['epoch'] for row in rows] == ['0', '1'] and rows[0] == first[0]
    metric = load(folder / 'last.pth.tar')['metric']
    assert float(rows[1]['eval_top1']) == metric and rows[1]['train_top1'] == '' and float(rows[1]['lr']) == .01
    shutil.copytree(folder, folder.parent / 'mixed')
    train('--epochs', '3', '--sched', 'none', '--val-split', '', '--eed-beta', '1', '--resume', 'auto')
    assert [row['epoch'] for row in rows_of(folder)] == ['0', '1', '2'] and rows_of(folder)[2]['eval_top1'] == ''

    without = train('--epochs', '2', '--stop-epoch', '1', '--val-split', '', '--mixup', '.2', experiment='none')
    train('--epochs', '2', '--resume', 'auto', experiment='none')
    rows = rows_of(without)
    assert rows[0]['eval_top1'] == '' and float(rows[1]['eval_top1']) == load(without / 'last.pth.tar')['metric']


def test_a_recovery_checkpoint_goes_on_with_another_loss(train):
    flags = ('-b', '6', '--epochs', '1', '--recovery-interval', '2', '--sched', 'none')
    folder = train(*flags)
    recovery = sorted(folder.glob('recovery-*'))[-1]
    other = train(*flags, '--mixup', '.2', '--resume', str(recovery), experiment='other')
    assert 'train_top1' not in rows_of(other)[0] and 0 < float(rows_of(other)[0]['train_loss']) < 20


def test_a_place_within_an_epoch_of_other_batches_means_nothing(train, caplog):
    folder = train('-b', '6', '--epochs', '1', '--recovery-interval', '4', '--sched', 'none')
    recovery = str(sorted(folder.glob('recovery-*'))[-1])
    other = train('-b', '12', '--epochs', '1', '--sched', 'none', '--resume', recovery, experiment='other')
    assert '6 batches of 6, 1 to an update; this run has 3 of 12' in caplog.text and len(rows_of(other)) == 1


def test_the_record_of_a_complete_run_stays(train, caplog):
    folder = train()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    train('--epochs', '1', '--eed-alpha', '7', '--resume', 'auto')
    assert 'there is nothing left to train (2 of 1 epochs)' in caplog.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_and_biases_gets_numbers_alone(monkeypatch):
    rows = []
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(log=rows.append))
    train_eed.log_wandb({'epoch': 0, 'train_loss': 1.5, 'eval_top1': ''})
    assert rows == [{'epoch': 0, 'train_loss': 1.5}]


def test_a_frozen_backbone_stays_with_split_batch_norm(train):
    folder = train('--freeze-backbone', '--split-bn', '--aug-splits', '2')
    first, last = (load(folder / f'checkpoint-{epoch}.pth.tar')['state_dict'] for epoch in (0, 1))
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed and all(name.startswith('exits.') for name in changed)


def test_no_interpolation_means_the_models(train):
    folder = train('--train-interpolation', '', '--epochs', '1')
    assert float(rows_of(folder)[0]['train_loss']) > 0


def test_two_runs_do_not_share_a_folder(train, capsys):
    folder = train()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert 'holds a run: continue it with --resume auto' in fails(train, capsys)
    elsewhere = train('--epochs', '1', experiment='elsewhere')
    assert 'holds a run' in fails(train, capsys, '--resume', str(elsewhere / 'last.pth.tar'))
    message = fails(train, capsys, '--resume', str(folder / 'checkpoint-0.pth.tar'))
    assert 'holds later checkpoints' in message and '--experiment' in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_named_checkpoint_of_the_same_folder_keeps_the_best(train):
    folder = train('--epochs', '4', '--stop-epoch', '2', '--sched', 'none')
    best = load(folder / 'model_best.pth.tar')
    train('--epochs', '4', '--stop-epoch', '3', '--sched', 'none', '--resume', str(folder / 'last.pth.tar'),
          '--no-resume-opt', '--lr', '5')
    after = load(folder / 'model_best.pth.tar')
    assert after['metric'] >= best['metric']
    assert len(load(folder / 'last.pth.tar')['saver']['checkpoint_files']) == 2  # and the one being written


@pytest.mark.parametrize('epochs', ['2', '3'])
def test_links_that_a_kill_prevented_are_made(train, epochs):
    """Killed behind the writing of last.pth.tar: in the last epoch, too."""
    flags = ('--epochs', epochs, '--sched', 'none', '--save-epochs', '2')
    folder = train(*flags, '--stop-epoch', '2')
    names = {path.name for path in folder.glob('*.tar')}
    assert 'milestone-2.pth.tar' in names
    for name in ('checkpoint-1.pth.tar', 'milestone-2.pth.tar'):
        (folder / name).unlink()
    train(*flags, '--resume', 'auto')
    found = {path.name for path in folder.glob('*.tar')}
    assert names <= found
    assert load(folder / 'milestone-2.pth.tar')['epoch'] == load(folder / 'checkpoint-1.pth.tar')['epoch'] == 1


def test_a_run_is_evaluated_on_its_own_classes(train, image_folder, tmp_path, capsys):
    folder = train('--epochs', '1')
    assert json.loads((folder / 'classes.json').read_text()) == ['class0', 'class1', 'class2']
    renamed = tmp_path / 'renamed'
    shutil.copytree(image_folder, renamed)
    (renamed / 'val/class0').rename(renamed / 'val/zero')
    command = ['validate', str(folder), str(renamed), '--device', 'cpu', '-j', '0']
    with pytest.raises(SystemExit, match=r'the model and the data disagree about the classes.*only in the data: zero'):
        cli.main(command)
    (renamed / 'val/zero').rename(renamed / 'val/class0')
    cli.main(command)
    with pytest.raises(SystemExit, match=r"has no 'holdout' split: .* Name another with --split\."):
        cli.main([*command, '--split', 'holdout'])


def test_digits_have_two_splits(tmp_path, capsys):
    flags = [*SMALL, '--dataset', 'eed/digits', '--num-classes', '10', '--output', str(tmp_path)]
    train_eed.main([*flags, '--epochs', '1', '-b', '128', '--experiment', 'run'])
    sizes = {}
    for split in ('train', 'validation', 'val'):
        cli.main(['validate', str(tmp_path / 'run'), '--split', split, '--device', 'cpu', '-j', '0'])
        sizes[split] = int(capsys.readouterr().out.split(' images')[0].split()[-1])
    assert sizes == dict(train=1442, validation=355, val=355)
    with pytest.raises(SystemExit, match="has the splits train and validation, not 'holdout'"):
        cli.main(['validate', str(tmp_path / 'run'), '--split', 'holdout', '--device', 'cpu', '-j', '0'])
    with pytest.raises(SystemExit, match=r"--train-split: torch/cifar10 has the splits .* not 'tset'"):
        train_eed.main([*flags, '--dataset', 'torch/cifar10', '--train-split', 'tset'])


def test_a_run_with_split_batch_norm_is_read(train, capsys):
    folder = train('--epochs', '1', '--split-bn', '--aug-splits', '2')
    capsys.readouterr()
    cli.main(['validate', str(folder), '--device', 'cpu', '-j', '0'])
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('main'))
    assert f"{float(rows_of(folder)[0]['eval_top1']):.2f} %" in printed


def test_a_complete_run_is_still_published(train, monkeypatch):
    pushed = []
    monkeypatch.setenv('HF_TOKEN', 'hf_none')
    monkeypatch.setattr(train_eed, 'push', lambda args, sections: pushed.append((args.run_dir, args.push_to_hub)))
    folder = train('--epochs', '1')
    train('--epochs', '1', '--resume', 'auto', '--push-to-hub', 'me/net')
    assert pushed == [(str(folder), 'me/net')]


def test_resume_continues_the_weights(train, caplog):
    folder = train('--epochs', '1', '--sched', 'none')
    first = load(folder / 'last.pth.tar')
    train('--epochs', '1', '--sched', 'none', '--resume', 'auto')
    assert 'is complete, there is nothing left to train' in caplog.text
    again = load(folder / 'last.pth.tar')
    assert all(torch.equal(v, again['state_dict'][k]) for k, v in first['state_dict'].items())
    other = train('--epochs', '2', '--lr', '0', '--sched', 'none', '--resume', str(folder / 'last.pth.tar'),
                  '--no-resume-opt', experiment='other')
    frozen = load(other / 'last.pth.tar')['state_dict']
    learned = [k for k in frozen if not k.endswith(('running_mean', 'running_var', 'num_batches_tracked'))]
    assert all(torch.equal(frozen[k], first['state_dict'][k]) for k in learned)


def test_initial_checkpoint_of_a_plain_and_of_a_multi_exit_model(train):
    plain = train('--eed-method', 'none', '--epochs', '1', experiment='plain')
    started = train('--initial-checkpoint', str(plain / 'last.pth.tar'), '--epochs', '1', '--lr', '0',
                    '--sched', 'none', experiment='started')
    weights, origin = load(started / 'last.pth.tar')['state_dict'], load(plain / 'last.pth.tar')['state_dict']
    assert torch.equal(weights['backbone.fc.weight'], origin['fc.weight'])
    again = train('--initial-checkpoint', str(started / 'last.pth.tar'), '--epochs', '1', '--lr', '0',
                  '--sched', 'none', experiment='again')
    assert torch.equal(load(again / 'last.pth.tar')['state_dict']['exits.0.fc.weight'], weights['exits.0.fc.weight'])


@pytest.mark.parametrize('flags', [
    '--eed-method kd --eed-output-loss mse', '--eed-method ce', '--eed-teacher exit1+main', '--bce-loss --cutmix 1',
    '--loss poly', '--jsd-loss --aug-splits 3 --aa rand-m9-mstd0.5', '--freeze-backbone', '--exit-type linear',
    '--exit-indices 1 -2', '--no-prefetcher --mixup .2 --channels-last', '--clip-grad .1 --clip-mode agc',
    '--sched multistep --decay-milestones 1', '--sched-on-updates --warmup-epochs 1', '--model-dtype bfloat16',
    '--torchcompile aot_eager', '--val-split= --val-interval 2', '--recovery-interval 1 --log-interval 1',
    '--grad-checkpointing --layer-decay .7', '--drop .2 --head-init-scale .1 --head-init-bias 0 --in-chans 1',
])
def test_flag_combinations_run(train, flags):
    row = rows_of(train(*flags.split(), '--epochs', '1'))[0]
    assert np.isfinite(float(row['train_loss']))


def test_evaluation_skipped_between_intervals_keeps_the_columns(train):
    rows = rows_of(train('--epochs', '3', '--val-interval', '2'))
    assert [bool(row['eval_top1_ensemble']) for row in rows] == [False, True, True]  # the last epoch always counts
    assert all(row['lr'] for row in rows)


def fails(train, capsys, *flags, **kwargs):
    with pytest.raises(SystemExit) as stop:
        train(*flags, **kwargs)
    return f'{stop.value}\n{capsys.readouterr().err}'


def test_bad_data_folders(train, capsys, tmp_path, image_folder):
    assert "'nowhere' does not exist" in fails(train, capsys, '--data', 'nowhere')
    (tmp_path / 'empty').mkdir()
    assert "has no 'train' split: expected a folder train or training in it, found nothing" in fails(
        train, capsys, '--data', 'empty')
    (tmp_path / 'empty/train').mkdir()
    assert 'Found 0 images' in fails(train, capsys, '--data', 'empty')
    shutil.rmtree(image_folder / 'val')
    message = fails(train, capsys)
    assert "no 'validation' split: expected a folder validation or val" in message and "--val-split ''" in message
    assert 'name a folder with --data' in fails(train, capsys, data=False)
    assert 'ships eed/digits' in fails(train, capsys, '--dataset', 'eed/letters')


def test_classes_that_disagree(train, capsys, image_folder):
    assert 'The data has 3 classes and the model 5 outputs; pass --num-classes 3' in fails(
        train, capsys, '--num-classes', '5')
    assert 'pass --num-classes 3' in fails(train, capsys, '--num-classes', '2')
    shutil.rmtree(image_folder / 'val/class1')
    message = fails(train, capsys)
    assert 'train and validation disagree about the classes: 3 in train, 2 in validation (only in' in message


def test_batch_larger_than_the_data(train, capsys):
    assert 'has 36 images, 36 per process, less than one batch of 64; lower --batch-size (-b) to 36' in fails(
        train, capsys, '-b', '64')


def test_bad_models_and_checkpoints(train, capsys, tmp_path):
    assert "Unknown model 'resnet5O'; did you mean" in fails(train, capsys, '--model', 'resnet5O')
    assert 'exit index 9 is out of range' in fails(train, capsys, '--exit-indices', '9')
    assert 'indices of the 4 classifiers' in fails(train, capsys, '--eed-teacher', 'exit7')
    assert "not measured; choose from loss, top1" in fails(train, capsys, '--eval-metric', 'map')
    assert "Cannot make the model 'test_resnet'" in fails(train, capsys, '--gp', 'nothing')
    assert 'one per input channel' in fails(train, capsys, '--mean', '.5', '.5')
    assert 'Cannot make the training loader' in fails(train, capsys, '--aa', 'nothing')
    assert "Cannot use --device 'nothing'" in fails(train, capsys, '--device', 'nothing')
    assert "there is no checkpoint 'none.pth'" in fails(train, capsys, '--resume', 'none.pth')
    (tmp_path / 'junk.pth').write_bytes(b'junk')
    assert 'is no readable checkpoint' in fails(train, capsys, '--resume', 'junk.pth')
    assert 'is no readable checkpoint' in fails(train, capsys, '--initial-checkpoint', 'junk.pth')
    folder = train('--epochs', '1')
    last = str(folder / 'last.pth.tar')
    message = fails(train, capsys, '--model', 'test_vit', '--resume', last, experiment='b')
    assert '--model was test_resnet and is test_vit' in message
    message = fails(train, capsys, '--opt', 'adamw', '--resume', last, experiment='b')
    assert '--opt was sgd and is adamw' in message and '--no-resume-opt' in message
    message = fails(train, capsys, '--eed-method', 'none', '--resume', last, experiment='b')
    assert '--eed-method was eed and is none' in message
    message = fails(train, capsys, '--model', 'test_convnext', '--initial-checkpoint', last, experiment='b')
    assert 'do not fit this model, check --model' in message


def test_checkpoints_that_would_run_code_are_refused(train, capsys, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'sprung'),)
    torch.save({'state_dict': Trap()}, tmp_path / 'trap.pth')
    for flag in ('--resume', '--initial-checkpoint'):
        assert 'is no readable checkpoint' in fails(train, capsys, flag, 'trap.pth')
    assert not (tmp_path / 'sprung').exists()


def test_nan_loss_stops_with_step_and_terms(train, capsys):
    folder = train('--epochs', '1')
    before = (folder / 'last.pth.tar').read_bytes()
    message = fails(train, capsys, '--epochs', '3', '--lr', '1e30', '--sched', 'none', '--resume', 'auto',
                    '--no-resume-opt')
    assert 'The loss is not finite at epoch 1, step' in message and 'task_loss' in message and '--lr' in message
    assert (folder / 'last.pth.tar').read_bytes() == before


def test_first_bad_step_is_named():
    terms = LossTerms(torch.device('cpu'))
    for step, value in enumerate([1., 2., float('nan'), float('nan')]):
        terms.add(step, {'loss': torch.tensor(value), 'task_loss': torch.tensor(1.)}, 4)
    with pytest.raises(TrainingError, match='epoch 5, step 2: loss nan, task_loss 1'):
        terms.check(5)


def test_loss_terms_are_weighted_by_samples():
    terms = LossTerms(torch.device('cpu'))
    terms.add(0, {'loss': torch.tensor(1.)}, 1)
    terms.add(1, {'loss': torch.tensor(4.)}, 2)
    assert terms.check(0) == {'loss': 3.}


def test_unreadable_images_are_named_counted_and_skipped(train, caplog, image_folder):
    bad = image_folder / 'train/class1/3.png'
    bad.write_bytes(bad.read_bytes()[:60])
    (image_folder / 'val/class0/0.png').write_bytes(b'no image')
    folder = train('--epochs', '1')
    assert f'Skipped unreadable image {bad}' in caplog.text
    assert '2 unreadable images were replaced by their neighbours in this epoch' in caplog.text
    assert len(rows_of(folder)) == 1


@pytest.mark.parametrize('workers', ['0', '2'])
def test_only_unreadable_images_end_the_run(train, capsys, image_folder, workers):
    for path in (image_folder / 'train').rglob('*.png'):
        path.write_bytes(b'no image')
    assert '10 images in a row are unreadable' in fails(train, capsys, '-j', workers)


def test_skipping_counts_over_worker_processes(image_folder):
    for i in range(3):
        (image_folder / f'train/class{i}/0.png').write_bytes(b'no image')
    dataset = SkippingImageDataset(create_dataset('', str(image_folder), split='train'))
    dataset.transform = np.array
    for _ in torch.utils.data.DataLoader(dataset, batch_size=6, num_workers=2):
        pass
    assert int(dataset.skipped) == 3


@pytest.mark.parametrize('workers', ['0', '1'])
def test_mixup_ends_at_its_epoch_in_worker_processes_too(image_folder, workers):
    args = parse_args([*SMALL, '--data', str(image_folder), '-j', workers, '--mixup', '1', '--mixup-off-epoch', '1'])
    device = setup_device(args)
    data = create_data(args, resolve_data_config(vars(args), model=timm.create_model('test_resnet')), 3, device)
    mixed = []
    for epoch in (0, 1):
        data.set_epoch(epoch, args.mixup_off_epoch)
        targets = torch.cat([y for _, y in data.train])
        mixed.append(int((targets.max(-1).values < 1 - .1 + .1 / 3 - 1e-6).sum()))  # one-hot but for smoothing
    assert mixed[0] > 0 and mixed[1] == 0


def test_digits_are_the_published_ones():
    train, held_out = Digits(), Digits(train=False)
    assert len(train) + len(held_out) == 1797
    counts = np.bincount([label for _, label in train.samples + held_out.samples])
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as the source states them
    levels = np.unique(np.stack([tile for tile, _ in train.samples]))
    assert levels.tolist() == [15 * level for level in range(17)]
    assert not {tile.tobytes() for tile, _ in train.samples} & {tile.tobytes() for tile, _ in held_out.samples}


def test_two_processes(image_folder, tmp_path):
    """torchrun with gloo: every parameter in step on both ranks, metrics without the sampler's padding."""
    done = torchrun(
        2, train_eed.__file__, *SMALL, '-b', '6', '--data', str(image_folder), '--num-classes', '3', '--epochs', '1',
        '--eed-beta', '1', '-vb', '5', '--output', str(tmp_path), '--experiment', 'two', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    row = rows_of(tmp_path / 'two')[0]
    assert float(row['eval_top1']) * 12 / 100 == pytest.approx(round(float(row['eval_top1']) * 12 / 100), abs=1e-6)
    assert not any(k.startswith('module') for k in load(tmp_path / 'two/last.pth.tar')['state_dict'])
