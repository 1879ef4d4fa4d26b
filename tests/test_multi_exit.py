"""What every wrapped timm model must do, and what wrap() refuses."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3

import timm_eed
from timm_eed.losses import ExitEnsembleDistillationLoss
from timm_eed.probe import input_size, meta_twin

TINY = timm.list_models('test_*')
COMMON = [
    'resnet18', 'resnet50', 'resnext50_32x4d', 'wide_resnet50_2', 'vgg19_bn', 'regnety_004', 'densenet121',
    'efficientnet_b0', 'mobilenetv3_small_100', 'convnext_atto', 'swin_tiny_patch4_window7_224', 'vit_tiny_patch16_224',
    'deit3_small_patch16_224', 'mixer_s16_224', 'mobilevit_s', 'nfnet_l0',
]
ODD_HEADS = ['volo_d1_224', 'levit_128s', 'deit_tiny_distilled_patch16_224', 'dla34', 'crossvit_9_240', 'caformer_s18']
KINDS = ['test_resnet', 'test_vit', 'test_convnext', 'test_byobnet']


def size_of(model, side=64):
    channels, height, width = input_size(model)
    return (channels, height, width) if model.pretrained_cfg.get('fixed_input_size') else (channels, side, side)


def randomise(model):
    """Weights that are not the initial ones, so that zero-initialised layers hide nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * .02)


@pytest.mark.parametrize('name', TINY + COMMON + ODD_HEADS)
def test_contract(name):
    backbone = timm.create_model(name, num_classes=7)
    randomise(backbone)
    keys, before = list(backbone.state_dict()), {k: v.clone() for k, v in backbone.state_dict().items()}
    x = torch.randn(2, *size_of(backbone))
    with torch.no_grad():
        bare = backbone.eval()(x)
    model = timm_eed.wrap(backbone)
    assert model.unwrap() is backbone
    assert list(backbone.state_dict()) == keys
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    with torch.no_grad():
        out = model.eval().forward_exits(x)
        assert torch.equal(model(x), bare)
    assert torch.equal(out.logits[-1], bare)
    assert len(out.logits) == len(out.features) == model.num_exits >= 2
    assert {tuple(z.shape) for z in out.logits} == {(2, 7)}
    assert {tuple(f.shape) for f in out.features} == {(2, model.head_hidden_size)}

    out = model.train().forward_exits(x)
    terms = ExitEnsembleDistillationLoss(1., 1.)(out.logits, out.features, torch.tensor([0, 6]))
    terms['loss'].backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without
    assert all(p.grad.abs().sum() > 0 for exit_head in model.exits for p in exit_head.fc.parameters())


@pytest.mark.parametrize('name', TINY + COMMON)
def test_copies_compute_with_their_own_weights(name):
    model = timm_eed.create_model(name, num_classes=3).eval()
    x = torch.randn(2, *size_of(model.backbone))
    with torch.no_grad():
        reference = model.forward_exits(x).logits
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ModelEmaV3(model).module]
        for twin in copies:
            for z, expected in zip(twin.forward_exits(x).logits, reference):
                assert torch.equal(z, expected)
            for p in twin.parameters():
                p.mul_(1.1).add_(.01)
            assert all(not torch.equal(a, b) for a, b in zip(twin.forward_exits(x).logits, reference))
            assert all(torch.equal(a, b) for a, b in zip(model.forward_exits(x).logits, reference))
        for p in model.parameters():
            p.zero_()
        zeroed = model.forward_exits(x).logits
        assert all(not torch.equal(a, b) for a, b in zip(copies[0].forward_exits(x).logits, zeroed))


@pytest.mark.parametrize('exit_type', timm_eed.EXIT_TYPES)
@pytest.mark.parametrize('name', KINDS)
def test_exit_types_on_any_map(name, exit_type):
    kwargs = dict(dynamic_img_size=True) if name == 'test_vit' else {}
    model = timm_eed.create_model(name, exit_type=exit_type, num_classes=3, in_chans=2, **kwargs)
    for height, width in ((160, 160), (64, 96), (48, 160), (32, 32)):
        out = model.forward_exits(torch.randn(2, 2, height, width))
        assert {tuple(f.shape) for f in out.features} == {(2, model.head_hidden_size)}
        assert all(torch.isfinite(z).all() for z in out.logits)


def test_parameters_equal_the_authors_network():
    model = timm_eed.create_model('cifar_resnet18')
    assert sum(p.numel() for p in model.parameters()) == 15_580_880
    assert sum(p.numel() for p in model.exits.parameters()) == 4_360_748


def test_profile_equals_the_papers_table():
    model = timm_eed.create_model('cifar_resnet18')
    rows = timm_eed.profile(model, (3, 32, 32))
    assert [row.exit for row in rows] == ['exit1', 'exit2', 'exit3', 'main']
    assert [round(row.gmacs, 4) for row in rows] == [.2094, .3248, .4401, .5555]  # Table III without batch norm
    assert rows[-1].params == sum(p.numel() for p in model.backbone.parameters())
    stem_and_layer1 = sum(
        p.numel() for n, p in model.backbone.named_parameters() if n.startswith(('stem', 'stages.0')))
    assert rows[0].params == stem_and_layer1 + model.exit_info()[0].parameters


def test_bottleneck_widths_step_through_the_planes():
    model = timm_eed.create_model('resnet50', num_classes=10)
    assert [[step.conv.out_channels for step in e.steps] for e in model.exits] == [
        [128, 256, 2048], [256, 2048], [2048]]


@pytest.mark.parametrize('name, expected', [
    ('resnet18', ['layer1', 'layer2', 'layer3']), ('convnext_atto', ['stages.0', 'stages.1', 'stages.2']),
    ('vit_tiny_patch16_224', ['blocks.2', 'blocks.5', 'blocks.8']), ('levit_128s', ['stages.0', 'stages.1']),
])
def test_default_places(name, expected):
    model = timm_eed.wrap(timm.create_model(name))
    assert [info.module for info in model.exit_info()] == expected
    assert [info.channels for info in model.exit_info()] == [
        model.feature_info[info.stage]['num_chs'] for info in model.exit_info()]


def test_places_by_index():
    backbone = timm.create_model('test_resnet')
    assert timm_eed.wrap(backbone, [-2, 1]).exit_indices == [1, 3]
    assert timm_eed.wrap(backbone, 2).exit_indices == [2, 3]


@pytest.mark.parametrize('exit_indices, message', [
    ([5], "exit index 5 is out of range for 'test_resnet' \\(5 feature stages: 0..4\\); use negative indices"),
    ([-6], 'exit index -6 is out of range'),
    ([4], 'exit index 4 is the last stage .* leave it out or choose from 0..3'),
    ([-1], 'exit index -1 is the last stage'),
    ([1, -4], 'names stage 1 .* twice'),
    ([], 'exit_indices is empty'),
    ('1', 'must be whole numbers'),
    ([1.], 'must be whole numbers'),
    (5, 'choose 1..4'),
])
def test_bad_places(exit_indices, message):
    with pytest.raises(ValueError, match=message):
        timm_eed.create_model('test_resnet', exit_indices=exit_indices)


def test_refusals_name_the_fix():
    with pytest.raises(ValueError, match=r'did you mean .*resnet50'):
        timm_eed.create_model('resnet5O')
    with pytest.raises(ValueError, match='create it with num_classes > 0'):
        timm_eed.create_model('test_resnet', num_classes=0)
    with pytest.raises(ValueError, match='without features_only=True'):
        timm_eed.wrap(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="Unknown exit type 'dense', choose one of conv"):
        timm_eed.create_model('test_resnet', exit_type='dense')
    with pytest.raises(ValueError, match='has exits already'):
        timm_eed.wrap(timm_eed.create_model('test_resnet'))


@pytest.mark.parametrize('name', KINDS)
def test_weight_decay_and_layer_groups_are_the_backbones(name):
    backbone = timm.create_model(name, num_classes=3)
    plain_groups = create_optimizer_v2(backbone, 'sgd', lr=.1, weight_decay=.1).param_groups
    plain = {p: group for group in plain_groups for p in group['params']}
    plain_scale = {id(p): g['lr_scale'] for g in param_groups_layer_decay(
        backbone, no_weight_decay_list=getattr(backbone, 'no_weight_decay', set)()) for p in g['params']}
    model = timm_eed.wrap(backbone)
    groups = create_optimizer_v2(model, 'sgd', lr=.1, weight_decay=.1).param_groups
    for group in groups:
        for p in group['params']:
            if p in plain:
                assert group['weight_decay'] == plain[p]['weight_decay']
    exit_ids = {id(p) for p in model.exits.parameters()}
    scales = {id(p): g['lr_scale'] for g in param_groups_layer_decay(
        model, no_weight_decay_list=model.no_weight_decay()) for p in g['params']}
    assert len(set(plain_scale.values())) > 2
    assert {i: s for i, s in scales.items() if i not in exit_ids} == plain_scale
    assert {scales[i] for i in exit_ids} == {1.}
    excluded = getattr(backbone, 'no_weight_decay', set)()
    assert model.no_weight_decay() == {f'backbone.{n}' for n in excluded}


@pytest.mark.parametrize('name', KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = timm_eed.create_model(name, num_classes=3)
    x, y = torch.randn(2, 3, 160, 160), torch.tensor([0, 2])

    def gradients():
        torch.manual_seed(0)
        model.zero_grad()
        out = model.forward_exits(x)
        ExitEnsembleDistillationLoss(1., 1.)(out.logits, out.features, y)['loss'].backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    for a, b in zip(plain, gradients()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', KINDS)
def test_reset_classifier(name):
    model = timm_eed.create_model(name, num_classes=3).double()
    model.early_exit_config = dict(policy='confidence', thresholds=[.5] * len(model.exits))
    model.reset_classifier(11)
    assert model.early_exit_config is None  # of the old classifiers
    x = torch.randn(2, 3, 160, 160, dtype=torch.float64)
    assert model.num_classes == 11
    assert {tuple(z.shape) for z in model.forward_exits(x).logits} == {(2, 11)}


def test_reset_classifier_with_a_wider_pooling():
    model = timm_eed.create_model('test_resnet', num_classes=3)
    model.reset_classifier(5, 'catavgmax')
    out = model.forward_exits(torch.randn(2, 3, 64, 64))
    assert {tuple(f.shape) for f in out.features} == {(2, model.head_hidden_size)} == {(2, 192)}
    assert {tuple(z.shape) for z in out.logits} == {(2, 5)}


def test_dropout_is_the_backbones_and_features_are_what_the_classifiers_see():
    model = timm_eed.create_model('test_resnet', num_classes=3, drop_rate=.5).train()
    assert [e.drop.p for e in model.exits] == [.5] * 3
    out = model.forward_exits(torch.randn(8, 3, 64, 64))
    heads = [e.fc for e in model.exits] + [model.get_classifier()]
    for fc, feature, logits in zip(heads, out.features, out.logits):
        assert .3 < (feature == 0).float().mean() < .7
        assert torch.equal(fc(feature), logits)


def test_parallel_branches_count_once():
    model = timm_eed.wrap(timm.create_model('crossvit_9_240', num_classes=3))
    gmacs = [row.gmacs for row in timm_eed.profile(model)]
    assert [info.module for info in model.exit_info()] == ['blocks.0', 'blocks.1'] and gmacs == sorted(gmacs)


def test_set_input_size():
    model = timm_eed.create_model('test_vit', num_classes=3)
    model.set_input_size(img_size=96)
    assert model.forward_exits(torch.randn(1, 3, 96, 96)).logits[0].shape == (1, 3)
    timm_eed.create_model('test_resnet').set_input_size(img_size=96)  # takes any size already


def test_data_settings_resolve_through_the_wrapper():
    backbone = timm.create_model('test_vit')
    model = timm_eed.wrap(backbone)
    resolve = timm.data.resolve_model_data_config
    assert resolve(model) == resolve(backbone)
    assert model.default_cfg == model.pretrained_cfg == backbone.pretrained_cfg
    assert model.num_features == backbone.num_features
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(model.eval().forward_head(model.forward_features(x)), backbone(x))


def test_frozen_backbone_stays_as_it_is():
    model = timm_eed.create_model('test_resnet', num_classes=3)
    model.freeze_backbone()
    model.train()
    state = copy.deepcopy(model.backbone.state_dict())
    optimizer = create_optimizer_v2(model, 'sgd', lr=.1)
    out = model.forward_exits(torch.randn(4, 3, 64, 64))
    ExitEnsembleDistillationLoss()(out.logits, None, torch.tensor([0, 1, 2, 0]))['loss'].backward()
    optimizer.step()
    assert all(torch.equal(v, state[k]) for k, v in model.backbone.state_dict().items())
    assert all(p.grad is not None for p in model.exits.parameters())
    model.freeze_backbone(False)
    assert model.backbone.training and all(p.requires_grad for p in model.parameters())


def test_dropout_behind_the_pre_logits_feature_is_kept():
    """Some heads drop after the point where pre_logits returns; then the head must run whole."""
    late = timm.create_model('lcnetv2_base', num_classes=5, drop_rate=.9)
    early = timm.create_model('resnet18', num_classes=5, drop_rate=.9)
    assert not timm_eed.wrap(late)._single_head_pass
    assert timm_eed.wrap(early)._single_head_pass


def test_compile_and_export_see_one_graph():
    model = timm_eed.create_model('test_resnet', num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model.forward_exits, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for a, b in zip(compiled(x).logits, model.forward_exits(x).logits):
            assert torch.allclose(a, b, atol=1e-5)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), model(x), atol=1e-5)


@pytest.mark.parametrize('name', ['test_resnet', 'levit_128s', 'swin_tiny_patch4_window7_224'])
def test_meta_twin_leaves_the_model_alone(name):
    model = timm.create_model(name).eval()
    x = torch.randn(1, *size_of(model))
    with torch.no_grad():
        before = model(x)
        twin = meta_twin(model)
        assert twin(x.to('meta')).shape == before.shape
        assert all(p.device.type == 'meta' for p in twin.parameters())
        assert torch.equal(model(x), before)
