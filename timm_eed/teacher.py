"""An external teacher beside the exits: a pretrained network whose logits every classifier learns from."""
from typing import Any, Dict, List, Optional, Sequence, Union

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import DistillationTeacher

from .exits import TimmModel
from .losses import ExitEnsembleDistillationLoss, distillation_kl
from .multi_exit import MultiExitWrapper
from .task import MultiExitTask

__all__ = ['MultiExitDistillationTask', 'load_teacher']


def load_teacher(
        name: str,
        model: TimmModel,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
) -> DistillationTeacher:
    """A pretrained timm model as the teacher of another one, with its own classifier.

    timm's `DistillationTeacher` would give a teacher of other classes a fresh classifier, which teaches noise.

    Args:
        name: A timm model's name.
        model: The student.
        device: Device of the teacher.
        dtype: Its dtype.

    Raises:
        ValueError: If the teacher has another number of classes than the student.
    """
    teacher: TimmModel = timm.create_model(name, pretrained=True, in_chans=model.in_chans, device=device, dtype=dtype)
    if teacher.num_classes != model.num_classes:
        raise ValueError(
            f"The teacher '{name}' has {teacher.num_classes} classes, the model {model.num_classes}: it knows nothing "
            'about them. Choose one that was trained on these classes.')
    # timm adapts the weights to other numbers of channels, but not what the images are normalised by
    for name in ('mean', 'std'):
        values = teacher.pretrained_cfg[name]
        if len(values) != model.in_chans:
            teacher.pretrained_cfg[name] = (sum(values) / len(values),) * model.in_chans
    return DistillationTeacher(teacher, device=device, dtype=dtype)


class MultiExitDistillationTask(MultiExitTask):
    """Multi-exit training with an external teacher.

    loss = task_loss_weight * (loss of the criterion) + distill_loss_weight * T^2 * sum_{i=1..k} KL(teacher || Z_i),
    each KL softened by T: what timm's `LogitDistillationTask` does for one network, summed over all classifiers as the
    criterion's own terms are. Weights as there: both 1; with the task weight alone the other is 1 - task weight.

    Args:
        model: A multi-exit model.
        teacher: A timm model's name (see `load_teacher`), a model, or timm's `DistillationTeacher`.
        criterion: The loss over the exits.
        distill_loss_weight: Weight of the teacher.
        task_loss_weight: Weight of the criterion.
        temperature: T of the teacher's KL.
        mean: Channel means that images are normalised by for the student; those of its `pretrained_cfg` when None.
        std: Channel standard deviations, likewise.
        device: Device for task tensors/buffers.
        dtype: Dtype for task tensors/buffers.
        verbose: Enable info logging.
    """

    def __init__(
            self,
            model: MultiExitWrapper,
            teacher: Union[str, nn.Module, DistillationTeacher],
            criterion: Optional[ExitEnsembleDistillationLoss] = None,
            distill_loss_weight: Optional[float] = None,
            task_loss_weight: Optional[float] = None,
            temperature: float = 4.,
            mean: Optional[Sequence[float]] = None,
            std: Optional[Sequence[float]] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
    ):
        super().__init__(model, criterion, device=device, dtype=dtype, verbose=verbose)
        if isinstance(teacher, str):
            teacher = load_teacher(teacher, model, self.device, self.dtype)
        elif not isinstance(teacher, DistillationTeacher):
            teacher = DistillationTeacher(teacher, device=self.device, dtype=self.dtype)
        self.teacher: Any = teacher.requires_grad_(False).eval()
        if distill_loss_weight is None:
            distill_loss_weight = 1. if task_loss_weight is None else 1. - task_loss_weight
        self.distill_loss_weight = distill_loss_weight
        self.task_loss_weight = 1. if task_loss_weight is None else task_loss_weight
        self.temperature = temperature
        for name, given in (('mean', mean), ('std', std)):  # images arrive normalised for the student
            values = torch.tensor(given or model.pretrained_cfg[name], device=self.device, dtype=self.dtype)
            self.register_buffer(f'student_{name}', values.view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> 'MultiExitDistillationTask':
        """Set training mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, Any]:
        """One training step's forward pass.

        Args:
            input: Images [B, C, H, W].
            target: Class indices [B], or soft targets [B, K].

        Returns:
            As `MultiExitTask`, with `kd_loss`, the unweighted sum over the classifiers.
        """
        result = super().forward(input, target)
        with torch.no_grad():
            images = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            teacher_logits = self.teacher(images, return_features=False)
        log_prob = F.log_softmax(teacher_logits.float() / self.temperature, dim=-1)
        students: List[torch.Tensor] = result['logits']
        kd_loss = torch.stack([distillation_kl(z.float(), log_prob, self.temperature) for z in students]).sum()
        kd_loss = kd_loss * self.temperature ** 2
        loss = self.task_loss_weight * result['loss'] + self.distill_loss_weight * kd_loss
        return {**result, 'loss': loss, 'kd_loss': kd_loss}
