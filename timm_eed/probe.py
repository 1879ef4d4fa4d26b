"""Shapes without compute: a twin of a model on the meta device, and what it tells about the model's head."""
import copy
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Tuple

import torch
import torch.nn as nn

from .exits import TimmModel

_MOST_MADE_UP = 1 << 26  # numbers; image sizes may come from files of anyone

__all__ = ['evaluation_mode', 'input_size', 'logits_are_classifier_output', 'meta_twin', 'pre_logits_width']


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor a module holds: parameters, buffers, and the plain attributes (also in dicts) used as caches."""
    yield from module.parameters()
    yield from module.buffers()
    for child in module.modules():
        for value in vars(child).values():
            for item in value.values() if isinstance(value, dict) else (value,):
                if isinstance(item, torch.Tensor):
                    yield item


def meta_twin(model: nn.Module) -> Any:
    """A deep copy of a model whose tensors live on the meta device: right shapes, no memory, no arithmetic.

    The model itself is left alone; running it under a fake-tensor mode instead would leave fake tensors in the
    caches of some models (LeViT, TinyViT).
    """
    memo: Dict[int, Any] = {}
    for tensor in _tensors(model):
        if id(tensor) not in memo:
            twin = tensor.detach().to('meta')
            memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    return copy.deepcopy(model, memo)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def input_size(model: TimmModel) -> Tuple[int, int, int]:
    """The input [C, H, W] a timm model was made for, with the channels its weights really take."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    channels, height, width = cfg.get('input_size') or (3, 224, 224)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(model, 'in_chans', None) or (first.in_channels if first is not None else channels)
    embed = getattr(model, 'patch_embed', None)
    height, width = getattr(embed, 'img_size', None) or (height, width)
    return channels, height, width


def _final_features(model: TimmModel) -> torch.Tensor:
    """The (shape of the) map that `forward_head` takes, for a batch of two, on the meta device."""
    twin = meta_twin(model).eval()
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return twin.forward_features(torch.empty(2, *input_size(model), device='meta', dtype=dtype))


def pre_logits_width(model: TimmModel) -> int:
    """D, the width of the main network's feature right before its classifier.

    Read from the classifier where it is a plain layer, else from timm's `head_hidden_size` / `num_features`.
    """
    classifier = model.get_classifier()
    width = getattr(classifier, 'in_features', None) or getattr(classifier, 'in_channels', None)
    return width or getattr(model, 'head_hidden_size', None) or model.num_features


def logits_are_classifier_output(model: TimmModel) -> bool:
    """Whether `get_classifier()` applied to `forward_head(x, pre_logits=True)` is exactly `forward_head(x)`.

    Then one pass through the head gives both feature and logits. Tried on the model's own head, in evaluation mode and
    with dropout on, on made-up features: what reaches the classifier must be the pre-logits feature, and what leaves it
    must be what `forward_head` returns. False for heads of several classifiers, where logits are changed afterwards
    (VOLO), where dropout comes after the pre-logits feature, and where it cannot be tried (weights on meta, features
    of more than 256 MiB).
    """
    classifier = model.get_classifier()
    parameter = next(model.parameters())
    if not isinstance(classifier, nn.Module) or parameter.device.type == 'meta':
        return False
    try:
        shape = _final_features(model).shape
    except (RuntimeError, AttributeError, NotImplementedError):  # no meta kernels, or features that are not a tensor
        return False
    if shape.numel() > _MOST_MADE_UP:
        return False
    x = torch.arange(shape.numel(), device=parameter.device).sin().reshape(shape).to(parameter.dtype)
    with evaluation_mode(model):
        if not _same_head(model, classifier, x):
            return False
        for module in model.modules():  # dropout on, norms still off
            module.training = module is model or isinstance(module, nn.Dropout)
        return _same_head(model, classifier, x)


def _same_head(model: TimmModel, classifier: nn.Module, x: torch.Tensor) -> bool:
    calls = []
    handle = classifier.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    devices = [x.device] if x.device.type == 'cuda' else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            logits = model.forward_head(x)
            torch.manual_seed(0)
            feature = model.forward_head(x, pre_logits=True)
    finally:
        handle.remove()
    if len(calls) != 1 or not isinstance(feature, torch.Tensor) or feature.ndim != 2:
        return False
    reached, left = calls[0]
    return (
        reached.shape[:2] == feature.shape and reached.numel() == feature.numel()
        and torch.equal(reached.flatten(1), feature)
        and left.data_ptr() == logits.data_ptr() and left.numel() == logits.numel()
    )
