"""When a sample may leave: rules on the logits of the exits passed so far.

One `ExitRule` decides for early exit in a running network, for calibration, and offline on finished logits alike.
Every rule is a score that is compared in one way: a sample leaves at the first exit whose score >= its threshold.

    confidence  max softmax(Z), https://arxiv.org/abs/1703.09844
    entropy     1 - H(softmax(Z)) / log K, so that 1 is certain and 0 is uniform, https://arxiv.org/abs/1709.01686
    margin      the largest softmax value minus the second
    patience    how many exits in a row, this one included, chose the same class, https://arxiv.org/abs/2006.04152

Shapes: B batch, K classes, k classifiers (the main network counted).
"""
import math
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch

__all__ = ['POLICIES', 'EarlyExitOutput', 'ExitRule', 'Progress', 'choose_exits']

POLICIES = ('confidence', 'entropy', 'margin', 'patience')
Thresholds = Union[None, float, Sequence[Optional[float]]]


class EarlyExitOutput(NamedTuple):
    """Answers in the order of the samples.

    logits: [B, K] of the exit each sample left at; with `ensemble` their mean over the exits it passed.
    exit_index: [B], 0 is exit1, k - 1 the main network.
    confidence: [B], the policy's score of the answer.
    """
    logits: torch.Tensor
    exit_index: torch.Tensor
    confidence: torch.Tensor


@dataclass
class Progress:
    """What the exits passed so far leave behind for a batch of samples: a sum of logits, a class and its run."""
    total: Optional[torch.Tensor] = None
    passed: int = 0
    prediction: Optional[torch.Tensor] = None
    run: Optional[torch.Tensor] = None

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        self.total = None if self.total is None else self.total[rows]
        self.prediction = None if self.prediction is None else self.prediction[rows]
        self.run = None if self.run is None else self.run[rows]


class ExitRule:
    """A policy with its thresholds, one per exit; None switches an exit off.

    Args:
        num_exits: k, the main network counted.
        thresholds: k - 1 of them, or one for all exits. None (or inf) switches an exit off: it is not computed.
            Whole numbers for patience.
        policy: One of POLICIES.
        temperatures: k of them, logits are divided by these before the softmax of the score; all 1 when None.
        ensemble: Whether the answer at an exit, and its score, come from the mean logits of the exits passed so far,
            this one included (those switched off are not).

    Raises:
        ValueError: If a name, number or length is wrong.
    """

    def __init__(
            self,
            num_exits: int,
            thresholds: Thresholds = 0.9,
            policy: str = 'confidence',
            temperatures: Optional[Sequence[float]] = None,
            ensemble: bool = False,
    ):
        if policy not in POLICIES:
            raise ValueError(f"Unknown policy '{policy}', choose one of {', '.join(POLICIES)}.")
        self.policy = policy
        self.thresholds = _thresholds(thresholds, num_exits - 1, policy)
        self.temperatures = [1.] * num_exits if temperatures is None else [float(t) for t in temperatures]
        if len(self.temperatures) != num_exits or not all(0. < t < math.inf for t in self.temperatures):
            raise ValueError(
                f'temperatures={temperatures} must be {num_exits} positive numbers, one per exit and the last for the '
                'main network.')
        self.ensemble = ensemble

    @property
    def enabled(self) -> List[int]:
        """Indices of the exits that are on, the main network left out."""
        return [i for i, threshold in enumerate(self.thresholds) if threshold is not None]

    @property
    def looks_back(self) -> bool:
        """Whether an answer depends on the exits passed before."""
        return self.ensemble or self.policy == 'patience'

    def settings(self) -> Dict[str, Any]:
        """The arguments of this rule, fit for JSON and for `EarlyExit(model, **settings)`."""
        return dict(thresholds=list(self.thresholds), policy=self.policy, temperatures=list(self.temperatures),
                    ensemble=self.ensemble)

    def answer(self, exit_index: int, logits: torch.Tensor, progress: Progress) -> Tuple[torch.Tensor, torch.Tensor]:
        """Answer [B, K] and score [B] at an exit that gave these logits; `progress` is brought up to date."""
        if self.ensemble:
            progress.total = logits if progress.total is None else progress.total + logits
            progress.passed += 1
            logits = progress.total / progress.passed
        if self.policy == 'patience':
            return logits, self._agreement(logits, progress)
        prob = (logits.float() / self.temperatures[exit_index]).softmax(-1)
        if self.policy == 'confidence':
            return logits, prob.amax(-1)
        if self.policy == 'margin':
            first, second = prob.topk(2, dim=-1).values.unbind(-1)
            return logits, first - second
        return logits, 1 - torch.special.entr(prob).sum(-1) / math.log(prob.shape[-1])

    def leaves(self, exit_index: int, score: torch.Tensor) -> torch.Tensor:
        """Which samples [B] of this score leave at an exit."""
        threshold = self.thresholds[exit_index]
        return torch.zeros_like(score, dtype=torch.bool) if threshold is None else score >= threshold

    @staticmethod
    def _agreement(logits: torch.Tensor, progress: Progress) -> torch.Tensor:
        prediction = logits.argmax(-1)
        if progress.prediction is None or progress.run is None:
            progress.run = torch.ones_like(prediction)
        else:
            progress.run = torch.where(prediction == progress.prediction, progress.run + 1, 1)
        progress.prediction = prediction
        return progress.run.float()


def choose_exits(rule: ExitRule, logits: Sequence[torch.Tensor]) -> EarlyExitOutput:
    """The exit that a rule picks for each sample, and its answer, from finished logits of all classifiers.

    Args:
        rule: The rule.
        logits: Z_1 .. Z_k, each [B, K].
    """
    last = len(logits) - 1
    progress = Progress()
    taken = torch.full((len(logits[0]),), -1, device=logits[0].device)
    output = torch.empty_like(logits[last])
    confidence = torch.empty(len(output), device=output.device)
    for i in [*rule.enabled, last]:
        answer, score = rule.answer(i, logits[i], progress)
        leaves = taken < 0
        if i < last:
            leaves &= rule.leaves(i, score)
        output = torch.where(leaves[:, None], answer, output)
        confidence = torch.where(leaves, score, confidence)
        taken[leaves] = i
    return EarlyExitOutput(output, taken, confidence)


def _thresholds(thresholds: Thresholds, count: int, policy: str) -> List[Optional[float]]:
    if thresholds is None or (hasattr(thresholds, '__float__') and not getattr(thresholds, 'ndim', 0)):
        one_for_all: Any = thresholds  # a number, also of NumPy or PyTorch
        thresholds = [one_for_all] * count
    try:
        values = [None if t is None or float(t) == math.inf else float(t) for t in thresholds]  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise ValueError(f'thresholds={thresholds!r} must be a number, or one per exit.') from error
    if len(values) != count:
        raise ValueError(
            f'{len(values)} thresholds for {count} exits; give one per exit (None switches an exit off), or a single '
            'number for all.')
    for value in values:
        if value is not None and not math.isfinite(value):
            raise ValueError(f'thresholds={thresholds} must be finite numbers, or None where an exit is off.')
        if policy == 'patience' and value is not None and (value < 1 or value != int(value)):
            raise ValueError(
                f'threshold {value} does not fit patience, which counts the exits in a row that agree; give whole '
                'numbers such as thresholds=2.')
    return values
