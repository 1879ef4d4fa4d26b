"""Time of early exit beside the plain model, earlyon's and the best that is possible, for shares of leaving samples.

    pip install --no-deps earlyon==0.3.0              # optional, a column more
    python benchmarks/early_exit.py                   # resumable; rows go to docs/early_exit_time.csv
    python benchmarks/early_exit.py --models resnet50 --batches 32
    python benchmarks/early_exit.py --summary         # docs/early_exit_time.md from the rows

One exit is on. Its threshold is put between two confidences of the very batch, so that the wanted share leaves; nothing
is faked, the samples are the same for all, and the answers are compared with those of the full model. earlyon gets the
same exit head, stage map and threshold; in its batched mode a batch leaves only as a whole. With batch 1 a stream of
eight images is timed, one by one, of which the share leaves.

    oracle = T(prefix + exit, all rows) + T(plain, rows that stay) - T(prefix, rows that stay)

each part timed alone. All are interleaved in one process, on one thread; the median over rounds of the ratios counts.
Times are CPU times of the thread (--clock wall for the other), since machines are shared.
"""
import argparse
import os
import platform
import statistics
import time
import warnings
from typing import Any, Callable, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
from rows import append, read

import timm_eed
from timm_eed.latency import by_round, measure
from timm_eed.policies import ExitRule, Progress, choose_exits
from timm_eed.probe import input_size
from timm_eed.profiling import early_exit_gflops

MODELS = ['resnet18', 'resnet50', 'convnext_tiny', 'swin_tiny_patch4_window7_224', 'deit_small_patch16_224',
          'efficientnet_b0']
SHARES = [0., .25, .5, .75, .9, 1.]
ROUNDS = {1: 7, 8: 5, 32: 5}
STREAM = 8  # images timed one by one at batch 1
FIELDS = ['model', 'exit_type', 'exit', 'batch', 'share', 'left', 'rounds', 'plain_ms', 'early_ms', 'earlyon_ms',
          'oracle_ms', 'early_oracle', 'early_oracle_low', 'early_oracle_high', 'early_plain', 'early_earlyon',
          'flops_share']
CSV = os.path.join(os.path.dirname(__file__), '..', 'docs', 'early_exit_time.csv')
CLOCKS = {'cpu': time.thread_time, 'wall': time.perf_counter}


class LogitsOnly(nn.Module):
    """An exit head as earlyon takes it."""

    def __init__(self, exit_head: nn.Module):
        super().__init__()
        self.exit_head = exit_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of a stage map."""
        return self.exit_head(x)[0]


class Case:
    """A model with one exit on, images, and everything that is timed as functions.

    Args:
        model: The multi-exit model.
        exit_index: The exit.
        images: Images [B, C, H, W].
        share: Share of the images that is to leave.
        one_by_one: Whether images are given one at a time.
    """

    def __init__(
            self, model: timm_eed.MultiExitWrapper, exit_index: int, images: torch.Tensor, share: float,
            one_by_one: bool,
    ):
        self.model, self.exit_index = model, exit_index
        logits = model.forward_exits(images).logits
        z = logits[exit_index]
        temperature = float((z - z.mean(0)).abs().max()) / 2  # spreads the confidences of an untrained network
        threshold = threshold_for(z / temperature, share)
        thresholds: List[Optional[float]] = [None] * len(model.exits)
        thresholds[exit_index] = threshold
        temperatures = [1.] * len(logits)
        temperatures[exit_index] = temperature
        self.early = timm_eed.EarlyExit(model, thresholds, temperatures=temperatures)
        expected = choose_exits(self.early.rule, logits)
        stays = expected.exit_index > exit_index
        self.left = float((~stays).double().mean())
        self.batches = list(images.split(1)) if one_by_one else [images]
        staying = images[stays]
        self.staying = list(staying.split(1 if one_by_one else len(staying))) if len(staying) else []
        self.earlyon = self._earlyon(threshold, temperature)
        check(torch.cat([self.early(x).logits for x in self.batches]), expected.logits)

    def _earlyon(self, threshold: float, temperature: float) -> Optional[Callable[[torch.Tensor], Any]]:
        try:
            from earlyon.core.types import EarlyExitConfig, ExitPoint
            from earlyon.core.wrappers import EarlyExitWrapper
        except ImportError:
            return None
        tap = self.early.prepare(self.batches[0]).taps[self.exit_index]
        model = self.model
        config = EarlyExitConfig(
            backbone='custom', num_classes=model.num_classes,
            exit_points=[ExitPoint('exit', tap.module, model.exit_info()[self.exit_index].channels)],
            # it takes thresholds from 0 to 1 only
            confidence_thresholds=[min(threshold, 1.)], temperatures={'exit': temperature, 'final': 1.})
        wrapper = EarlyExitWrapper(
            model.backbone, {'exit': LogitsOnly(model.exits[self.exit_index])}, lambda logits: logits, config,
            input_shape=tuple(self.batches[0].shape), feature_adapters={'exit': tap.stage_map}).eval()
        _ = wrapper.flops_estimate  # its own analysis, once
        self._wrapper = wrapper
        return wrapper if len(self.batches[0]) == 1 else wrapper.forward_inference_batched

    def close(self) -> None:
        """Take earlyon's hooks off the network."""
        for handle in getattr(getattr(self, '_wrapper', None), '_hook_handles', []):
            handle.remove()

    def prefix(self, x: torch.Tensor) -> torch.Tensor:
        """The network up to the exit's stage."""
        return self.model.backbone.forward_intermediates(
            x, indices=[self.model.exit_indices[self.exit_index]], output_fmt='NCHW', stop_early=True,
            intermediates_only=True)[0]

    def parts(self) -> Dict[str, Callable[[torch.Tensor], Any]]:
        """What is timed; the argument, all images, is not used."""
        exit_head = self.model.exits[self.exit_index]
        functions: Dict[str, Callable[[torch.Tensor], Any]] = {
            'plain': lambda _: [self.model.backbone(x) for x in self.batches],
            'early': lambda _: [self.early(x) for x in self.batches],
            'prefix + exit, all': lambda _: [exit_head(self.prefix(x)) for x in self.batches],
            'plain, staying': lambda _: [self.model.backbone(x) for x in self.staying],
            'prefix, staying': lambda _: [self.prefix(x) for x in self.staying],
        }
        if (earlyon := self.earlyon) is not None:
            functions['earlyon'] = lambda _: [earlyon(x) for x in self.batches]
        return functions


def check(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Answers are those of the full model."""
    error = float((logits - expected).abs().max() / expected.abs().max())
    if error > 1e-4:
        raise AssertionError(f'answers differ from those of the full model by {error:.2g}')


def threshold_for(logits: torch.Tensor, share: float) -> float:
    """Between two confidences of these logits, so that this share of them (to the nearest sample) is above."""
    if share == 0:
        return 2.
    confidence = ExitRule(2).answer(0, logits, Progress())[1].sort(descending=True).values.tolist()
    leaving = round(share * len(confidence))
    return 0. if leaving == len(confidence) else (confidence[leaving - 1] + confidence[leaving]) / 2


def make_model(name: str, exit_type: str, batch: int) -> Tuple[timm_eed.MultiExitWrapper, torch.Tensor]:
    """An untrained model whose batch norms know the images, and images of different contrast."""
    torch.manual_seed(0)
    model = timm_eed.create_model(name, exit_type=exit_type)
    x = torch.randn(batch, *input_size(model.backbone)) * (.5 + torch.rand(batch, 1, 1, 1))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.
    model.forward_exits(x[:8])
    return model.eval(), x


def bench(model: timm_eed.MultiExitWrapper, images: torch.Tensor, key: Dict[str, Any], rounds: int,
          clock: Callable[[], float]) -> Dict[str, Any]:
    """A row."""
    case = Case(model, key['exit'] - 1, images, key['share'], key['batch'] == 1)
    try:
        times = by_round(measure(case.parts(), [images], rounds, 1, clock))
    finally:
        case.close()
    oracle = [a + b - c for a, b, c in zip(
        times['prefix + exit, all'], times['plain, staying'], times['prefix, staying'])]
    trunk, heads = early_exit_gflops(model)
    at = case.exit_index
    flops = heads[at] + case.left * trunk[at] + (1 - case.left) * trunk[-1]
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times['early'], oracle)], n=4)
    per_call = 1e3 / len(case.batches)

    def ratio(other: str) -> str:
        if other not in times:
            return ''
        return f"{statistics.median(a / b for a, b in zip(times['early'], times[other])):.3f}"

    def milliseconds(seconds: Optional[List[float]]) -> str:
        return f'{per_call * statistics.median(seconds):.2f}' if seconds else ''

    return dict(
        key, left=f'{case.left:.3f}', rounds=rounds, plain_ms=milliseconds(times['plain']),
        early_ms=milliseconds(times['early']), earlyon_ms=milliseconds(times.get('earlyon')),
        oracle_ms=milliseconds(oracle), early_oracle=f'{middle:.3f}', early_oracle_low=f'{low:.3f}',
        early_oracle_high=f'{high:.3f}', early_plain=ratio('plain'), early_earlyon=ratio('earlyon'),
        flops_share=f'{flops / trunk[-1]:.3f}')


def write_summary(path: str) -> None:
    """A table beside the rows."""
    lines = [
        '# Early exit, timed', '',
        'Generated by `python benchmarks/early_exit.py --summary` from '
        f'[{os.path.basename(path)}]({os.path.basename(path)}): PyTorch {torch.__version__.split("+")[0]}, timm '
        f'{timm.__version__}, one thread of a shared {platform.machine()} CPU, CPU time per call, median of the rounds '
        'in turns. One exit is on; `share` of the samples leaves there. The oracle is '
        'T(prefix + exit, all) + T(plain, staying) - T(prefix, staying), each timed alone in the same rounds.', '']
    rows = read(path)
    for kind in sorted({(row['exit_type'], row['exit']) for row in rows}, key=lambda kind: (kind[0] != 'linear', kind)):
        lines += [f'## {kind[0]} head at exit{kind[1]}', '',
                  '| model | batch | left | plain | early exit | earlyon | oracle | early / oracle (quartiles) | '
                  'early / plain | early / earlyon | FLOPs share |', '|---|---|---|---|---|---|---|---|---|---|---|']
        for row in rows:
            if (row['exit_type'], row['exit']) == kind:
                lines.append(
                    f"| {row['model']} | {row['batch']} | {100 * float(row['left']):.0f} % | {row['plain_ms']} ms | "
                    f"{row['early_ms']} ms | {row['earlyon_ms'] or '-'} ms | {row['oracle_ms']} ms | "
                    f"{row['early_oracle']} ({row['early_oracle_low']}-{row['early_oracle_high']}) | "
                    f"{row['early_plain']} | {row['early_earlyon'] or '-'} | {row['flops_share']} |")
        lines.append('')
    with open(os.path.splitext(path)[0] + '.md', 'w', encoding='utf-8') as file:
        file.write('\n'.join(lines).rstrip() + '\n')


@torch.no_grad()
def main() -> None:
    """Measure what has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS, help='timm models')
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 8, 32], help='batch sizes')
    parser.add_argument('--shares', nargs='+', type=float, default=SHARES, help='shares of the samples that leave')
    parser.add_argument('--exit', type=int, default=2, help='the exit that is on, 1 is exit1')
    parser.add_argument('--exit-type', default='linear', choices=timm_eed.EXIT_TYPES, help='kind of head')
    parser.add_argument('--rounds', type=int, help='timed rounds (7, 5 and 5 for batches of 1, 8 and 32)')
    parser.add_argument('--clock', default='cpu', choices=CLOCKS, help='CPU time of the thread, or wall clock')
    parser.add_argument('--csv', default=CSV, help='file of rows')
    parser.add_argument('--summary', action='store_true', help='write the summary only')
    args = parser.parse_args()
    if args.summary:
        return write_summary(args.csv)
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', message='FLOPs analysis failed')
    names = ('model', 'exit_type', 'exit', 'batch', 'share')
    done = {tuple(str(row[name]) for name in names) for row in read(args.csv)}
    for name in args.models:
        for batch in args.batches:
            keys = [dict(zip(names, (name, args.exit_type, args.exit, batch, share))) for share in args.shares]
            keys = [key for key in keys if tuple(map(str, key.values())) not in done]
            if not keys:
                continue
            model, images = make_model(name, args.exit_type, max(batch, STREAM))
            for key in keys:
                row = bench(model, images, key, args.rounds or ROUNDS.get(batch, 9), CLOCKS[args.clock])
                append(args.csv, FIELDS, row)
                print(' '.join(f'{k}={row[k]}' for k in FIELDS if k not in ('exit_type', 'rounds')), flush=True)
    write_summary(args.csv)


if __name__ == '__main__':
    main()
