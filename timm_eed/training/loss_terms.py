"""Loss terms and accuracies of training, averaged on the device."""
import math
from typing import Any, Dict, List, Tuple

import torch
import torch.distributed as dist

from ..losses import ensemble_mean
from .errors import TrainingError

__all__ = ['LossTerms', 'batch_accuracy']

_TERMS = ('loss', 'task_loss', 'distill_loss', 'feature_loss', 'kd_loss')


def batch_accuracy(result: Dict[str, Any], target: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Top-1 (%) of a training batch by classifier, under the evaluation's names; none for targets that are not indices.

    Args:
        result: A task's result, with `output` [B, K], and `logits` of all classifiers where there are exits.
        target: Class indices [B], or anything else.
    """
    logits = [z.detach().float() for z in result.get('logits', [])]
    by_name = {f'top1_exit{i + 1}': z for i, z in enumerate(logits[:-1])}
    by_name['top1'] = result['output'].detach()
    if logits:
        by_name['top1_ensemble'] = ensemble_mean(logits)
    if target.ndim != 1 or target.dtype.is_floating_point or len(target) != len(by_name['top1']):
        return {}
    return {name: 100 * z.argmax(-1).eq(target).float().mean() for name, z in by_name.items()}


class LossTerms:
    """Running means of the loss terms and accuracies, kept on the device; the host looks only when it is asked.

    Args:
        device: Device of the losses.
    """

    def __init__(self, device: torch.device):
        self.names: List[str] = []
        self._device = device
        self._sum = torch.zeros(0, device=device)
        self._samples = 0
        self._unseen: List[Tuple[int, torch.Tensor]] = []

    def add(self, step: int, result: Dict[str, torch.Tensor], samples: int) -> None:
        """Count the terms of one step."""
        names = [name for name in result if name in _TERMS or name.startswith('top1')]
        if self.names and names != self.names:  # a resumed run with other losses: its means begin here
            self._sum, self._samples = self._sum[:0], 0
        self.names = names
        terms = torch.stack([result[name].detach().float() for name in self.names])
        self._unseen.append((step, terms))
        self._sum = terms * samples + (self._sum if len(self._sum) else 0)
        self._samples += samples

    def check(self, epoch: int) -> Dict[str, float]:
        """Means so far.

        Raises:
            TrainingError: If the loss of a step was not finite; names the step and its terms.
        """
        if self._unseen:
            terms = torch.stack([terms for _, terms in self._unseen]).cpu()
            for (step, _), row in zip(self._unseen, terms.tolist()):
                if not all(map(math.isfinite, row)):
                    values = ', '.join(f'{name} {value:.4g}' for name, value in zip(self.names, row) if name in _TERMS)
                    raise TrainingError(
                        f'The loss is not finite at epoch {epoch}, step {step}: {values}. No checkpoint was written '
                        'since. Lower --lr, clip with --clip-grad 1, or use --amp-dtype bfloat16.')
            self._unseen.clear()
        return self.means(self._sum, self._samples)

    def means(self, total: torch.Tensor, samples: float) -> Dict[str, float]:
        """Means of summed terms."""
        return dict(zip(self.names, (total / max(samples, 1)).tolist()))

    def state(self) -> Dict[str, torch.Tensor]:
        """What `load_state` needs to count on within an epoch."""
        return {'terms': self._sum.cpu(), 'samples': torch.tensor(self._samples)}

    def load_state(self, state: Dict[str, torch.Tensor], names: List[str]) -> None:
        """Count on from `state`, whose terms have these names."""
        self.names = names
        self._sum = state['terms'].to(self._device)
        self._samples = int(state['samples'])

    def reduced(self) -> Dict[str, float]:
        """Means over all processes."""
        total = torch.cat([self._sum, self._sum.new_tensor([float(self._samples)])])
        dist.all_reduce(total)
        return self.means(total[:-1], total[-1].item())
