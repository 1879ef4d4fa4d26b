"""The losses of exit-ensemble distillation, on lists of tensors.

Equation numbers are those of 'Exit-Ensemble Distillation'. Z_1 .. Z_k are logits [B, K], F_1 .. F_k features [B, D],
shallow to deep, the last is the main network; y is the target.

    (2)  sum_{i=1..k}   CE(Z_i, y)
    (4)  (2) + sum_{i=1..k-1} [ alpha l_z(Z_i, Z_k) + beta l_f(F_i, F_k) ]
    (8)  (2) + sum_{i=1..k}   [ alpha l_z(Z_i, G_z) + beta l_f(F_i, G_f) ],  G = mean of the teacher's members
"""
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import create_classification_loss

__all__ = [
    'ExitEnsembleDistillationLoss',
    'binary_distillation_kl',
    'create_multi_exit_loss',
    'distillation_kl',
    'ensemble_mean',
]

Teacher = Union[str, Sequence[int]]


def ensemble_mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of equally shaped tensors: G_z (5) of logits, G_f (6) of features."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total / len(tensors)


def distillation_kl(logits: torch.Tensor, teacher_log_prob: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || softmax(Z / T)), summed over classes, averaged over the batch, without a factor T^2.

    Args:
        logits: Z [B, K].
        teacher_log_prob: log softmax(G / T) [B, K].
        temperature: T.
    """
    log_prob = F.log_softmax(logits / temperature, dim=-1)
    return F.kl_div(log_prob, teacher_log_prob, reduction='batchmean', log_target=True)


def binary_distillation_kl(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL between the Bernoulli distributions of each label, averaged over labels and batch, without a factor T^2.

    Args:
        logits: Z [B, K], each label's own logit.
        teacher_logits: G [B, K].
        temperature: T.
    """
    z, g = logits / temperature, teacher_logits / temperature
    prob = g.sigmoid()
    # log p - log q and log(1 - p) - log(1 - q), as log sigmoids, which do not overflow
    yes, no = F.logsigmoid(g) - F.logsigmoid(z), F.logsigmoid(-g) - F.logsigmoid(-z)
    return (prob * yes + (1 - prob) * no).mean()


class ExitEnsembleDistillationLoss(nn.Module):
    """Equation (8), and with other teachers (4) and the subsets of Table IV.

    loss = task_loss + alpha * distill_loss + beta * feature_loss; the three are plain sums over the classifiers.
    With a single member as the teacher that member is no student of its own: teacher='main' is equation (4).

    KL is the paper's: softened by T on both sides, no factor T^2. The usual T^2-scaled KL is alpha = T^2 here, the
    authors' published code (0.1 T^2 x soft cross-entropy, which has KL's gradient) is alpha = 0.1 T^2. MSE is averaged
    over batch and classes, and over batch and feature width for features.
    The authors' code masks its feature loss where neither side is positive; behind ReLU and average pooling nothing
    is, so it equals the plain MSE here: https://github.com/hjdw2/Exit-Ensemble-Distillation

    Args:
        alpha: Weight of the output distillation, 0 switches it off.
        beta: Weight of the feature distillation, 0 switches it off.
        output_loss: l_z, 'kl' or 'mse'.
        temperature: T of the KL.
        teacher: 'ensemble' of all, 'main', or the indices of the members (0 is exit1, -1 the main network).
        task_loss: Criterion applied to each classifier, any that timm makes; cross-entropy when None.
        multi_label: Targets are independent labels [B, K]: the KL is that of the sigmoids, averaged over labels as
            timm's binary cross-entropy is; the default criterion is that one.

    Raises:
        ValueError: If a weight is negative, the temperature is not positive, or a name or index is wrong.
    """

    def __init__(
            self,
            alpha: float = 1.,
            beta: float = 0.,
            output_loss: str = 'kl',
            temperature: float = 3.,
            teacher: Teacher = 'ensemble',
            task_loss: Optional[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = None,
            multi_label: bool = False,
    ):
        super().__init__()
        for name, value in (('alpha', alpha), ('beta', beta)):
            if not 0. <= value < float('inf'):
                raise ValueError(f'{name}={value} must be a finite number of at least 0 (0 switches the term off).')
        if not 0. < temperature < float('inf'):
            raise ValueError(f'temperature={temperature} must be greater than 0 (the paper takes 3).')
        if output_loss not in ('kl', 'mse'):
            raise ValueError(f"Unknown output_loss '{output_loss}', choose 'kl' or 'mse'.")
        self.alpha = alpha
        self.beta = beta
        self.output_loss = output_loss
        self.temperature = temperature
        self.teacher = teacher
        self.multi_label = multi_label
        default = nn.BCEWithLogitsLoss if multi_label else nn.CrossEntropyLoss
        self.task_loss = task_loss if task_loss is not None else default()
        self._check_teacher()

    def _check_teacher(self) -> None:
        if isinstance(self.teacher, str):
            if self.teacher not in ('ensemble', 'main'):
                raise ValueError(
                    f"Unknown teacher '{self.teacher}', choose 'ensemble', 'main' or a list of classifier indices.")
        elif not isinstance(self.teacher, Sequence) or not self.teacher or not all(
                isinstance(i, int) for i in self.teacher):
            raise ValueError(f'teacher={self.teacher} must name at least one classifier by its index (0 is exit1).')

    def teacher_indices(self, num_exits: int) -> List[int]:
        """Indices of the teacher's members among `num_exits` classifiers (the main network counted).

        Raises:
            ValueError: If an index is out of range or named twice.
        """
        if self.teacher == 'ensemble':
            return list(range(num_exits))
        if self.teacher == 'main':
            return [num_exits - 1]
        members = [int(i) + num_exits if int(i) < 0 else int(i) for i in self.teacher]
        if not all(0 <= i < num_exits for i in members) or len(set(members)) < len(members):
            raise ValueError(
                f'teacher={list(self.teacher)} must be different indices of the {num_exits} classifiers: '
                f'0..{num_exits - 2} are the exits, {num_exits - 1} (or -1) is the main network.')
        return members

    def forward(
            self,
            logits: Sequence[torch.Tensor],
            features: Optional[Sequence[torch.Tensor]],
            target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        """The loss and its terms.

        Args:
            logits: Z_1 .. Z_k, each [B, K].
            features: F_1 .. F_k, each [B, D]; may be None when beta is 0.
            target: Class indices [B], soft targets [B, K], or labels [B, K] for multi-label targets.

        Returns:
            Dictionary with `loss` and the unweighted sums `task_loss`, `distill_loss`, `feature_loss`; a term that is
            switched off is 0.

        Raises:
            ValueError: If there is nothing to distil (one classifier), or features are missing.
        """
        if (self.alpha or self.beta) and len(logits) < 2:
            raise ValueError('Distillation needs at least one exit beside the main network; attach exits, '
                             'or set alpha=0 and beta=0.')
        with _no_autocast(logits[0].device.type):
            logits = [_full_precision(z) for z in logits]
            task_loss = _sum([self.task_loss(z, target) for z in logits])
            off = task_loss.new_zeros(())
            distill_loss = self._output_loss(logits) if self.alpha else off
            feature_loss = self._feature_loss(features) if self.beta else off
            loss = task_loss
            if self.alpha:
                loss = loss + self.alpha * distill_loss
            if self.beta:
                loss = loss + self.beta * feature_loss
        return {'loss': loss, 'task_loss': task_loss, 'distill_loss': distill_loss, 'feature_loss': feature_loss}

    def _students(self, members: List[int], num_exits: int) -> List[int]:
        return [i for i in range(num_exits) if members != [i]]

    def _output_loss(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        members = self.teacher_indices(len(logits))
        students = [logits[i] for i in self._students(members, len(logits))]
        teacher = ensemble_mean([logits[i].detach() for i in members])
        if self.output_loss == 'mse':
            return _sum([F.mse_loss(z, teacher) for z in students])
        if self.multi_label:
            return _sum([binary_distillation_kl(z, teacher, self.temperature) for z in students])
        teacher_log_prob = F.log_softmax(teacher / self.temperature, dim=-1)
        return _sum([distillation_kl(z, teacher_log_prob, self.temperature) for z in students])

    def _feature_loss(self, features: Optional[Sequence[torch.Tensor]]) -> torch.Tensor:
        if features is None:
            raise ValueError('beta > 0 needs the features; pass out.features of forward_exits().')
        features = [_full_precision(f) for f in features]
        members = self.teacher_indices(len(features))
        teacher = ensemble_mean([features[i].detach() for i in members])
        return _sum([F.mse_loss(features[i], teacher) for i in self._students(members, len(features))])

    def extra_repr(self) -> str:
        return (f'alpha={self.alpha}, beta={self.beta}, output_loss={self.output_loss}, '
                f'temperature={self.temperature}, teacher={self.teacher}')


def _no_autocast(device_type: str) -> ContextManager[Any]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # meta and the like


def _full_precision(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def create_multi_exit_loss(
        loss_type: Optional[str] = None,
        method: str = 'eed',
        alpha: float = 1.,
        beta: float = 0.,
        output_loss: str = 'kl',
        temperature: float = 3.,
        teacher: Optional[Teacher] = None,
        **timm_loss_kwargs: Any,
) -> ExitEnsembleDistillationLoss:
    """Multi-exit training criterion by name, beside timm's `create_classification_loss`.

    Args:
        loss_type: Criterion applied to each classifier, one of timm's; ce when None, bce for multi-label targets.
        method: 'eed' is equation (8), 'kd' is (4), 'ce' is (2), which ignores alpha and beta.
        alpha: Weight of the output distillation.
        beta: Weight of the feature distillation.
        output_loss: 'kl' or 'mse'.
        temperature: T of the KL.
        teacher: With method 'eed' the members of the ensemble (Table IV), all when None.
        timm_loss_kwargs: Further arguments of `timm.loss.create_classification_loss` (smoothing, multi_label, ..).

    Raises:
        ValueError: If a name or a value is wrong, or the criterion does not fit the targets.
    """
    if method not in ('eed', 'kd', 'ce'):
        raise ValueError(f"Unknown method '{method}', choose 'eed' (8), 'kd' (4) or 'ce' (2).")
    if teacher is not None and method != 'eed':
        raise ValueError(f"teacher={teacher} goes with method 'eed'; method '{method}' has its teacher fixed.")
    task_loss = create_classification_loss(loss_type, **timm_loss_kwargs)
    if method == 'ce':
        alpha = beta = 0.
    if teacher is None:
        teacher = 'main' if method == 'kd' else 'ensemble'
    return ExitEnsembleDistillationLoss(
        alpha, beta, output_loss, temperature, teacher, task_loss, bool(timm_loss_kwargs.get('multi_label')))
