"""The study behind docs/study.md: splits, runs, collection and the figures of the report."""
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'benchmarks'))

import study  # noqa: E402
import study_report  # noqa: E402


def write_images(folder, classes=3, train=10, test=4):
    generator = np.random.default_rng(0)
    for split, count in (('train', train), ('test', test)):
        for label in range(classes):
            (folder / split / f'class{label}').mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8) // 4 + 60 * label
                Image.fromarray(pixels).save(folder / split / f'class{label}' / f'{i:03d}.png')


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """The study's own code with few images, one epoch and two configurations of a tiny network."""
    monkeypatch.setattr(study, 'SMALL', 4)
    monkeypatch.setattr(study, 'VALIDATION', 3)
    monkeypatch.setattr(study, 'SEEDS', {'small_none': 2, 'small_eed_kl': 1})
    monkeypatch.setattr(study, 'CONFIGS', tmp_path / 'configs')
    monkeypatch.setattr(study, 'RESULTS', tmp_path / 'results')
    (tmp_path / 'configs').mkdir()
    for name in study.SEEDS:
        config = yaml.safe_load((ROOT / 'benchmarks' / 'study' / f'{name}.yaml').read_text())
        config.update(model='test_resnet', num_classes=3, epochs=2, batch_size=4, decay_milestones=[2])
        (tmp_path / 'configs' / f'{name}.yaml').write_text(yaml.safe_dump(config))
    write_images(tmp_path / 'images')
    return tmp_path


def test_prepare_run_and_collect(small_study, capfd):
    data, runs = str(small_study / 'data'), str(small_study / 'runs')
    sys.argv = ['study.py', 'prepare', '--data', data, '--source', str(small_study / 'images')]
    study.main()
    files = {split: {path.name for path in Path(data, split, 'class1').iterdir()}
             for split in ('train_small', 'train_full', 'val', 'test')}
    assert {split: len(names) for split, names in files.items()} == dict(train_small=4, train_full=7, val=3, test=4)
    assert files['train_small'] < files['train_full'] and not files['train_full'] & files['val']

    sys.argv = ['study.py', 'run', '--data', data, '--output', runs, '--jobs', '2']
    study.main()
    assert {path.parent.name for path in Path(runs).glob('*/test.json')} == {
        'small_none-seed0', 'small_none-seed1', 'small_eed_kl-seed0'}
    study.main()
    assert '0 runs to do' in capfd.readouterr().out

    sys.argv = ['study.py', 'collect', '--output', runs]
    study.main()
    found = study_report.Study(small_study / 'results')
    assert set(found.test('small_none')) == {0, 1} and set(found.test('small_eed_kl', 'exit2')) == {0}
    with open(Path(runs, 'small_none-seed1', 'summary.csv')) as file:
        epochs = [float(row['eval_top1']) for row in csv.DictReader(file)]
    assert np.allclose(found.curves['small_none', 'eval', 'main'][1], epochs, atol=.005) and len(epochs) == 2

    tables = [(small_study / 'results' / name).read_text() for name in ('results.csv', 'curves.csv')]
    shutil.rmtree(Path(runs, 'small_none-seed0'))  # of another machine, say
    study.main()
    assert tables == [(small_study / 'results' / name).read_text() for name in ('results.csv', 'curves.csv')]

    changed = json.loads(Path(runs, 'small_none-seed1', 'test.json').read_text())
    changed['metrics']['main']['top1'] = 12.5
    Path(runs, 'small_none-seed1', 'test.json').write_text(json.dumps(changed))
    before = found.test('small_none')
    study.main()
    assert study_report.Study(small_study / 'results').test('small_none') == {0: before[0], 1: 12.5}


def test_a_failed_run_does_not_stop_the_others(tmp_path, monkeypatch):
    done = []

    def one_run(args, name, seed):
        if name == 'small_ce' and seed == 0:
            raise subprocess.CalledProcessError(1, 'train_eed.py')
        done.append((name, seed))

    monkeypatch.setattr(study, 'one_run', one_run)
    monkeypatch.setattr(sys, 'argv', [
        'study.py', 'run', '--data', 'x', '--output', str(tmp_path), '--seeds', '0', '1', '--only', 'small_none',
        'small_ce'])
    with pytest.raises(SystemExit, match=r'1 runs failed: .*small_ce-seed0/log\.txt'):
        study.main()
    assert done == [('small_none', 0), ('small_none', 1), ('small_ce', 1)]


def test_nothing_to_collect(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [
        'study.py', 'collect', '--output', str(tmp_path), '--results', str(tmp_path / 'csv')])
    with pytest.raises(SystemExit, match='has no finished runs'):
        study.main()
    assert not (tmp_path / 'csv').exists()


def write_results(folder, epochs=15):
    """Made-up results of two methods and five seeds."""
    generator = np.random.default_rng(1)
    results, curves = [], []
    for config, better in (('small_none', 0.), ('small_eed_kl', 2.)):
        for seed in range(5):
            names = ['main'] if config == 'small_none' else ['exit1', 'exit2', 'main', 'ensemble']
            for name in names:
                values = dict(zip(('top1', 'top5', 'ece', 'loss'), generator.random(4) + 50 + seed + better))
                results.append(dict(config=config, seed=seed, classifier=name, **values))
                curves += [dict(config=config, seed=seed, epoch=epoch, split='eval', classifier=name,
                                top1=3 * epoch + generator.random() + better) for epoch in range(epochs)]
    for name, rows in (('results', results), ('curves', curves)):
        with open(folder / f'{name}.csv', 'w', newline='') as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return results, curves


def test_figures_of_the_report(tmp_path):
    results, curves = write_results(tmp_path)
    found = study_report.Study(tmp_path)

    def top1(config):
        return [row['top1'] for row in results if row['config'] == config and row['classifier'] == 'main']

    interval = stats.ttest_rel(top1('small_eed_kl'), top1('small_none')).confidence_interval(.95)
    difference = study_report.paired(found.test('small_eed_kl'), found.test('small_none'))
    assert (difference.low, difference.high) == pytest.approx(tuple(interval)) and difference.n == 5
    assert difference.verdict == 'better'
    other_way = study_report.paired(found.test('small_none'), found.test('small_eed_kl'))
    assert other_way.verdict == 'worse' and other_way.mean == pytest.approx(-difference.mean)
    assert study_report.paired({0: 1.}, {0: 2., 1: 3.}).verdict == 'no difference shown'
    assert study_report.paired({0: 1.}, {1: 3.}) is None
    assert str(study_report.Difference(1.234, -.5, 3., 4)) == '+1.23 (-0.50 to +3.00), n = 4'

    for seed in range(5):
        curve, plain = ([row['top1'] for row in curves if (row['config'], row['seed'], row['classifier']) == (
            config, seed, 'main')] for config in ('small_eed_kl', 'small_none'))
        changes = [abs(curve[i] - curve[i - 1]) for i in range(5, 15)]
        assert found.fluctuation('small_eed_kl')[seed] == pytest.approx(sum(changes) / 10)
        reached = next(i for i, value in enumerate(curve, start=1) if value >= .95 * plain[-1])
        assert found.epochs_to_plain('small_eed_kl', 'small_none')[seed] == reached

    assert set(found.epochs_to_plain('small_none', 'small_eed_kl').values()) <= {14., 15., float('inf')}
    assert study_report.mean_and_std({0: 1., 1: float('inf'), 2: 3.}) == '2.00 ± 1.41 (2 of 3)'
    assert study_report.mean_and_std({0: float('inf')}) == 'never'

    values = top1('small_none')
    assert f'{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}' in study_report.readme_table(found)
    table = study_report.accuracy_table(found, study_report.SMALL)
    assert table.count('\n') == 3 and '| no exits | 5 | - | - | ' in table
    assert str(difference) in study_report.pairs_table(found)

    def values_of(config, classifier):
        return [row['top1'] for row in results if row['config'] == config and row['classifier'] == classifier]

    gap = [a - b for a, b in zip(values_of('small_eed_kl', 'ensemble'), values_of('small_eed_kl', 'main'))]
    half = stats.t.ppf(.975, 4) * stats.sem(gap)
    assert f'| {np.mean(gap):+.2f} ({np.mean(gap) - half:+.2f} to {np.mean(gap) + half:+.2f}), n = 5 |' in (
        study_report.ensemble_table(found))
    found.results.update({('small_ce', name, 'top1'): dict(enumerate(
        value - 1. for value in values_of('small_eed_kl', name))) for name in study_report.CLASSIFIERS})
    assert study_report.by_classifier_table(found).splitlines()[2:] == [
        '| small | EED, KL (8) | 5 |' + ' +1.00 (+1.00 to +1.00) |' * 4]


def test_only_what_is_between_the_marks_is_written(tmp_path):
    file = tmp_path / 'x.md'
    file.write_text('before\n<!-- a -->\nold\n<!-- /a -->\nafter\n')
    study_report.fill(file, dict(a=lambda: 'new \\1'))
    study_report.fill(file, dict(a=lambda: 'new \\1'))
    assert file.read_text() == 'before\n<!-- a -->\n\nnew \\1\n\n<!-- /a -->\nafter\n'
    with pytest.raises(ValueError, match='has no marks <!-- b -->'):
        study_report.fill(file, dict(b=lambda: ''))


def test_pictures_are_drawn(tmp_path):
    write_results(tmp_path)
    study_report.draw(study_report.Study(tmp_path), study_report.SMALL, ['main', 'ensemble'], tmp_path / 'x.png')
    assert len(np.unique(np.asarray(Image.open(tmp_path / 'x.png').convert('RGB')).reshape(-1, 3), axis=0)) > 10


def test_differences_are_drawn(tmp_path):
    write_results(tmp_path)
    study_report.draw_differences(study_report.Study(tmp_path), tmp_path / 'x.png')
    pixels = np.asarray(Image.open(tmp_path / 'x.png').convert('RGB')).reshape(-1, 3)
    blue = (pixels == (31, 119, 180)).all(1)  # mean and interval
    assert blue.sum() > 20
