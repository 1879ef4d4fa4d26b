"""An external teacher beside the exits, against a naive sum and timm's own task for one network."""
import pytest
import timm
import torch
from timm.task import DistillationTeacher, LogitDistillationTask

import timm_eed
from timm_eed.teacher import MultiExitDistillationTask


@pytest.fixture
def parts():
    torch.manual_seed(0)
    teacher = timm.create_model('test_convnext', num_classes=5)
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, 'mean': (.1, .2, .3), 'std': (.5, .6, .7)}
    model = timm_eed.create_model('test_resnet', num_classes=5)
    return teacher, model, torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])


def test_a_teacher_of_other_classes_is_refused(parts, tmp_path):
    _, model, x, y = parts
    for classes in (7, 5):
        teacher = timm.create_model('test_resnet', num_classes=classes)
        timm.models.save_for_hf(teacher, tmp_path / str(classes), model_config={}, safe_serialization=True)
    with pytest.raises(ValueError, match='has 7 classes, the model 5'):
        MultiExitDistillationTask(model, f'local-dir:{tmp_path / "7"}', verbose=False)
    task = MultiExitDistillationTask(model, f'local-dir:{tmp_path / "5"}', verbose=False, dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    assert task.teacher.model.fc.weight.dtype == torch.bfloat16
    assert all(torch.equal(v, task.teacher.model.state_dict()[k])
               for k, v in teacher.to(torch.bfloat16).state_dict().items())
    assert task(x.bfloat16(), y)['loss'].isfinite()


@pytest.mark.parametrize('weights, expected', [
    ({}, (1., 1.)), (dict(distill_loss_weight=.3), (1., .3)), (dict(task_loss_weight=.6), (.6, .4)),
    (dict(task_loss_weight=.6, distill_loss_weight=2.), (.6, 2.))])
def test_every_classifier_learns_from_the_teacher(parts, weights, expected):
    teacher, model, x, y = parts
    task = MultiExitDistillationTask(model, DistillationTeacher(teacher), temperature=2., verbose=False, **weights)
    model.eval()  # the same output twice
    result = task(x, y)
    out = model.forward_exits(x)
    plain = timm_eed.ExitEnsembleDistillationLoss()(out.logits, out.features, y)['loss']
    cfg, own = teacher.pretrained_cfg, model.pretrained_cfg
    shape = (1, 3, 1, 1)
    mean, std = (torch.tensor(own[k]).view(shape) for k in ('mean', 'std'))
    images = (x * std + mean - torch.tensor(cfg['mean']).view(shape)) / torch.tensor(cfg['std']).view(shape)
    with torch.no_grad():
        target = (teacher.eval()(images) / 2.).softmax(-1)
    kd = sum((target * (target.log() - (z / 2.).log_softmax(-1))).sum() / 4 for z in out.logits) * 4.
    assert torch.allclose(result['kd_loss'], kd, atol=1e-5)
    assert torch.allclose(result['loss'], expected[0] * plain + expected[1] * kd, atol=1e-4)


def test_a_teacher_of_colours_teaches_grey_images(tmp_path):
    teacher = timm.create_model('test_resnet', num_classes=5)
    cfg = dict(mean=(.1, .2, .3), std=(.2, .3, .4))
    timm.models.save_for_hf(teacher, tmp_path, model_config=dict(pretrained_cfg=cfg), safe_serialization=True)
    model = timm_eed.create_model('test_resnet', num_classes=5, in_chans=1)
    task = MultiExitDistillationTask(model, f'local-dir:{tmp_path}', mean=[.5], std=[.5], verbose=False)
    assert task(torch.randn(2, 1, 32, 32), torch.tensor([0, 4]))['loss'].isfinite()
    assert [t.numel() for t in (task.teacher.mean_kd, task.teacher.std_kd)] == [1, 1]
    assert float(task.teacher.mean_kd) == pytest.approx(.2)


def test_for_one_classifier_it_is_timms(parts):
    teacher, model, x, y = parts
    timms = LogitDistillationTask(
        model.backbone, DistillationTeacher(teacher), criterion=torch.nn.CrossEntropyLoss(), temperature=3.,
        verbose=False)
    ours = MultiExitDistillationTask(model, DistillationTeacher(teacher), temperature=3., verbose=False)
    model.eval()
    exits = ours(x, y)['logits'][:-1]
    of_exits = sum(torch.nn.functional.kl_div(
        (z / 3).log_softmax(-1), (ours.teacher(ours.teacher.normalize_input(x, ours.student_mean, ours.student_std),
                                               return_features=False) / 3).log_softmax(-1),
        reduction='batchmean', log_target=True) * 9 for z in exits)
    assert torch.allclose(ours(x, y)['kd_loss'] - of_exits, timms(x, y)['kd_loss'], atol=1e-4)


def test_teacher_stays_as_it_is(parts):
    teacher, model, x, y = parts
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    task = MultiExitDistillationTask(model, DistillationTeacher(teacher), verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    task.train()
    task(x, y)['loss'].backward()
    optimizer.step()
    assert not task.teacher.training and model.training
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in task.teacher.parameters())
    assert not any('teacher' in name for name in task.get_checkpoint_state()['state_dict'])
