"""Numbers about trained exits, against NumPy written from the definitions."""
import numpy as np
import pytest
import timm
import torch

import timm_eed
from timm_eed import analysis

K, N, C = 3, 40, 7


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(K, N, C, generator=generator), torch.randint(C, (N,), generator=generator)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize('k', [1, 5, 20])
def test_accuracy(outputs, k):
    logits, targets = outputs[0][0].numpy(), outputs[1].numpy()
    right = [target in np.argsort(-z)[:k] for z, target in zip(logits, targets)]
    assert analysis.accuracy(outputs[0][0], outputs[1], k) == pytest.approx(100 * np.mean(right))


@pytest.mark.parametrize('bins', [1, 10, 15])
def test_calibration_error(outputs, bins):
    prob, targets = softmax(outputs[0][1].numpy().astype(np.float64)), outputs[1].numpy()
    confidence, right = prob.max(1), prob.argmax(1) == targets
    total = 0.
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert analysis.calibration_error(outputs[0][1], outputs[1], bins) == pytest.approx(100 * total, abs=1e-3)


def test_certain_and_right_is_calibrated():
    logits = torch.eye(4) * 100
    assert analysis.calibration_error(logits, torch.arange(4)) == pytest.approx(0)
    assert analysis.calibration_error(logits, torch.tensor([1, 2, 3, 0])) == pytest.approx(100)


def test_score_and_subsets(outputs):
    logits, targets = outputs
    mean = logits.numpy()[[0, 2]].mean(0)
    assert np.allclose(analysis.subset_logits(logits, [0, 2]).numpy(), mean, atol=1e-6)
    assert np.allclose(analysis.subset_logits(logits).numpy(), logits.numpy().mean(0), atol=1e-6)
    found = analysis.score(logits[2], targets)
    nll = -np.log(softmax(logits[2].numpy())[np.arange(N), targets.numpy()]).mean()
    assert found['loss'] == pytest.approx(nll, rel=1e-5) and set(found) == {'top1', 'top5', 'ece', 'loss'}


def test_right_wrong_counts(outputs):
    logits, targets = outputs[0].numpy(), outputs[1].numpy()
    found = analysis.right_wrong_counts(*outputs).numpy()
    right = logits.argmax(-1) == targets
    for exit_index in range(K - 1):
        for main in (0, 1):
            for other in (0, 1):
                expected = ((right[-1] == (main == 0)) & (right[exit_index] == (other == 0))).sum()
                assert found[exit_index, main, other] == expected
    assert (found.sum((1, 2)) == N).all()


def test_dissimilarity_and_contrast():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 4)
    activations = rng.normal(size=(3, 6))[labels] + .1 * rng.normal(size=(12, 6))
    expected = np.empty((12, 12))
    for i in range(12):
        for j in range(12):
            a, b = activations[i] - activations[i].mean(), activations[j] - activations[j].mean()
            expected[i, j] = 1 - (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    found = analysis.dissimilarity(torch.tensor(activations))
    assert np.allclose(found.numpy(), expected, atol=1e-6)
    within = [expected[i, j] for i in range(12) for j in range(12) if i != j and labels[i] == labels[j]]
    between = [expected[i, j] for i in range(12) for j in range(12) if labels[i] != labels[j]]
    contrast = analysis.class_contrast(found, torch.tensor(labels))
    assert contrast == pytest.approx(np.mean(between) - np.mean(within), abs=1e-5) and contrast > .5
    with pytest.raises(ValueError, match='class contrast'):
        analysis.class_contrast(found[:4, :4], torch.zeros(4))


@pytest.mark.parametrize('exits', [True, False])
def test_collect(exits):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=5)
    model = timm_eed.wrap(model) if exits else model
    images, targets = torch.randn(10, 3, 32, 32), torch.arange(10) % 5
    batches = [(images[:4], targets[:4]), (images[4:8], targets[4:8]), (images[8:], targets[8:])]
    found = analysis.collect(model.train(), batches, max_images=7, progress=False)
    with torch.no_grad():
        expected = torch.cat([model.eval()(x) for x, _ in batches])[:7]
    assert found.logits.shape == (4 if exits else 1, 7, 5) and torch.equal(found.logits[-1], expected)
    assert torch.equal(found.targets, targets[:7])
    assert torch.allclose(model.get_classifier()(found.features), expected, atol=1e-6)
    with pytest.raises(ValueError, match='no images'):
        analysis.collect(model, [])
