"""A model in a folder, laid out for two readers.

    config.json            timm's description of the backbone      what timm reads: a plain model
    model.safetensors      timm's state dict of the backbone
    eed/config.json        how to rebuild the exits, checksums of both weight files, early-exit settings, metrics
    eed/exits.safetensors  the exits' weights

Nothing is pickled. What is read is untrusted: the JSON files are checked key by key, the weights by shape.
"""
import hashlib
import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf  # not exported by timm.models

from .exits import TimmModel
from .hub_errors import first_line
from .multi_exit import MultiExitWrapper, wrap
from .probe import evaluation_mode, input_size
from .repo_config import ExitsConfig, check_early_exit_config, read_backbone_config, read_exits_config

__all__ = [
    'EXITS', 'EXITS_CONFIG', 'FILES', 'MAIN', 'StaleExitsError', 'file_sha256', 'has_exits', 'load_backbone',
    'load_multi_exit', 'save_pretrained',
]

CONFIG, MAIN, EXITS_CONFIG, EXITS = FILES = (
    'config.json', 'model.safetensors', 'eed/config.json', 'eed/exits.safetensors')


class StaleExitsError(ValueError):
    """The main weights are not the ones that the exits were trained with.

    Args:
        main_sha256: SHA-256 of the `model.safetensors` that the exits belong to.
    """

    def __init__(self, message: str, main_sha256: str):
        super().__init__(message)
        self.main_sha256 = main_sha256


def save_pretrained(
        model: MultiExitWrapper,
        save_directory: Union[str, Path],
        *,
        metrics: Optional[Mapping[str, float]] = None,
        data_config: Optional[Dict[str, Any]] = None,
        model_config: Optional[Dict[str, Any]] = None,
        card: Optional[Any] = None,
) -> None:
    """Write a multi-exit model into a folder that plain timm loads too; see `MultiExitWrapper.save_pretrained`."""
    from . import __version__
    folder = Path(save_directory)
    (folder / 'eed').mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix='.saving-') as temporary:
        new = Path(temporary)
        (new / 'eed').mkdir()
        _save_backbone_config(model.backbone, new / CONFIG, model_config, data_config)
        _save_weights(model.backbone, new / MAIN)
        _save_weights(model.exits, new / EXITS)
        config = ExitsConfig(
            exit_indices=model.exit_indices,
            exit_type=model.exit_type,
            exit_kwargs=model.exit_kwargs,
            main_sha256=file_sha256(new / MAIN),
            exits_sha256=file_sha256(new / EXITS),
            early_exit=check_early_exit_config(model.early_exit_config, model.num_exits),
            metrics=dict(metrics or {}),
        )
        (new / EXITS_CONFIG).write_text(config.to_json(__version__), encoding='utf-8')
        _check_round_trip(model, new)
        for name in (MAIN, EXITS):  # safetensors keeps them from other users
            os.chmod(new / name, (new / CONFIG).stat().st_mode)
        names = list(FILES)
        if card is not None:
            (new / 'README.md').write_text(str(card), encoding='utf-8')
            names.append('README.md')
        for name in names:  # each appears whole; the checksums tell a folder where only some did
            os.replace(new / name, folder / name)


def _save_backbone_config(
        backbone: TimmModel,
        path: Path,
        model_config: Optional[Dict[str, Any]],
        data_config: Optional[Dict[str, Any]],
) -> None:
    if not (getattr(backbone, 'pretrained_cfg', None) or {}).get('architecture'):
        raise ValueError(
            f'{type(backbone).__name__} does not know its architecture; make it with timm.create_model() '
            '(and @register_model for an own one), so that others can rebuild it by name.')
    save_config_for_hf(backbone, str(path), model_config=model_config, data_config=data_config)


def _save_weights(module: nn.Module, path: Path) -> None:
    # copies, since safetensors takes neither channels_last nor shared tensors
    save_file(
        {name: tensor.detach().to('cpu', memory_format=torch.contiguous_format, copy=True)
         for name, tensor in module.state_dict().items()},
        path, metadata={'format': 'pt'})


def _check_round_trip(model: MultiExitWrapper, folder: Path) -> None:
    """Load what was saved and compare logits: who changes a backbone after timm made it would publish another model."""
    hint = ('was the backbone changed after timm.create_model() made it? Others rebuild it by its name; register the '
            'changed one with timm (@register_model).')
    try:
        loaded = load_multi_exit(folder)
    except ValueError as error:
        raise ValueError(f'The saved model would not load: {error} {hint}') from error
    parameter = next(model.parameters())
    loaded.to(device=parameter.device, dtype=parameter.dtype).eval()
    size = input_size(model.backbone)
    x = torch.arange(math.prod(size), device=parameter.device).sin().reshape(1, *size).to(parameter.dtype)
    with evaluation_mode(model), torch.no_grad():
        expected = model.forward_exits(x).logits
        found = loaded.forward_exits(x).logits
    tolerance = 1e-3 if parameter.dtype in (torch.float32, torch.float64) else .05
    for z, other in zip(expected, found):
        if (z - other).abs().max() > tolerance * z.abs().max():
            raise ValueError(f'The saved model would give other logits; {hint}')


def has_exits(folder: Path) -> bool:
    """Whether a model folder holds exits, and not a plain timm model alone."""
    return (folder / EXITS_CONFIG).is_file()


def load_multi_exit(folder: Path, **timm_kwargs: Any) -> MultiExitWrapper:
    """The multi-exit model of a folder, its exits' weights and early-exit settings included.

    Args:
        folder: A folder as `save_pretrained` writes it.
        timm_kwargs: Arguments for `timm.create_model`; another `num_classes` gives fresh classifiers
            (and no settings of early exit).

    Raises:
        StaleExitsError: If the main weights were replaced after the exits were trained.
        ValueError: If a file is missing, or is not what `save_pretrained` writes.
    """
    _check_files(folder)
    config = read_exits_config(folder)
    backbone_config = read_backbone_config(folder)
    if file_sha256(folder / MAIN) != config.main_sha256:
        raise StaleExitsError(
            'model.safetensors is not the file that the exits belong to (main_sha256 in eed/config.json differs): '
            'the main weights were replaced and the exits were not.', config.main_sha256)
    if file_sha256(folder / EXITS) != config.exits_sha256:
        raise ValueError('eed/exits.safetensors is not the file that eed/config.json describes (exits_sha256).')
    backbone = _build(folder, timm_kwargs)
    try:
        model = wrap(backbone, config.exit_indices, config.exit_type, **config.exit_kwargs)
    except RuntimeError as error:  # of models that cannot take images of the size in config.json
        raise ValueError(f'exits cannot be attached as eed/config.json says: {first_line(error)}') from error
    fresh = model.num_classes != backbone_config['num_classes']
    if not fresh:
        model.early_exit_config = config.early_exit
    expected = {k: v for k, v in model.exits.state_dict().items() if not (fresh and '.fc.' in k)}
    _check_shapes(expected, folder, EXITS, 'the exits', ignore='.fc.' if fresh else None)
    try:
        weights = load_file(folder / EXITS)
        model.exits.load_state_dict({**model.exits.state_dict(), **{name: weights[name] for name in expected}})
    except (SafetensorError, RuntimeError) as error:  # dtypes that torch does not have, or does not convert
        raise ValueError(f'{EXITS} cannot be loaded: {first_line(error)}') from error
    return model


def load_backbone(folder: Path, **timm_kwargs: Any) -> TimmModel:
    """The plain timm model of a folder or of a plain timm repo, by timm's own loader; pickles are not read.

    Raises:
        ValueError: If a file is missing, or is not what timm writes.
    """
    _check_files(folder, exits=False)
    if has_exits(folder):
        return _build(folder, timm_kwargs)
    read_backbone_config(folder, with_exits=False)
    return _create(folder, timm_kwargs)  # timm's own repos may need its conversions, shapes are its matter


def _build(folder: Path, timm_kwargs: Dict[str, Any]) -> TimmModel:
    read_backbone_config(folder)
    state = _twin_state(folder)
    if state is not None:
        _check_shapes(state, folder, MAIN, 'the architecture in config.json')
    return _create(folder, timm_kwargs)


def _create(folder: Path, timm_kwargs: Dict[str, Any]) -> TimmModel:
    try:
        return timm.create_model(f'local-dir:{folder}', pretrained=True, **timm_kwargs)
    except Exception as error:  # constructors of a thousand models, given what a file says, fail in many ways
        raise ValueError(f'timm cannot load config.json and model.safetensors: {first_line(error)}') from error


def _check_files(folder: Path, exits: bool = True) -> None:
    missing = [name for name in FILES if (exits or not name.startswith('eed/')) and not (folder / name).is_file()]
    if MAIN in missing:
        raise ValueError(
            f'there is no {MAIN}, and other kinds of weight files (pickles) are not read; '
            'timm_eed.wrap(timm.create_model(..)) takes what timm itself can load.')
    if missing == [EXITS_CONFIG, EXITS]:
        raise ValueError(
            'there are no exits (no eed/config.json), it is a plain timm model; timm_eed.create_model(.., '
            'pretrained=True) loads it and attaches fresh exits.')
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing.")


def _twin_state(folder: Path) -> Optional[Dict[str, torch.Tensor]]:
    """The state dict that config.json asks for, without weights; None where a constructor needs real tensors."""
    try:
        with torch.device('meta'):
            return timm.create_model(f'local-dir:{folder}', pretrained=False).state_dict()
    except NotImplementedError:
        return None
    except RuntimeError as error:
        if 'meta' in str(error):
            return None
        raise ValueError(f'timm cannot build the model in config.json: {first_line(error)}') from error
    except Exception as error:
        raise ValueError(f'timm cannot build the model in config.json: {first_line(error)}') from error


def _check_shapes(
        expected: Dict[str, torch.Tensor], folder: Path, name: str, what: str, ignore: Optional[str] = None,
) -> None:
    """Compare a weight file's table of contents, which costs next to nothing to read."""
    found = _shapes(folder / name, name)
    if ignore:
        found = {key: shape for key, shape in found.items() if ignore not in key}
    wanted = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    problems = [f"no '{key}'" for key in wanted if key not in found]
    problems += [f"unknown '{key[:100]}'" for key in found if key not in wanted]
    problems += [f"'{key}' is {list(found[key])} and should be {list(shape)}"
                 for key, shape in wanted.items() if found.get(key, shape) != shape]
    if problems:
        more = f', and {len(problems) - 3} more' if len(problems) > 3 else ''
        raise ValueError(f"{name} does not fit {what} ({'; '.join(problems[:3])}{more}).")


def _shapes(path: Path, name: str) -> Dict[str, Tuple[int, ...]]:
    try:
        with safe_open(path, framework='pt') as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f'{name} is no readable safetensors file: {first_line(error)}') from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
