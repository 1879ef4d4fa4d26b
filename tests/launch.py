"""torchrun, as the command line has it."""
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def torchrun(processes: int, *command: str, cwd: Path, timeout: float = 120) -> 'subprocess.CompletedProcess[str]':
    """Run a script in several processes, with gloo, on a free port; a hang ends in TimeoutExpired.

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
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path})
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends the processes it started
        process.communicate(timeout=60)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
