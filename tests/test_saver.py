"""Files are whole or not there: a full disk, kills within a write, random states."""
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from timm_eed.training.errors import TrainingError
from timm_eed.training.random_state import get_random_state, set_random_state
from timm_eed.training.report import trim_summary
from timm_eed.training.saver import write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'old')

    def fail(file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')
    with pytest.raises(TrainingError, match=r'No space left on device.*--resume auto'):
        write_atomically(str(path), fail)
    assert path.read_bytes() == b'old' and [p.name for p in tmp_path.iterdir()] == ['file']


def test_full_disk_ends_a_run_with_a_message_and_the_last_checkpoint_whole(tmp_path):
    """A limit on the size of files that only the checkpoint of epoch 1 reaches stands for the full disk."""
    code = f'''
import resource, sys, train_eed
from timm_eed.training.saver import RunSaver
save = RunSaver.save_checkpoint
def limited(self, epoch, metric=None):
    if epoch == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    return save(self, epoch, metric)
RunSaver.save_checkpoint = limited
train_eed.main("--dataset eed/digits --model test_resnet --num-classes 10 --input-size 1 32 32 --mean .3 --std .4 "
    "--epochs 3 --warmup-epochs 0 --workers 0 --device cpu --train-batches-per-epoch 2 --output {tmp_path} "
    "--experiment run".split())
'''
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert 'Cannot write' in result.stderr and 'Is the disk full?' in result.stderr
    from timm_eed.training.checkpoint import load_checkpoint
    assert load_checkpoint(str(tmp_path / 'run/last.pth.tar'))['epoch'] == 0
    assert not list((tmp_path / 'run').glob('*.tmp'))


def test_random_states_continue_exactly():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), np.random.randn(), torch.rand(3)  # leaves halves of pairs behind

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(5).tolist()
    state = get_random_state()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first


def test_a_row_cut_short_is_dropped(tmp_path):
    path = tmp_path / 'summary.csv'
    path.write_text('epoch,a,b\n0,1,2\n1,3,4\n2,5')
    trim_summary(str(path), 3)
    assert path.read_text() == 'epoch,a,b\n0,1,2\n1,3,4\n'
    trim_summary(str(path), 1)
    assert path.read_text() == 'epoch,a,b\n0,1,2\n'
    trim_summary(str(path), 0)
    assert path.read_text() == ''
    trim_summary(str(tmp_path / 'none.csv'), 1)
