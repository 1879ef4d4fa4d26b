"""Truncated models beside the whole network: parameters, FLOPs and time.

    python benchmarks/truncated.py --models resnet50 deit_small_patch16_224

Each exit's `timm_eed.truncate` and the main network get the same images, in turns, on one thread; CPU time, median of
the rounds' ratios with quartiles. Logits must be bit-equal to those of the multi-exit model.
"""
import argparse
import platform
import statistics
import time

import timm
import torch

import timm_eed
from timm_eed.latency import measure
from timm_eed.multi_exit import classifier_names
from timm_eed.probe import input_size


@torch.no_grad()
def main() -> None:
    """Print a row per exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet50', 'deit_small_patch16_224'], help='timm models')
    parser.add_argument('--batch', type=int, default=8, help='images per batch')
    parser.add_argument('--rounds', type=int, default=9, help='timed rounds')
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f'torch {torch.__version__}, timm {timm.__version__}, {platform.machine()} CPU, one thread, batch '
          f'{args.batch}, {args.rounds} rounds\n')
    print(f'{"model":<24} {"exit":<6} {"parameters":>12} {"share":>8} {"FLOPs":>8} {"time":>8}  quartiles')
    for name in args.models:
        torch.manual_seed(0)
        model = timm_eed.create_model(name, exit_type='linear').eval()
        x = torch.randn(args.batch, *input_size(model.backbone))
        names = classifier_names(model.num_exits)
        parts = {exit_name: timm_eed.truncate(model, i) for i, exit_name in enumerate(names)}
        for exit_name, z in zip(names, model.forward_exits(x).logits):
            assert torch.equal(parts[exit_name](x), z), f'{name} {exit_name} differs'
        times = measure(parts, [x], args.rounds, 1, time.thread_time)
        profile = {row.exit: row for row in timm_eed.profile(model)}
        whole = sum(p.numel() for p in parts['main'].parameters())
        for exit_name in names:
            params = sum(p.numel() for p in parts[exit_name].parameters())
            low, middle, high = statistics.quantiles(
                [sum(a) / sum(b) for a, b in zip(times[exit_name], times['main'])], n=4)
            print(f'{name:<24} {exit_name:<6} {params:12,d} {100 * params / whole:6.1f} % '
                  f"{100 * profile[exit_name].gflops / profile['main'].gflops:6.1f} % {100 * middle:6.1f} %  "
                  f'({100 * low:.1f}-{100 * high:.1f})', flush=True)


if __name__ == '__main__':
    main()
