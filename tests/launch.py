"""torchrun, as the command line has it."""
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def torchrun(processes: int, *command: str, cwd: Path, timeout: float = 300) -> 'subprocess.CompletedProcess[str]':
    """Run a script in several processes, with gloo, on a free port; a hang fails and shows where each process stands.

    Args:
        processes: How many.
        command: Options of torchrun, the script and its arguments.
        cwd: Working folder.
        timeout: Seconds.
    """
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    process = subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes), *command],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path, 'PYTHONFAULTHANDLER': '1'})
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        subprocess.run(['pkill', '-ABRT', '-P', str(process.pid)], check=False)  # faulthandler writes their stacks
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        raise AssertionError(f'Nothing after {timeout} s.\n{out[-3000:]}\n{err[-10000:]}') from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
