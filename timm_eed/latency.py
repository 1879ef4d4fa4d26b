"""Time of every exit, of the main network and of early exit, on the same images, taken in turns."""
import math
import operator
import random
import statistics
import time
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

import torch

from .early_exit import EarlyExit
from .profiling import early_exit_gflops, leaving_gflops

__all__ = ['Timing', 'by_round', 'measure', 'time_exits']


class Timing(NamedTuple):
    """Time of one way to answer batches, and what it costs.

    name: exit1, .., main, early exit. p50, p95: Milliseconds per batch. throughput: Images per second.
    time_share, flops_share: Time (the median of the rounds' ratios) and FLOPs relative to the main network's.
    """
    name: str
    p50: float
    p95: float
    throughput: float
    time_share: float
    flops_share: float


@torch.no_grad()
def time_exits(
        early: EarlyExit,
        batches: Sequence[torch.Tensor],
        rounds: int = 20,
        warmup: int = 3,
        clock: Callable[[], float] = time.perf_counter,
) -> List[Timing]:
    """Times of exit1, .. (all samples leave there), of the network alone (main) and of early exit.

    Args:
        early: The model with its thresholds.
        batches: Images [B, C, H, W] on the model's device.
        rounds: How often all of them are timed, in turns.
        warmup: Rounds before that are not timed.
        clock: What tells the time, in seconds.
    """
    last = early.model.num_exits - 1
    functions: Dict[str, Callable[[torch.Tensor], object]] = {
        f'exit{i + 1}': lambda x, i=i: early(x, exit=i) for i in range(last)}  # type: ignore[misc]
    functions['main'] = early.model.backbone
    functions['early exit'] = early
    taken = torch.cat([early(x).exit_index for x in batches])
    shares = (torch.bincount(taken, minlength=last + 1).double() / len(taken)).tolist()
    trunk, heads = early_exit_gflops(early.model, tuple(batches[0].shape[1:]))  # type: ignore[arg-type]
    passed = early.rule.enabled if early.rule.looks_back else []  # whose answers count at later exits, too
    flops = [leaving_gflops(trunk, heads, sorted({*passed, i}))[i] for i in range(last)] + [trunk[-1]]
    flops.append(sum(map(operator.mul, shares, leaving_gflops(trunk, heads, early.rule.enabled))))
    times = measure(functions, batches, rounds, warmup, clock)
    totals = by_round(times)
    images = sum(len(x) for x in batches)
    rows = []
    for name, cost in zip(functions, flops):
        per_batch = sorted(1e3 * seconds for each in times[name] for seconds in each)
        rows.append(Timing(
            name, statistics.median(per_batch), per_batch[math.ceil(.95 * len(per_batch)) - 1],
            images / statistics.median(totals[name]),
            statistics.median(a / b for a, b in zip(totals[name], totals['main'])), cost / trunk[-1]))
    return rows


def measure(
        functions: Dict[str, Callable[[torch.Tensor], object]],
        batches: Sequence[torch.Tensor],
        rounds: int,
        warmup: int,
        clock: Callable[[], float],
) -> Dict[str, List[List[float]]]:
    """Seconds by function, round and batch. Each round has another order, since caches remember who was before."""
    times: Dict[str, List[List[float]]] = {name: [] for name in functions}
    device, order = batches[0].device, random.Random(0)
    for turn in range(warmup + rounds):
        for name in order.sample(list(functions), len(functions)):
            seconds = [_seconds(functions[name], x, device, clock) for x in batches]
            if turn >= warmup:
                times[name].append(seconds)
    return times


def by_round(times: Dict[str, List[List[float]]]) -> Dict[str, List[float]]:
    """What `measure` gives, the batches of a round summed: seconds by function and round."""
    return {name: [sum(each) for each in seconds] for name, seconds in times.items()}


def _seconds(
        function: Callable[[torch.Tensor], object],
        x: torch.Tensor,
        device: Optional[torch.device],
        clock: Callable[[], float],
) -> float:
    _finish(device)
    start = clock()
    function(x)
    _finish(device)
    return clock() - start


def _finish(device: Optional[torch.device]) -> None:
    if device is not None and device.type != 'cpu':
        torch.accelerator.synchronize()
