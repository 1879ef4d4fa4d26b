"""Multi-exit models: any timm model plus exits, in one forward pass.

Shapes: B batch, C channels, H x W input, D pre-logits width, K classes, k classifiers (the main network counted).
"""
import difflib
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.optim import auto_group_layers

from .exits import EXIT_KWARGS, ExitHead, TimmModel, exit_widths, resolve_exit_indices, stages
from .probe import logits_are_classifier_output, pre_logits_width

__all__ = ['MultiExitOutput', 'MultiExitWrapper', 'check_has_exits', 'classifier_names', 'create_model', 'wrap']


class MultiExitOutput(NamedTuple):
    """Everything one forward pass gives, shallow to deep; the last entry is the main network.

    logits: Z_1 .. Z_k, each [B, K].
    features: F_1 .. F_k, each [B, D], the input of each fully connected layer.
    """
    logits: List[torch.Tensor]
    features: List[torch.Tensor]


class ExitInfo(NamedTuple):
    """Where one exit sits: module name in the backbone, stage index and depth (0..1), map channels and reduction."""
    module: str
    stage: int
    depth: float
    channels: int
    reduction: int
    parameters: int


class MultiExitWrapper(nn.Module):
    """A timm model with exits at stage boundaries; to timm it still looks like the model itself.

    The backbone is held, never edited: its parameters, keys and outputs stay what they were.
    Stage maps come from timm's `forward_intermediates`, so the wrapper holds no hooks and no state between calls.

    Args:
        backbone: A timm classification model.
        exit_indices: Stages to put exits behind: None for the default places, an int for the last n stages before
            the last one, or indices into `feature_info` as in timm's `out_indices`.
        exit_type: Kind of head, one of `timm_eed.EXIT_TYPES`.
        exit_kwargs: Further arguments of `ExitHead`: `drop_rate` (the backbone's own if not given), `last_stride`.

    Attributes:
        early_exit_config: Settings of early exit that are saved and loaded with the model, None until it was
            calibrated (`Calibration.settings`): arguments of `EarlyExit`.

    Raises:
        ValueError: If the backbone has no classifier, or an exit index, the exit type or another argument is wrong.

    Examples:

        ```python
        model = MultiExitWrapper(timm.create_model('resnet50'))
        logits = model(x)                   # [B, K], the main network
        out = model.forward_exits(x)        # out.logits: 4 x [B, K], out.features: 4 x [B, D]
        ```
    """

    def __init__(
            self,
            backbone: TimmModel,
            exit_indices: Optional[Union[int, Sequence[int]]] = None,
            exit_type: str = 'conv',
            **exit_kwargs: Any,
    ):
        super().__init__()
        infos = stages(backbone)
        _check_classifier(backbone)
        cfg = getattr(backbone, 'pretrained_cfg', None) or {}
        self.exit_indices = resolve_exit_indices(
            infos, exit_indices, cfg.get('architecture') or type(backbone).__name__)
        if unknown := set(exit_kwargs) - set(EXIT_KWARGS):
            raise ValueError(f"exits have no argument '{min(unknown)}', only {' and '.join(EXIT_KWARGS)}.")
        self.exit_type = exit_type
        self.exit_kwargs = exit_kwargs
        self.early_exit_config: Optional[Dict[str, Any]] = None
        self.backbone: TimmModel = backbone
        self.backbone_frozen = False
        self.exits: Any = self._make_exits()
        self.training = backbone.training
        self._single_head_pass = logits_are_classifier_output(backbone)

    def _make_exits(self) -> nn.ModuleList:
        """Fresh exits on the backbone's device, in its dtype and mode, with its dropout unless told otherwise."""
        infos, width = stages(self.backbone), pre_logits_width(self.backbone)
        parameter = next(self.backbone.parameters())
        kwargs = {'drop_rate': getattr(self.backbone, 'drop_rate', 0.), **self.exit_kwargs}
        with torch.device(parameter.device):
            exits = nn.ModuleList(
                ExitHead(
                    infos[index].channels,
                    exit_widths(self.backbone, index, width),
                    self.backbone.num_classes,
                    exit_type=self.exit_type,
                    **kwargs,
                )
                for index in self.exit_indices
            )
        return exits.to(dtype=parameter.dtype).train(self.backbone.training)

    @property
    def num_exits(self) -> int:
        """k, the number of classifiers, the main network counted."""
        return len(self.exits) + 1

    @property
    def num_classes(self) -> int:
        """K, as the backbone has it."""
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        """The backbone's `num_features`."""
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        """D, the width of all features F_i."""
        return self.exits[0].num_features

    @property
    def in_chans(self) -> int:
        """Channels of the input image."""
        return self.backbone.in_chans

    @property
    def feature_info(self) -> Any:
        """The backbone's `feature_info`, which `exit_indices` point into."""
        return self.backbone.feature_info

    @property
    def pretrained_cfg(self) -> Dict[str, Any]:
        """The backbone's `pretrained_cfg`, so that timm resolves data settings through the wrapper."""
        return self.backbone.pretrained_cfg

    @property
    def default_cfg(self) -> Dict[str, Any]:
        """timm's older name of `pretrained_cfg`."""
        return self.backbone.default_cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the main network [B, K] for images [B, C, H, W], in train and eval mode alike; no exit is run."""
        return self.backbone(x)

    def forward_exits(self, x: torch.Tensor) -> MultiExitOutput:
        """Logits and features of all classifiers from one pass over images [B, C, H, W].

        Raises:
            ValueError: If the input is not a tensor of images (NaFlex models also take dictionaries of patches).
        """
        if not isinstance(x, torch.Tensor):
            raise ValueError(
                f'forward_exits takes images as a tensor [B, C, H, W], not a {type(x).__name__}; NaFlex patch '
                'dictionaries have no maps for the exits, pass images of one size instead.')
        # stop_early is said, since some models stop behind the last map unless told not to
        x, maps = self.backbone.forward_intermediates(
            x, indices=self.exit_indices, output_fmt='NCHW', stop_early=False)
        outputs = [exit_head(stage_map) for exit_head, stage_map in zip(self.exits, maps)]
        outputs.append(self._forward_main_head(x))
        logits, features = zip(*outputs)
        return MultiExitOutput(list(logits), list(features))

    def _forward_main_head(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        feature = self.backbone.forward_head(x, pre_logits=True)
        if not self._single_head_pass:
            # pairs and lists of classifiers: timm combines them inside forward_head, which is run once more for them
            return self.backbone.forward_head(x), feature.flatten(1)
        classifier = self.backbone.get_classifier()
        if isinstance(classifier, nn.Conv2d):
            return classifier(feature[:, :, None, None]).flatten(1), feature
        return classifier(feature), feature

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The backbone's features before its head, in the backbone's own layout."""
        return self.backbone.forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The backbone's head on its own features: logits [B, K], or the pre-logits feature [B, D]."""
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        """The main network's classifier."""
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Fresh classifiers for `num_classes`, in the main network and in every exit.

        Where a new pooling changes the width of the feature, the exits are made anew. Settings of early exit, which
        were those of the old classifiers, are dropped.
        """
        self.early_exit_config = None
        if global_pool is None:
            self.backbone.reset_classifier(num_classes)
        else:
            self.backbone.reset_classifier(num_classes, global_pool)
        if num_classes and pre_logits_width(self.backbone) != self.head_hidden_size:
            self.exits = self._make_exits()
        else:
            for exit_head in self.exits:
                exit_head.reset_classifier(num_classes)
        self._single_head_pass = logits_are_classifier_output(self.backbone)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Change the input size of a backbone that has a fixed one; other backbones take any size as they are."""
        if hasattr(self.backbone, 'set_input_size'):
            self.backbone.set_input_size(*args, **kwargs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Gradient checkpointing in the backbone; the exits are too small to be worth it."""
        self.backbone.set_grad_checkpointing(enable)

    def freeze_backbone(self, freeze: bool = True) -> None:
        """Train the exits alone: the backbone takes no gradients and stays in evaluation mode, also after `train()`."""
        self.backbone_frozen = freeze
        self.backbone.requires_grad_(not freeze)
        self.train(self.training)

    def train(self, mode: bool = True) -> 'MultiExitWrapper':
        """Set training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        return self

    def no_weight_decay(self) -> Set[str]:
        """Names the backbone excludes from weight decay, under the wrapper's own prefix."""
        names: Set[str] = getattr(self.backbone, 'no_weight_decay', set)()
        return {'backbone.' + name for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer groups for layer-wise learning rate decay: the backbone's own; the exits go with its head."""
        if hasattr(self.backbone, 'group_matcher'):
            layers = group_parameters(self.backbone, self.backbone.group_matcher(coarse=coarse), reverse=True)
        else:
            layers = auto_group_layers(self.backbone)
        head = max(layers.values(), default=0)
        by_name = {'backbone.' + name: layer for name, layer in layers.items()}
        return lambda name: by_name.get(name, head)

    def exit_info(self) -> List[ExitInfo]:
        """Where each exit sits and how many parameters it has, shallow to deep, the main network left out."""
        infos = stages(self.backbone)
        return [
            ExitInfo(
                infos[index].module,
                index,
                (index + 1) / len(infos),
                infos[index].channels,
                infos[index].reduction,
                sum(p.numel() for p in exit_head.parameters()),
            )
            for index, exit_head in zip(self.exit_indices, self.exits)
        ]

    def unwrap(self) -> TimmModel:
        """The plain timm model, its state_dict keys unchanged."""
        return self.backbone

    def save_pretrained(
            self,
            save_directory: Union[str, Path],
            *,
            metrics: Optional[Mapping[str, float]] = None,
            data_config: Optional[Dict[str, Any]] = None,
            model_config: Optional[Dict[str, Any]] = None,
            card: Optional[Any] = None,
    ) -> None:
        """Write the model into a folder: `timm_eed.from_pretrained(folder)` gives it back, and
        `timm.create_model('local-dir:folder', pretrained=True)` the plain backbone. Files are replaced whole.

        Args:
            save_directory: Folder, made if it does not exist.
            metrics: Numbers to keep with the model, as in `{'top1_exit1': 71.2}`.
            data_config: Preprocessing, where it is not the backbone's own: `mean`, `std`, `input_size`, `crop_pct`, ..
            model_config: Further entries of timm's config.json, as in `{'label_names': [..]}`.
            card: Model card (a `huggingface_hub.ModelCard` or its text), written as README.md.

        Raises:
            ValueError: If timm could not rebuild the backbone from what it knows about itself.
        """
        from .pretrained import save_pretrained  # that module loads models and so imports this one
        save_pretrained(
            self, save_directory, metrics=metrics, data_config=data_config, model_config=model_config, card=card)


def classifier_names(num_exits: int) -> List[str]:
    """exit1, exit2, .., main, for a number of classifiers (the main network counted)."""
    return [f'exit{i + 1}' for i in range(num_exits - 1)] + ['main']


def classifier_layers(model: TimmModel) -> List[nn.Module]:
    """The classifiers of a model: its own, of which some models have two or more, then those of its exits."""
    classifier = model.get_classifier()
    layers = list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]
    if isinstance(model, MultiExitWrapper):
        layers += [exit_head.fc for exit_head in model.exits]
    return layers


def _check_classifier(model: TimmModel) -> None:
    if not hasattr(model, 'get_classifier') or not hasattr(model, 'forward_head'):
        raise ValueError(
            f'{type(model).__name__} is an encoder without a classifier, there is nothing to distil; '
            'exits need a classification model.')
    if not getattr(model, 'num_classes', 0) or isinstance(model.get_classifier(), nn.Identity):
        raise ValueError(
            f'{type(model).__name__} has no classifier (num_classes=0); '
            'create it with num_classes > 0 or call its reset_classifier(num_classes) first.')


def wrap(
        model: TimmModel,
        exit_indices: Optional[Union[int, Sequence[int]]] = None,
        exit_type: str = 'conv',
        **exit_kwargs: Any,
) -> MultiExitWrapper:
    """Attach exits to a timm model; see `MultiExitWrapper` for the arguments.

    Examples:

        ```python
        model = timm_eed.wrap(timm.create_model('convnext_tiny', pretrained=True))
        ```
    """
    if isinstance(model, MultiExitWrapper):
        raise ValueError('The model has exits already; wrap(model.unwrap(), ...) gives it other ones.')
    return MultiExitWrapper(model, exit_indices, exit_type, **exit_kwargs)


def create_model(
        model_name: str,
        pretrained: bool = False,
        exit_indices: Optional[Union[int, Sequence[int]]] = None,
        exit_type: Optional[str] = None,
        **timm_kwargs: Any,
) -> MultiExitWrapper:
    """`timm.create_model()` and `wrap()` in one; `timm_kwargs` go to timm.

    Names of repos and folders are spelled as in timm: 'hf-hub:user/name@revision', 'local-dir:path'. With `pretrained`,
    exits that are there come along with their weights, unless `exit_indices` or `exit_type` (elsewhere 'conv' if not
    given) ask for others.

    Raises:
        ValueError: If timm knows no such model (the message names similar ones), or as in `wrap`.
    """
    check_model_name(model_name)
    if pretrained and ':' in model_name:
        from .hub import Source, load_source  # that module loads models and so imports this one
        source = Source(model_name, cache_dir=timm_kwargs.pop('cache_dir', None))
        return load_source(source, exit_indices, exit_type, **timm_kwargs)
    return wrap(timm.create_model(model_name, pretrained=pretrained, **timm_kwargs), exit_indices, exit_type or 'conv')


def check_has_exits(model: nn.Module) -> None:
    """Raise a ValueError that names the fix if a model is no multi-exit model."""
    if not isinstance(model, MultiExitWrapper):
        raise ValueError(f'{type(model).__name__} has no exits; make them with timm_eed.wrap(model).')


def check_model_name(model_name: str) -> None:
    """Raise a ValueError naming similar models if timm has none of that name (names of Hub repos are let through)."""
    architecture = model_name.split('.')[0]
    if ':' in model_name or timm.is_model(architecture):
        return
    close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models('*part of the name*') lists them."
    raise ValueError(f"Unknown model '{model_name}'; {hint}")
