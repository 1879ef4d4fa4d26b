"""The two JSON files of a model repo, which come from anywhere and are checked key by key before anything is built.

`config.json` is timm's: architecture, constructor arguments, data settings of the backbone. `eed/config.json` is this
package's: how to rebuild the exits, which weights they belong to, and what calibration found.
"""
import inspect
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg

from .exits import EXIT_TYPES
from .json_checks import (
    MAX_INT,
    Check,
    Fields,
    flag,
    list_of,
    mapping,
    mapping_of,
    matching,
    number,
    one_of,
    optional,
    plain,
    read_json,
    text,
    whole,
)
from .policies import POLICIES, ExitRule

__all__ = ['ExitsConfig', 'check_early_exit_config', 'read_backbone_config', 'read_exits_config']

FORMAT_VERSION = 1
MAX_EXITS = 64
MAX_BYTES = 1 << 20
MAX_BACKBONE_BYTES = 1 << 24  # it may hold the labels of ImageNet-21k
MAX_SIDE = 4096  # of images, in pixels
_sha256 = matching('[0-9a-f]{64}', 'a SHA-256 in 64 hexadecimal digits')
_EXIT_KWARGS: Dict[str, Check] = {'drop_rate': number(0, 1), 'last_stride': whole(1, 2)}  # of ExitHead

_image_size = list_of(whole(1, MAX_SIDE), 3, 3)
_crop_share = number(.01, 2)
_DATA_SETTINGS: Dict[str, Check] = {
    'input_size': _image_size, 'test_input_size': _image_size, 'min_input_size': _image_size,
    'mean': list_of(number(), 1, MAX_SIDE), 'std': list_of(number(1e-6), 1, MAX_SIDE),
    'crop_pct': _crop_share, 'test_crop_pct': _crop_share,
    'crop_mode': one_of(('center', 'squash', 'border')),
    'interpolation': one_of(('bicubic', 'bilinear', 'nearest', 'lanczos', 'hamming', 'box', 'random')),
}

# options of timm's factory and builder that are no arguments of a model: they say where weights come from, let missing
# weights pass, or return something else than a classifier
_BUILDER_OPTIONS = {
    *inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters,
    'features_only', 'out_indices', 'feature_cls', 'pruned', 'device', 'dtype',
} - {'kwargs'}


class ExitsConfig(NamedTuple):
    """What `eed/config.json` says.

    exit_indices: absolute, ascending stage indices. exit_type, exit_kwargs: arguments of the exits.
    main_sha256, exits_sha256: of the two weight files. early_exit: see `check_early_exit_config`, None if never
    calibrated. metrics: numbers by name, as in `top1_exit1`.
    """
    exit_indices: List[int]
    exit_type: str
    exit_kwargs: Dict[str, float]
    main_sha256: str
    exits_sha256: str
    early_exit: Optional[Dict[str, Any]]
    metrics: Dict[str, float]

    def to_json(self, timm_eed_version: str) -> str:
        """The file's text, checked by the same rules that reading follows.

        Raises:
            ValueError: If what it would say could not be read back.
        """
        versions = dict(timm_eed=timm_eed_version, timm=timm.__version__, torch=torch.__version__)
        content = dict(
            format_version=FORMAT_VERSION,
            exits={name: getattr(self, name) for name in ('exit_indices', 'exit_type', 'exit_kwargs')},
            main_sha256=self.main_sha256,
            exits_sha256=self.exits_sha256,
            early_exit=self.early_exit,
            metrics=self.metrics,
            versions=versions,
        )
        try:
            written = json.dumps(content, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f'eed/config.json cannot hold what the model says about itself: {error}') from error
        _parse_exits_config(json.loads(written))
        return written + '\n'


def read_exits_config(folder: Path) -> ExitsConfig:
    """`eed/config.json` of a model folder.

    Raises:
        ValueError: If it is anything but what this package writes; the reason names the key.
    """
    return _parse_exits_config(read_json(folder / 'eed/config.json', 'eed/config.json', MAX_BYTES))


def _parse_exits_config(content: Any) -> ExitsConfig:
    top = Fields(content, 'eed/config.json')
    version = top.take('format_version', whole(1, 10 ** 6))
    if version != FORMAT_VERSION:
        raise ValueError(
            f'eed/config.json has format {version}, this timm_eed reads {FORMAT_VERSION}; update it: '
            'pip install -U timm-eed')
    exits = Fields(top.take('exits', mapping), 'eed/config.json: exits')
    indices = exits.take('exit_indices', list_of(whole(0, MAX_INT), 1, MAX_EXITS))
    if sorted(set(indices)) != indices:
        raise ValueError(f'eed/config.json: exits: exit_indices must ascend, not {indices}.')
    exit_type = exits.take('exit_type', one_of(EXIT_TYPES))
    exit_kwargs = Fields(exits.take('exit_kwargs', mapping), 'eed/config.json: exit_kwargs')
    given = {name: exit_kwargs.take(name, check) for name, check in _EXIT_KWARGS.items() if name in exit_kwargs.rest}
    config = ExitsConfig(
        exit_indices=indices,
        exit_type=exit_type,
        exit_kwargs=given,
        main_sha256=top.take('main_sha256', _sha256),
        exits_sha256=top.take('exits_sha256', _sha256),
        early_exit=check_early_exit_config(top.take('early_exit', optional(mapping), None), len(indices) + 1),
        metrics=top.take('metrics', mapping_of(number(), 1000), {}),
    )
    top.take('versions', mapping_of(text(100), 20), {})  # for people
    for fields in (top, exits, exit_kwargs):
        fields.finish()
    return config


def check_early_exit_config(content: Any, num_exits: int) -> Optional[Dict[str, Any]]:
    """The settings of early exit that travel with a model, checked: None, or a mapping of

        policy: name of the rule, as in 'confidence';
        thresholds: a number per exit, null where it is off;
        temperatures: a positive number per classifier, or null;
        ensemble: whether the exits passed answer together, false if not given.

    They are arguments of `EarlyExit` and must do for it.

    Args:
        content: The settings.
        num_exits: Number of classifiers, the main network counted.

    Raises:
        ValueError: If it is anything else.
    """
    if content is None:
        return None
    fields = Fields(content, 'early_exit')
    settings = dict(
        policy=fields.take('policy', one_of(POLICIES)),
        thresholds=fields.take('thresholds', list_of(optional(number()), num_exits - 1, num_exits - 1)),
        temperatures=fields.take('temperatures', optional(list_of(number(1e-6), num_exits, num_exits)), None),
        ensemble=fields.take('ensemble', flag, False),
    )
    fields.finish()
    try:
        ExitRule(num_exits, **settings)
    except ValueError as error:
        raise ValueError(f'early_exit: {error}') from error
    return settings


def read_backbone_config(folder: Path, with_exits: bool = True) -> Dict[str, Any]:
    """timm's `config.json` of a model folder, after a look at everything that decides what timm builds from it.

    Args:
        folder: The folder.
        with_exits: Whether it was written by this package, which leaves less to be expected.

    Raises:
        ValueError: If the architecture is unknown, or a key or value is none that timm writes for a classifier.
    """
    config = mapping(read_json(folder / 'config.json', 'config.json', MAX_BACKBONE_BYTES), 'config.json')
    architecture = matching(r'[A-Za-z0-9_]{1,128}', 'the name of an architecture')(
        config.get('architecture'), 'config.json: architecture')
    if not timm.is_model(architecture):
        raise ValueError(
            f"config.json: timm {timm.__version__} knows no architecture '{architecture}'; update timm, or first "
            'import the package that registers it (the model card should name it).')
    if with_exits or 'pretrained_cfg' in config:
        cfg = mapping(config.get('pretrained_cfg'), 'config.json: pretrained_cfg')
        unknown = set(cfg) - set(PretrainedCfg.__dataclass_fields__)
        if unknown:
            raise ValueError(f"config.json: pretrained_cfg: timm knows no '{min(unknown)}'.")
    else:
        cfg = config  # timm's older layout
    args = mapping(config.get('model_args', {}), 'config.json: model_args')
    for key, value in args.items():
        if key in _BUILDER_OPTIONS:
            raise ValueError(f"config.json: model_args: '{key}' is an option of timm's factory, not of a model.")
        plain(value, f'config.json: model_args: {key}')
    for name, check in _DATA_SETTINGS.items():
        optional(check)(cfg.get(name), f'config.json: {name}')
    if with_exits:
        _check_native(config, cfg, args)
    return config


def _check_native(config: Dict[str, Any], cfg: Dict[str, Any], args: Dict[str, Any]) -> None:
    if cfg.get('custom_load') or cfg.get('state_dict') or cfg.get('label_offset'):
        raise ValueError('config.json: pretrained_cfg describes weights of another format, not a timm state dict.')
    if 'num_classes' not in config:
        raise ValueError('config.json does not say num_classes.')
    classes = [part['num_classes'] for part in (args, config, cfg) if 'num_classes' in part]
    for said in classes:
        whole(1, MAX_INT)(said, 'config.json: num_classes')
    if len(set(classes)) > 1:  # timm would then leave the classifier at its random start
        raise ValueError(f'config.json: num_classes is said to be {" and ".join(map(str, classes))}.')
