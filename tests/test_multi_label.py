"""Independent labels: the loss from its definition, metrics against timm's and scikit-learn's, a run of the script."""
import csv
import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.task import MultiLabelClassificationEvaluator

import timm_eed
import train_eed
from timm_eed import cli
from timm_eed.losses import ExitEnsembleDistillationLoss, create_multi_exit_loss
from timm_eed.multi_label import MultiLabelExitsEvaluator

B, K, EXITS = 4, 3, 3


def outputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(B, K, generator=generator, dtype=dtype, requires_grad=True) for _ in range(EXITS)]
    return logits, torch.randint(2, (B, K), generator=generator).to(dtype)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def naive(logits, target, alpha, temperature, teacher):
    """Sums over plain numbers."""
    z = [rows.tolist() for rows in logits]
    task = distill = 0.
    for i in range(EXITS):
        for b in range(B):
            for c in range(K):
                p = sigmoid(z[i][b][c])
                y = float(target[b, c])
                task -= (y * math.log(p) + (1 - y) * math.log(1 - p)) / (B * K)
                if teacher == [i]:
                    continue
                t = sigmoid(sum(z[j][b][c] for j in teacher) / len(teacher) / temperature)
                q = sigmoid(z[i][b][c] / temperature)
                distill += (t * math.log(t / q) + (1 - t) * math.log((1 - t) / (1 - q))) / (B * K)
    return task, distill, task + alpha * distill


@pytest.mark.parametrize('method, teacher', [('eed', [0, 1, 2]), ('kd', [2]), ('ce', [0, 1, 2])])
@pytest.mark.parametrize('temperature', [1., 3.])
def test_loss_is_the_definition(method, teacher, temperature):
    logits, target = outputs()
    found = create_multi_exit_loss(method=method, alpha=.7, temperature=temperature, multi_label=True)(
        logits, None, target)
    task, distill, loss = naive(logits, target, .7, temperature, teacher)
    assert found['task_loss'].item() == pytest.approx(task, abs=1e-10)
    if method == 'ce':
        assert found['loss'].item() == pytest.approx(task, abs=1e-10)
        return
    assert found['distill_loss'].item() == pytest.approx(distill, abs=1e-10)
    assert found['loss'].item() == pytest.approx(loss, abs=1e-10)


def test_teacher_gets_no_gradient_and_large_logits_stay_finite():
    logits, target = outputs()
    ExitEnsembleDistillationLoss(1., multi_label=True, teacher='main', task_loss=lambda z, y: 0 * z.sum())(
        logits, None, target)['loss'].backward()
    assert not logits[-1].grad.any() and logits[0].grad.any()
    big = [torch.tensor([[500., -500.]], requires_grad=True), torch.tensor([[-500., 500.]])]
    loss = ExitEnsembleDistillationLoss(1., multi_label=True)(big, None, torch.tensor([[1., 0.]]))['loss']
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(big[0].grad).all()


@pytest.mark.parametrize('loss', ['bce', 'asl', 'poly', 'twoway', 'zlpr'])
def test_timms_losses(loss):
    logits, target = outputs(torch.float32)
    criterion = create_multi_exit_loss(loss, multi_label=True)
    terms = criterion(logits, None, target)
    expected = sum(criterion.task_loss(z, target) for z in logits)
    assert torch.allclose(terms['task_loss'], expected) and torch.isfinite(terms['loss'])


def test_metrics_are_timms_for_every_classifier():
    average_precision_score = pytest.importorskip('sklearn.metrics').average_precision_score
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(30, 5, generator=generator) for _ in range(3)]
    target = torch.randint(2, (30, 5), generator=generator).float()
    evaluator = MultiLabelExitsEvaluator(3, threshold=.4)
    for rows in (slice(0, 16), slice(16, 30)):
        evaluator.update([z[rows] for z in logits], target[rows])
    found = evaluator.compute()
    assert set(found) == set(evaluator.metric_names)
    for suffix, z in (('_exit1', logits[0]), ('_exit2', logits[1]), ('', logits[2]), ('_ensemble', sum(logits) / 3)):
        alone = MultiLabelClassificationEvaluator(threshold=.4)
        alone.update(z, target)
        for metric, value in alone.compute().items():
            if metric != 'loss' or not suffix:
                assert found[metric + suffix] == pytest.approx(value, abs=1e-5)
        expected = 100 * average_precision_score(target.numpy(), z.numpy(), average='macro')
        assert found[f'map{suffix}'] == pytest.approx(expected, abs=1e-4)


def test_task_makes_the_fitting_evaluator():
    model = timm_eed.create_model('test_resnet', num_classes=4)
    task = timm_eed.MultiExitTask(model, ExitEnsembleDistillationLoss(multi_label=True), threshold=.3, verbose=False)
    evaluator = task.create_evaluator(max_samples=3)
    assert isinstance(evaluator, MultiLabelExitsEvaluator) and evaluator.evaluators['main'].threshold == .3
    evaluator.update(task.get_eval_model().eval()(torch.randn(4, 3, 32, 32)), torch.eye(4))
    assert evaluator.evaluators['exit1'].num_samples == 3
    evaluator.reset()
    assert evaluator.evaluators['exit1'].num_samples == 0


def shard(path, count, seed):
    """Images that are bright in the channels of their labels, and the labels as a multi-hot vector."""
    rng = np.random.default_rng(seed)
    with tarfile.open(path, 'w') as tar:
        for i in range(count):
            labels = rng.integers(0, 2, 3)
            pixels = (labels * 150 + rng.integers(0, 80, (16, 16, 3))).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, 'png')
            fields = dict(zip('abc', labels.tolist()), labels=labels.tolist(), ids=np.flatnonzero(labels).tolist())
            text = json.dumps(fields).encode()
            for suffix, data in (('png', buffer.getvalue()), ('json', text)):
                info = tarfile.TarInfo(f'{i:04d}.{suffix}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize('method, target', [
    ('eed', ['labels', '--target-format', 'multihot']), ('none', ['labels', '--target-format', 'multihot']),
    ('eed', ['a,b,c']), ('eed', ['ids'])])
def test_a_run(tmp_path, method, target, capsys):
    pytest.importorskip('webdataset')
    for split, count in (('train', 64), ('val', 24)):
        shard(tmp_path / f'{split}-0.tar', count, len(split))
    (tmp_path / '_info.json').write_text(json.dumps({'splits': {
        split: {'name': split, 'filenames': [f'{split}-0.tar'], 'shard_lengths': [count], 'num_samples': count}
        for split, count in (('train', 64), ('val', 24))}}))
    metrics = train_eed.run(train_eed.parse_args(
        ['--dataset', 'wds/x', '--data', str(tmp_path), '--val-split', 'val', '--task', 'multilabel', '--target-key',
         *target, '--multilabel-threshold', '.4', '--model', 'test_resnet', '--num-classes', '3', '--img-size', '32',
         '--epochs', '3', '--warmup-epochs', '0', '--batch-size', '8', '--lr', '.02', '--workers', '0', '--device',
         'cpu', '--no-aug', '--smoothing', '0', '--eed-method', method, '--output', str(tmp_path / 'out'),
         '--experiment', 'run']))
    assert metrics['map'] > 60
    with open(tmp_path / 'out/run/summary.csv', newline='') as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row['eval_map']) == pytest.approx(metrics['map'])
    assert ('eval_map_exit1' in row) == ('eval_map_ensemble' in row) == (method == 'eed')
    assert 'mAP' in capsys.readouterr().out
    cli.main(['validate', str(tmp_path / 'out/run'), '--device', 'cpu', '-j', '0'])
    printed = capsys.readouterr().out
    with pytest.raises(SystemExit, match='has no top-1 accuracy; runs with multi-label targets have no curves'):
        cli.main(['report', str(tmp_path / 'out/run'), '--output', str(tmp_path / 'report'), '--curves-only'])
    assert f'{metrics["map"]:6.2f} %' in next(line for line in printed.splitlines() if line.startswith('main'))
