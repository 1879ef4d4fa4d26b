"""Augmentation of training images, from flags to timm's arguments."""
import argparse
from typing import Any, Dict, Optional, Tuple

from timm.data import FastCollateMixup, Mixup
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torchvision.transforms import RandomCrop

from .errors import TrainingError

__all__ = ['create_mixup', 'crop_from_padded', 'training_transforms']


def crop_from_padded(dataset: Any, input_size: Tuple[int, int, int], padding: int) -> None:
    """Put a crop of the input size from the padded image in the place of timm's resized crop."""
    resized_crop = (RandomResizedCropAndInterpolation, ResizeKeepRatio)
    steps = getattr(dataset.transform, 'transforms', [])
    if not steps or not isinstance(steps[0], resized_crop):
        raise TrainingError('--crop-padding replaces the random resized crop; drop --no-aug and --aug-splits.')
    crop = RandomCrop(input_size[1:], padding=padding, pad_if_needed=True)
    rest = steps[2:] if isinstance(steps[0], ResizeKeepRatio) else steps[1:]  # ResizeKeepRatio has a crop behind it
    dataset.transform.transforms = [crop, *rest]


def training_transforms(args: argparse.Namespace, data_config: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments of timm's `create_loader` that make it one for training."""
    own = args.no_aug or not args.train_interpolation
    interpolation = data_config['interpolation'] if own else args.train_interpolation
    return dict(
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.,
        auto_augment=args.aa,
        num_aug_repeats=int(args.aug_repeats),
        num_aug_splits=args.aug_splits,
        interpolation=interpolation,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        # new workers for every epoch draw from the process's random state alone, so that a run can be continued
        # exactly, and hear of mixup's end
        persistent_workers=False,
        **_sizes(args),
    )


def _sizes(args: argparse.Namespace) -> Dict[str, Any]:
    """Batches at several image sizes."""
    if not args.train_img_sizes:
        return {}
    return dict(
        input_size_choices=args.train_img_sizes,
        batch_size_choices=args.train_batch_sizes,
        batch_choice_weights=args.train_size_probs,
        batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
    )


def create_mixup(
        args: argparse.Namespace,
        num_classes: int,
) -> Tuple[Optional[FastCollateMixup], Optional[Mixup]]:
    """Mixup inside the loader, or on finished batches where there is no prefetcher; neither if it is not asked for."""
    if not args.mixup_active:
        return None, None
    if args.aug_splits:
        raise TrainingError('Mixup and --aug-splits cannot go together; drop one of them.')
    if args.batch_size % 2:
        raise TrainingError(f'Mixup pairs images, so the batch must be even; --batch-size is {args.batch_size}.')
    kwargs = dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
        multi_label=args.task == 'multilabel',
    )
    return (None, Mixup(**kwargs)) if args.no_prefetcher else (FastCollateMixup(**kwargs), None)
