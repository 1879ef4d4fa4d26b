"""The training task and the evaluator, against plain PyTorch and NumPy."""
import copy

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from timm.utils import unwrap_model

import timm_eed
from timm_eed import ExitEnsembleDistillationLoss, MultiExitEvaluator, MultiExitOutput, MultiExitTask


def make_task(**kwargs):
    torch.manual_seed(0)
    return MultiExitTask(timm_eed.create_model('test_resnet', num_classes=6), **kwargs)


@pytest.fixture
def batch():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 5])


def test_one_step_equals_the_plain_loop(batch):
    task = make_task(criterion=ExitEnsembleDistillationLoss(1., .5))
    model = copy.deepcopy(task.get_trainable_module().module)
    assert isinstance(task, TrainingTask)
    result = task(*batch)
    assert set(result) == {'loss', 'output', 'logits', 'task_loss', 'distill_loss', 'feature_loss'}
    out = model.forward_exits(batch[0])
    expected = ExitEnsembleDistillationLoss(1., .5)(out.logits, out.features, batch[1])['loss']
    assert torch.equal(result['loss'], expected)
    assert torch.equal(result['output'], out.logits[-1])
    result['loss'].backward()
    expected.backward()
    for a, b in zip(task.parameters(), model.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_checkpoints_carry_the_models_own_keys_and_come_back(batch):
    task = make_task()
    task.setup_ema(decay=.5)
    model = unwrap_model(task.get_trainable_module())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.)
    task.update_ema(step=1)
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert set(state['state_dict']) == set(model.state_dict()) == set(state['state_dict_ema'])
    fresh = make_task()
    fresh.setup_ema()
    fresh.load_checkpoint_state(state['state_dict'])
    fresh.load_checkpoint_state(state['state_dict_ema'], ema=True)
    for ema in (False, True):
        a, b = task.get_eval_model(ema=ema).eval()(batch[0]), fresh.get_eval_model(ema=ema).eval()(batch[0])
        assert all(torch.equal(p, q) for p, q in zip(a.logits, b.logits))


def test_moving_average_follows_by_its_decay():
    task = make_task()
    task.setup_ema(decay=.75)
    before = copy.deepcopy(unwrap_model(task.get_trainable_module()).state_dict())
    with torch.no_grad():
        for p in task.get_trainable_module().parameters():
            p.add_(1.)
    task.update_ema()
    ema = task.get_checkpoint_state(ema=True)['state_dict_ema']
    for name, p in unwrap_model(task.get_trainable_module()).named_parameters():
        assert torch.allclose(ema[name], .75 * before[name] + .25 * p, atol=1e-6)


def test_compiled_task_gives_the_same_loss(batch):
    task = make_task()
    expected = task(*batch)['loss']
    task.load_state_dict(make_task().state_dict())
    keys = set(task.get_checkpoint_state()['state_dict'])
    task.compile(backend='aot_eager')
    assert torch.allclose(task(*batch)['loss'], expected, rtol=1e-5)
    assert set(task.get_checkpoint_state()['state_dict']) == keys
    assert len(task.get_eval_model()(batch[0]).logits) == 4


def test_parameters_for_clipping():
    task = make_task()
    model = task.get_trainable_module().module
    assert len(list(task.get_clip_parameters())) == len(list(model.parameters()))
    kept = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    left_out = {name for name, p in model.named_parameters() if id(p) not in kept}
    assert left_out == {f'{m}.{p}' for m in ('backbone.fc', 'exits.0.fc', 'exits.1.fc', 'exits.2.fc')
                        for p in ('weight', 'bias')}


def test_task_refuses_what_cannot_work():
    with pytest.raises(ValueError, match=r'make them with timm_eed\.wrap'):
        MultiExitTask(timm_eed.create_model('test_resnet').unwrap())
    with pytest.raises(ValueError, match='indices of the 4 classifiers'):
        make_task(criterion=ExitEnsembleDistillationLoss(teacher=[7]))


def test_every_public_object_builds_with_its_defaults():
    model = timm_eed.create_model('test_resnet')
    timm_eed.MultiExitWrapper(timm_eed.create_model('test_vit').unwrap())
    timm_eed.ExitHead(8, [16])
    timm_eed.ExitEnsembleDistillationLoss()
    timm_eed.create_multi_exit_loss()
    timm_eed.MultiExitTask(model)
    timm_eed.MultiExitEvaluator(model.num_exits)
    assert len(timm_eed.profile(model)) == model.num_exits


def numpy_metrics(logits, target):
    """Accuracies from the definition, samples with their logits as arrays [k, N, K]."""
    def topk(scores, k):
        order = np.argsort(-scores, axis=1, kind='stable')[:, :k]
        return 100 * np.mean([t in row for t, row in zip(target, order)])
    named = {f'_exit{i + 1}': z for i, z in enumerate(logits[:-1])}
    named.update({'': logits[-1], '_ensemble': np.mean(logits, axis=0)})
    metrics = {f'top{k}{name}': topk(z, k) for name, z in named.items() for k in (1, 5)}
    z = logits[-1] - logits[-1].max(1, keepdims=True)
    log_prob = z - np.log(np.exp(z).sum(1, keepdims=True))
    metrics['loss'] = -np.mean(log_prob[np.arange(len(target)), target])
    return metrics


@pytest.mark.parametrize('max_samples', [None, 10])
def test_evaluator_equals_numpy(max_samples):
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(3, 12, 8)).astype(np.float32), rng.integers(0, 8, 12)
    evaluator = MultiExitEvaluator(3, max_samples=max_samples)
    for start in (0, 4, 8):
        rows = [torch.from_numpy(z[start:start + 4]) for z in logits]
        evaluator.update(MultiExitOutput(rows, rows), torch.from_numpy(target[start:start + 4]))
    count = max_samples or 12
    expected = numpy_metrics(logits[:, :count], target[:count])
    metrics = evaluator.compute()
    assert set(metrics) == set(expected) == set(evaluator.metric_names)
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert evaluator.summary() == metrics


def test_evaluator_counts_exits_over_the_samples_that_had_them():
    evaluator, target = MultiExitEvaluator(2), torch.arange(4)
    evaluator.update(torch.eye(4), target)
    evaluator.update([torch.eye(4), torch.eye(4)], target)
    assert evaluator.compute()['top1_exit1'] == evaluator.compute()['top1_ensemble'] == 100.


def test_evaluator_takes_plain_logits_as_timms_does():
    evaluator = MultiExitEvaluator(3)
    evaluator.update(torch.eye(4), torch.tensor([0, 1, 0, 0]))
    assert set(evaluator.compute()) == {'loss', 'top1', 'top5'}
    assert evaluator.compute()['top1'] == 50.
    with pytest.raises(ValueError, match='logits of 3 classifiers, got 2'):
        evaluator.update([torch.eye(4)] * 2, torch.arange(4))


def test_optimizers_see_through_the_trainable_module():
    """Weight decay and layer-wise rates of `task.trainable_module` are those of the model itself."""
    model = timm_eed.create_model('test_vit', num_classes=3)
    task = MultiExitTask(model, verbose=False)

    def groups(module):
        names = {id(p): name.removeprefix('module.') for name, p in module.named_parameters()}
        optimizer = create_optimizer_v2(module, 'sgd', lr=1., weight_decay=.1, layer_decay=.5)
        return {names[id(p)]: (group['weight_decay'], group['lr_scale'])
                for group in optimizer.param_groups for p in group['params']}

    found = groups(task.trainable_module)
    assert found == groups(model) and len({scale for _, scale in found.values()}) > 3
    assert found['backbone.pos_embed'][0] == 0 and found['exits.0.fc.weight'] == (.1, 1.)
