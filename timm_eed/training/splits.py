"""Data sets of the training script: the splits that the flags name, checked."""
import argparse
import logging
import os
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
from PIL import Image
from timm.data import ImageDataset, MultiLabelTarget, create_dataset

from .digits import Digits
from .errors import TrainingError

__all__ = [
    'SkippingImageDataset', 'check_classes', 'check_evaluated_classes', 'check_same_classes', 'class_names',
    'create_split', 'encode_labels', 'spread_rows']

_logger = logging.getLogger(__name__)

# folder names that mean the same split, as timm reads them
_SPLIT_NAMES = (('train', 'training'), ('validation', 'val', 'valid', 'eval', 'evaluation'))
# data sets that are split in two, of which any unknown name would mean the second
_TWO_SPLITS = {'eed/digits', *(f'torch/{name}' for name in (
    'cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist'))}


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


def create_split(
        args: argparse.Namespace, split: str, data_config: Dict[str, Any], training: bool, flag: str,
) -> Optional[Any]:
    """A data set of one split as the flags name it, None where the name of the split is empty.

    Args:
        args: Parsed arguments.
        split: Name of the split.
        data_config: As timm's `resolve_data_config` gives it.
        training: Whether it is trained on.
        flag: The flag that names the split, for messages.

    Raises:
        TrainingError: If it is missing or cannot be read.
    """
    if not split:
        return None
    image_mode = args.input_img_mode or ('L' if data_config['input_size'][0] == 1 else 'RGB')
    if args.dataset.lower() in _TWO_SPLITS and split not in {*_SPLIT_NAMES[0], *_SPLIT_NAMES[1], 'test'}:
        raise TrainingError(f"{flag}: {args.dataset} has the splits train and validation, not '{split}'.")
    if args.dataset == 'eed/digits':
        return Digits(train=split in _SPLIT_NAMES[0], input_img_mode=image_mode)
    if not args.dataset:
        _check_folder(args.data_dir, split, flag)
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


def _check_folder(root: Optional[str], split: str, flag: str) -> None:
    """timm reads the root itself where a split is missing, and would validate on training images."""
    if not root:
        folder = 'behind the model (MODEL DATA)' if flag == '--split' else 'with --data DIR'
        raise TrainingError(f'No data: name a folder {folder}, or a data set with --dataset NAME.')
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
    without = " or train without one by --val-split ''" if flag == '--val-split' else ''
    raise TrainingError(
        f"The data folder '{root}' has no '{split}' split: expected a folder {' or '.join(names)} in it, "
        f'found {listing}. Name another with {flag}{without}.')


def class_names(dataset: Any) -> Optional[List[str]]:
    """Class names in index order where a data set knows them."""
    by_name = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    if by_name:
        return sorted(by_name, key=by_name.get)
    return getattr(dataset, 'classes', None)


def check_classes(args: argparse.Namespace, train: Any, validation: Optional[Any], num_classes: int) -> None:
    """Raise a TrainingError if splits disagree about the classes, or the model has other ones."""
    classes, validation_classes = class_names(train), class_names(validation)
    if classes is None:
        return
    if validation_classes is not None:
        check_same_classes('train', classes, 'validation', validation_classes)
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


def check_evaluated_classes(
        classes: Optional[Sequence[Any]],
        num_classes: int,
        class_names: Optional[Sequence[str]],
        label_names: Optional[Any],
) -> None:
    """Raise a TrainingError if data that a model is evaluated on has other classes than the model.

    Args:
        classes: Class names of the data in index order; nothing is checked where they are unknown.
        num_classes: Outputs of the model.
        class_names: Those of its training data; None if unknown.
        label_names: What was published with it. These may be other words, so that only another order of the same ones
            is surely wrong.
    """
    if not classes:
        return
    names = [str(name) for name in classes]
    if class_names:
        check_same_classes('the model', class_names, 'the data', names)
    if len(names) > num_classes:
        raise TrainingError(
            f'The data has {len(names)} classes and the model {num_classes} outputs: it was made for other data. '
            f'(A timm model takes --num-classes {len(names)}.)')
    if isinstance(label_names, (list, tuple)):
        labels = [str(name) for name in label_names]
        if set(labels) == set(names):
            check_same_classes('the model', labels, 'the data', names)
        else:
            _logger.warning(
                f"The model calls its classes {', '.join(labels[:3])}, .., the data "
                f"{', '.join(names[:3])}, ..: results are right only if both mean the same in this order.")
    elif len(names) < num_classes:
        _logger.warning(f'The data has {len(names)} classes, the model {num_classes} outputs: results are right only '
                        f'if the first {len(names)} outputs are these classes.')


def spread_rows(total: int, count: int) -> List[int]:
    """Indices of at most `count` of `total` samples from all over a data set (folders come class by class), in random
    order, always the same."""
    count = min(count, total)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return [i * total // count for i in order.tolist()]


def check_same_classes(first: str, names: Sequence[str], second: str, others: Sequence[str]) -> None:
    """Raise a TrainingError that names the difference if two lists of class names, in index order, are not the same."""
    if list(names) == list(others):
        return
    differences = [
        f"only in {name}: {', '.join(sorted(map(str, only))[:5])}"
        for name, only in ((first, set(names) - set(others)), (second, set(others) - set(names))) if only]
    raise TrainingError(
        f'{first} and {second} disagree about the classes: {len(names)} in {first}, {len(others)} in {second} '
        f"({'; '.join(differences) or 'same names, other order'}). Labels would not match; give each a folder per "
        'class, or a --class-map.')


def encode_labels(args: argparse.Namespace, dataset: Optional[Any], num_classes: int) -> None:
    """Multi-label targets become vectors [K] of 0 and 1.

    Raises:
        TrainingError: If the data set has one label per image.
    """
    if args.task != 'multilabel':
        return
    if not args.dataset or args.dataset.lower() in _TWO_SPLITS:
        raise TrainingError(f"--task multilabel: {args.dataset or 'a folder per class'} has one label per image; name "
                            'a data set with several, as in --dataset wds/NAME or hfds/NAME.')
    if dataset is not None:
        dataset.target_transform = MultiLabelTarget(num_classes, dense=args.target_format == 'multihot')
