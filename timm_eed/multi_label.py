"""Evaluation of exits on independent labels (multi-label targets)."""
from collections import OrderedDict
from typing import Any, Dict, Optional, Sequence, Union

import torch
from timm.task import MultiLabelClassificationEvaluator

from .losses import ensemble_mean
from .multi_exit import MultiExitOutput, classifier_names

__all__ = ['MultiLabelExitsEvaluator']


class MultiLabelExitsEvaluator:
    """timm's multi-label metrics (%) of the main network, of every exit and of the ensemble (mean of all logits).

    The main network's metrics carry timm's names (`loss`, `map`, `micro_f1`, `macro_f1`, `sample_f1`), the others a
    suffix: `map_exit1`, .., `map_ensemble`.

    Args:
        num_exits: Number of classifiers, the main network counted.
        device: Device for the running totals.
        max_samples: Ignore predictions beyond this many examples (distributed sampler padding).
        threshold: Probability that counts as yes in the F1 metrics.
    """

    default_metric = 'map'

    def __init__(
            self,
            num_exits: int,
            device: Optional[torch.device] = None,
            *,
            max_samples: Optional[int] = None,
            threshold: float = .5,
    ):
        *names, main = classifier_names(num_exits)
        self.evaluators: Dict[str, MultiLabelClassificationEvaluator] = {
            name: MultiLabelClassificationEvaluator(device, max_samples=max_samples, threshold=threshold)
            for name in [*names, main, 'ensemble']}
        metrics = MultiLabelClassificationEvaluator.metric_names
        self.metric_names = (*metrics, *(f'{metric}_{name}' for name in [*names, 'ensemble'] for metric in metrics[1:]))

    def reset(self) -> None:
        """Forget everything seen so far."""
        for evaluator in self.evaluators.values():
            evaluator.reset()

    @torch.no_grad()
    def update(self, output: Union[MultiExitOutput, Sequence[torch.Tensor]], target: torch.Tensor) -> None:
        """Count one batch.

        Args:
            output: A `MultiExitOutput`, or a list of logits [B, K] shallow to deep.
            target: Labels [B, K], 0 or 1.
        """
        logits = [z.float() for z in (output.logits if isinstance(output, MultiExitOutput) else output)]
        for evaluator, z in zip(self.evaluators.values(), [*logits, ensemble_mean(logits)]):
            evaluator.update(z, target)

    def _named(self, by_name: Dict[str, Any]) -> 'OrderedDict[str, float]':
        metrics = OrderedDict(by_name['main'])
        for name, values in by_name.items():
            if name != 'main':
                metrics.update({f'{metric}_{name}': value for metric, value in values.items() if metric != 'loss'})
        return metrics

    def summary(self) -> 'OrderedDict[str, float]':
        """Local running loss for progress logging, without collectives."""
        return self._named({'main': self.evaluators['main'].summary()})

    def compute(self, distributed: bool = False) -> 'OrderedDict[str, float]':
        """Metrics over everything seen, over all ranks if distributed."""
        return self._named({name: e.compute(distributed=distributed) for name, e in self.evaluators.items()})
