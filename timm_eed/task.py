"""Multi-exit training as a timm task: forward pass, loss terms and per-exit evaluation."""
from collections import OrderedDict
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Set, Union

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.task import ClassificationEvaluator, TrainingTask
from timm.utils import unwrap_model

from .losses import ExitEnsembleDistillationLoss, ensemble_mean
from .multi_exit import MultiExitOutput, MultiExitWrapper, check_has_exits, classifier_layers, classifier_names
from .multi_label import MultiLabelExitsEvaluator

__all__ = ['AllExits', 'MultiExitEvaluator', 'MultiExitTask']


class AllExits(nn.Module):
    """A multi-exit model whose plain call gives all exits, as DDP, EMA and compile need it.

    The model is held as `module`, the name by which `timm.utils.unwrap_model` sees through wrappers: checkpoints
    carry the model's own keys.

    Args:
        model: The multi-exit model.
    """

    def __init__(self, model: MultiExitWrapper):
        super().__init__()
        self.module = model

    def forward(self, x: torch.Tensor) -> MultiExitOutput:
        """All logits and features for images [B, C, H, W]."""
        return self.module.forward_exits(x)

    def no_weight_decay(self) -> Set[str]:
        """The model's exclusions from weight decay, under this module's prefix."""
        return {'module.' + name for name in self.module.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The model's layer groups, under this module's prefix."""
        matcher = self.module.group_matcher(coarse=coarse)
        return lambda name: matcher(name[len('module.'):])


class MultiExitTask(TrainingTask):
    """Train a multi-exit model: one forward pass, the loss over all classifiers.

    EMA, compile, DDP, gradient clipping and checkpoint state work through the methods of timm's tasks. The eval model
    gives a `MultiExitOutput`, which the evaluator of `create_evaluator()` takes.

    Args:
        model: A multi-exit model.
        criterion: The loss; `ExitEnsembleDistillationLoss()` when None.
        device: Device for task tensors/buffers.
        dtype: Dtype for task tensors/buffers.
        verbose: Enable info logging.
        threshold: Probability that counts as yes in the F1 metrics of multi-label targets.

    Raises:
        ValueError: If the model has no exits, or the criterion's teacher names a classifier that it has not.

    Examples:

        ```python
        task = timm_eed.MultiExitTask(timm_eed.create_model('resnet18', num_classes=10))
        result = task(x, y)
        result['loss'].backward()
        ```
    """

    def __init__(
            self,
            model: MultiExitWrapper,
            criterion: Optional[ExitEnsembleDistillationLoss] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
            threshold: float = .5,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        check_has_exits(model)
        self.num_exits = model.num_exits
        self.trainable_module: Any = AllExits(model)
        self.criterion = (criterion if criterion is not None else ExitEnsembleDistillationLoss()).to(self.device)
        self.threshold = threshold
        self.criterion.teacher_indices(self.num_exits)  # raises now what would fail in the first step

    def prepare_distributed(self, device_ids: Optional[List[int]] = None, **ddp_kwargs: Any) -> 'MultiExitTask':
        """Wrap the trainable part in DistributedDataParallel, see `timm.task.TrainingTask`."""
        from torch.nn.parallel import DistributedDataParallel
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]  # as timm's tasks have it
            self,
            backend: str = 'inductor',
            mode: Optional[str] = None,
            **compile_kwargs: Any,
    ) -> nn.Module:
        """Compile the forward pass of all exits, before `prepare_distributed`; training and evaluation share it."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        self.eval_model = self.trainable_module
        return self.trainable_module

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterable[nn.Parameter]:
        """Parameters to clip; without the fully connected layers of all classifiers for `exclude_head` (AGC)."""
        model = unwrap_model(self.trainable_module)
        if not exclude_head:
            return model.parameters()
        excluded = {id(p) for layer in classifier_layers(model) for p in layer.parameters()}
        return [p for p in model.parameters() if id(p) not in excluded]

    def create_evaluator(self, **kwargs: Any) -> Union['MultiExitEvaluator', MultiLabelExitsEvaluator]:
        """A fresh evaluator for this task's eval model and kind of targets."""
        if self.criterion.multi_label:
            return MultiLabelExitsEvaluator(self.num_exits, self.device, threshold=self.threshold, **kwargs)
        return MultiExitEvaluator(self.num_exits, device=self.device, **kwargs)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, Any]:
        """One training step's forward pass.

        Args:
            input: Images [B, C, H, W].
            target: Class indices [B], or soft targets [B, K].

        Returns:
            Dictionary with `loss`, `output` (main logits [B, K]), `logits` (of all classifiers), `task_loss`,
            `distill_loss`, `feature_loss`.
        """
        out = self.trainable_module(input)
        return {**self.criterion(out.logits, out.features, target), 'output': out.logits[-1], 'logits': out.logits}


class MultiExitEvaluator(ClassificationEvaluator):
    """Top-1 and top-5 accuracy (%) of the main network, of every exit and of the ensemble (mean of all logits).

    The main network's metrics carry timm's names (`loss`, `top1`, `top5`), the others a suffix: `top1_exit1`, ..,
    `top1_ensemble`. Plain logits instead of a `MultiExitOutput` give the main metrics alone.

    Args:
        num_exits: Number of classifiers, the main network counted.
        device: Device for the running totals, normally the model output device.
        max_samples: Ignore predictions beyond this many examples (distributed sampler padding).
        criterion: Loss to report, defaults to cross-entropy on class indices.
    """

    def __init__(
            self,
            num_exits: int,
            device: Optional[torch.device] = None,
            *,
            max_samples: Optional[int] = None,
            criterion: Optional[nn.Module] = None,
    ):
        self.names = classifier_names(num_exits)[:-1] + ['ensemble']
        self.metric_names: Any = ('loss', 'top1', 'top5', *(f'top{k}_{name}' for name in self.names for k in (1, 5)))
        super().__init__(device, max_samples=max_samples, criterion=criterion)

    def reset(self) -> None:
        """Forget everything seen so far."""
        super().reset()
        self.exit_counts = torch.zeros(len(self.names), 2, dtype=torch.int64, device=self.device)  # correct
        self.exit_samples = torch.zeros((), dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def update(
            self,
            output: Union[torch.Tensor, MultiExitOutput, Sequence[torch.Tensor]],
            target: torch.Tensor,
    ) -> None:
        """Count one batch.

        Args:
            output: A `MultiExitOutput`, a list of logits [B, K] shallow to deep, or the main logits alone.
            target: Class indices [B].
        """
        if isinstance(output, torch.Tensor):
            return super().update(output, target)
        logits = output.logits if isinstance(output, MultiExitOutput) else output
        if len(logits) != len(self.names):
            raise ValueError(f'Expected logits of {len(self.names)} classifiers, got {len(logits)}.')
        before = self.num_samples
        super().update(logits[-1], target)
        count = self.num_samples - before  # without the sampler's padding
        if not count:
            return
        self.exit_samples += count
        logits = [z[:count].float() for z in logits]
        logits[-1] = ensemble_mean(logits)  # the main network is counted by the base class
        for row, z in zip(self.exit_counts, logits):
            correct = z.topk(min(5, z.shape[-1]), dim=-1).indices.eq(target[:count, None])
            row[0] += correct[:, 0].sum()
            row[1] += correct.any(dim=-1).sum()

    def _add_exits(
            self,
            metrics: 'OrderedDict[str, float]',
            exit_counts: torch.Tensor,
            samples: int,
    ) -> 'OrderedDict[str, float]':
        if samples:
            for name, (top1, top5) in zip(self.names, exit_counts.tolist()):
                metrics[f'top1_{name}'] = 100 * top1 / samples
                metrics[f'top5_{name}'] = 100 * top5 / samples
        return metrics

    def summary(self) -> 'OrderedDict[str, float]':
        """Local running metrics for progress logging, without collectives."""
        return self._add_exits(super().summary(), self.exit_counts, int(self.exit_samples))

    def compute(self, distributed: bool = False) -> 'OrderedDict[str, float]':
        """Metrics over everything seen, over all ranks if distributed."""
        exit_counts, samples = self.exit_counts.clone(), self.exit_samples.clone()
        if distributed:
            dist.all_reduce(exit_counts)
            dist.all_reduce(samples)
        return self._add_exits(super().compute(distributed=distributed), exit_counts, int(samples))
