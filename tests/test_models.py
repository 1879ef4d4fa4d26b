"""The paper's CIFAR networks: sizes from other sources, and what timm asks of a model."""
import json
import subprocess
import sys

import pytest
import timm
import torch

import timm_eed

NAMES = timm.list_models('cifar_*')
# with `classes`, in millions where the source prints no more digits
PARAMETERS = {
    'cifar_resnet18': (100, 11_220_132),  # the authors' network without its exits
    'cifar_resnet20': (10, 269_722),  # 0.27 M in the ResNet paper
    'cifar_wide_resnet28_10': (100, 36.5e6),  # the WideResNet paper
    'cifar_wide_resnet16_4': (10, 2.7e6),  # the WideResNet paper
    'cifar_pyramidnet110_a270': (10, 28.5e6),  # the PyramidNet paper prints 28.3 M
    'cifar_resnet50': (100, 23_705_252),  # torchvision's ResNet-50 with a 3x3 stem and 100 classes
    'cifar_resnet101': (100, 42_697_380),
    'cifar_resnet152': (100, 58_341_028),
}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


@pytest.mark.parametrize('name', PARAMETERS)
def test_number_of_parameters(name):
    classes, expected = PARAMETERS[name]
    with torch.device('meta'):
        found = count(timm.create_model(name, num_classes=classes))
    assert found == expected if isinstance(expected, int) else abs(found - expected) < 0.06e6


@pytest.mark.parametrize('name, torchvision_name', [
    ('cifar_resnet50', 'resnet50'), ('cifar_resnet101', 'resnet101'), ('cifar_resnet152', 'resnet152'),
    ('cifar_vgg19', 'vgg19_bn')])
def test_sizes_follow_from_torchvisions_networks(name, torchvision_name):
    torchvision = pytest.importorskip('torchvision')
    with torch.device('meta'):
        other = getattr(torchvision.models, torchvision_name)(num_classes=100)
        ours = create(name, num_classes=100)
    if name == 'cifar_vgg19':
        biases = sum(m.bias.numel() for m in other.features if isinstance(m, torch.nn.Conv2d))
        assert count(ours) == count(other.features) - biases + 512 * 100 + 100
    else:
        assert count(ours) == count(other) - 64 * 3 * 7 * 7 + 64 * 3 * 3 * 3


def test_resnext_is_the_resnext_papers_with_four_groups():
    with torch.device('meta'):
        paper = timm_eed.models.CifarNet('bottleneck', (3, 3, 3), (64, 128, 256), cardinality=8, num_classes=10)
    assert abs(count(paper) - 34.4e6) < 0.1e6  # the ResNeXt paper's 29-layer, 8x64d
    with torch.device('meta'):
        assert count(create('cifar_resnext29_4x64d')) == 17_654_692


def test_contract(name):
    model = create(name, num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 7)
    final, maps = model.forward_intermediates(x)
    assert [m.shape[1] for m in maps] == [info['num_chs'] for info in model.feature_info]
    assert [32 // m.shape[-1] for m in maps] == [info['reduction'] for info in model.feature_info]
    assert torch.equal(model.forward_head(final), model(x))
    assert torch.equal(final, model.forward_features(x))
    assert model.forward_head(final, pre_logits=True).shape == (2, model.num_features)
    model.set_grad_checkpointing()
    assert torch.equal(model(x), model.eval()(x))
    keys = model.state_dict()
    assert model.default_cfg['classifier'] + '.weight' in keys and model.default_cfg['first_conv'] + '.weight' in keys
    assert tuple(final.shape[-2:]) == tuple(model.default_cfg['pool_size'])
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, '')
    assert torch.equal(model(x), final)
    assert isinstance(timm_eed.wrap(create(name)), timm_eed.MultiExitWrapper)


@pytest.mark.parametrize('name', ['cifar_resnet20', 'cifar_wide_resnet16_4', 'cifar_vgg19', 'cifar_resnext29_4x64d'])
def test_features_only_and_pruned(name):
    x = torch.randn(1, 3, 32, 32)
    features = create(name, features_only=True).eval()
    model = create(name).eval()
    for ours, expected in zip(features(x), model.forward_intermediates(x, intermediates_only=True)):
        assert torch.equal(ours, expected)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    assert torch.equal(model(x), expected) and len(model.stages) == 2


@pytest.mark.parametrize('name', ['cifar_resnet20', 'cifar_wide_resnet16_4', 'cifar_pyramidnet110_a270'])
def test_training_options(name):
    model = create(name, num_classes=10, drop_rate=.1, drop_path_rate=.1, in_chans=1)
    model.set_grad_checkpointing()
    model.train()(torch.randn(4, 1, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert timm.create_model(name, global_pool='', num_classes=0)(torch.randn(1, 3, 32, 32)).ndim == 4
    groups = set(timm.models.group_parameters(model, model.group_matcher(), reverse=True).values())
    assert groups == set(range(max(groups) + 1)) and len(groups) > 4


def test_zero_padding_takes_every_second_pixel():
    x = torch.randn(2, 4, 8, 8)
    y = timm_eed.models.ZeroPadShortcut(4, 6, 2)(x)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2]) and not y[:, 4:].any()
    y = timm_eed.models.ZeroPadShortcut(4, 6, 2, average=True)(x)
    assert torch.allclose(y[:, :4], x.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5)))


def test_unknown_block():
    with pytest.raises(ValueError, match='choose one of'):
        timm_eed.models.CifarNet('dense')


def test_loads_from_a_config_folder(tmp_path):
    model = create('cifar_resnet20', num_classes=10, drop_rate=.2)
    timm.models.save_for_hf(model, tmp_path, model_config={}, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), again(x))
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'cifar_resnet20'


def test_table_three():
    sys.path.insert(0, 'benchmarks')
    try:
        import table3
    finally:
        sys.path.pop(0)
    macs = {  # 10^9 multiply-adds without normalisation
        'cifar_vgg19': (.0679, .1198, .2472, .3982), 'cifar_resnet18': (.2094, .3248, .4401, .5555),
        'cifar_resnet50': (.3899, .7066, 1.3358, 1.2980), 'cifar_resnet101': (.3899, .7066, 2.5479, 2.5102)}
    for name, paper in table3.PAPER.items():
        printed, exact = table3.table3(name)
        assert [f'{value:.2f}' for value in printed] == [f'{value:.2f}' for value in paper]
        assert [round(value, 4) for value in exact] == list(macs[name])


def test_table_three_as_a_command():
    out = subprocess.run([sys.executable, 'benchmarks/table3.py'], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith('16 of 16 equal the print.')
