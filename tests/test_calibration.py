"""Calibration against brute force, against the model itself, and its guarantee by simulation."""
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import timm_eed
from timm_eed.calibration import calibrate, calibrate_logits, fit_temperature
from timm_eed.early_exit import EarlyExit
from timm_eed.policies import POLICIES, ExitRule, Progress, choose_exits
from timm_eed.profiling import early_exit_gflops
from timm_eed.risk_control import controlled_point, path_of_caution
from timm_eed.threshold_search import Point, Problem, pareto

TRUNK = [.2, .45, .7, 1.]
HEADS = [.02, .03, .05]


def world(count, seed, classes=5):
    """Logits and labels of made-up images, easy and hard; deeper classifiers see better, all see in their own way."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    ease = 3.5 * torch.rand(count, 1, generator=generator)
    logits = []
    for depth in range(4):
        z = torch.randn(count, classes, generator=generator)
        z += F.one_hot(targets, classes) * ease * (.8 + .2 * depth)
        logits.append(z * (1.5 + depth) / 2)
    return logits, targets


def walk(thresholds, logits, targets):
    """Mean cost and accuracy, sample by sample."""
    cost = right = 0.
    for n in range(len(targets)):
        for i in range(4):
            if i < 3 and thresholds[i] is None:
                continue
            cost += HEADS[i] if i < 3 else 0.
            if i == 3 or float(logits[i][n].softmax(0).max()) >= thresholds[i]:
                cost += TRUNK[i]
                right += float(logits[i][n].argmax() == targets[n])
                break
    return cost / len(targets), right / len(targets)


def test_every_threshold_of_an_exit_at_once():
    """The step of the search against a loop over thresholds and samples, with equal scores among them."""
    logits, targets = world(40, 0)
    logits = [(z * 2).round() / 2 for z in logits]
    scores = torch.stack([ExitRule(4).answer(i, logits[i], Progress())[1] for i in range(3)], 1)
    right = torch.stack([z.argmax(1) == targets for z in logits], 1)
    costs = [trunk + sum(HEADS[:i + 1]) for i, trunk in enumerate(TRUNK)]
    problem = Problem(scores, right, costs)
    fixed = [.7, .5, .6]
    for exit_number in range(3):
        thresholds, (cost, accuracy) = problem.line(exit_number, fixed)
        assert len(thresholds) > 5
        for at, threshold in enumerate(thresholds.tolist()):
            mine = list(fixed)
            mine[exit_number] = threshold
            expected = walk(mine, logits, targets)
            assert (float(cost[at]), float(accuracy[at])) == pytest.approx(expected)
        reachable = {round(walk([*fixed[:exit_number], float(s), *fixed[exit_number + 1:]], logits, targets)[0], 9)
                     for s in scores[:, exit_number]}
        assert reachable <= {round(float(c), 9) for c in cost}


@pytest.mark.parametrize('seed', range(4))
def test_search_against_brute_force(seed):
    """All thresholds of three exits tried; the search may miss the optimum by a sample of sixteen, no more."""
    logits, targets = world(16, seed)
    scores = [ExitRule(4).answer(i, logits[i], Progress())[1] for i in range(3)]
    right = torch.stack([z.argmax(1) == targets for z in logits], 1).double()
    everything = []
    for thresholds in itertools.product(*([None, *s.tolist()] for s in scores)):
        taken = choose_by_hand(thresholds, scores)
        on = [i for i in range(3) if thresholds[i] is not None]
        costs = torch.tensor([TRUNK[i] + sum(HEADS[j] for j in on if j <= i) for i in range(4)], dtype=torch.float64)
        everything.append((float(costs[taken].mean()), float(right.gather(1, taken[:, None]).mean())))
    main = float(right[:, -1].mean())
    for drop in (0., 1 / 16, 2 / 16):
        found = calibrate_logits(logits, targets, TRUNK, HEADS, max_accuracy_drop=drop, temperature_scaling=False)
        best = min(cost for cost, accuracy in everything if accuracy >= main - drop - 1e-9)
        assert best - 1e-9 <= found.gflops <= best + 1 / 16 and found.accuracy >= main - drop - 1e-9
    for budget in (.4, .6, .8):
        found = calibrate_logits(logits, targets, TRUNK, HEADS, max_flops=budget * 1e9, temperature_scaling=False)
        best = max(accuracy for cost, accuracy in everything if cost <= budget + 1e-9)
        assert best - 1 / 16 - 1e-9 <= found.accuracy <= best + 1e-9 and found.gflops <= budget + 1e-9


def choose_by_hand(thresholds, scores):
    leaves = [s >= t if t is not None else torch.zeros(len(s), dtype=torch.bool) for t, s in zip(thresholds, scores)]
    return torch.stack([*leaves, torch.ones(len(scores[0]), dtype=torch.bool)], 1).int().argmax(1)


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('ensemble', [False, True])
def test_every_point_of_the_curve_is_what_the_rule_gives(policy, ensemble):
    logits, targets = world(200, 1)
    result = calibrate_logits(
        logits, targets, TRUNK, HEADS, max_accuracy_drop=.02, policy=policy, ensemble=ensemble)
    assert result.reached and result.accuracy >= result.main_accuracy - .02 - 1e-9
    assert result.main_accuracy == float((logits[-1].argmax(1) == targets).double().mean())
    chosen = Point(result.gflops, result.accuracy, tuple(result.settings['thresholds']))
    for point in [*result.curve, chosen]:
        rule = ExitRule(4, **{**result.settings, 'thresholds': point.thresholds})
        out = choose_exits(rule, logits)
        assert float((out.logits.argmax(1) == targets).double().mean()) == pytest.approx(point.accuracy)
        costs = [TRUNK[i] + sum(HEADS[j] for j in rule.enabled if j <= i) for i in range(4)]
        assert sum(costs[i] for i in out.exit_index.tolist()) / 200 == pytest.approx(point.cost)
    costs, accuracies = [p.cost for p in result.curve], [p.accuracy for p in result.curve]
    assert costs == sorted(costs) and accuracies == sorted(accuracies) and len(result.curve) > 3
    assert sum(result.exit_shares) == pytest.approx(1)
    assert min(p.cost for p in result.curve if p.accuracy >= result.main_accuracy - .02) >= result.gflops - 1e-9


def test_targets_that_cannot_be_met_are_said_to_be():
    logits, targets = world(100, 2)
    result = calibrate_logits(logits, targets, TRUNK, HEADS, max_flops=.1e9)
    assert not result.reached and 'cannot be met: 0.1 GFLOPs are less than the 0.22' in result.message
    assert result.exit_shares[0] == 1 and result.gflops == pytest.approx(.22)
    result = calibrate_logits(logits, targets, TRUNK, HEADS, max_accuracy_drop=-.9)
    assert not result.reached and 'no thresholds are more accurate than' in result.message
    assert result.accuracy == max(p.accuracy for p in result.curve)
    useless = [F.one_hot((targets + 1) % 5, 5) * 2.] * 3 + [F.one_hot(targets, 5) * 9.]
    result = calibrate_logits(useless, targets, TRUNK, HEADS, max_accuracy_drop=0.)
    assert result.reached and result.settings['thresholds'] == [None] * 3 and 'main network alone' in result.message


def test_exits_that_do_not_pay_are_switched_off():
    logits, targets = world(400, 3)
    logits[1] = torch.zeros_like(logits[1])  # says nothing
    result = calibrate_logits(logits, targets, TRUNK, HEADS, max_accuracy_drop=.02)
    assert result.settings['thresholds'][1] is None
    kept = calibrate_logits(logits, targets, TRUNK, HEADS, max_accuracy_drop=.02, switch_off=False)
    assert None not in kept.settings['thresholds']
    assert kept.gflops > result.gflops


def test_temperature_is_the_best_of_a_grid():
    logits, targets = world(500, 4)
    for z in logits:
        fitted = fit_temperature(z, targets)
        grid = torch.linspace(.3, 6, 571).tolist()
        best = min(grid, key=lambda t: float(F.cross_entropy(z / t, targets)))
        assert fitted == pytest.approx(best, abs=.02)
        assert float(F.cross_entropy(z / fitted, targets)) <= float(F.cross_entropy(z / best, targets)) + 1e-6


def test_calibrated_model_does_what_was_expected():
    """Through the loader: costs, figures, JSON, and EarlyExit on the same images."""
    torch.manual_seed(0)
    model = timm_eed.create_model('test_resnet', num_classes=4, in_chans=1, exit_type='linear')
    x = torch.randn(96, 1, 32, 32)
    targets = torch.randint(4, (96,))
    optimizer = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    for _ in range(6):  # enough for exits to differ in what they know
        optimizer.zero_grad()
        sum(F.cross_entropy(z, targets) for z in model.forward_exits(x).logits).backward()
        optimizer.step()
    loader = DataLoader(TensorDataset(x, targets), batch_size=32)
    result = calibrate(model, loader, max_accuracy_drop=.05)
    assert not model.training
    early = EarlyExit(model, **json.loads(json.dumps(result.to_dict()))['settings'])
    outputs = [early(images) for images, _ in loader]
    taken = torch.cat([out.exit_index for out in outputs])
    right = torch.cat([out.logits for out in outputs]).argmax(1) == targets
    assert float(right.double().mean()) == pytest.approx(result.accuracy, abs=.011)
    trunk, heads = early_exit_gflops(model, (1, 32, 32))
    on = early.rule.enabled
    gflops = sum(trunk[i] + sum(heads[j] for j in on if j <= i) for i in taken.tolist()) / 96
    assert gflops == pytest.approx(result.gflops, rel=.02)
    profile = timm_eed.profile(model, (1, 32, 32))
    assert result.main_gflops == profile[-1].gflops == trunk[-1]
    assert [a + b for a, b in zip(trunk, heads)] == pytest.approx([row.gflops for row in profile[:-1]])
    with torch.no_grad():
        logits = model.forward_exits(x).logits
    assert [p.cost for p in result.classifiers] == pytest.approx([row.gflops for row in profile])
    assert [p.accuracy for p in result.classifiers] == pytest.approx(
        [float((z.argmax(1) == targets).double().mean()) for z in logits])
    for i, point in enumerate(result.classifiers):
        assert EarlyExit(model, point.thresholds)(x).exit_index.tolist() == [i] * 96
    assert len(early.rule.enabled) > 0 and result.gflops < result.main_gflops


def test_refusals_name_the_fix():
    model = timm_eed.create_model('test_resnet', num_classes=4)
    logits, targets = world(20, 0)
    for kwargs in ({}, dict(max_accuracy_drop=.1, max_flops=1e9)):
        with pytest.raises(ValueError, match='Give one target: max_accuracy_drop'):
            calibrate(model, [], **kwargs)
    with pytest.raises(ValueError, match='must be a share of the images'):
        calibrate(model, [], max_accuracy_drop=2)
    with pytest.raises(ValueError, match='The loader has no images'):
        calibrate(model, [], max_accuracy_drop=.1)
    with pytest.raises(ValueError, match='needs one class index per image'):
        calibrate(model, [(torch.randn(2, 3, 64, 64), torch.zeros(2, 4))], max_accuracy_drop=.1)
    x = torch.randn(2, 3, 64, 64)
    for batch in (dict(x=x), (x, torch.zeros(2).long(), None)):
        with pytest.raises(ValueError, match=r'must give batches \(images, labels\)'):
            calibrate(model, [batch], max_accuracy_drop=.1)
    with pytest.raises(ValueError, match=r'1 of 2 labels are none of the 4 classes 0\.\.3, the first of them is 9'):
        calibrate(model, [(x, torch.tensor([0, 9]))], max_accuracy_drop=.1)
    broken = logits[1].clone()
    broken[3, 2] = float('nan')
    with pytest.raises(ValueError, match=r'Classifier 1 .* 1 of 20 images logits that are not finite'):
        calibrate_logits([logits[0], broken, *logits[2:]], targets, TRUNK, HEADS, max_accuracy_drop=.1)
    with pytest.raises(ValueError, match='not finite'):
        fit_temperature(broken, targets)
    with pytest.raises(ValueError, match='has no exits; make them with'):
        calibrate(model.backbone, [], max_accuracy_drop=.1)
    with pytest.raises(ValueError, match='risk_control bounds the accuracy drop'):
        calibrate_logits(logits, targets, TRUNK, HEADS, max_flops=1e9, risk_control=True)
    with pytest.raises(ValueError, match='choose confidence, entropy or margin'):
        calibrate_logits(logits, targets, TRUNK, HEADS, max_accuracy_drop=.1, risk_control=True, policy='patience')


def mean_and_error(values):
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std() / len(values) ** .5)


@pytest.mark.parametrize('count, bound', [(40, .05), (100, .05), (300, .02)])
def test_guarantee_by_simulation(count, bound):
    """The expected loss on images to come, over many draws of calibration images, is below the bound.

    The same path without conformal risk control, its mean loss brought below the bound as it is, is not: that shows
    that the simulation would notice.
    """
    logits, targets = world(40_000, 5)
    main_right = logits[-1].argmax(1) == targets
    path = path_of_caution(Point(0., 0., (.6, .6, .6)))
    lost = torch.stack([
        main_right & (choose_exits(ExitRule(4, p.thresholds), logits).logits.argmax(1) != targets) for p in path])
    expected = lost.double().mean(1)
    assert expected[0] > .1 and expected[-1] == 0
    number = {point: i for i, point in enumerate(path)}
    generator = torch.Generator().manual_seed(6)
    controlled, naive = [], []
    for _ in range(400):
        draw = lost[:, torch.randint(lost.shape[1], (count,), generator=generator)]
        point = controlled_point(path, lambda p, draw=draw: draw[number[p]], bound)
        controlled.append(expected[number[point]])
        naive.append(expected[int((draw.double().mean(1) <= bound).int().argmax())])
    mean, error = mean_and_error(controlled)
    assert mean <= bound + 2 * error
    assert mean >= bound / 4  # a bound that leaves nothing is none
    mean, error = mean_and_error(naive)
    assert mean > bound + 2 * error


def test_guarantee_of_the_whole_calibration():
    logits, targets = world(20_000, 7)
    main_right = logits[-1].argmax(1) == targets
    drops, losses, costs = [], [], []
    generator = torch.Generator().manual_seed(8)
    for _ in range(25):
        rows = torch.randint(20_000, (240,), generator=generator)
        result = calibrate_logits(
            [z[rows] for z in logits], targets[rows], TRUNK, HEADS, max_accuracy_drop=.05, risk_control=True)
        assert result.guaranteed_drop == .05 and result.images == 120
        costs.append(result.gflops / result.main_gflops)
        right = choose_exits(ExitRule(4, **result.settings), logits).logits.argmax(1) == targets
        losses.append((main_right & ~right).double().mean())
        drops.append(main_right.double().mean() - right.double().mean())
    mean, error = mean_and_error(losses)
    assert mean <= .05 + 2 * error
    assert mean_and_error(drops)[0] <= mean
    assert sum(costs) / len(costs) < .9  # and most draws save something


def test_too_few_images_for_the_bound_leave_the_main_network():
    logits, targets = world(30, 9)
    result = calibrate_logits(logits, targets, TRUNK, HEADS, max_accuracy_drop=.02, risk_control=True)
    assert result.settings['thresholds'] == [None] * 3
    assert 'half of the images must be 49 or more, here they are 15' in result.message and result.gflops == TRUNK[-1]


def test_pareto():
    points = [Point(c, a, ()) for c, a in ((3, .5), (1, .4), (2, .4), (2, .6), (4, .6), (1, .3), (5, .7))]
    assert [(p.cost, p.accuracy) for p in pareto(points)] == [(1, .4), (2, .6), (5, .7)]
