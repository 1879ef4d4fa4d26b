"""The losses against a naive loop written from the equations, in float64."""
import itertools
import math

import pytest
import torch
from timm.data.mixup import mixup_target

from timm_eed import ExitEnsembleDistillationLoss, create_multi_exit_loss
from timm_eed.losses import ensemble_mean

B, K, D = 3, 5, 4


def make_inputs(num_exits=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda width: [  # noqa: E731
        torch.randn(B, width, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(num_exits)]
    return make(K), make(D), torch.tensor([0, 3, 1])


def softmax(row, temperature):
    exps = [math.e ** (float(v) / temperature) for v in row]
    return [e / sum(exps) for e in exps]


def naive_terms(logits, features, target, output_loss, temperature, members):
    """Equations (2), (4), (8) and Table IV, one number at a time; `members` are the teacher's indices."""
    k, logits, features = len(logits), [z.tolist() for z in logits], [f.tolist() for f in features]
    task = -sum(math.log(softmax(logits[i][b], 1.)[int(target[b])]) for i in range(k) for b in range(B)) / B
    distill = feature = 0.
    for i in range(k):
        if members == [i]:  # (4): the main network is not its own student
            continue
        for b in range(B):
            teacher = [sum(float(logits[m][b][c]) for m in members) / len(members) for c in range(K)]
            if output_loss == 'kl':
                p, q = softmax(teacher, temperature), softmax(logits[i][b], temperature)
                distill += sum(pc * math.log(pc / qc) for pc, qc in zip(p, q)) / B
            else:
                distill += sum((float(logits[i][b][c]) - teacher[c]) ** 2 for c in range(K)) / (B * K)
            for d in range(D):
                mean = sum(float(features[m][b][d]) for m in members) / len(members)
                feature += (float(features[i][b][d]) - mean) ** 2 / (B * D)
    return task, distill, feature


METHODS = [('ce', None, [0, 1, 2, 3]), ('kd', None, [3]), ('eed', None, [0, 1, 2, 3]),
           ('eed', [0, 3], [0, 3]), ('eed', [2, -1], [2, 3]), ('eed', [0, 1, 2], [0, 1, 2]), ('eed', [1], [1])]


@pytest.mark.parametrize('method, teacher, members', METHODS)
@pytest.mark.parametrize('output_loss', ['kl', 'mse'])
@pytest.mark.parametrize('alpha, beta, temperature', list(itertools.product([0., .7], [0., 1.3], [1., 3.])))
def test_value_equals_loop(method, teacher, members, output_loss, alpha, beta, temperature):
    logits, features, target = make_inputs()
    criterion = create_multi_exit_loss(
        'ce', method, alpha, beta, output_loss=output_loss, temperature=temperature, teacher=teacher)
    terms = criterion(logits, features, target)
    if method == 'ce':
        alpha = beta = 0.
    task, distill, feature = naive_terms(logits, features, target, output_loss, temperature, members)
    expected = task + alpha * distill + beta * feature
    assert abs(terms['loss'].item() - expected) < 1e-10
    assert abs(terms['task_loss'].item() - task) < 1e-10
    assert abs(terms['distill_loss'].item() - (distill if alpha else 0)) < 1e-10
    assert abs(terms['feature_loss'].item() - (feature if beta else 0)) < 1e-10


def analytic_gradients(logits, features, target, output_loss, alpha, beta, temperature, members):
    """Gradients worked out by hand from the equations, teacher constant."""
    k = len(logits)
    z, f = [x.detach() for x in logits], [x.detach() for x in features]
    g_z, g_f = sum(z[m] for m in members) / len(members), sum(f[m] for m in members) / len(members)
    onehot = torch.nn.functional.one_hot(target, K).double()
    dz, df = [], []
    for i in range(k):
        grad = (z[i].softmax(-1) - onehot) / B
        student = members != [i]
        if student and output_loss == 'kl':
            grad = grad + alpha * ((z[i] / temperature).softmax(-1) - (g_z / temperature).softmax(-1)) / temperature / B
        elif student:
            grad = grad + alpha * 2 * (z[i] - g_z) / (B * K)
        dz.append(grad)
        df.append(beta * 2 * (f[i] - g_f) / (B * D) if student else torch.zeros_like(f[i]))
    return dz, df


@pytest.mark.parametrize('method, teacher, members', METHODS[1:])
@pytest.mark.parametrize('output_loss', ['kl', 'mse'])
@pytest.mark.parametrize('alpha, beta, temperature', [(1., 0., 3.), (.7, 1.3, 1.), (2., .5, 4.)])
def test_gradient_equals_hand(method, teacher, members, output_loss, alpha, beta, temperature):
    logits, features, target = make_inputs(seed=1)
    criterion = create_multi_exit_loss(
        'ce', method, alpha, beta, output_loss=output_loss, temperature=temperature, teacher=teacher)
    criterion(logits, features, target)['loss'].backward()
    dz, df = analytic_gradients(logits, features, target, output_loss, alpha, beta, temperature, members)
    for tensor, expected in [*zip(logits, dz), *zip(features, df)]:
        gradient = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
        assert (gradient - expected).abs().max() < 1e-10


GOLDEN = {  # naive_terms of make_inputs(), T = 3
    ('eed', 'kl'): (6.6415, .1193, 3.9248),
    ('eed', 'mse'): (6.6415, 2.5911, 3.9248),
    ('kd', 'kl'): (6.6415, .2781, 10.7193),
    ('kd', 'mse'): (6.6415, 5.9975, 10.7193),
}


@pytest.mark.parametrize('method, output_loss', GOLDEN)
def test_golden_numbers_move_with_their_term(method, output_loss):
    logits, features, target = make_inputs()
    terms = create_multi_exit_loss(method=method, output_loss=output_loss, alpha=1., beta=1.)(logits, features, target)
    assert [terms[n].item() for n in ('task_loss', 'distill_loss', 'feature_loss')] == pytest.approx(
        GOLDEN[method, output_loss], abs=1e-4)
    for off, name in (('alpha', 'distill_loss'), ('beta', 'feature_loss')):
        weights = {'alpha': 1., 'beta': 1., off: 0.}
        less = create_multi_exit_loss(method=method, output_loss=output_loss, **weights)(logits, features, target)
        assert less[name] == 0
        assert (terms['loss'] - less['loss']).item() == pytest.approx(terms[name].item(), abs=1e-9)


@pytest.mark.parametrize('kwargs', [
    dict(loss_type='ce', smoothing=.1), dict(loss_type='bce', smoothing=.1), dict(loss_type='bce', bce_sum=True),
    dict(loss_type='asl'), dict(loss_type='poly', smoothing=.1), dict(loss_type='jsd', jsd_splits=2, smoothing=.1),
])
def test_every_single_label_criterion(kwargs):
    from timm.loss import create_classification_loss
    logits = [torch.randn(4, K) for _ in range(3)]
    target = torch.tensor([0, 1, 2, 3])
    terms = create_multi_exit_loss(alpha=.5, **kwargs)(logits, None, target)
    expected = sum(create_classification_loss(**kwargs)(z, target) for z in logits)
    assert terms['task_loss'] == pytest.approx(expected.item(), rel=1e-6)
    assert terms['loss'] == pytest.approx(expected.item() + .5 * terms['distill_loss'].item(), rel=1e-6)


@pytest.mark.parametrize('loss_type', ['ce', 'bce', 'poly'])
def test_soft_targets(loss_type):
    logits = [torch.randn(4, K) for _ in range(3)]
    target = mixup_target(torch.tensor([0, 1, 2, 3]), K, lam=.3, smoothing=.1)
    terms = create_multi_exit_loss(loss_type, soft_targets=True)(logits, None, target)
    if loss_type == 'ce':
        expected = sum(-(target * z.log_softmax(-1)).sum(-1).mean() for z in logits)
        assert terms['task_loss'] == pytest.approx(expected.item(), rel=1e-6)
    assert torch.isfinite(terms['loss'])


def test_float32_inside_autocast():
    logits = [(torch.randn(4, K) * 20).bfloat16().requires_grad_() for _ in range(3)]
    features = [torch.randn(4, D).bfloat16().requires_grad_() for _ in range(3)]
    target = torch.tensor([0, 1, 2, 3])
    criterion = ExitEnsembleDistillationLoss(1., 1.)
    outside = criterion([z.float() for z in logits], [f.float() for f in features], target)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = criterion(logits, features, target)
    for name in outside:
        assert inside[name].dtype == torch.float32
        assert torch.equal(inside[name], outside[name]), name
    inside['loss'].backward()
    assert logits[0].grad.dtype == torch.bfloat16


def authors_loss(logits, features, target, output_loss, temperature=3.):
    """The authors' published training loss, written anew from its description: soft cross-entropy times 0.1 T^2 or
    MSE to the mean logits; squared error to the mean features where either side is positive, over all elements."""
    g_z, g_f = torch.stack(logits).mean(0).detach(), torch.stack(features).mean(0).detach()
    loss = sum(torch.nn.functional.cross_entropy(z, target) for z in logits)
    for z, f in zip(logits, features):
        if output_loss == 'kl':
            soft = -((g_z / temperature).softmax(1) * (z / temperature).log_softmax(1)).sum(1).mean()
            loss = loss + .1 * temperature ** 2 * soft
        else:
            loss = loss + ((z - g_z) ** 2).mean()
        loss = loss + (((f - g_f) ** 2) * ((f > 0) | (g_f > 0))).mean()
    return loss


@pytest.mark.parametrize('output_loss', ['kl', 'mse'])
def test_equals_the_authors_example(output_loss):
    logits, features, target = make_inputs(seed=2)
    features = [f.detach().relu().requires_grad_() for f in features]  # behind ReLU and average pooling
    alpha = .1 * 3. ** 2 if output_loss == 'kl' else 1.
    ours = ExitEnsembleDistillationLoss(alpha, 1., output_loss)(logits, features, target)['loss']
    theirs = authors_loss(logits, features, target, output_loss)
    if output_loss == 'kl':  # soft cross-entropy is KL plus the teacher's entropy, which has no gradient
        teacher = (ensemble_mean(logits).detach() / 3.).softmax(1)
        theirs = theirs - len(logits) * alpha * -(teacher * teacher.log()).sum(1).mean()
    assert abs(ours.item() - theirs.item()) < 1e-6
    inputs = logits + features
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)):
        assert (a - b).abs().max() < 1e-6


@pytest.mark.parametrize('kwargs, message', [
    (dict(alpha=-1.), 'alpha=-1.0 must be'),
    (dict(beta=float('nan')), 'beta=nan must be'),
    (dict(temperature=0.), 'temperature=0.0 must be greater than 0'),
    (dict(output_loss='l1'), "choose 'kl' or 'mse'"),
    (dict(teacher='exits'), "choose 'ensemble', 'main'"),
    (dict(teacher=[]), 'at least one classifier'),
])
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ExitEnsembleDistillationLoss(**kwargs)


@pytest.mark.parametrize('teacher', [[4], [-5], [0, 0], [1, -3]])
def test_teacher_out_of_range(teacher):
    logits, _, target = make_inputs()
    with pytest.raises(ValueError, match=r'different indices of the 4 classifiers: 0..2 are the exits, 3'):
        ExitEnsembleDistillationLoss(teacher=teacher)(logits, None, target)


def test_degenerate_cases_say_what_to_do():
    logits, features, target = make_inputs(num_exits=1)
    with pytest.raises(ValueError, match='attach exits, or set alpha=0 and beta=0'):
        ExitEnsembleDistillationLoss()(logits, features, target)
    logits, _, target = make_inputs()
    with pytest.raises(ValueError, match=r'pass out\.features'):
        ExitEnsembleDistillationLoss(beta=1.)(logits, None, target)
    with pytest.raises(ValueError, match="goes with method 'eed'"):
        create_multi_exit_loss(method='kd', teacher=[0])
    with pytest.raises(ValueError, match='does not support multi-label'):
        create_multi_exit_loss('ce', multi_label=True)
