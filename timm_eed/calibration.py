"""Thresholds for early exit from labelled images: for an accuracy that may be lost, or for FLOPs that may be spent.

Shapes: N images, K classes, k classifiers (the main network counted).
"""
import itertools
import math
import operator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch

from .analysis import collect
from .multi_exit import MultiExitWrapper, check_has_exits
from .policies import ExitRule, Progress, choose_exits
from .profiling import early_exit_gflops, leaving_gflops
from .risk_control import controlled_point, path_of_caution
from .threshold_search import Objective, Point, Problem, cheapest, most_accurate, pareto, sweep

__all__ = ['Calibration', 'calibrate', 'calibrate_logits', 'fit_temperature']

MOST_SUBSETS = 32  # of exits to have on; beyond five exits all stay on


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and what they gave on the images they were chosen with; all plain numbers, fit for JSON.

    settings: Arguments of `EarlyExit`: thresholds, policy, temperatures, ensemble.
    accuracy: Share of images answered rightly (0..1). gflops: 10^9 FLOPs per image in the mean, exits included.
    main_accuracy, main_gflops: Those of the main network alone.
    exit_shares: Share of the images that leaves at each classifier, the main network's last.
    images: N, how many images these figures come from.
    reached: Whether the target was met. message: The outcome in a sentence.
    guaranteed_drop: With risk control, the bound on the expected accuracy drop; None without.
    curve: The best accuracy found for each cost, from cheap to dear: cost (10^9 FLOPs), accuracy and thresholds. With
        risk control it is of the half that chose, all else is of the other half.
    classifiers: The same for each classifier as the only one for all images, the main network last.
    """
    settings: Dict[str, Any]
    accuracy: float
    gflops: float
    main_accuracy: float
    main_gflops: float
    exit_shares: List[float]
    images: int
    reached: bool
    message: str
    guaranteed_drop: Optional[float]
    curve: List[Point]
    classifiers: List[Point]

    def to_dict(self) -> Dict[str, Any]:
        """As a dictionary for JSON; points become dictionaries."""
        points = {name: [p._asdict() for p in getattr(self, name)] for name in ('curve', 'classifiers')}
        return {**asdict(self), **points}


def calibrate(
        model: MultiExitWrapper,
        loader: Iterable[Any],
        *,
        max_accuracy_drop: Optional[float] = None,
        max_flops: Optional[float] = None,
        policy: str = 'confidence',
        ensemble: bool = False,
        temperature_scaling: bool = True,
        switch_off: bool = True,
        risk_control: bool = False,
        input_size: Optional[Tuple[int, int, int]] = None,
) -> Calibration:
    """Choose thresholds (and temperatures) for early exit on labelled images.

    Use images that the model was not trained on and that no result is reported on: thresholds are fitted to them. All
    classifiers run once per image; the search works on their logits.

    With `risk_control` the accuracy drop is bounded for images to come, by conformal risk control
    (https://arxiv.org/abs/2208.02814): `timm_eed.risk_control` tells what is guaranteed and when.

    Args:
        model: A multi-exit model; put into evaluation mode.
        loader: Batches (images [B, C, H, W], labels [B]); they go to the model's device, an autocast around it holds.
        max_accuracy_drop: Share of right answers (0.01 is one point) that early exit may lose against the main network;
            the cheapest thresholds within it are chosen.
        max_flops: FLOPs per image (2 per multiply-add, as `profile` counts) that may be spent in the mean; the most
            accurate thresholds within it are chosen.
        policy: One of `timm_eed.policies.POLICIES`.
        ensemble: Whether answers and scores come from the mean logits of the exits passed so far.
        temperature_scaling: Whether each classifier's temperature is fitted first, https://arxiv.org/abs/1706.04599
        switch_off: Whether exits may be switched off, which saves their cost (all stay on beyond five exits).
        risk_control: Whether to guarantee `max_accuracy_drop`; half of the images choose, the other half bounds.
        input_size: Image size (C, H, W) that FLOPs are counted at; that of the first images when None.

    Raises:
        ValueError: If not exactly one target is given, or the loader is empty or has no plain labels.
    """
    check_has_exits(model)
    _check_target(max_accuracy_drop, max_flops, policy, risk_control)
    watched = _Watched(loader)
    predictions = collect(model, watched)
    trunk, heads = early_exit_gflops(model, input_size or watched.size)
    return calibrate_logits(
        list(predictions.logits), predictions.targets, trunk, heads, max_accuracy_drop=max_accuracy_drop,
        max_flops=max_flops, policy=policy, ensemble=ensemble, temperature_scaling=temperature_scaling,
        switch_off=switch_off, risk_control=risk_control)


def calibrate_logits(
        logits: Sequence[torch.Tensor],
        targets: torch.Tensor,
        trunk_gflops: Sequence[float],
        head_gflops: Sequence[float],
        *,
        max_accuracy_drop: Optional[float] = None,
        max_flops: Optional[float] = None,
        policy: str = 'confidence',
        ensemble: bool = False,
        temperature_scaling: bool = True,
        switch_off: bool = True,
        risk_control: bool = False,
) -> Calibration:
    """`calibrate` on finished logits.

    Args:
        logits: Z_1 .. Z_k, each [N, K].
        targets: Class indices [N].
        trunk_gflops: 10^9 FLOPs of the network up to each exit's stage, the whole network's last: k of them.
        head_gflops: 10^9 FLOPs of each exit: k - 1 of them.
        max_accuracy_drop: As the further ones, see `calibrate`.
    """
    _check_target(max_accuracy_drop, max_flops, policy, risk_control)
    _check_images(logits, targets)
    target = _Target(max_accuracy_drop, None if max_flops is None else max_flops / 1e9)
    images = _Images(logits, targets, trunk_gflops, head_gflops, ExitRule(len(logits), None, policy, ensemble=ensemble))
    fitting, checking = images.halves() if risk_control else (images, images)
    if temperature_scaling and policy != 'patience':
        fitting.rule.temperatures[:] = [fit_temperature(z, fitting.targets) for z in fitting.answers()]
    points = fitting.points(target, switch_off)
    point, curve = target.best(points, fitting.main), pareto(points)
    if max_accuracy_drop is not None and risk_control:
        point = controlled_point(path_of_caution(point), checking.lost, max_accuracy_drop)
    return checking.result(point, curve, target, guaranteed_drop=max_accuracy_drop if risk_control else None)


def fit_temperature(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """T that minimises the cross-entropy of softmax(Z / T); the loss is convex in 1 / T, so a bisection finds it.

    Args:
        logits: Z [N, K].
        targets: Class indices [N].

    Raises:
        ValueError: If a logit is not finite, or a label no class.
    """
    _check_images([logits], targets)
    logits = logits.double()
    logits = logits - logits.gather(1, targets[:, None])
    low, high = math.log(0.02), math.log(50.)  # of 1 / T
    for _ in range(40):
        middle = (low + high) / 2
        slope = ((logits * math.exp(middle)).softmax(1) * logits).sum(1).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


@dataclass(frozen=True)
class _Target:
    """What to reach: one of the two is given."""
    max_drop: Optional[float]
    max_gflops: Optional[float]

    def objective(self, main: Point) -> Objective:
        """What is to be small, infinite where the target is missed."""
        if self.max_drop is not None:
            return partial(cheapest, main.accuracy - self.max_drop)
        return partial(most_accurate, self.max_gflops or 0.)

    def best(self, points: Sequence[Point], main: Point) -> Point:
        """The point that meets the target best, or else comes nearest to it."""
        values = self.objective(main)(torch.tensor([p[:2] for p in points], dtype=torch.float64).T)
        if values.isfinite().any():
            return points[int(values.argmin())]
        return max(points, key=lambda p: p.accuracy) if self.max_drop is not None else min(points, key=lambda p: p.cost)

    def outcome(self, point: Point, main: Point, curve: Sequence[Point]) -> Tuple[bool, str]:
        """Whether a point meets the target, and that in a sentence."""
        if self.objective(main)(torch.tensor([point[:2]], dtype=torch.float64).T).isfinite().all():
            if any(t is not None for t in point.thresholds):
                return True, 'The target is met.'
            return True, 'The target is met by the main network alone: no exit is good enough, nothing is saved.'
        if self.max_drop is not None:
            return False, f'The target cannot be met: no thresholds are more accurate than {curve[-1].accuracy:.4f}.'
        return False, (f'The target cannot be met: {self.max_gflops:.4g} GFLOPs are less than the {curve[0].cost:.4g} '
                       'GFLOPs of leaving at the cheapest exit.')


class _Watched:
    """A loader that looks at what passes."""

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader
        self.size: Optional[Tuple[int, int, int]] = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise ValueError('The loader must give batches (images, labels) of two tensors.')
            images, targets = batch
            if targets.ndim != 1:
                raise ValueError(
                    f'Labels of shape {tuple(targets.shape)}: calibration needs one class index per image.')
            self.size = self.size or tuple(images.shape[1:])
            yield images, targets


class _Images:
    """Logits and labels of images, a rule whose thresholds are sought, and what the classifiers cost."""

    def __init__(
            self,
            logits: Sequence[torch.Tensor],
            targets: torch.Tensor,
            trunk: Sequence[float],
            heads: Sequence[float],
            rule: ExitRule,
    ):
        self.logits, self.targets = logits, targets
        self.trunk, self.heads = trunk, heads
        self.rule = rule
        self.main_right = logits[-1].argmax(1) == targets
        self.main = Point(trunk[-1], float(self.main_right.double().mean()), (None,) * len(heads))

    def halves(self) -> Tuple['_Images', '_Images']:
        """Two halves drawn at random, always the same, under one rule."""
        if len(self.targets) < 2:
            raise ValueError('Risk control splits the images in two, one is not enough.')
        order = torch.randperm(len(self.targets), generator=torch.Generator().manual_seed(0))
        first, second = (
            _Images([z[rows] for z in self.logits], self.targets[rows], self.trunk, self.heads, self.rule)
            for rows in (order[::2], order[1::2]))
        return first, second

    def answers(self, exits: Optional[Sequence[int]] = None) -> List[torch.Tensor]:
        """Of the exits that are on (all if None) and the main network, each [N, K]."""
        return [answer for answer, _ in self._passed(exits)]

    def _passed(self, exits: Optional[Sequence[int]]) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        progress, last = Progress(), len(self.heads)
        return [self.rule.answer(i, self.logits[i], progress)
                for i in [*(range(last) if exits is None else exits), last]]

    def alone(self) -> List[Point]:
        """Each classifier as the only one for all images."""
        last, always = len(self.heads), 1. if self.rule.policy == 'patience' else 0.
        right = [float((z.argmax(1) == self.targets).double().mean()) for z in self.logits]
        costs = map(operator.add, self.trunk, self.heads)
        return [Point(cost, right[i], tuple(always if j == i else None for j in range(last)))
                for i, cost in enumerate(costs)] + [self.main]

    def points(self, target: _Target, switch_off: bool) -> List[Point]:
        """Points of the curve for every subset of exits, the best of each improved for the target."""
        objective = target.objective(self.main)
        points = [self.main]
        for exits in self._subsets(switch_off):
            answers, scores = zip(*self._passed(exits))
            right = torch.stack([answer.argmax(1) == self.targets for answer in answers], dim=1)
            by_exit = leaving_gflops(self.trunk, self.heads, exits)
            costs = [by_exit[i] for i in [*exits, len(self.heads)]]
            problem = Problem(torch.stack(scores[:-1], dim=1), right, costs, whole=self.rule.policy == 'patience')
            found = [self._point(problem, exits, thresholds) for thresholds in sweep(problem, self.main.cost)]
            start = [t for t in target.best(found, self.main).thresholds if t is not None]
            points += [*found, self._point(problem, exits, problem.descend(start, objective))]
        return points

    def _subsets(self, switch_off: bool) -> Iterator[Tuple[int, ...]]:
        count = len(self.heads)
        if not switch_off or 2 ** count > MOST_SUBSETS:
            yield tuple(range(count))
            return
        for size in range(1, count + 1):
            yield from itertools.combinations(range(count), size)

    def _point(self, problem: Problem, exits: Sequence[int], thresholds: Sequence[float]) -> Point:
        by_exit = dict(zip(exits, thresholds))
        return Point(*problem.cost_and_accuracy(thresholds), tuple(by_exit.get(i) for i in range(len(self.heads))))

    def _taken(self, point: Point) -> Tuple[torch.Tensor, torch.Tensor]:
        """The exit each image leaves at [N], and whether its answer is right [N]."""
        rule = ExitRule(len(self.logits), **{**self.rule.settings(), 'thresholds': point.thresholds})
        out = choose_exits(rule, self.logits)
        return out.exit_index, out.logits.argmax(1) == self.targets

    def lost(self, point: Point) -> torch.Tensor:
        """Which images [N] the main network has right and early exit has not."""
        return self.main_right & ~self._taken(point)[1]

    def result(
            self,
            point: Point,
            curve: List[Point],
            target: _Target,
            guaranteed_drop: Optional[float],
    ) -> Calibration:
        """What a point gives on these images."""
        taken, right = self._taken(point)
        exits = [i for i, threshold in enumerate(point.thresholds) if threshold is not None]
        shares = (torch.bincount(taken, minlength=len(self.logits)).double() / len(taken)).tolist()
        gflops = sum(map(operator.mul, shares, leaving_gflops(self.trunk, self.heads, exits)))
        point = Point(gflops, float(right.double().mean()), point.thresholds)
        reached, message = target.outcome(point, self.main, curve)
        if guaranteed_drop is not None:  # holds for images to come, whatever these show
            reached, message = True, _bound_in_a_sentence(guaranteed_drop, len(taken), bool(exits))
        settings = {**self.rule.settings(), 'thresholds': list(point.thresholds)}
        return Calibration(
            settings, point.accuracy, gflops, self.main.accuracy, self.main.cost, shares, len(taken), reached, message,
            guaranteed_drop, curve, self.alone())


def _bound_in_a_sentence(max_drop: float, images: int, leaves: bool) -> str:
    least = math.ceil(1 / max_drop - 1)
    if images < least:
        return (f'The main network answers alone: to bound a drop of {max_drop:g}, half of the images must be '
                f'{least} or more, here they are {images}.')
    return 'The bound is guaranteed.' if leaves else 'No exit is good enough for the bound, nothing is saved.'


def _check_images(logits: Sequence[torch.Tensor], targets: torch.Tensor) -> None:
    classes = logits[-1].shape[1]
    wrong = (targets < 0) | (targets >= classes)
    if wrong.any():
        raise ValueError(f'{int(wrong.sum())} of {len(targets)} labels are none of the {classes} classes '
                         f'0..{classes - 1}, the first of them is {int(targets[wrong][0])}.')
    for i, z in enumerate(logits):
        broken = ~z.isfinite().all(1)
        if broken.any():
            raise ValueError(f'Classifier {i} (0 is exit1) gives {int(broken.sum())} of {len(targets)} images logits '
                             'that are not finite; compute in float32, or look at these images.')


def _check_target(
        max_accuracy_drop: Optional[float],
        max_flops: Optional[float],
        policy: str,
        risk_control: bool,
) -> None:
    if (max_accuracy_drop is None) == (max_flops is None):
        raise ValueError('Give one target: max_accuracy_drop=0.01 (one point) or max_flops=2e9 (per image).')
    if max_accuracy_drop is not None and not -1 < max_accuracy_drop < 1:
        raise ValueError(f'max_accuracy_drop={max_accuracy_drop} must be a share of the images: 0.01 is one point.')
    if risk_control and not (max_accuracy_drop or 0.) > 0:
        raise ValueError('risk_control bounds the accuracy drop: give max_accuracy_drop=0.01 or the like.')
    if risk_control and policy == 'patience':
        raise ValueError('risk_control needs thresholds between 0 and 1: choose confidence, entropy or margin.')
