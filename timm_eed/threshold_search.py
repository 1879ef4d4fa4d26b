"""Thresholds by search on finished scores: what accuracy can be had for what cost.

Nothing here knows of networks: N samples, M exits that are on, a score per sample and exit, whether each of the M + 1
classifiers is right, and what leaving at each costs. A sample leaves at the first exit with score >= threshold.

All is built on one exact step: with the other thresholds fixed, sort the samples that reach an exit by score; sums from
the top down give accuracy and cost of every threshold this exit could have. Steps along the exits in turn, minimising
cost * price - accuracy for prices from low to high, give points of the accuracy-cost curve.
"""
from functools import partial
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

__all__ = ['Objective', 'Point', 'Problem', 'cheapest', 'most_accurate', 'pareto', 'sweep']

Objective = Callable[[torch.Tensor], torch.Tensor]  # means of cost and accuracy [2, T] to what is to be small [T]
TOLERANCE = 1e-12
MOST_ROUNDS = 20
PRICES = [10 ** (exponent / 4) for exponent in range(-14, 9)]  # accuracy lost per main network's cost saved


class Point(NamedTuple):
    """Thresholds of all exits (None: off), shallow to deep, and the accuracy (0..1) and mean cost they have."""
    cost: float
    accuracy: float
    thresholds: Tuple[Optional[float], ...]


class Problem:
    """Finished scores, with the thresholds that are being searched.

    Args:
        scores: [N, M] of the exits that are on.
        right: [N, M + 1], 1 where a classifier is right, the main network's last.
        costs: M + 1, of leaving at each.
        whole: Whether scores count something (patience): thresholds are scores then, else values between two of them.
    """

    def __init__(self, scores: torch.Tensor, right: torch.Tensor, costs: Sequence[float], whole: bool = False):
        self.scores = scores.float()
        self.values = torch.stack([torch.tensor(costs, dtype=torch.float64).expand(right.shape), right.double()])
        self.whole = whole
        self.never = float(len(costs)) if whole else 2.
        self.always = 1. if whole else 0.
        self.order = self.scores.argsort(dim=0, descending=True)

    def exits_taken(self, thresholds: Sequence[float]) -> torch.Tensor:
        """Which classifier [N] answers for each sample."""
        leaves = self.scores >= torch.tensor(thresholds, dtype=torch.float32)
        return torch.cat([leaves, leaves.new_ones(len(leaves), 1)], dim=1).int().argmax(dim=1)

    def cost_and_accuracy(self, thresholds: Sequence[float]) -> Tuple[float, float]:
        """Means over all samples."""
        taken = self.exits_taken(thresholds)
        cost, accuracy = self.values.gather(2, taken.expand(2, -1)[:, :, None]).mean(dim=(1, 2)).tolist()
        return cost, accuracy

    def line(self, exit_number: int, thresholds: Sequence[float]) -> Tuple[torch.Tensor, torch.Tensor]:
        """Every threshold an exit could have [T], and the means of cost and accuracy it would give [2, T]."""
        others = list(thresholds)
        others[exit_number] = self.never
        taken = self.exits_taken(others)
        without = self.values.gather(2, taken.expand(2, -1)[:, :, None])[:, :, 0]
        order = self.order[:, exit_number]
        order = order[taken[order] > exit_number]  # those that get here, surest first
        gain = (self.values[:, order, exit_number] - without[:, order]).cumsum(dim=1)
        totals = torch.cat([gain.new_zeros(2, 1), gain], dim=1) + without.sum(dim=1, keepdim=True)
        ranked = self.scores[order, exit_number]
        cuts = self._between(ranked)
        possible = torch.ones(len(cuts), dtype=torch.bool)
        possible[1:-1] = ranked[1:] < ranked[:-1]  # equal scores leave together
        return cuts[possible], totals[:, possible] / len(self.scores)

    def _between(self, ranked: torch.Tensor) -> torch.Tensor:
        """Thresholds at which the first 0, 1, .., all of the samples leave; scores are ranked from high to low."""
        ends = [ranked.new_tensor([end]) for end in (self.never, self.always)]
        if len(ranked) == 0:
            return ends[0]
        middle = ranked[:-1] if self.whole else (ranked[:-1] + ranked[1:]) / 2
        middle = torch.where(middle > ranked[1:], middle, ranked[:-1])  # float32 has nothing in between
        return torch.cat([ends[0], middle, ends[1]])


    def descend(self, thresholds: Sequence[float], objective: Objective) -> List[float]:
        """Thresholds improved exit by exit, until no step makes the objective smaller."""
        thresholds = list(thresholds)
        best = float(objective(torch.tensor(self.cost_and_accuracy(thresholds), dtype=torch.float64)[:, None]))
        for _ in range(MOST_ROUNDS):
            start = best
            for number in reversed(range(len(thresholds))):
                candidates, means = self.line(number, thresholds)
                values = objective(means)
                at = int(values.argmin())
                if float(values[at]) < best - TOLERANCE:
                    best, thresholds[number] = float(values[at]), float(candidates[at])
            if best == start:
                break
        return thresholds


def sweep(problem: Problem, unit: float) -> Iterator[List[float]]:
    """Thresholds along the curve, as prices rise from all samples going to the end, and fall from all leaving at once.

    Args:
        problem: The problem.
        unit: A cost; at a price of 1, saving it is worth all accuracy.
    """
    for start, prices in ((problem.never, PRICES), (problem.always, PRICES[::-1])):
        thresholds = [start] * problem.scores.shape[1]
        yield thresholds
        for price in prices:
            thresholds = problem.descend(thresholds, partial(_priced, price / unit))
            yield thresholds


def _priced(price: float, means: torch.Tensor) -> torch.Tensor:
    return means[0] * price - means[1]


def cheapest(min_accuracy: float, means: torch.Tensor) -> torch.Tensor:
    """Objective: the cost, where accuracy is at least this."""
    return torch.where(means[1] >= min_accuracy - TOLERANCE, means[0], torch.inf)


def most_accurate(max_cost: float, means: torch.Tensor) -> torch.Tensor:
    """Objective: the accuracy, where the cost is at most this."""
    return torch.where(means[0] <= max_cost + TOLERANCE, -means[1], torch.inf)


def pareto(points: Sequence[Point]) -> List[Point]:
    """Those than which none is both cheaper and as accurate, from cheap to dear."""
    frontier: List[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.accuracy)):
        if not frontier or point.accuracy > frontier[-1].accuracy:
            frontier.append(point)
    return frontier
