"""Data sets and loaders of the training script, checked before the first step."""
import argparse
import logging
import os
from dataclasses import replace
from typing import Any, Dict, List, Optional, Set, Tuple

import torch
from PIL import Image
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    ImageDataset,
    Mixup,
    MultiLabelTarget,
    create_dataset,
    create_loader,
)
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torchvision.transforms import RandomCrop

from .digits import Digits
from .errors import TrainingError

__all__ = ['Data', 'class_names', 'create_data', 'create_evaluation_loader']

_logger = logging.getLogger(__name__)

# folder names that mean the same split, as timm reads them
_SPLIT_NAMES = (('train', 'training'), ('validation', 'val', 'valid', 'eval', 'evaluation'))


class SkippingImageDataset(ImageDataset):
    """timm's image data set, which replaces an unreadable image by the next one, with two additions: the image is
    named, and counted over all loader processes.

    Args:
        dataset: The data set to read from.
    """

    def __init__(self, dataset: ImageDataset):
        super().__init__(
            root=None,
            reader=dataset.reader,
            input_img_mode=dataset.input_img_mode,
            target_transform=dataset.target_transform,
        )
        self.skipped = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._named: Set[int] = set()

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        for _ in range(self._max_retries):
            try:
                file, target = self.reader[index]
                image: Any = Image.open(file)
                image = image.convert(self.input_img_mode) if self.input_img_mode else image  # decodes the pixels
                break
            except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNGs
                self._skip(index, error)
                index = (index + 1) % len(self.reader)
        else:
            raise TrainingError(
                f'{self._max_retries} images in a row are unreadable, the last is {self._name(index - 1)}; '
                'check that the files are whole (TIMM_DATASET_MAX_RETRIES changes the number).')
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def _name(self, index: int) -> str:
        return self.reader.filename(index % len(self.reader), absolute=True)

    def _skip(self, index: int, error: Exception) -> None:
        self.skipped += 1
        if index not in self._named:
            self._named.add(index)
            _logger.warning(f'Skipped unreadable image {self._name(index)}: {error}')


class Data:
    """The loaders of a run, and what else the loop needs to know about its data.

    Args:
        train: Training loader.
        validation: Validation loader, None without a validation split.
        mixup: Mixup on batches where the loader does not do it itself.
        collate_mixup: Mixup inside the loader.
        sources: The image data sets that count unreadable files.
        max_batches: Most batches per epoch.
    """

    def __init__(
            self,
            train: Any,
            validation: Optional[Any],
            mixup: Optional[Mixup],
            collate_mixup: Optional[FastCollateMixup],
            sources: List[SkippingImageDataset],
            max_batches: Optional[int] = None,
    ):
        self.train = train
        self._max_batches = max_batches
        self.validation = validation
        self.mixup = mixup
        self._collate_mixup = collate_mixup
        self._sources = sources

    @property
    def num_batches(self) -> int:
        """Training batches per epoch."""
        return len(self.train) if self._max_batches is None else min(len(self.train), self._max_batches)

    def set_epoch(self, epoch: int, mixup_off_epoch: int = 0) -> None:
        """Tell samplers and streamed data sets the epoch, and end mixup when its time has come."""
        targets: Tuple[Any, Any] = (getattr(self.train, 'sampler', None), self.train.dataset)
        for target in (*targets, getattr(self.train, 'batch_sampler', None)):
            if target is not None and hasattr(target, 'set_epoch'):
                target.set_epoch(epoch)
        reader: Any = getattr(self.train.dataset, 'reader', None)
        if hasattr(reader, 'worker_seed'):  # WebDataset without loader processes: a resumed run shuffles alike
            reader.ds, reader.worker_seed = None, reader.common_seed + epoch
        if mixup_off_epoch and epoch >= mixup_off_epoch:
            if self._collate_mixup is not None:
                self.train.mixup_enabled = False
            if self.mixup is not None:
                self.mixup.mixup_enabled = False

    def take_skipped(self) -> int:
        """How many unreadable images were replaced since the last call."""
        count = 0
        for source in self._sources:
            count += int(source.skipped)
            source.skipped.zero_()
        return count


def create_data(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        num_classes: int,
        device: torch.device,
) -> Data:
    """Data sets and loaders for parsed arguments.

    Args:
        args: Parsed arguments.
        data_config: Input size, mean, std, .. as timm's `resolve_data_config` gives them.
        num_classes: Outputs of the model.
        device: Device of the batches.

    Raises:
        TrainingError: If a folder or split is missing or empty, or class counts disagree.
    """
    train: Any = _create_split(args, args.train_split, data_config, training=True)
    validation = _create_split(args, args.val_split, data_config, training=False)
    if train is None:
        raise TrainingError("--train-split is empty; name the training split, as in --train-split train.")
    _check_classes(args, train, validation, num_classes)
    for split in (train, validation):
        _encode_labels(args, split, num_classes)
    sources = [dataset for dataset in (train, validation) if isinstance(dataset, SkippingImageDataset)]
    if args.aug_splits:
        train = AugMixDataset(train, num_splits=args.aug_splits)
    collate, mixup = _create_mixup(args, num_classes)
    loader = _loader_kwargs(args, data_config, device)
    try:
        train_loader = create_loader(train, **loader, **_training_transforms(args, data_config), collate_fn=collate)
    except (AssertionError, KeyError, ValueError, TypeError) as error:  # names of policies, crops and interpolations
        raise TrainingError(f'Cannot make the training loader: {type(error).__name__}: {error}') from error
    if args.crop_padding is not None:
        _crop_from_padded(train_loader.dataset, data_config['input_size'], args.crop_padding)
    if not len(train_loader):
        share = len(train) // args.world_size
        raise TrainingError(
            f'The training split has {len(train)} images, {share} per process, less than one batch of '
            f'{args.batch_size}; lower --batch-size (-b) to {share} or less.')
    if validation is None:
        return Data(train_loader, None, mixup, collate, sources, args.train_batches_per_epoch)
    validation_loader = _evaluation_loader(args, validation, data_config, loader)
    return Data(train_loader, validation_loader, mixup, collate, sources, args.train_batches_per_epoch)


def create_evaluation_loader(
        args: argparse.Namespace,
        split: str,
        data_config: Dict[str, Any],
        num_classes: int,
        device: torch.device,
) -> Any:
    """A loader of one split without augmentation, for a model with `num_classes` outputs.

    Raises:
        TrainingError: If the split is missing or empty, or the class counts disagree.
    """
    dataset = _create_split(args, split, data_config, training=False)
    if dataset is None:
        raise TrainingError("--split is empty; name a split, as in --split validation.")
    _check_classes(args, dataset, None, num_classes)
    _encode_labels(args, dataset, num_classes)
    return _evaluation_loader(args, dataset, data_config, _loader_kwargs(args, data_config, device))


def _encode_labels(args: argparse.Namespace, dataset: Optional[Any], num_classes: int) -> None:
    """Multi-label targets become vectors [K] of 0 and 1."""
    if dataset is not None and args.task == 'multilabel':
        dataset.target_transform = MultiLabelTarget(num_classes, dense=args.target_format == 'multihot')


def _loader_kwargs(args: argparse.Namespace, data_config: Dict[str, Any], device: torch.device) -> Dict[str, Any]:
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
        device=device,
        img_dtype=args.img_dtype,
        use_prefetcher=not args.no_prefetcher,
        worker_seeding=args.worker_seeding,
    )


def _evaluation_loader(
        args: argparse.Namespace, dataset: Any, data_config: Dict[str, Any], loader: Dict[str, Any],
) -> Any:
    workers = min(2, args.workers) if args.distributed and args.dataset.startswith(('tfds', 'wds')) else args.workers
    if args.distributed and args.dataset.startswith('wds'):
        _take_own_shards(dataset.reader)
    created = create_loader(dataset, **{**loader, 'num_workers': workers}, **dict(
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
    ))
    # a generator of its own: that an evaluation took place must not change what training draws afterwards
    getattr(created, 'loader', created).generator = torch.Generator()
    return created


def _take_own_shards(reader: Any) -> None:
    """Each sample once over all processes, each of which goes through shards of its own.

    timm's reader makes the processes equally long instead, by repeating and dropping samples.
    """
    reader.split_info = replace(
        reader.split_info, filenames=reader.split_info.filenames[reader.dist_rank::reader.dist_num_replicas])
    reader.dist_rank, reader.dist_num_replicas = 0, 1


def _crop_from_padded(dataset: Any, input_size: Tuple[int, int, int], padding: int) -> None:
    """Put a crop of the input size from the padded image in the place of timm's resized crop."""
    resized_crop = (RandomResizedCropAndInterpolation, ResizeKeepRatio)
    steps = getattr(dataset.transform, 'transforms', [])
    if not steps or not isinstance(steps[0], resized_crop):
        raise TrainingError('--crop-padding replaces the random resized crop; drop --no-aug and --aug-splits.')
    crop = RandomCrop(input_size[1:], padding=padding, pad_if_needed=True)
    rest = steps[2:] if isinstance(steps[0], ResizeKeepRatio) else steps[1:]  # ResizeKeepRatio has a crop behind it
    dataset.transform.transforms = [crop, *rest]


def _training_transforms(args: argparse.Namespace, data_config: Dict[str, Any]) -> Dict[str, Any]:
    interpolation = data_config['interpolation'] if args.no_aug else args.train_interpolation
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


def _create_mixup(
        args: argparse.Namespace,
        num_classes: int,
) -> Tuple[Optional[FastCollateMixup], Optional[Mixup]]:
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


def _create_split(
        args: argparse.Namespace, split: str, data_config: Dict[str, Any], training: bool,
) -> Optional[Any]:
    if not split:
        return None
    image_mode = args.input_img_mode or ('L' if data_config['input_size'][0] == 1 else 'RGB')
    if args.dataset == 'eed/digits':
        return Digits(train=training, input_img_mode=image_mode)
    if not args.dataset:
        _check_folder(args.data_dir, split)
    elif args.dataset.startswith('eed/'):
        raise TrainingError(f"Unknown data set '{args.dataset}'; the package ships eed/digits.")
    elif args.dataset.startswith('wds/') and not args.data_dir:
        raise TrainingError('No data: name the folder or address of the shards with --data.')
    kwargs: Dict[str, Any] = {} if args.dataset.startswith('torch/') else {'input_img_mode': image_mode}
    if args.target_format:
        kwargs['target_format'] = args.target_format
    # torchvision's data sets are kept in a folder, which need not be named
    root = args.data_dir or ('./data' if args.dataset.startswith('torch/') else None)
    try:
        dataset = create_dataset(
            args.dataset,
            root=root,
            split=split,
            is_training=training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            num_samples=args.train_num_samples if training else args.val_num_samples,
            seed=args.seed,
            repeats=args.epoch_repeats if training else 0,
            input_key=args.input_key,
            target_key=args.target_key,
            trust_remote_code=args.dataset_trust_remote_code,
            **kwargs,
        )
    except (RuntimeError, OSError, AssertionError, ImportError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"Cannot read split '{split}' of {args.dataset or args.data_dir}: {type(error).__name__}: {error}"
        ) from error
    return SkippingImageDataset(dataset) if type(dataset) is ImageDataset else dataset


def _check_folder(root: Optional[str], split: str) -> None:
    """timm reads the root itself where a split is missing, and would validate on training images."""
    if not root:
        raise TrainingError('No data: name a folder with --data DIR, or a data set with --dataset NAME.')
    if not os.path.exists(root):
        raise TrainingError(
            f"The data folder '{root}' does not exist (looked from {os.getcwd()}); correct --data.")
    if not os.path.isdir(root):
        return  # an archive, which timm's readers open
    base = split.split('[')[0]
    names = next((names for names in _SPLIT_NAMES if base in names), (base,))
    if any(os.path.exists(os.path.join(root, name)) for name in (base, *names)):
        return
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    listing = ', '.join(found[:8]) + (', ..' if len(found) > 8 else '') if found else 'nothing'
    flag, without = ('--train-split', '') if base in _SPLIT_NAMES[0] else (
        '--val-split', " or train without one by --val-split ''")
    raise TrainingError(
        f"The data folder '{root}' has no '{split}' split: expected a folder {' or '.join(names)} in it, "
        f'found {listing}. Name another with {flag}{without}.')


def class_names(dataset: Any) -> Optional[List[str]]:
    """Class names in index order where a data set knows them."""
    by_name = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    if by_name:
        return sorted(by_name, key=by_name.get)
    return getattr(dataset, 'classes', None)


def _check_classes(args: argparse.Namespace, train: Any, validation: Optional[Any], num_classes: int) -> None:
    classes, validation_classes = class_names(train), class_names(validation)
    if classes is None:
        return
    if validation_classes is not None and classes != validation_classes:
        differences = [
            f"only in {name}: {', '.join(sorted(map(str, only))[:5])}"
            for name, only in (
                ('train', set(classes) - set(validation_classes)),
                ('validation', set(validation_classes) - set(classes)),
            )
            if only
        ]
        raise TrainingError(
            f'The splits disagree about the classes: {len(classes)} in train, {len(validation_classes)} in validation '
            f"({'; '.join(differences) or 'same names, other order'}). Labels would not match; "
            'give every split a folder per class, or a --class-map.')
    if args.class_map:
        return  # maps may name classes that no image has
    if len(classes) > num_classes or (args.num_classes is not None and len(classes) != num_classes):
        raise TrainingError(
            f'The data has {len(classes)} classes and the model {num_classes} outputs; '
            f'pass --num-classes {len(classes)}.')
    if len(classes) < num_classes and args.primary:
        _logger.warning(
            f'The data has {len(classes)} classes, the model its default of {num_classes} outputs; '
            f'--num-classes {len(classes)} would fit.')
