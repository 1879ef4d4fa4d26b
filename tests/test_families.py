"""The contract over all of timm: a small model of every family, and a model that timm does not know."""
import ast
import csv
from pathlib import Path
from typing import Dict

import pytest
import timm
import torch
import torch.nn as nn

import timm_eed
from timm_eed.losses import ExitEnsembleDistillationLoss

ROOT = Path(__file__).parent.parent


def quickest_of_each_family() -> Dict[str, Dict[str, str]]:
    """Rows of the survey that ran on real tensors, the quickest of each family."""
    with open(ROOT / 'docs/coverage.csv', newline='', encoding='utf-8') as file:
        rows = [row for row in csv.DictReader(file) if row['device'] == 'cpu' and row['status'] == 'ok']
    quickest: Dict[str, Dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: float(row['seconds'])):
        quickest.setdefault(row['family'], row)
    return quickest


def check_contract(backbone: nn.Module, x: torch.Tensor) -> timm_eed.MultiExitWrapper:
    """Evaluation logits bit-equal to the bare model's, one feature width, gradients to every parameter of the exits."""
    with torch.no_grad():
        bare = backbone.eval()(x)
        model = timm_eed.wrap(backbone)
        assert torch.equal(model.forward_exits(x).logits[-1], bare)
    out = model.train().forward_exits(x)
    assert {tuple(z.shape) for z in out.logits} == {tuple(bare.shape)}
    assert {tuple(f.shape) for f in out.features} == {(len(x), model.head_hidden_size)}
    y = torch.arange(len(x))
    ExitEnsembleDistillationLoss(1., 1.)(out.logits, out.features, y)['loss'].backward()
    assert all(p.grad is not None for p in model.exits.parameters())
    return model


@pytest.mark.parametrize('row', quickest_of_each_family().values(), ids=lambda row: row['name'])
def test_one_model_per_family(row):
    model = check_contract(
        timm.create_model(row['name'], num_classes=4), torch.randn(2, *map(int, row['input'].split('x'))))
    assert row['exits'] == ' '.join(f'{e.module}:{e.channels}:{e.reduction}' for e in model.exit_info())


class ThirdPartyNet(nn.Module):
    """Made by somebody else tomorrow: timm's protocol and nothing more, NHWC inside, three stages of odd widths."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        widths = [5, 9, 7]
        self.stages = nn.ModuleList(nn.Linear(4 * a, b) for a, b in zip([3] + widths, widths))
        self.head = nn.Linear(7, num_classes)
        self.num_classes = num_classes
        self.num_features = 7
        self.feature_info = [
            dict(num_chs=c, reduction=2 ** (i + 1), module=f'stages.{i}') for i, c in enumerate(widths)]

    def _stage(self, stage, x):
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)
        return stage(x).relu()

    def forward_intermediates(self, x, indices=None, output_fmt='NCHW', intermediates_only=False, stop_early=False):
        x, maps = x.permute(0, 2, 3, 1), []
        for i, stage in enumerate(self.stages):
            x = self._stage(stage, x)
            if i in indices:
                maps.append(x.permute(0, 3, 1, 2))
        return maps if intermediates_only else (x, maps)

    def forward_features(self, x):
        return self.forward_intermediates(x, indices=[])[0]

    def forward_head(self, x, pre_logits=False):
        x = x.mean((1, 2))
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def get_classifier(self):
        return self.head


def test_a_model_that_timm_does_not_know():
    model = check_contract(ThirdPartyNet(), torch.randn(3, 3, 16, 24))
    assert [info.module for info in model.exit_info()] == ['stages.0', 'stages.1']
    assert model._single_head_pass


def test_no_architecture_name_stands_in_the_package():
    """Nothing is decided by a model's name: no string of the code (documentation aside) is one."""
    names = set(timm.list_models()) | {name.split('.')[-1] for name in timm.list_modules()}
    for path in (ROOT / 'timm_eed').rglob('*.py'):
        if path.parent.name == 'models':
            continue  # which registers networks under their names
        tree = ast.parse(path.read_text(encoding='utf-8'))
        defaults = {'resnet50'} if path.name == 'flags.py' else set()  # timm's default of --model
        constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not (constants & names) - defaults, path


def test_encoders_without_a_classifier_say_so():
    for name in ('qwen3_vit_88m_enc', 'mobilenetv5_300m_enc'):
        with torch.device('meta'):
            encoder = timm.create_model(name)
        with pytest.raises(ValueError, match='is an encoder without a classifier'):
            timm_eed.wrap(encoder)


def test_patch_dictionaries_are_refused():
    model = timm_eed.create_model('test_vit')
    with pytest.raises(ValueError, match='not a dict; NaFlex patch dictionaries'):
        model.forward_exits({'patches': torch.zeros(1, 4, 768)})


@pytest.mark.parametrize('exit_type', timm_eed.EXIT_TYPES)
def test_exits_never_shrink_a_map_away(exit_type):
    """Four halvings on a 1x1 and a 1x3 map leave something to pool."""
    head = timm_eed.ExitHead(6, [8, 8, 8, 10], num_classes=4, exit_type=exit_type)
    for side in ((1, 1), (1, 3)):
        logits, feature = head(torch.randn(2, 6, *side))
        assert logits.shape == (2, 4) and feature.shape == (2, 10) and torch.isfinite(logits).all()
