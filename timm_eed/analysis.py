"""What trained exits do, in numbers: accuracy, calibration, who is right where, and how classes are represented.

Figure numbers are those of 'Exit-Ensemble Distillation'. Everything here computes; `timm_eed.figures` draws.
Shapes: N images, K classes, D feature width, k classifiers (shallow to deep, the last is the main network).
"""
from typing import Any, Dict, Iterable, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from timm.task import MultiLabelClassificationEvaluator
from tqdm import tqdm

from .losses import ensemble_mean
from .multi_exit import MultiExitWrapper, classifier_names

__all__ = [
    'METRIC_TITLES', 'Predictions', 'accuracy', 'calibration_error', 'class_contrast', 'collect', 'dissimilarity',
    'right_wrong_counts', 'score', 'score_classifiers', 'shown_metrics', 'subset_logits',
]

# what people call the metrics, those of single-label and of multi-label evaluation
METRIC_TITLES = {
    'top1': 'top-1', 'top5': 'top-5', 'ece': 'ECE', 'map': 'mAP', 'macro_f1': 'macro F1', 'micro_f1': 'micro F1'}


class Predictions(NamedTuple):
    """All that a model says about a data set, on the CPU.

    logits: [k, N, K]. targets: [N]. features: [N, D] of the main network (before its fully connected layer).
    """
    logits: torch.Tensor
    targets: torch.Tensor
    features: torch.Tensor


def collect(model: Any, loader: Iterable[Any], max_images: Optional[int] = None, progress: bool = True) -> Predictions:
    """Run a model over a loader, each exit computed once.

    Holds k x N x K logits and N x D features (ImageNet, 4 classifiers of a ResNet-50: 0.8 + 0.4 GB).


    Args:
        model: A multi-exit model, or a plain timm model (then k = 1).
        loader: Batches of images [B, C, H, W] and class indices [B].
        max_images: Stop after so many images.
        progress: Show a bar.
    """
    parameter = next(model.parameters())
    logits, targets, features = [], [], []
    count = 0
    model.eval()
    with torch.inference_mode():
        for x, y in tqdm(loader, unit='batch', leave=False, disable=None if progress else True):
            x = x.to(device=parameter.device, dtype=parameter.dtype)
            if isinstance(model, MultiExitWrapper):
                out = model.forward_exits(x)
                zs, feature = out.logits, out.features[-1]
            else:
                final = model.forward_features(x)
                zs, feature = [model.forward_head(final)], model.forward_head(final, pre_logits=True).flatten(1)
            logits.append(torch.stack(zs).float().cpu())
            features.append(feature.float().cpu())
            targets.append(y.cpu())
            count += len(x)
            if max_images is not None and count >= max_images:
                break
    if not targets:
        raise ValueError('The loader has no images.')
    return Predictions(torch.cat(logits, 1)[:, :max_images], torch.cat(targets)[:max_images],
                       torch.cat(features)[:max_images])


def accuracy(logits: torch.Tensor, targets: torch.Tensor, k: int = 1) -> float:
    """Share (%) of images whose class is among the k likeliest, for logits [N, K]."""
    top = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    return 100 * top.eq(targets[:, None]).any(-1).float().mean().item()


def calibration_error(logits: torch.Tensor, targets: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error (%): the gap of accuracy and confidence, https://arxiv.org/abs/1706.04599.

    Args:
        logits: [N, K].
        targets: [N].
        bins: Number of bins of equal width over (0, 1].
    """
    confidence, predicted = logits.softmax(-1).max(-1)
    right = predicted.eq(targets).float()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins).index_add_(0, index, right - confidence)
    return 100 * gap.abs().sum().item() / len(targets)


def subset_logits(logits: torch.Tensor, members: Optional[Sequence[int]] = None) -> torch.Tensor:
    """Logits [N, K] of an ensemble: the mean over some of k classifiers' [k, N, K], over all for None."""
    return ensemble_mean(list(logits if members is None else logits[list(members)]))


def score(logits: torch.Tensor, targets: torch.Tensor) -> Dict[str, float]:
    """Metrics of one classifier's logits [N, K]: top1, top5, ece (%), and loss (mean negative log likelihood).

    For multi-label targets [N, K]: map, macro_f1, micro_f1 (%), and loss (mean binary cross-entropy).
    """
    if targets.ndim == 2:
        evaluator = MultiLabelClassificationEvaluator()
        evaluator.update(logits, targets)
        found = evaluator.compute()
        return {name: found[name] for name in ('map', 'macro_f1', 'micro_f1', 'loss')}
    return dict(
        top1=accuracy(logits, targets),
        top5=accuracy(logits, targets, 5),
        ece=calibration_error(logits, targets),
        loss=torch.nn.functional.cross_entropy(logits, targets).item(),
    )


def score_classifiers(logits: torch.Tensor, targets: torch.Tensor) -> Dict[str, Dict[str, float]]:
    """`score` of each of k classifiers' logits [k, N, K] by name, and with exits of the ensemble of all."""
    metrics = {name: score(z, targets) for name, z in zip(classifier_names(len(logits)), logits)}
    if len(logits) > 1:
        metrics['ensemble'] = score(subset_logits(logits), targets)
    return metrics


def shown_metrics(metrics: Mapping[str, float]) -> Tuple[str, str]:
    """The two of a model's metrics that tables show: those of single-label or of multi-label evaluation."""
    return ('map', 'macro_f1') if 'map' in metrics else ('top1', 'top5')


def right_wrong_counts(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Fig. 2: images right or wrong by the main network against each exit, [k - 1, 2, 2].

    First index of a table: main right (0) or wrong (1); second: exit right or wrong.
    """
    wrong = logits.argmax(-1).ne(targets).long()
    cells = 2 * wrong[-1] + wrong[:-1]
    return torch.stack([row.bincount(minlength=4).reshape(2, 2) for row in cells])


def dissimilarity(activations: torch.Tensor) -> torch.Tensor:
    """Fig. 4: representational dissimilarity [N, N] of activations [N, D], 1 - the correlation of each pair of images.

    Follows https://doi.org/10.3389/neuro.06.004.2008.
    """
    return 1 - torch.corrcoef(activations.double()).clamp(-1, 1).float()


def class_contrast(rdm: torch.Tensor, labels: torch.Tensor) -> float:
    """How clear the diagonal blocks of a dissimilarity matrix [N, N] are.

    Mean dissimilarity of pairs of different classes minus that of different images of one class.

    Raises:
        ValueError: If no two images share a class, or all do.
    """
    same = labels[:, None] == labels
    different = ~same
    same.fill_diagonal_(False)
    if not same.any() or not different.any():
        raise ValueError('The class contrast needs two images of one class and two classes.')
    return (rdm[different].mean() - rdm[same].mean()).item()
