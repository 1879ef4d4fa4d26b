"""Time of a training step with exits over that of the plain timm model, beside the ratio of their FLOPs.

    python benchmarks/step_time.py

Steps of both are interleaved in one process; the median of several rounds counts. A step is forward, loss, backward
and SGD update. Target: time ratio at most 1.05 x FLOPs ratio.
"""
import argparse
import platform
import statistics
import time
from typing import Callable

import timm
import torch
import torch.nn as nn
from timm.task import ClassificationTask
from torch.utils.flop_counter import FlopCounterMode

import timm_eed
from timm_eed.probe import meta_twin

CASES = [('cifar_resnet18', 32, 32), ('resnet50', 224, 8)]  # model, side in pixels, batch


def make_step(task: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """One training step as a function without arguments."""
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-3, momentum=.9)
    task.train()

    def step() -> None:
        optimizer.zero_grad()
        task(x, y)['loss'].backward()
        optimizer.step()
    return step


def training_flops(task: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """FLOPs of forward and backward, counted on a twin without weights."""
    twin = meta_twin(task).train()
    with FlopCounterMode(display=False) as counter:
        twin(x.to('meta'), y.to('meta'))['loss'].backward()
    return counter.get_total_flops()


def measure(steps: list, rounds: int) -> list:
    """Seconds of each step, a list per step, taken in turns."""
    for step in steps:
        step()
    times: list = [[] for _ in steps]
    for _ in range(rounds):
        for step, seconds in zip(steps, times):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return times


def main() -> None:
    """Print a row per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=15, help='timed steps of each kind')
    parser.add_argument('--threads', type=int, default=1, help='threads of PyTorch')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f'torch {torch.__version__}, timm {timm.__version__}, {platform.machine()} CPU, {args.threads} thread(s), '
          f'median of {args.rounds}')
    print(f"{'model':<22} {'input':>10} {'plain':>9} {'exits':>9} {'time ratio':>11} {'(quartiles)':>15} "
          f"{'FLOPs ratio':>12} {'time / FLOPs':>13}")
    for name, size, batch in CASES:
        x, y = torch.randn(batch, 3, size, size), torch.randint(100, (batch,))
        plain = ClassificationTask(timm.create_model(name), nn.CrossEntropyLoss(), verbose=False)
        exits = timm_eed.MultiExitTask(timm_eed.create_model(name), verbose=False)
        flops = training_flops(exits, x, y) / training_flops(plain, x, y)
        a, b = measure([make_step(plain, x, y), make_step(exits, x, y)], args.rounds)
        ratios = [q / p for p, q in zip(a, b)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        print(f'{name:<22} {f"{batch}x{size}x{size}":>10} {1e3 * statistics.median(a):6.0f} ms '
              f'{1e3 * statistics.median(b):6.0f} ms {ratio:11.3f} {f"({low:.3f}-{high:.3f})":>15} {flops:12.3f} '
              f'{ratio / flops:13.3f}')


if __name__ == '__main__':
    main()
