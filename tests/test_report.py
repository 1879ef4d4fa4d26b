"""Curves, figures, the report and `timm-eed validate`, on runs of the script."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch

import train_eed
from timm_eed import cli, curves
from timm_eed.training.runs import load_run

FLAGS = ('--dataset eed/digits --model test_resnet --num-classes 10 --input-size 1 32 32 --mean .3 --std .4 --epochs 2 '
         '--warmup-epochs 0 --workers 0 --device cpu --lr .05 --smoothing 0').split()


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    kinds = dict(a=['--seed', '1'], b=['--seed', '2'], ce=['--eed-method', 'ce'], none=['--eed-method', 'none'])
    for name, flags in kinds.items():
        train_eed.main([*FLAGS, '--output', str(folder), '--experiment', name, *flags])
    return folder


def test_curves_are_the_summary(runs):
    found = curves.read_curves(str(runs / 'a'))
    with open(runs / 'a/summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert set(found['train']) == set(found['eval']) == {'exit1', 'exit2', 'exit3', 'main', 'ensemble'}
    assert found['eval']['main'].tolist() == [float(row['eval_top1']) for row in rows]
    assert found['train']['ensemble'].tolist() == [float(row['train_top1_ensemble']) for row in rows]
    assert found['train']['ensemble'][-1] > found['train']['ensemble'][0] > 5


def test_runs_are_grouped_by_what_sets_them_apart(runs):
    folders = [str(runs / name) for name in ('a', 'ce', 'b')]
    groups = curves.group_runs(folders)
    assert [group.label for group in groups] == ['method eed', 'method ce']
    assert groups[0].folders == [folders[0], folders[2]]
    assert groups[0].curves['eval']['exit1'].shape == (2, 2)
    assert np.array_equal(groups[0].curves['eval']['exit1'][1], curves.read_curves(folders[2])['eval']['exit1'])
    with pytest.raises(ValueError, match='no run'):
        curves.group_runs([str(runs)])


def test_data_sets_are_not_seeds(runs, tmp_path):
    for name, data in (('a', '/here/flowers'), ('b', '/there/flowers/'), ('c', '/here/cars')):
        shutil.copytree(runs / 'a', tmp_path / name)
        with open(tmp_path / name / 'args.yaml', 'a') as file:
            file.write(f'data_dir: {data}\n')
    groups = curves.group_runs([str(tmp_path / name) for name in 'abc'])
    assert [(group.label, len(group.folders)) for group in groups] == [('data_dir flowers', 2), ('data_dir cars', 1)]


def test_epochs_are_those_of_the_summary(runs, tmp_path):
    """A run that goes on in another folder begins at a later epoch; one that still runs has fewer."""
    def part(name, rows):
        shutil.copytree(runs / 'none', tmp_path / name)
        values = [dict(epoch=epoch, train_top1=epoch, eval_top1=value) for epoch, value in rows]
        with open(tmp_path / name / 'summary.csv', 'w', newline='') as file:
            writer = csv.DictWriter(file, list(values[0]))
            writer.writeheader()
            writer.writerows(values)
        return str(tmp_path / name)
    folders = [part('whole', [(0, 10.), (1, 20.), (2, 30.), (3, 40.)]), part('later', [(1, 22.), (2, 34.), (3, '')])]
    group, = curves.group_runs(folders)
    assert curves.measured_epochs(group.curves['eval']['main']).tolist() == [1, 2]
    assert group.curves['eval']['main'][:, 2].tolist() == [30., 34.]
    pytest.importorskip('matplotlib')
    cli.main(['report', *folders, '--curves-only', '--output', str(tmp_path / 'out')])
    assert '<td>3</td><td>32.00</td><td>2.83</td><td>2</td>' in (tmp_path / 'out/report.html').read_text()


def test_validate_repeats_the_last_evaluation(runs, capsys, tmp_path):
    out = tmp_path / 'metrics.json'
    cli.main(['validate', str(runs / 'a'), '--subset', 'exit1+main', '--json', str(out), '--device', 'cpu', '-j', '0'])
    with open(runs / 'a/summary.csv', newline='') as file:
        last = list(csv.DictReader(file))[-1]
    metrics = json.loads(out.read_text())['metrics']
    for name in ('exit1', 'exit2', 'exit3', 'main', 'ensemble'):
        suffix = '' if name == 'main' else f'_{name}'
        for metric in ('top1', 'top5'):
            assert metrics[name][metric] == pytest.approx(float(last[f'eval_{metric}{suffix}']), abs=1e-4)
    assert metrics['main']['loss'] == pytest.approx(float(last['eval_loss']), rel=1e-5)
    printed = capsys.readouterr().out
    assert 'exit1+main' in printed and '355 images' in printed and 'after 2 epochs' in printed


@pytest.mark.parametrize('arguments, message', [
    (['nowhere/run'], "no run and no checkpoint 'nowhere/run'"), (['resnet_18'], 'did you mean'),
    (['{a}', '--checkpoint', 'x.pth.tar'], 'has no checkpoint'), (['{a}', '--subset', 'exit9'], 'different indices'),
    (['{a}', '--split', ''], None), (['{a}', 'no/such/folder'], 'does not exist')])
def test_validate_says_what_is_wrong(runs, arguments, message):
    arguments = [a.format(a=runs / 'a') for a in arguments]
    if message is None:
        return cli.main(['validate', *arguments, '-j', '0'])
    with pytest.raises(SystemExit) as error:
        cli.main(['validate', *arguments, '-j', '0'])
    assert message in str(error.value)


def test_a_plain_run_is_validated_too(runs, capsys):
    cli.main(['validate', str(runs / 'none'), '-j', '0'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith('main') and 'ensemble' not in ''.join(lines)


def test_moving_average_is_preferred(runs, tmp_path):
    train_eed.main([*FLAGS, '--epochs', '1', '--model-ema', '--model-ema-decay', '.5', '--output', str(tmp_path),
                    '--experiment', 'ema'])
    with_ema, without = load_run(str(tmp_path / 'ema')), load_run(str(tmp_path / 'ema'), ema=False)
    assert with_ema.ema and not without.ema and with_ema.epoch == 1
    a, b = with_ema.model.state_dict(), without.model.state_dict()
    assert not all(torch.equal(a[k], b[k]) for k in a)
    best = load_run(str(tmp_path / 'ema'), 'best').model.state_dict()
    assert all(torch.equal(a[k], best[k]) for k in a)


def test_report(runs, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    cli.main(['report', str(runs / 'a'), str(runs / 'b'), str(runs / 'ce'), '--output', str(tmp_path), '-j', '0'])
    page = (tmp_path / 'report.html').read_text()
    assert page.count('data:image/png;base64,') == 4 and 'http' not in page and 'class contrast' in page
    pictures = sorted(p.name for p in tmp_path.glob('*.png'))
    assert len(pictures) == 4 and all((tmp_path / name).read_bytes().startswith(b'\x89PNG') for name in pictures)
    assert 'report.html' in capsys.readouterr().out


def test_report_of_curves_alone(runs, tmp_path):
    pytest.importorskip('matplotlib')
    shutil.copytree(runs / 'none', tmp_path / 'none')
    cli.main(['report', str(tmp_path / 'none'), '--curves-only', '--output', str(tmp_path / 'out')])
    assert (tmp_path / 'out/report.html').read_text().count('data:image/png') == 1
    with open(tmp_path / 'none/summary.csv', newline='') as file:
        rows = [{k: v for k, v in row.items() if not k.startswith('eval')} for row in csv.DictReader(file)]
    with open(tmp_path / 'none/summary.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    cli.main(['report', str(tmp_path / 'none'), '--curves-only', '--output', str(tmp_path / 'train')])
    page = (tmp_path / 'train/report.html').read_text()
    assert 'Accuracy on the training images' in page and f"{float(rows[-1]['train_top1']):.2f}" in page
    with pytest.raises(SystemExit, match='has no exits'):
        cli.main(['report', str(tmp_path / 'none'), '--output', str(tmp_path / 'out'), '-j', '0'])
