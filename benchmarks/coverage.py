"""Wrap every architecture that timm lists, train and evaluate one step, and write down what happened.

    python benchmarks/coverage.py                     # all, resumable; rows go to docs/coverage.csv
    python benchmarks/coverage.py --filter "swin*"
    python benchmarks/coverage.py --summary           # docs/coverage.md from docs/coverage.csv

Per architecture: create, wrap, evaluation logits against the bare model, a training step (forward, loss with both
distillation terms, backward), and the same step with gradient checkpointing. On real tensors where the network is small
enough at its smallest size, else on the meta device, where only shapes and gradient flow can be seen.
"""
import argparse
import fnmatch
import os
import signal
import time
from collections import Counter
from typing import Any, Dict, List, Optional

import timm
import torch
from rows import append, read
from timm.models import model_entrypoint
from tqdm import tqdm

import timm_eed
from timm_eed.probe import input_size

FIELDS = ['name', 'family', 'device', 'input', 'exits', 'exit_share', 'bit_equal', 'exit_gradients', 'checkpointing',
          'status', 'reason', 'seconds']
CSV = os.path.join(os.path.dirname(__file__), '..', 'docs', 'coverage.csv')
BATCH = 2
SIDE = 64  # pixels, for networks that take any size
NOT_POSSIBLE = 'not supported by the network'


class OutOfTime(Exception):
    """The time limit of one model is over."""


def out_of_time(*_: Any) -> None:
    """Signal handler."""
    raise OutOfTime


def main() -> None:
    """Go through the models that have no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--filter', default='*', help='name pattern')
    parser.add_argument('--limit', type=int, default=240, help='seconds per model')
    parser.add_argument('--max-params', type=float, default=60, help='most parameters (10^6) run on real tensors')
    parser.add_argument('--threads', type=int, default=1, help='threads of PyTorch')
    parser.add_argument('--csv', default=CSV, help='file of rows')
    parser.add_argument('--summary', action='store_true', help='write the summary only')
    args = parser.parse_args()
    if args.summary:
        return write_summary(args.csv)
    torch.set_num_threads(args.threads)
    signal.signal(signal.SIGALRM, out_of_time)
    os.makedirs(os.path.dirname(args.csv), exist_ok=True)
    done = {row['name'] for row in read(args.csv)}
    names = [n for n in timm_models() if n not in done and fnmatch.fnmatch(n, args.filter)]
    for name in tqdm(names, unit='model', dynamic_ncols=True):
        row = survey(name, args)
        append(args.csv, FIELDS, row)
    write_summary(args.csv)


def timm_models() -> List[str]:
    """Names of timm's own architectures."""
    return [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith('timm.')]


def survey(name: str, args: argparse.Namespace) -> Dict[str, Any]:
    """The row of one architecture; whatever goes wrong is its status and reason."""
    row: Dict[str, Any] = dict.fromkeys(FIELDS, '')
    row.update(name=name, family=model_entrypoint(name).__module__.split('.')[-1])
    start = time.time()
    signal.alarm(args.limit)
    try:
        examine(name, row, args.max_params * 1e6, own_size=False)
        row['status'] = row['status'] or 'ok'
    except RuntimeError as error:
        retry(name, row, args.max_params * 1e6, error)
    except OutOfTime:
        row.update(status='timeout', reason=f'{args.limit} s are over')
    except Exception as error:
        row.update(status='error', reason=f'{type(error).__name__}: {error}'.splitlines()[0][:300])
    finally:
        signal.alarm(0)
    row['seconds'] = f'{time.time() - start:.1f}'
    return row


def retry(name: str, row: Dict[str, Any], max_params: float, error: RuntimeError) -> None:
    """Once more: on real tensors where the meta device cannot run the network, else at the network's own size."""
    needs_values = 'meta tensors' in str(error)
    row.update(status='', reason='')
    try:
        examine(name, row, float('inf') if needs_values else max_params, own_size=not needs_values)
        row['status'] = row['status'] or 'ok'
    except OutOfTime:
        row.update(status='timeout', reason='the limit is over')
    except Exception as again:
        row.update(status='error', reason=f'{type(again).__name__}: {again}'.splitlines()[0][:300])


def examine(name: str, row: Dict[str, Any], max_params: float, own_size: bool) -> None:
    """Fill in a row; raises what the model raises."""
    with torch.device('meta'):
        backbone = timm.create_model(name, num_classes=10)
    size = input_size(backbone) if own_size else smallest_size(backbone)
    params = sum(p.numel() for p in backbone.parameters())
    real = params <= max_params
    row.update(device='cpu' if real else 'meta', input='x'.join(map(str, size)))
    if real:
        torch.manual_seed(0)
        backbone = timm.create_model(name, num_classes=10)
    try:
        model = timm_eed.wrap(backbone)
    except ValueError as error:
        row.update(status='refused', reason=str(error))
        return
    row['exits'] = ' '.join(f'{e.module}:{e.channels}:{e.reduction}' for e in model.exit_info())
    row['exit_share'] = f'{sum(p.numel() for p in model.exits.parameters()) / params:.3f}'
    device = 'cpu' if real else 'meta'
    x = torch.randn(BATCH, *size, device=device)
    if real:
        with torch.no_grad():
            bare = backbone.eval()(x)
            out = model.eval().forward_exits(x)
        row['bit_equal'] = 'yes' if torch.equal(out.logits[-1], bare) else 'no'
        if row['bit_equal'] == 'no':
            row.update(status='differs', reason=f'by {(out.logits[-1] - bare).abs().max():.2g}')
    plain = gradients(model, x, row)
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, NotImplementedError):
        row['checkpointing'] = NOT_POSSIBLE
        return
    again = gradients(model, x, None)
    if real:
        worst = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(again, plain))
        row['checkpointing'] = 'equal' if worst == 0 else f'relative {worst:.1g}'
    else:
        row['checkpointing'] = 'shapes'


def gradients(model: timm_eed.MultiExitWrapper, x: torch.Tensor, row: Optional[Dict[str, Any]]) -> List[torch.Tensor]:
    """Gradients of one training step, with the same random draws at every call; batch statistics are put back."""
    if x.device.type != 'meta':
        buffers = [b.clone() for b in model.buffers()]
    torch.manual_seed(1)
    model.train().zero_grad()
    out = model.forward_exits(x)
    shapes = {tuple(z.shape) for z in out.logits}, {tuple(f.shape) for f in out.features}
    expected = {(BATCH, 10)}, {(BATCH, model.head_hidden_size)}
    if shapes != expected:
        raise ValueError(f'logits and features of shapes {shapes}, expected {expected}')
    y = torch.arange(BATCH, device=x.device)
    timm_eed.ExitEnsembleDistillationLoss(1., 1.)(out.logits, out.features, y)['loss'].backward()
    if row is not None:
        missing = [n for n, p in model.exits.named_parameters() if p.grad is None]
        row['exit_gradients'] = 'all' if not missing else f'{len(missing)} missing'
        if missing:
            row.update(status='no gradient', reason=', '.join(missing[:3]))
    if x.device.type != 'meta':
        with torch.no_grad():
            for buffer, saved in zip(model.buffers(), buffers):
                buffer.copy_(saved)
    return [p.grad for p in model.parameters() if p.grad is not None]


def smallest_size(model: Any) -> tuple:
    """SIDE pixels where the network takes any size, else its own size."""
    channels, height, width = input_size(model)
    cfg = model.pretrained_cfg
    if cfg.get('fixed_input_size'):
        return channels, height, width
    low = cfg.get('min_input_size')
    return tuple(low) if low else (channels, SIDE, SIDE)


def write_summary(path: str) -> None:
    """A table by family, beside the rows."""
    rows = read(path)
    status = ', '.join(f'{count} {name}' for name, count in Counter(row['status'] for row in rows).most_common())
    real = [row for row in rows if row['device'] == 'cpu' and row['status'] == 'ok']
    equal = sum(row['bit_equal'] == 'yes' for row in real)
    torch_version = torch.__version__.split('+')[0]
    lines = [
        '# Coverage of timm', '',
        f'Generated by `python benchmarks/coverage.py --summary` from [coverage.csv](coverage.csv): {len(rows)} of '
        f'{len(timm_models())} architectures of timm {timm.__version__}, PyTorch {torch_version}.', '',
        f'{status}; {len(real)} of the ok rows ran on real tensors, {equal} of them with evaluation logits bit-equal '
        "to the bare model's. The others are large and ran on the meta device: shapes and exits, no numbers.", '',
        '| family | models | ok | real tensors | bit-equal | exits |', '|---|---|---|---|---|---|']
    for family in sorted({row['family'] for row in rows}):
        mine = [row for row in rows if row['family'] == family]
        ok = [row for row in mine if row['status'] == 'ok']
        on_cpu = [row for row in ok if row['device'] == 'cpu']
        counts = sorted({len(row['exits'].split()) for row in ok})
        lines.append(
            f'| {family} | {len(mine)} | {len(ok)} | {len(on_cpu)} | {sum(r["bit_equal"] == "yes" for r in on_cpu)} | '
            f'{", ".join(map(str, counts))} |')
    others = [row for row in rows if row['status'] != 'ok']
    if others:
        lines += ['', '| not ok | status | reason |', '|---|---|---|']
        lines += [f"| {row['name']} | {row['status']} | {row['reason']} |" for row in others]
    with open(os.path.join(os.path.dirname(path), 'coverage.md'), 'w', encoding='utf-8') as file:
        file.write('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
