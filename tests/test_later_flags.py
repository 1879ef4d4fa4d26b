"""What timm's script does since 1.0.30, and the rarer flags, end to end."""
import logging
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import rows_of

import train_eed
from timm_eed.training.checkpoint import load_checkpoint

FLAGS = ('--dataset eed/digits --model test_resnet --num-classes 10 --input-size 1 32 32 --mean .3 --std .4 '
         '--warmup-epochs 0 --batch-size 128 --workers 0 --device cpu --lr .05 --train-batches-per-epoch 2').split()
RGB = ('--input-size', '3', '32', '32', '--mean', '.3', '.3', '.3', '--std', '.4', '.4', '.4')


@pytest.fixture
def train(tmp_path):
    def run(*flags, experiment='run'):
        train_eed.main([*FLAGS, '--output', str(tmp_path), '--experiment', experiment, *flags])
        return tmp_path / experiment
    return run


def test_stop_epoch_keeps_the_schedule_and_is_evaluated(train):
    stopped = train('--epochs', '6', '--stop-epoch', '2', '--val-interval', '5', experiment='stopped')
    whole = train('--epochs', '6', '--val-interval', '5', experiment='whole')
    assert [row['lr'] for row in rows_of(stopped)] == [row['lr'] for row in rows_of(whole)][:2]
    assert len(rows_of(stopped)) == 2 and rows_of(stopped)[1]['eval_top1'] and not rows_of(whole)[1]['eval_top1']
    again = train('--epochs', '6', '--val-interval', '5', '--resume', 'auto', experiment='stopped')
    a, b = (load_checkpoint(str(folder / 'last.pth.tar'))['state_dict'] for folder in (again, whole))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_save_epochs_keeps_milestones_and_evaluates(train):
    folder = train('--epochs', '4', '--save-epochs', '2', '4', '--val-interval', '3', '--checkpoint-hist', '1')
    assert sorted(p.name for p in folder.glob('milestone-*')) == ['milestone-2.pth.tar', 'milestone-4.pth.tar']
    assert load_checkpoint(str(folder / 'milestone-2.pth.tar'))['epoch'] == 1
    assert [bool(row['eval_top1']) for row in rows_of(folder)] == [False, True, True, True]


def test_ranked_checkpoints_and_summary_stay_consistent_over_resumes(train, caplog):
    flags = ('--epochs', '4', '--checkpoint-hist', '2')
    whole = train(*flags, experiment='whole')
    train(*flags, '--stop-epoch', '1', experiment='parts')
    train(*flags, '--stop-epoch', '3', '--resume', 'auto', experiment='parts')
    parts = train(*flags, '--resume', 'auto', experiment='parts')
    assert sorted(p.name for p in parts.glob('*.pth.tar')) == sorted(p.name for p in whole.glob('*.pth.tar'))
    drop = {'train_images_per_second'}
    assert [{k: v for k, v in row.items() if k not in drop} for row in rows_of(parts)] == [
        {k: v for k, v in row.items() if k not in drop} for row in rows_of(whole)]
    best = [load_checkpoint(str(f / 'model_best.pth.tar'))['epoch'] for f in (parts, whole)]
    assert best[0] == best[1]
    recorded = yaml.safe_load((parts / 'args.yaml').read_text())
    assert recorded['resume'] == 'auto' and recorded['epochs'] == 4 and recorded['lr'] == .05
    train(*flags, '--resume', 'auto', experiment='parts')
    assert 'nothing left to train' in caplog.text


@pytest.mark.parametrize('flags', [
    ['--sched', 'wsd', '--decay-epochs', '2', '--lr-decay-fn', 'linear'], ['--sched', 'none'],
    ['--sched', 'multistep', '--decay-milestones', '1']])
def test_schedules(train, flags):
    folder = train('--epochs', '3', *flags)
    found = [float(row['lr']) for row in rows_of(folder)]
    assert len(found) == 3 and (len(set(found)) == 1) == (flags[1] == 'none')


def test_an_external_teacher_from_a_folder(train, tmp_path):
    torch.manual_seed(0)
    teacher = timm.create_model('test_resnet', num_classes=10, in_chans=1)
    timm.models.save_for_hf(teacher, tmp_path / 'teacher', model_config={}, safe_serialization=True)
    name = f'local-dir:{tmp_path / "teacher"}'
    folder = train('--epochs', '1', '--kd-model-name', name, '--task-loss-weight', '.5')
    row = rows_of(folder)[0]
    assert float(row['train_kd_loss']) > 0 and 'eval_top1_exit1' in row
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=10), tmp_path / 'teacher', model_config={},
                            safe_serialization=True)
    row = rows_of(train('--epochs', '1', '--kd-model-name', name, '--eed-method', 'none', *RGB, experiment='plain'))[0]
    assert float(row['train_loss']) > 0 and 'eval_top1_exit1' not in row


def test_feature_distillation_trains_its_projection(train, tmp_path):
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=10), tmp_path / 'teacher', model_config={},
                            safe_serialization=True)
    folder = train(
        *RGB, '--epochs', '2', '--eed-method', 'none', '--model', 'test_convnext', '--kd-distill-type', 'feature',
        '--kd-model-name', f"local-dir:{tmp_path / 'teacher'}", '--weight-decay', '0')
    first, second = (load_checkpoint(str(folder / f'checkpoint-{epoch}.pth.tar'))['task_state'] for epoch in (0, 1))
    assert not torch.equal(first['projection']['weight'], second['projection']['weight'])


def test_several_image_sizes(train):
    folder = train('--epochs', '2', '--train-img-sizes', '32', '48', '--train-batch-sizes', '64', '32',
                   '--train-size-schedule', 'progressive', '--variable-batch-loss-scale', 'linear')
    assert len(rows_of(folder)) == 2


def test_steps_per_epoch_images_and_torchscript(train, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        folder = train('--epochs', '1', '--log-interval', '1', '--save-images', '--recovery-interval', '1')
    assert [p.name for p in folder.glob('*.jpg')] == ['train-epoch-0-step-0.jpg']  # 2 steps, the last is the epoch's
    assert 'step 1/2' in caplog.text
    plain = train('--epochs', '1', '--eed-method', 'none', '--torchscript', experiment='script')
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(train_eed, 'create_data', lambda args, data_config, *_: seen.append(data_config) or 1 / 0)
        for flags in (['--torchscript'], []):
            with pytest.raises(ZeroDivisionError):
                train_eed.main(['--model', 'test_vit', '--eed-method', 'none', '--device', 'cpu', *flags])
    assert seen[0] == seen[1] and seen[0]['input_size'] == (3, 160, 160)
    assert len(rows_of(plain)) == 1 and not any('exit' in key for key in load_checkpoint(
        str(plain / 'last.pth.tar'))['state_dict'])


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(train, caplog):
    whole = train('--epochs', '3', experiment='whole')
    folder = train('--epochs', '3', '--stop-epoch', '2', experiment='damaged')
    data = (folder / 'last.pth.tar').read_bytes()
    for name in ('last.pth.tar', 'checkpoint-1.pth.tar', 'model_best.pth.tar'):
        if (folder / name).exists():
            (folder / name).unlink()
    (folder / 'last.pth.tar').write_bytes(data[:len(data) // 2])
    train('--epochs', '3', '--resume', 'auto', experiment='damaged')
    assert "last.pth.tar' is no readable checkpoint" in caplog.text and 'previous.pth.tar' in caplog.text
    a, b = (load_checkpoint(str(f / 'last.pth.tar'))['state_dict'] for f in (folder, whole))
    assert all(torch.equal(a[k], b[k]) for k in a)
    for path in Path(folder).glob('*.pth.tar'):
        path.write_bytes(b'nothing')
    with pytest.raises(SystemExit, match='none of the checkpoints'):
        train('--epochs', '3', '--resume', 'auto', experiment='damaged')


@pytest.mark.parametrize('flags, message', [
    (['--pretrained'], r"Cannot make the model 'test_resnet': .*(cache holds no complete copy|no success)"),
    (['--kd-model-name', 'test_vit'], r"--kd-model-name: .*(cache holds no complete copy|no success)"),
    (['--output', '/dev/null/x'], r'--output: cannot make the folder of the run'),
    (['--interpolation', 'foo'], r'Cannot make the validation loader: .*foo'),
    (['--loss', 'bce', '--loss-class-weight', '1', '2'], r'takes one weight, or one for each of the 10 classes, not 2'),
    (['--task', 'multilabel', '--smoothing', '0'], '--task multilabel: eed/digits has one label per image'),
    (['--device-modules', 'no_such_module'], r"--device-modules: cannot import 'no_such_module'"),
])
def test_what_cannot_be_done_ends_with_a_sentence(train, flags, message, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(SystemExit, match=message):
        train('--epochs', '1', *flags)


@pytest.mark.parametrize('flags, message', [
    (['--crop-padding', '2', '--train-img-sizes', '32', '48'], '--crop-padding crops to one size'),
    (['--mixup', '.2', '--train-img-sizes', '32', '48', '--train-batch-sizes', '16', '17'], 'must be even'),
    (['--mixup', '.2', '--mixup-off-epoch', '1', '--use-multi-epochs-loader', '-j', '1'], 'not hear of'),
])
def test_flags_that_do_not_go_together(train, flags, message, capsys):
    with pytest.raises(SystemExit):
        train(*flags)
    assert message in capsys.readouterr().err
