"""Loaders of the training script, checked before the first step."""
import argparse
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_loader
from torch.utils.data import IterableDataset, Subset

from .augmentation import create_mixup, crop_from_padded, training_transforms
from .errors import TrainingError
from .splits import (
    SkippingImageDataset,
    check_classes,
    check_evaluated_classes,
    class_names,
    create_split,
    encode_labels,
    spread_rows,
)

__all__ = ['Data', 'create_data', 'create_evaluation_loader']


class Data:
    """The loaders of a run, and what else the loop needs to know about its data.

    Args:
        train: Training loader.
        validation: Validation loader, None without a validation split.
        mixup: Mixup on batches where the loader does not do it itself.
        collate_mixup: Mixup inside the loader.
        sources: The image data sets that count unreadable files.
        max_batches: Most batches per epoch.
        classes: Names of the classes in index order, where they are known.
    """

    def __init__(
            self,
            train: Any,
            validation: Optional[Any],
            mixup: Optional[Mixup],
            collate_mixup: Optional[FastCollateMixup],
            sources: List[SkippingImageDataset],
            max_batches: Optional[int] = None,
            classes: Optional[List[str]] = None,
    ):
        self.train = train
        self.classes = classes
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
    train: Any = create_split(args, args.train_split, data_config, training=True, flag='--train-split')
    validation = create_split(args, args.val_split, data_config, training=False, flag='--val-split')
    if train is None:
        raise TrainingError("--train-split is empty; name the training split, as in --train-split train.")
    check_classes(args, train, validation, num_classes)
    classes = class_names(train)
    for split in (train, validation):
        encode_labels(args, split, num_classes)
    sources = [dataset for dataset in (train, validation) if isinstance(dataset, SkippingImageDataset)]
    if args.aug_splits:
        train = AugMixDataset(train, num_splits=args.aug_splits)
    collate, mixup = create_mixup(args, num_classes)
    loader = _loader_kwargs(args, data_config, device)
    with _explained('training'):
        train_loader = create_loader(train, **loader, **training_transforms(args, data_config), collate_fn=collate)
    if args.crop_padding is not None:
        crop_from_padded(train_loader.dataset, data_config['input_size'], args.crop_padding)
    if not len(train_loader):
        share = len(train) // args.world_size
        raise TrainingError(
            f'The training split has {len(train)} images, {share} per process, less than one batch of '
            f'{args.batch_size}; lower --batch-size (-b) to {share} or less.')
    validation_loader = None if validation is None else _evaluation_loader(args, validation, data_config, loader)
    return Data(train_loader, validation_loader, mixup, collate, sources, args.train_batches_per_epoch, classes)


def create_evaluation_loader(
        args: argparse.Namespace,
        split: str,
        data_config: Dict[str, Any],
        num_classes: int,
        device: torch.device,
        images: Optional[int] = None,
) -> Any:
    """A loader of one split without augmentation, for a model with `num_classes` outputs.

    Where `args.class_names` (of a run) or `args.label_names` (published with a model) say what the model was trained
    on, the data must have the same classes.

    Args:
        args: Parsed arguments.
        split: Name of the split.
        data_config: Input size, mean, std, .. as timm's `resolve_data_config` gives them.
        num_classes: Outputs of the model.
        device: Device of the batches.
        images: Only so many, from all over the split and in random order; of streamed data the first ones.

    Raises:
        TrainingError: If the split is missing or empty, or the classes disagree.
    """
    dataset = create_split(args, split, data_config, training=False, flag='--split')
    if dataset is None:
        raise TrainingError("--split is empty; name a split, as in --split validation.")
    if not args.class_map:
        check_evaluated_classes(
            class_names(dataset), num_classes, getattr(args, 'class_names', None), getattr(args, 'label_names', None))
    encode_labels(args, dataset, num_classes)
    loader = _loader_kwargs(args, data_config, device)
    if images is None or isinstance(dataset, IterableDataset):
        return _evaluation_loader(args, dataset, data_config, loader)
    part: Any = Subset(dataset, spread_rows(len(dataset), images))
    created = _evaluation_loader(args, part, data_config, loader)
    dataset.transform = part.transform  # timm sets it on what it is given
    return created


@contextmanager
def _explained(kind: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, KeyError, ValueError, TypeError) as error:  # names of policies, crops and interpolations
        raise TrainingError(f'Cannot make the {kind} loader: {type(error).__name__}: {error}') from error


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
    with _explained('validation'):
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
