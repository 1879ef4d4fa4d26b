"""Kill a training run at random moments, resume it until it is done, and compare it with a run left alone.

    python benchmarks/kill_resume.py --kills 20

Each trial starts the same run (digits, moving average, dropout, mixup, loader workers, recovery checkpoints), kills
the whole process group with SIGKILL at a random moment, several of them within the writing of a checkpoint, and starts
it again with --resume auto. Compared are the final weights, their moving average, the optimizer and summary.csv (but
for images per second).
"""
import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

SCRIPT = Path(__file__).resolve().parent.parent / 'train_eed.py'
FLAGS = (
    '--dataset eed/digits --model test_resnet --num-classes 10 --input-size 1 32 32 --mean .3 --std .4 --epochs 4 '
    '--warmup-epochs 1 --batch-size 32 --workers 2 --device cpu --drop .1 --mixup .2 --reprob .2 --hflip 0 '
    '--model-ema --model-ema-decay .99 --recovery-interval 7 --checkpoint-hist 2 --opt adamw --lr 1e-3').split()


def start(output: str, *flags: str) -> 'subprocess.Popen[bytes]':
    """The run, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *FLAGS, '--output', output, '--experiment', 'run', *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'})


def kill(process: 'subprocess.Popen[bytes]') -> None:
    """The run and its loader workers, at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: 'subprocess.Popen[bytes]') -> None:
    """Wait; a run that fails by itself ends the benchmark."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f'the run failed:\n{errors.decode()[-2000:]}')


def wait_for_write(folder: Path, process: 'subprocess.Popen[bytes]', skip: int) -> bool:
    """Wait until the run is writing its (skip + 1)-th checkpoint from now; False if it ended before."""
    seen, writing = 0, False
    while process.poll() is None:
        now = any(folder.glob('*.pth.tar.tmp'))
        if now and not writing:
            seen += 1
            if seen > skip:
                return True
        writing = now
        time.sleep(0.0002)
    return False


def trial(output: str, seconds: float, in_write: bool, generator: random.Random) -> Optional[str]:
    """Kill one run once, resume it to its end; what was going on at the kill, None if it was over before."""
    folder = Path(output) / 'run'
    process = start(output)
    if in_write:
        hit = wait_for_write(folder, process, generator.randrange(6))
        time.sleep(generator.random() * .004)
    else:
        try:
            process.wait(generator.uniform(.3, 1.) * seconds)
            hit = False
        except subprocess.TimeoutExpired:
            hit = True
    if not hit:
        finish(process)
        return None
    writing = [path.name for path in folder.glob('*.tmp')]
    kill(process)
    finish(start(output, '--resume', 'auto'))
    return f"while writing {', '.join(writing)}" if writing else 'between writes'


def outcome(output: str) -> Dict[str, Any]:
    """All that must agree."""
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(Path(output) / 'run' / 'last.pth.tar', weights_only=True)
    with open(Path(output) / 'run' / 'summary.csv', newline='', encoding='utf-8') as file:
        rows = [{k: v for k, v in row.items() if k != 'train_images_per_second'} for row in csv.DictReader(file)]
    files = sorted(p.name for p in (Path(output) / 'run').glob('*.pth.tar') if not p.name.startswith('recovery'))
    return dict(weights=state['state_dict'], ema=state['state_dict_ema'], optimizer=state['optimizer']['state'],
                random=state['random'], summary=rows, files=files)


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def main() -> None:
    """Print a line per kill, and the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20, help='number of kills')
    parser.add_argument('--in-write', type=int, default=8, help='how many of them are aimed at the writing of a file')
    parser.add_argument('--seed', type=int, default=0, help='seed of the moments')
    args = parser.parse_args()
    generator = random.Random(args.seed)
    base = tempfile.mkdtemp(prefix='kill-resume-')
    began = time.time()
    finish(start(os.path.join(base, 'whole')))
    seconds = time.time() - began
    expected = outcome(os.path.join(base, 'whole'))
    print(f'a run left alone takes {seconds:.1f} s; PyTorch {torch.__version__}')
    equal = in_write = done = 0
    while done < args.kills:
        output = os.path.join(base, 'trial')
        what = trial(output, seconds, args.kills - done <= args.in_write - in_write, generator)
        if what is not None:
            found = outcome(output)
            differing: List[str] = [key for key in expected if not same(expected[key], found[key])]
            done, equal, in_write = done + 1, equal + (not differing), in_write + what.startswith('while')
            print(f"{done:3d}  killed {what:<45}  {'DIFFERS: ' + ', '.join(differing) if differing else 'identical'}",
                  flush=True)
        shutil.rmtree(output)
    print(f'{equal} of {done} identical, {in_write} of them killed within a write')
    shutil.rmtree(base)
    sys.exit(equal != done)


if __name__ == '__main__':
    main()
