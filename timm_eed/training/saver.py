"""Writing checkpoints so that a run can be stopped at any moment: whole files only, and all state in them."""
import glob
import logging
import os
from typing import Any, Callable, Dict, List, Optional

import torch
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.utils import CheckpointSaver

from .errors import TrainingError
from .random_state import RandomState

__all__ = ['RunSaver', 'resumable_files', 'write_atomically']

_logger = logging.getLogger(__name__)


def write_atomically(path: str, write: Callable[[Any], None]) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it: `path` is the old file or the new one.

    Args:
        path: The file.
        write: Gets the file, opened for binary writing.

    Raises:
        TrainingError: If it cannot be written (a full disk); the old file is untouched.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path)
    except (OSError, RuntimeError) as error:  # PyTorch raises RuntimeError where it cannot write on
        if os.path.exists(temporary):
            os.remove(temporary)
        raise TrainingError(
            f"Cannot write '{path}': {str(error).splitlines()[0]}. Is the disk full? The files written before are "
            'whole; make room and continue the run with --resume auto --experiment NAME.') from error


def _flush_folder(path: str) -> None:
    """Make a rename last; where folders cannot be opened (Windows) the system sees to it."""
    if os.name == 'posix':
        folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def resumable_files(folder: str) -> List[str]:
    """The checkpoints of a run that --resume auto looks at, and that no other run may write beside."""
    return [path for name in ('last', 'previous', 'recovery-*', 'checkpoint-*')
            for path in glob.glob(os.path.join(glob.escape(folder), name + '.pth.tar'))]


class RunSaver(CheckpointSaver):
    """timm's checkpoint files, written atomically and with everything that an exact continuation needs.

    Beside `last.pth.tar` it keeps `previous.pth.tar`, the one before, should the last one be damaged.

    Args:
        scheduler: The schedule; the only one with a state of its own is plateau.
        args: As for timm's CheckpointSaver, together with all other arguments.
    """

    def __init__(self, *args: Any, scheduler: Optional[Any] = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.scheduler = scheduler
        self.random_states: List[RandomState] = []
        self.position: Optional[Dict[str, Any]] = None
        self._written = False  # the checkpoint to be ranked is on the disk already

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        if self._written:
            return
        state = {
            'epoch': epoch,
            'arch': self.args.model,
            'args': self.args,
            'version': 2,  # timm's: the epoch is counted when it is complete
            'optimizer': self.optimizer.state_dict(),
            'random': self.random_states,
            'saver': self.state_dict(epoch, metric),
            **self.task.get_checkpoint_state(unwrap_fn=self.unwrap_fn),
            **self.task.get_checkpoint_state(ema=True, unwrap_fn=self.unwrap_fn),
        }
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        if isinstance(self.scheduler, PlateauLRScheduler):
            state['plateau'] = self.scheduler.lr_scheduler.state_dict()
        if metric is not None:
            state['metric'] = metric
        if self.position is not None:
            state['position'] = self.position
        write_atomically(save_path, lambda file: torch.save(state, file))

    def _replace(self, src: str, dst: str) -> None:
        """Rename, without a moment in which there is no `dst`; the last checkpoint becomes the previous one."""
        if self._written:
            return
        if os.path.exists(dst) and os.path.basename(dst) == 'last' + self.extension:
            self._duplicate(dst, os.path.join(self.checkpoint_dir, 'previous' + self.extension))
        os.replace(src, dst)
        _flush_folder(dst)

    def _duplicate(self, src: str, dst: str) -> None:
        """Link or copy, without a moment in which `dst` is missing or incomplete."""
        if os.path.exists(dst) and os.path.samefile(src, dst):
            return  # a rename onto the same file would do nothing and leave the temporary name
        temporary = f'{dst}.tmp'
        if os.path.exists(temporary):
            os.remove(temporary)
        super()._duplicate(src, temporary)
        os.replace(temporary, dst)

    def save_recovery(self, epoch: int, batch_idx: int = 0, position: Optional[Dict[str, Any]] = None) -> None:
        """Save within an epoch.

        Args:
            epoch: The epoch that is going on.
            batch_idx: Index of the last batch done.
            position: What `engine.train_one_epoch` needs to go on behind it.
        """
        self.position = position
        try:
            super().save_recovery(epoch, batch_idx)
        finally:
            self.position = None

    def continue_run(self, checkpoint: Dict[str, Any], path: str) -> None:
        """Take up the history of ranked checkpoints, and finish what a kill may have cut short.

        A run killed behind the writing of last.pth.tar may not have linked it as a ranked or best checkpoint yet.

        Args:
            checkpoint: The checkpoint that the run goes on from.
            path: Its file.
        """
        state = dict(checkpoint.get('saver') or {})
        epoch, metric = state.pop('pending', (None, None))
        self.load_state_dict(state)
        found = sorted(self._recovery_files(), key=os.path.getmtime)[-2:]
        self.prev_recovery_file, self.curr_recovery_file = (['', ''] + found)[-2:]
        if epoch is None or 'position' in checkpoint:
            return
        last = os.path.join(self.checkpoint_dir, 'last' + self.extension)
        if os.path.abspath(path) != os.path.abspath(last):
            self._duplicate(path, last)
        self._written = True
        try:
            self.save_checkpoint(epoch, metric)
            if epoch + 1 in (self.args.save_epochs or []):
                self.save_milestone(epoch + 1)
        finally:
            self._written = False

    def _recovery_files(self) -> List[str]:
        return glob.glob(os.path.join(glob.escape(self.recovery_dir), self.recovery_prefix + '-*' + self.extension))
