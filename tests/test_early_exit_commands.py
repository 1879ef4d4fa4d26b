"""`timm-eed calibrate`, `benchmark` and `export`, on a run of the script."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import timm_eed
import train_eed
from timm_eed import cli
from timm_eed.commands.inputs import load_data, load_model
from timm_eed.latency import measure, time_exits
from timm_eed.profiling import early_exit_gflops
from timm_eed.training.runs import load_run

FLAGS = ('--dataset eed/digits --model test_resnet --num-classes 10 --input-size 1 32 32 --mean .3 --std .4 --epochs 3 '
         '--warmup-epochs 0 --workers 0 --device cpu --lr .05 --smoothing 0 --exit-type linear').split()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    train_eed.main([*FLAGS, '--output', str(folder), '--experiment', 'a'])
    return folder / 'a'


@pytest.fixture(scope='module')
def settings_file(run):
    file = run / 'early.json'
    cli.main(['calibrate', str(run), '--max-accuracy-drop', '2', '--json', str(file), '--device', 'cpu', '-j', '0'])
    return file


def test_calibrate_shows_what_early_exit_does(run, settings_file, capsys):
    cli.main(['calibrate', str(run), '--max-accuracy-drop', '2', '--device', 'cpu', '-j', '0'])
    printed = capsys.readouterr().out
    assert '355 images, policy confidence' in printed and 'The target is met.' in printed and 'The curve:' in printed
    result = json.loads(settings_file.read_text())
    assert result['accuracy'] >= result['main_accuracy'] - .02 and result['gflops'] < result['main_gflops']
    assert f"{100 * result['accuracy']:.2f} %" in printed and f"{result['gflops']:.4f}" in printed


def test_calibrate_draws_the_curve(run, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    picture = tmp_path / 'curve.png'
    cli.main(['calibrate', str(run), '--max-accuracy-drop', '2', '--device', 'cpu', '-j', '0',
              '--figure', str(picture)])
    assert len(np.unique(np.asarray(Image.open(picture).convert('RGB')).reshape(-1, 3), axis=0)) > 10


def test_thresholds_are_published_and_used(run, settings_file, capsys, tmp_path):
    folder, out = tmp_path / 'published', tmp_path / 'times.json'
    cli.main(['publish', str(run / 'args.yaml'), '--checkpoint', str(run), '--repo', 'me/early', '--dry-run',
              str(folder), '--early-exit', str(settings_file)])
    assert 'timm_eed.EarlyExit(model, **model.early_exit_config)' in capsys.readouterr().out
    settings = json.loads(settings_file.read_text())['settings']
    assert timm_eed.from_pretrained(folder).early_exit_config == settings
    for name in (str(folder), f'local-dir:{folder}'):
        cli.main(['benchmark', name, '--images', '2', '--rounds', '1', '--device', 'cpu', '--json', str(out)])
        assert json.loads(out.read_text())['settings'] == settings
    cli.main(['validate', str(folder), '--dataset', 'eed/digits', '--device', 'cpu', '-j', '0', '--json', str(out)])
    model, measured = timm_eed.from_pretrained(folder), json.loads(out.read_text())['metrics']
    cli.main(['validate', str(run), '--device', 'cpu', '-j', '0', '--json', str(out)])
    assert measured == json.loads(out.read_text())['metrics'] and len(measured) == model.num_exits + 1
    (tmp_path / 'x.json').write_text('{}')
    with pytest.raises(SystemExit, match='is no file of `timm-eed calibrate --json`'):
        cli.main(['publish', str(run / 'args.yaml'), '--checkpoint', str(run), '--repo', 'me/early', '--dry-run',
                  str(tmp_path / 'none'), '--early-exit', str(tmp_path / 'x.json')])
    assert not (tmp_path / 'none').exists()


def test_calibrate_for_a_budget_and_with_a_guarantee(run, capsys):
    cli.main(['calibrate', str(run), '--max-gflops', '1e-6', '--device', 'cpu', '-j', '0'])
    assert 'The target cannot be met: 1e-06 GFLOPs are less than' in capsys.readouterr().out
    cli.main(['calibrate', str(run), '--max-accuracy-drop', '5', '--risk-control', '--device', 'cpu', '-j', '0'])
    assert 'at most 5.00 points' in capsys.readouterr().out


def test_benchmark_of_real_images(run, settings_file, capsys, tmp_path):
    out = tmp_path / 'times.json'
    flags = '--dataset eed/digits --images 40 -b 20 --rounds 2 --device cpu -j 0'.split()
    cli.main(['benchmark', str(run), *flags, '--settings', str(settings_file), '--json', str(out)])
    printed = capsys.readouterr().out
    assert '40 real images in batches of 20' in printed and 'rows leave by: cut' in printed
    rows = json.loads(out.read_text())['rows']
    assert [row['name'] for row in rows] == ['exit1', 'exit2', 'exit3', 'main', 'early exit']
    profile = timm_eed.profile(load_run(str(run)).model, (1, 32, 32))
    for row, cost in zip(rows, profile):
        assert row['flops_share'] == pytest.approx(cost.gflops / profile[-1].gflops)
    assert all(0 < row['p50'] <= row['p95'] for row in rows) and rows[3]['time_share'] == 1
    assert rows[4]['flops_share'] < 1.1


def test_benchmark_takes_images_of_all_classes(tmp_path, capsys):
    """A folder comes class by class."""
    timm_eed.create_model('test_resnet', num_classes=2).save_pretrained(tmp_path / 'model')
    for name, value in (('a', 0), ('b', 255)):
        (tmp_path / 'data' / 'val' / name).mkdir(parents=True)
        for i in range(30):
            Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(tmp_path / 'data' / 'val' / name / f'{i}.png')
    args = cli.build_parser().parse_args(
        ['benchmark', str(tmp_path / 'model'), str(tmp_path / 'data'), '--split', 'val', '-b', '60', '--device', 'cpu',
         '-j', '0'])
    inputs = load_model(args)
    taken, labels = next(iter(load_data(args, inputs, 20)))
    assert len(labels) == 20 and labels.sum() == 10 and labels[:10].unique().tolist() == [0, 1]
    everything, all_labels = next(iter(load_data(args, inputs)))
    assert all_labels.tolist() == [0] * 30 + [1] * 30
    assert torch.equal(taken, everything[labels * 30])  # prepared alike


def test_data_of_other_classes_is_not_evaluated(tmp_path, capsys, caplog):
    timm_eed.create_model('test_resnet', num_classes=2).save_pretrained(
        tmp_path / 'model', model_config=dict(label_names=['b', 'a']))
    for split, names in dict(val='ab', three='abc', other=('a2', 'b2')).items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new('RGB', (32, 32)).save(tmp_path / split / name / '0.png')
    command = ['validate', str(tmp_path / 'model'), str(tmp_path), '--device', 'cpu', '-j', '0', '--split']
    with pytest.raises(SystemExit, match=r'disagree about the classes: .*same names, other order'):
        cli.main([*command, 'val'])
    with pytest.raises(SystemExit, match='The data has 3 classes and the model 2 outputs: it was made for other data'):
        cli.main([*command, 'three'])
    cli.main([*command, 'other'])  # other words may mean the same
    assert 'calls its classes b, a, .., the data a2, b2' in caplog.text


def test_flops_count_all_exits_that_answer_together():
    model = timm_eed.create_model('test_resnet', num_classes=3)
    trunk, heads = early_exit_gflops(model, (3, 32, 32))
    rows = time_exits(timm_eed.EarlyExit(model, .5, ensemble=True), [torch.randn(2, 3, 32, 32)], 1, 0)
    for i in range(3):
        assert rows[i].flops_share == pytest.approx((trunk[i] + sum(heads[:i + 1])) / trunk[-1])
    rows = time_exits(timm_eed.EarlyExit(model, [.5, .5, None]), [torch.randn(2, 3, 32, 32)], 1, 0)
    assert rows[2].flops_share == pytest.approx((trunk[2] + heads[2]) / trunk[-1])


def test_benchmark_without_data_takes_random_images(capsys):
    cli.main(['benchmark', 'test_convnext', '--num-classes', '4', '--images', '4', '-b', '4', '--rounds', '1',
              '--thresholds', '0', '--device', 'cpu'])
    printed = capsys.readouterr().out
    assert '4 random images' in printed and 'leaving at: exit1 100 %' in printed


def test_times_are_those_of_the_clock():
    """Each function is timed by itself: a clock that ticks once per call of anything."""
    ticks = iter(range(10 ** 6))
    times = measure({'a': lambda x: None, 'b': lambda x: next(ticks)}, [torch.zeros(1)] * 2, 3, 1, lambda: next(ticks))
    assert times == {'a': [[1, 1]] * 3, 'b': [[2, 2]] * 3}
    early = timm_eed.EarlyExit(timm_eed.create_model('test_resnet', num_classes=3), 1.1)
    ticks = iter(range(10 ** 6))
    rows = time_exits(early, [torch.randn(2, 3, 32, 32)], 2, 1, lambda: next(ticks))
    assert {(row.p50, row.p95, row.throughput, row.time_share) for row in rows} == {(1000., 1000., 2., 1.)}


@pytest.mark.parametrize('who', ['main', 'exit2', 'all'])
@pytest.mark.parametrize('suffix', ['onnx', 'pt2'])
def test_export(run, who, suffix, tmp_path, capsys):
    file = tmp_path / f'model.{suffix}'
    cli.main(['export', str(run), '--output', str(file), '--exit', who, '--device', 'cpu'])
    assert f'{who} of' in capsys.readouterr().out
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        logits = load_run(str(run)).model.forward_exits(x).logits
    expected = {'main': logits[-1:], 'exit2': logits[1:2], 'all': logits}[who]
    if suffix == 'pt2':
        program = torch.export.load(file)
        assert who == 'all' or not any('exits' in name for name in program.state_dict)  # only what is computed
        outputs = program.module()(x)
        outputs = [z.detach().numpy() for z in (outputs if who == 'all' else [outputs])]
    else:
        session = pytest.importorskip('onnxruntime').InferenceSession(file, providers=['CPUExecutionProvider'])
        outputs = session.run(None, {'images': x.numpy()})
    assert len(outputs) == len(expected)
    for z, reference in zip(outputs, expected):
        assert np.allclose(z, reference.numpy(), atol=1e-4)


@pytest.mark.parametrize('command, message', [
    ('export test_resnet --output x.bin', r'must end in \.onnx or \.pt2'),
    ('export test_resnet --output x.onnx --exit exit9', "no exit 'exit9'; choose exit1, exit2, exit3, main or all"),
    ('benchmark test_resnet --settings nowhere.json', 'is no file of `timm-eed calibrate --json`'),
    ('benchmark test_resnet --settings a --thresholds 1', 'drop --thresholds and --policy'),
    ('benchmark test_resnet --settings a --policy margin', 'drop --thresholds and --policy'),
    ('benchmark test_resnet --split train', 'is one of DATA, which is not named'),
    ('benchmark test_resnet --checkpoint best', r'--checkpoint has no meaning for .* a timm model'),
    ('export docs/models/cifar_resnet20_eed --no-ema --output x.onnx', '--no-ema has no meaning'),
    ('info hf-hub:me/none', "cannot make 'hf-hub:me/none'"),
    ('benchmark test_resnet --thresholds 1 2', '2 thresholds for 3 exits'),
    ('benchmark test_resnet --thresholds .5 --exit-kwargs droprate=.1', "no argument 'droprate', only drop_rate and"),
    ('benchmark test_resnet --exit-kwargs drop_rate=x', 'drop_rate=x must be a number from 0 to 1'),
    ('benchmark docs/models/cifar_resnet20_eed --exit-kwargs drop_rate=.1', r'--exit-kwargs .* is a saved model'),
    ('export docs/models/cifar_resnet20_eed --output x.onnx --num-classes 3', r'--num-classes .* trained exits'),
    ('export docs/models/cifar_resnet20_eed --output x.onnx --exit-type conv', r'--exit-type .* trained exits'),
    ('validate docs/models/cifar_resnet20_eed --exit-indices 1', r'--exit-indices .* trained exits'),
    ('calibrate docs/models/cifar_resnet20_eed --max-accuracy-drop 150', 'must be percentage points, as in 0.5'),
])
def test_refusals_name_the_fix(command, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(SystemExit, match=message):
        cli.main([*command.split(), *(['--device', 'cpu'] if 'info' not in command else [])])


def test_an_unusable_device_is_named():
    with pytest.raises(SystemExit, match="cannot use --device 'nonsense'"):
        cli.main(['benchmark', 'test_resnet', '--device', 'nonsense'])


@pytest.mark.parametrize('command, message', [
    ('benchmark test_resnet --images 0', "'0' must be a whole number from 1"),
    ('benchmark test_resnet -b x', "'x' must be a whole number from 1"),
    ('benchmark test_resnet --json nowhere/x.json', 'must be a file in a folder that exists'),
])
def test_wrong_flags_are_refused_before_any_work(command, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(command.split())
    assert message in capsys.readouterr().err


def test_flags_that_a_run_ignores_are_refused(run, capsys, tmp_path):
    with pytest.raises(SystemExit, match=r'--exit-indices has no meaning .* is a run'):
        cli.main(['benchmark', str(run), '--exit-indices', '1', '--device', 'cpu'])
    settings = dict(policy='confidence', thresholds=[.5] * 3, temperature=[1.] * 4)
    (tmp_path / 'x.json').write_text(json.dumps(dict(settings=settings)))
    with pytest.raises(SystemExit, match="unknown key 'temperature'"):
        cli.main(['benchmark', str(run), '--settings', str(tmp_path / 'x.json'), '--device', 'cpu'])
