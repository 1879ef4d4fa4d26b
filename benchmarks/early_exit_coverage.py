"""In which way rows leave each architecture of timm, and whether the answers are right.

    python benchmarks/early_exit_coverage.py                     # resumable; rows go to docs/early_exit_families.csv
    python benchmarks/early_exit_coverage.py --max-params 100
    python benchmarks/early_exit_coverage.py --summary           # docs/early_exit_families.md from the rows

Per architecture that docs/coverage.csv calls ok: an untrained model on real tensors at its smallest input, batch norms
set to the statistics of 32 images; `EarlyExit` finds its way, then batches of 32, 7, 2 and 1 in random order leave it
at thresholds in the widest gap of the middle half of each exit's confidences. Exits must be those that the rule picks
from the logits of all classifiers, and answers within 1e-5 of the scale of each classifier's logits, or within twice of
what the whole model itself differs by when it gets these batches (column plain: kernels round otherwise). Smallest
networks first.
"""
import argparse
import fnmatch
import os
import time
import warnings
from typing import Any, Dict, List

import timm
import torch
import torch.nn as nn
from coverage import CSV as MODELS_CSV
from rows import append, read
from tqdm import tqdm

import timm_eed
from timm_eed.policies import ExitRule, Progress, choose_exits

FIELDS = ['name', 'family', 'input', 'params', 'way', 'taps', 'agree', 'worst', 'plain', 'status', 'reason', 'seconds']
CSV = os.path.join(os.path.dirname(__file__), '..', 'docs', 'early_exit_families.csv')
BATCHES = (32, 7, 2, 1)


def main() -> None:
    """Go through the models that have no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--filter', default='*', help='name pattern')
    parser.add_argument('--max-params', type=float, default=30, help='most parameters (10^6)')
    parser.add_argument('--one-per-family', action='store_true', help='only families that have no row')
    parser.add_argument('--csv', default=CSV, help='file of rows')
    parser.add_argument('--summary', action='store_true', help='write the summary only')
    args = parser.parse_args()
    if args.summary:
        return write_summary(args.csv)
    torch.set_num_threads(1)
    known = read(args.csv)
    done, families = {row['name'] for row in known}, {row['family'] for row in known if row['status'] == 'ok'}
    models = [row for row in read(MODELS_CSV) if row['status'] == 'ok' and row['name'] not in done
              and fnmatch.fnmatch(row['name'], args.filter)]
    sizes = {row['name']: parameters(row['name']) for row in tqdm(models, unit='model', desc='sizes')}
    for row in tqdm(sorted(models, key=lambda row: sizes[row['name']]), unit='model'):
        if sizes[row['name']] > args.max_params * 1e6 or (args.one_per_family and row['family'] in families):
            continue
        found = survey(row, sizes[row['name']])
        if found['status'] == 'ok':
            families.add(row['family'])
        append(args.csv, FIELDS, found)
    write_summary(args.csv)


def parameters(name: str) -> int:
    """Number of parameters, without making them."""
    with torch.device('meta'):
        return sum(p.numel() for p in timm.create_model(name).parameters())


@torch.no_grad()
def survey(model_row: Dict[str, str], params: int) -> Dict[str, Any]:
    """The row of one architecture; whatever goes wrong is its status and reason."""
    row: Dict[str, Any] = dict.fromkeys(FIELDS, '')
    row.update({key: model_row[key] for key in ('name', 'family', 'input')}, params=params)
    start = time.time()
    try:
        examine(row)
    except Exception as error:
        row.update(status='error', reason=f'{type(error).__name__}: {error}'.splitlines()[0][:300])
    row['seconds'] = f'{time.time() - start:.1f}'
    return row


def examine(row: Dict[str, Any]) -> None:
    """Fill in a row; raises what the model raises."""
    torch.manual_seed(0)
    model = timm_eed.create_model(row['name'], num_classes=10, exit_type='linear')
    images = max(BATCHES)
    x = torch.randn(images, *map(int, row['input'].split('x'))) * (.5 + torch.rand(images, 1, 1, 1))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.
    model.forward_exits(x)
    logits = model.eval().forward_exits(x).logits
    early = timm_eed.EarlyExit(model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        way = early.prepare(x)
    row.update(way=way.name, taps=' '.join(tap.module for tap in way.taps))
    early.rule = middle_rule(logits)
    expected = choose_exits(early.rule, logits)
    scales = torch.stack([z.abs().max() for z in logits])
    agree, worst, plain = True, 0., 0.
    for batch in BATCHES:
        rows = torch.randperm(images)[:batch]
        out = early(x[rows])
        agree &= torch.equal(out.exit_index, expected.exit_index[rows])
        error = (out.logits - expected.logits[rows]).abs().amax(1) / scales[expected.exit_index[rows]]
        worst = max(worst, float(error.max()))
        own = [(z - all_z[rows]).abs().max() / all_z.abs().max()
               for z, all_z in zip(model.forward_exits(x[rows]).logits, logits)]
        plain = max(plain, float(max(own)))
    right = agree and worst <= max(1e-5, 2 * plain)
    row.update(agree='yes' if agree else 'no', worst=f'{worst:.1g}', plain=f'{plain:.1g}',
               status='ok' if right else 'differs')


def middle_rule(logits: List[torch.Tensor]) -> ExitRule:
    """Thresholds in the widest gap of the middle half of the confidences present; temperatures spread them."""
    temperatures = [float((z - z.mean(0)).abs().max()) / 2 + 1e-6 for z in logits]
    rule = ExitRule(len(logits), 2., temperatures=temperatures)
    present = torch.ones(len(logits[0]), dtype=torch.bool)
    for i, z in enumerate(logits[:-1]):
        score = rule.answer(i, z, Progress())[1]
        ranked = score[present].double().sort().values
        if len(ranked) > 2:
            quarter = len(ranked) // 4
            low = quarter + int(ranked.diff()[quarter:len(ranked) - 1 - quarter].argmax())
            rule.thresholds[i] = float(ranked[low] + ranked[low + 1]) / 2
            present &= ~rule.leaves(i, score)
    return rule


def write_summary(path: str) -> None:
    """A table by family, beside the rows."""
    rows = read(path)
    ways = ('cut', 'replay', 'whole')
    counts = ', '.join(f'{sum(row["way"] == way for row in rows)} by {way}' for way in ways)
    good = [row for row in rows if row['status'] == 'ok']
    families = sorted({row['family'] for row in rows})
    lines = [
        '# Early exit by architecture', '',
        'Generated by `python benchmarks/early_exit_coverage.py --summary` from '
        '[early_exit_families.csv](early_exit_families.csv): '
        f'{len(rows)} architectures of {len(families)} families of timm {timm.__version__}, on real tensors, PyTorch '
        f'{torch.__version__.split("+")[0]}. Samples leave {counts} (`timm_eed.row_dropping` tells what that is).', '',
        f'{len(good)} are ok: batches of {", ".join(map(str, BATCHES))} leave at the exits that the rule picks from '
        f'all logits, and their answers are within 1e-5 of the scale of the logits, or within '
        'twice of what the whole model itself differs by when it gets these batches (last column).', '',
        '| family | model | cut | replay | whole | ok | worst relative difference | whole model |',
        '|---|---|---|---|---|---|---|---|']
    for family in families:
        mine = [row for row in rows if row['family'] == family]
        worst, plain = (max((float(row[key]) for row in mine if row[key]), default=0.) for key in ('worst', 'plain'))
        names = ', '.join(f"{row['name']} ({row['input']})" for row in mine)
        lines.append(f'| {family} | {names} | ' + ' | '.join(
            str(sum(row['way'] == way for row in mine)) for way in ways)
            + f" | {sum(row['status'] == 'ok' for row in mine)} | {worst:.1g} | {plain:.1g} |")
    others = [row for row in rows if row['status'] != 'ok']
    if others:
        lines += ['', '| not ok | status | exits agree | worst | reason |', '|---|---|---|---|---|']
        lines += [f"| {row['name']} | {row['status']} | {row['agree']} | {row['worst']} | {row['reason']} |"
                  for row in others]
    with open(os.path.splitext(path)[0] + '.md', 'w', encoding='utf-8') as file:
        file.write('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
