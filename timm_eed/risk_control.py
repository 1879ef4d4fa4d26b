"""A bound on what early exit loses on images to come: conformal risk control, https://arxiv.org/abs/2208.02814

The loss of an image is 1 if the main network answers it rightly and early exit does not, else 0; its expectation
bounds the drop of accuracy from above. Conformal risk control asks for losses that never rise with caution; being
answered later can make an answer wrong again, so each image is charged the largest loss of any point from the
chosen one to the cautious end of the path, which never rises and is never too small. Of n images the boldest point
with (n * mean loss + 1) / (n + 1) <= max_drop is taken.

Guarantee: over draws of these n images and one more of the same distribution, the expected loss of that one at the
chosen point is at most max_drop. The path must not depend on these images, and a shift of the data voids it. With
n < 1 / max_drop - 1 images no point but the last can be chosen.
"""
from typing import Callable, List, Sequence

import torch

from .threshold_search import Point

__all__ = ['controlled_point', 'path_of_caution']


def controlled_point(path: Sequence[Point], lost: Callable[[Point], torch.Tensor], max_drop: float) -> Point:
    """The boldest point of a path whose expected loss is at most `max_drop`, by conformal risk control.

    Args:
        path: Points from bold to cautious, the last without any loss (all exits off).
        lost: Loss [n] of the images at a point.
        max_drop: Bound on the expected loss.
    """
    chosen = path[-1]
    worst = lost(chosen).double()
    for point in reversed(path[:-1]):
        worst = torch.maximum(worst, lost(point).double())
        if (float(worst.sum()) + 1) / (len(worst) + 1) > max_drop:
            break
        chosen = point
    return chosen


def path_of_caution(point: Point, steps: int = 100) -> List[Point]:
    """From all thresholds 0 over those of a point towards 1, and then all exits off."""
    def blend(share: float) -> Point:
        return point._replace(thresholds=tuple(
            t if t is None or t > 1 else t * (1 + share) if share < 0 else t + share * (1 - t)
            for t in point.thresholds))
    path = [blend(step / steps) for step in range(-steps, steps)]
    return [*path, point._replace(thresholds=(None,) * len(point.thresholds))]
