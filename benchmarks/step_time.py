"""Time and memory of a training step with exits beside those of the plain timm model.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --variants fp32 bf16 channels_last compile

Steps of both are interleaved in one process; the median of several rounds counts. A step is forward, loss, backward
and SGD update with momentum. Targets: time ratio at most 1.05 x FLOPs ratio; peak memory at most 1.10 x what explains
it: the plain step's, the exits' parameters with gradients and momentum, and what they keep for the backward pass.
"""
import argparse
import platform
import statistics
import time
from typing import Callable, Dict, Tuple

import timm
import torch
import torch.nn as nn
from timm.task import ClassificationTask, TrainingTask
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

import timm_eed
from timm_eed.probe import meta_twin

CASES = [('cifar_resnet18', 32, 32), ('resnet50', 224, 8)]  # model, side in pixels, batch


VARIANTS = ('fp32', 'bf16', 'channels_last', 'compile')


def make_step(
        task: TrainingTask, x: torch.Tensor, y: torch.Tensor, variant: str = 'fp32',
) -> Tuple[Callable[[], None], torch.optim.Optimizer]:
    """One training step as a function without arguments, and its optimizer."""
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-3, momentum=.9)
    task.train()
    if variant == 'channels_last':
        task.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    if variant == 'compile':
        task.compile()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=variant == 'bf16'):
            loss = task(x, y)['loss']
        loss.backward()
        optimizer.step()
    return step, optimizer


def peak_memory(task: TrainingTask, x: torch.Tensor, y: torch.Tensor, variant: str) -> int:
    """Most bytes in tensors at any moment of a step, parameters and optimizer state included."""
    step, optimizer = make_step(task, x, y, variant)
    step()
    tracker = MemTracker()
    tracker.track_external(task, optimizer, x, y)
    with tracker:
        step()
    return tracker.get_tracker_snapshot('peak')[x.device]['Total']


def memory_of_exits(task: timm_eed.MultiExitTask, x: torch.Tensor, variant: str) -> int:
    """Bytes that the exits need: parameters, their gradients and momentum, and tensors kept for the backward pass.

    Stage maps and parameters are not counted among the latter, since the backbone and the optimizer have them.
    """
    model = task.get_trainable_module().module.train()
    with torch.autocast('cpu', torch.bfloat16, enabled=variant == 'bf16'):
        maps = model.backbone.forward_intermediates(
            x, indices=model.exit_indices, output_fmt='NCHW', intermediates_only=True)
        known = {t.untyped_storage().data_ptr() for t in (*maps, *model.parameters())}
        kept: Dict[int, int] = {}
        alive = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            alive.append(storage)
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = [exit_head(stage_map) for exit_head, stage_map in zip(model.exits, maps)]
    del outputs
    return 3 * sum(p.numel() * p.element_size() for p in model.exits.parameters()) + sum(kept.values())


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
    parser.add_argument('--variants', nargs='+', default=['fp32', 'bf16'], choices=VARIANTS, help='kinds of steps')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f'torch {torch.__version__}, timm {timm.__version__}, {platform.machine()} CPU, {args.threads} thread(s), '
          f'median of {args.rounds}')
    print(f"{'model':<15} {'input':>10} {'variant':<13} {'plain':>8} {'exits':>8} {'time ratio':>11} {'quartiles':>14}"
          f" {'FLOPs ratio':>11} {'time/FLOPs':>11} {'peak MB':>8} {'explained':>9} {'ratio':>6}")
    for name, size, batch in CASES:
        for variant in args.variants:
            print(row(name, size, batch, variant, args.rounds), flush=True)


def row(name: str, size: int, batch: int, variant: str, rounds: int) -> str:
    """One model and variant as a line of the table."""
    x, y = torch.randn(batch, 3, size, size), torch.randint(100, (batch,))

    def tasks() -> Tuple[TrainingTask, timm_eed.MultiExitTask]:
        return (ClassificationTask(timm.create_model(name), nn.CrossEntropyLoss(), verbose=False),
                timm_eed.MultiExitTask(timm_eed.create_model(name), verbose=False))

    plain, exits = tasks()
    flops = training_flops(exits, x, y) / training_flops(plain, x, y)
    a, b = measure([make_step(task, x, y, variant)[0] for task in (plain, exits)], rounds)
    ratios = [q / p for p, q in zip(a, b)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    line = (f'{name:<15} {f"{batch}x{size}x{size}":>10} {variant:<13} {1e3 * statistics.median(a):5.0f} ms '
            f'{1e3 * statistics.median(b):5.0f} ms {ratio:11.3f} {f"({low:.3f}-{high:.3f})":>14} {flops:11.3f} '
            f'{ratio / flops:11.3f}')
    if variant == 'compile':  # the tracker does not see into compiled code
        return line
    plain, exits = tasks()
    explained = peak_memory(plain, x, y, variant) + memory_of_exits(exits, x, variant)
    peak = peak_memory(exits, x, y, variant)
    return line + f' {peak / 1e6:8.1f} {explained / 1e6:9.1f} {peak / explained:6.3f}'


if __name__ == '__main__':
    main()
