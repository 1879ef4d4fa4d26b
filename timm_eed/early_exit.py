"""Early exit for real: samples that are sure enough leave in the middle of the network, the others go on without them.

Shapes: B batch, C channels, H x W input, K classes, k classifiers (the main network counted).
"""
import warnings
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from .cuts import NetworkChanged
from .multi_exit import MultiExitWrapper, check_has_exits
from .policies import EarlyExitOutput, ExitRule, Progress, Thresholds
from .replay import Replay
from .row_dropping import Way, find_way, run

__all__ = ['EarlyExit', 'EarlyExitOutput']


class EarlyExit(nn.Module):
    """A multi-exit model in which a sample leaves at the first exit whose score is >= that exit's threshold.

    One pass over a batch: at each exit the samples that are sure enough leave with its answer, only the rows of the
    others go on, and the network stops when nobody is left. It runs the backbone's own forward pass and computes
    nothing twice; an exit that is switched off costs nothing. Rows that stay get the logits they get in a full batch,
    up to what the kernels make of another batch size (on the CPU within 1e-5 of the largest logit).

    The way in which rows leave is found, and tried on made-up images, at the first call with a new image size (see
    `row_dropping`; `prepare` does it ahead of time). A network in which no way works is computed to its end for all
    rows, after a warning. The model is put into evaluation mode; it carries no hooks between calls, and threads may
    share an `EarlyExit`. Inference only, no gradients.

    Args:
        model: A multi-exit model.
        thresholds: One per exit, or one number for all; None switches an exit off. `calibrate` finds good ones.
        policy: What is compared with the thresholds: 'confidence', 'entropy', 'margin' or 'patience', each told in
            `timm_eed.policies`.
        temperatures: k of them, logits are divided by these before the score is taken.
        ensemble: Whether answers and scores come from the mean logits of the exits passed so far.

    Raises:
        ValueError: If the model has no exits, or a threshold, temperature or policy is wrong.

    Examples:

        ```python
        early = EarlyExit(model, thresholds=0.9)
        out = early(x)                      # out.logits [B, K], out.exit_index [B], out.confidence [B]
        out = early(x, exit=1)              # all from exit2
        for out in early.anytime(x):        # exit by exit, to be stopped at any time
            ...
        ```
    """

    def __init__(
            self,
            model: MultiExitWrapper,
            thresholds: Thresholds = 0.9,
            policy: str = 'confidence',
            temperatures: Optional[Sequence[float]] = None,
            ensemble: bool = False,
    ):
        super().__init__()
        check_has_exits(model)
        if model.num_classes < 2:
            raise ValueError('Early exit chooses among classes, it needs a model with num_classes of at least 2.')
        self.rule = ExitRule(model.num_exits, thresholds, policy, temperatures, ensemble)
        self.model = model.eval()
        self._ways: Dict[Tuple[int, ...], Way] = {}

    @torch.no_grad()
    def forward(self, x: torch.Tensor, exit: Optional[int] = None) -> EarlyExitOutput:
        """Answers for images [B, C, H, W], in their order.

        Args:
            x: Images.
            exit: All samples leave at this one, 0 is exit1, -1 the main network; thresholds decide if None.

        Raises:
            ValueError: If the model is in training mode, the input is no batch of images, or there is no such exit.
        """
        self._check(x)
        if exit is not None:
            return self._fixed(x, exit)
        if not self.rule.enabled or len(x) == 0:
            return self._fixed(x, -1)
        for _ in range(2):
            call = _Call(self)
            try:
                return call.output(run(self.model, self.prepare(x), self.rule.enabled, x, call.decide))
            except NetworkChanged:
                self._ways.pop(tuple(x.shape[1:]), None)  # another thread may have been first
        raise RuntimeError('The network calls other submodules at every pass, rows cannot leave it.')

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return ', '.join(f'{key}={value!r}' for key, value in self.rule.settings().items())

    @torch.no_grad()
    def prepare(self, x: torch.Tensor) -> Way:
        """Find the way in which rows leave for images of the shape of x [B, C, H, W] (once); its `name` tells which."""
        size = tuple(x.shape[1:])
        if (way := self._ways.get(size)) is None:
            if any(module.training for module in self.model.modules()):  # norms would learn from made-up images
                raise ValueError('Early exit is for evaluation: call model.eval() first.')
            way = self._ways[size] = find_way(self.model, x)
            if way.name == 'whole':
                warnings.warn(
                    f'{type(self.model.backbone).__name__} cannot go on with a part of a batch: answers are right, but '
                    'samples that leave early save no time. early(x, exit=...) and truncate() do.', stacklevel=3)
        return way

    def anytime(self, x: torch.Tensor) -> Iterator[EarlyExitOutput]:
        """Answers for all images [B, C, H, W] exit by exit, the main network's last; thresholds are not looked at.

        The network goes on only when the next answer is asked for. Exits that are switched off are passed over.

        Raises:
            ValueError: As in `forward`.
        """
        self._check(x)
        return self._anytime(x)

    def _anytime(self, x: torch.Tensor) -> Iterator[EarlyExitOutput]:
        replay, progress = Replay(self.model.backbone, x), Progress()
        for i in [*self.rule.enabled, self.model.num_exits - 1]:
            with torch.no_grad():
                if i == self.model.num_exits - 1:
                    logits = replay.logits()
                else:
                    logits = self.model.exits[i](replay.stage_map(self.model.exit_indices[i]))[0]
                answer = self._all_at(i, *self.rule.answer(i, logits, progress))
            yield answer

    def _fixed(self, x: torch.Tensor, exit: int) -> EarlyExitOutput:
        last = self.model.num_exits - 1
        if not -last - 1 <= exit <= last:
            raise ValueError(f'exit={exit} is out of range, choose 0 (exit1) to {last} (the main network), or -1.')
        exit %= last + 1
        passed = [i for i in self.rule.enabled if i < exit] if self.rule.looks_back else []
        if exit == last and not passed:
            logits = [self.model.backbone(x)]
        else:
            heads = passed if exit == last else [*passed, exit]
            maps = self.model.backbone.forward_intermediates(
                x, indices=[self.model.exit_indices[i] for i in heads], output_fmt='NCHW', stop_early=exit < last,
                intermediates_only=exit < last)
            if exit == last:
                final, maps = maps
            logits = [self.model.exits[i](stage_map)[0] for i, stage_map in zip(heads, maps)]
            if exit == last:
                logits.append(self.model.backbone.forward_head(final))
        progress = Progress()
        for i, z in zip([*passed, exit], logits):
            answer = self.rule.answer(i, z, progress)
        return self._all_at(exit, *answer)

    @staticmethod
    def _all_at(exit: int, logits: torch.Tensor, score: torch.Tensor) -> EarlyExitOutput:
        return EarlyExitOutput(logits, torch.full_like(score, exit, dtype=torch.long), score)

    def _check(self, x: Any) -> None:
        if not isinstance(x, torch.Tensor) or x.ndim != 4:
            raise ValueError('EarlyExit takes images as a tensor [B, C, H, W].')
        parts = self.model, self.model.backbone, *self.model.exits  # a frozen backbone stays in evaluation mode
        if any(part.training for part in parts):
            raise ValueError('Early exit is for evaluation: call model.eval() first.')


class _Call:
    """One batch on its way: which rows are still in the network, and the answers of those that left."""

    def __init__(self, early: EarlyExit):
        self.exits = early.model.exits
        self.rule = early.rule
        self.progress = Progress()
        self.rows: Optional[torch.Tensor] = None  # None while all are present
        self.left: List[Tuple[torch.Tensor, EarlyExitOutput]] = []

    def decide(self, i: int, stage_map: torch.Tensor) -> Optional[torch.Tensor]:
        """Rows that stay behind an exit, None for all; the one place where the host waits for the device."""
        answer, score = self.rule.answer(i, self.exits[i](stage_map)[0], self.progress)
        leaves = self.rule.leaves(i, score)
        leaving = int(leaves.sum())
        if leaving == 0:
            return None
        if leaving == len(leaves):
            self._leave(i, None, answer, score)
            return leaves.new_empty(0, dtype=torch.long)
        staying_first = leaves.argsort(stable=True)
        stay, leave = staying_first.split([len(leaves) - leaving, leaving])
        self._leave(i, leave, answer, score)
        self.rows = stay if self.rows is None else self.rows[stay]
        self.progress.keep(stay)
        return stay

    def output(self, logits: Optional[torch.Tensor]) -> EarlyExitOutput:
        """All answers in the order of the samples, given the main network's logits for the rows that are left."""
        if logits is not None:
            answer, score = self.rule.answer(len(self.exits), logits, self.progress)
            self._leave(len(self.exits), None, answer, score)
        if len(self.left) == 1:
            return self.left[0][1]
        rows, outputs = zip(*self.left)
        answers, exits, scores = (torch.cat(parts) for parts in zip(*outputs))
        order = torch.cat(rows).argsort()
        return EarlyExitOutput(answers[order], exits[order], scores[order])

    def _leave(self, i: int, rows: Optional[torch.Tensor], answer: torch.Tensor, score: torch.Tensor) -> None:
        """Keep the answers of some of the rows that are present, None for all."""
        if rows is not None:
            answer, score = answer[rows], score[rows]
            rows = rows if self.rows is None else self.rows[rows]
        else:
            rows = torch.arange(len(score), device=score.device) if self.rows is None else self.rows
        self.left.append((rows, EarlyExit._all_at(i, answer, score)))
