"""Models in folders: what is written comes back, and what others wrote is looked at twice."""
import copy
import inspect
import json
import os
import shutil

import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode

import timm_eed
from timm_eed import pretrained
from timm_eed.pretrained import file_sha256
from timm_eed.repo_config import _EXIT_KWARGS

pytestmark = pytest.mark.usefixtures('one_thread')

X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)


def logits_of(model, x=X):
    with torch.no_grad():
        return model.eval().forward_exits(x).logits


def assert_same(model, other, x=X):
    assert all(torch.equal(a, b) for a, b in zip(logits_of(model, x), logits_of(other, x)))


@pytest.fixture(scope='module')
def model():
    return timm_eed.create_model('test_resnet', num_classes=7)


@pytest.fixture(scope='module')
def saved(model, tmp_path_factory):
    """A folder to read from, never to write to."""
    folder = tmp_path_factory.mktemp('saved')
    model.save_pretrained(folder, metrics={'top1': 50., 'top1_exit1': 25})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved`."""
    return shutil.copytree(saved, tmp_path / 'copy')


def tensors_of(path):
    """In memory: `load_file` only maps the file."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def edit(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize('name, kwargs, exits', [
    ('test_resnet', dict(in_chans=1), dict(exit_indices=[1, -2], exit_type='separable', drop_rate=.2)),
    ('test_vit', dict(img_size=96, global_pool='avg'), dict(exit_type='linear')),
    ('test_convnext', {}, dict(exit_type='bottleneck', last_stride=1)), ('cifar_resnet20', {}, {}),
    ('levit_128s', {}, {}),
])
def test_models_come_back(name, kwargs, exits, tmp_path):
    model = timm_eed.wrap(timm.create_model(name, num_classes=5, drop_rate=.1, **kwargs), **exits)
    side = kwargs.get('img_size', 224 if name == 'levit_128s' else 64)
    x = torch.randn(2, kwargs.get('in_chans', 3), side, side)
    with torch.no_grad():
        model.train().forward_exits(x)
    model.save_pretrained(tmp_path)
    loaded = timm_eed.from_pretrained(tmp_path)
    assert (loaded.exit_indices, loaded.exit_type, loaded.exit_kwargs) == (
        model.exit_indices, model.exit_type, model.exit_kwargs)
    assert_same(loaded, model, x)
    plain = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))


def test_every_argument_of_exits_can_be_saved():
    arguments = set(inspect.signature(timm_eed.ExitHead).parameters) - {
        'in_chans', 'widths', 'num_classes', 'exit_type'}  # said by the backbone and by a key of its own
    assert arguments == set(_EXIT_KWARGS)


@pytest.mark.parametrize('change', [
    lambda m: m.to(memory_format=torch.channels_last), lambda m: ModelEmaV3(m).module, copy.deepcopy,
    lambda m: (m.reset_classifier(4, 'catavgmax'), m)[1]])
def test_any_state_of_a_model_can_be_saved(change, tmp_path):
    model = change(timm_eed.create_model('test_resnet', num_classes=3))
    model.save_pretrained(tmp_path)
    loaded = timm_eed.from_pretrained(tmp_path).state_dict()
    assert list(loaded) == list(model.state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_half_precision_comes_back_as_its_values(tmp_path):
    model = timm_eed.create_model('test_resnet', num_classes=3).half()
    model.save_pretrained(tmp_path)
    loaded = timm_eed.from_pretrained(tmp_path)
    assert all(torch.equal(v, model.state_dict()[k].to(v.dtype)) for k, v in loaded.state_dict().items())
    assert load_file(tmp_path / 'model.safetensors')['fc.weight'].dtype == torch.float16


def test_preprocessing_labels_and_card_are_kept(model, tmp_path):
    labels = [f'class {i}' for i in range(7)]
    model.save_pretrained(
        tmp_path, data_config=dict(mean=[.1, .2, .3], input_size=[3, 48, 48], crop_pct=.5),
        model_config=dict(label_names=labels), card='# A card\n')
    cfg = timm_eed.from_pretrained(tmp_path).pretrained_cfg
    assert (list(cfg['mean']), list(cfg['input_size']), cfg['crop_pct'], cfg['label_names']) == (
        [.1, .2, .3], [3, 48, 48], .5, labels)
    assert (tmp_path / 'README.md').read_text() == '# A card\n'


@pytest.mark.parametrize('config', [
    None, dict(policy='confidence', thresholds=[.9, None, .5], temperatures=None, ensemble=True),
    dict(policy='patience', thresholds=[1, 2, 2], temperatures=[1., .5, 2., 1.], ensemble=False)])
def test_thresholds_travel_with_the_model(model, tmp_path, config):
    model = copy.deepcopy(model)
    model.early_exit_config = config
    model.save_pretrained(tmp_path)
    assert timm_eed.from_pretrained(tmp_path).early_exit_config == config
    assert copy.deepcopy(model).early_exit_config == config
    if config:
        assert timm_eed.EarlyExit(model, **config).rule.thresholds == config['thresholds']


@pytest.mark.parametrize('config, message', [
    (dict(thresholds=[.5] * 3), "'policy' is missing"),
    (dict(policy='confidence', thresholds=[.5]), 'list of 3 values'),
    (dict(policy='confidence', thresholds=[.5] * 3, extra=1), "unknown key 'extra'"),
    (dict(policy='confidence', thresholds=[float('nan')] * 3), 'must be a number'),
    (dict(policy='os.system', thresholds=[.5] * 3), 'policy'),
    (dict(policy='confidence', thresholds=[.5] * 3, temperatures=[0, 1, 1, 1]), 'from 1e-06'),
    (dict(policy='patience', thresholds=[.5] * 3), 'early_exit: threshold 0.5 does not fit patience'),
    (dict(policy='confidence', thresholds=[.5] * 3, ensemble=1), 'must be true or false'),
    (torch.ones(3), 'must be a mapping')])
def test_bad_thresholds_are_not_saved(model, tmp_path, config, message):
    model = copy.deepcopy(model)
    model.early_exit_config = config
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)


def test_saving_leaves_the_model_as_it_was(model, tmp_path):
    model = copy.deepcopy(model).train()
    model.freeze_backbone()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_timm_could_not_rebuild_is_not_saved(tmp_path):
    edited = timm.create_model('resnet18', num_classes=3)
    edited.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    with pytest.raises(ValueError, match=r"'conv1.weight' is \[64, 3, 3, 3\] and should be \[64, 3, 7, 7\]"):
        timm_eed.wrap(edited).save_pretrained(tmp_path)
    swapped = timm_eed.create_model('resnet18', num_classes=3).eval()
    swapped.backbone.maxpool = nn.Identity()  # the same weights, another network
    with pytest.raises(ValueError, match='would give other logits; was the backbone changed after'):
        swapped.save_pretrained(tmp_path)
    nameless = timm.models.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)
    with pytest.raises(ValueError, match='does not know its architecture; make it with'):
        timm_eed.wrap(nameless).save_pretrained(tmp_path)
    assert [path for path in tmp_path.rglob('*') if path.is_file()] == []


def test_a_stop_in_the_middle_leaves_whole_files(model, folder, monkeypatch):
    """Whatever the moment, the folder loads as before or says what is wrong."""
    reference = logits_of(timm_eed.from_pretrained(folder))
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    replace, other = os.replace, timm_eed.create_model('test_resnet', num_classes=7)

    def stop_at(number):
        calls = []

        def counted(source, target):
            calls.append(target)
            if len(calls) > number:
                raise KeyboardInterrupt
            replace(source, target)
        return counted

    for number in range(4):
        monkeypatch.setattr(os, 'replace', stop_at(number))
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(folder)
        monkeypatch.undo()
        assert {path for path in folder.rglob('*') if path.is_file()} == set(before)
        if number < 2:  # config.json, the first file, is the same for both
            assert all(torch.equal(a, b) for a, b in zip(logits_of(timm_eed.from_pretrained(folder)), reference))
        else:
            with pytest.raises(ValueError, match='Save the whole model again' if number == 2 else 'exits_sha256'):
                timm_eed.from_pretrained(folder)
    monkeypatch.setattr(pretrained, '_save_weights', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.save_pretrained(folder)
    assert {path for path in folder.rglob('*') if path.is_file()} == set(before)


def test_damaged_or_swapped_weights_are_told(model, folder):
    exits = tensors_of(folder / 'eed/exits.safetensors')
    (folder / 'eed/exits.safetensors').write_bytes(b'\0' * 100)
    with pytest.raises(ValueError, match='exits_sha256'):
        timm_eed.from_pretrained(folder)
    for tensors, message in [
            ({k: v for k, v in exits.items() if k != '0.fc.bias'}, r"eed/exits\.safetensors .*\(no '0\.fc\.bias'\)"),
            ({**exits, 'extra': X}, "unknown 'extra'"),
            ({**exits, '0.fc.weight': X}, r"'0.fc.weight' is \[2, 3, 32, 32\] and should be \[7, 96\]"),
    ]:
        save_file(tensors, folder / 'eed/exits.safetensors')
        checksum = file_sha256(folder / 'eed/exits.safetensors')
        edit(folder, 'eed/config.json', lambda c, checksum=checksum: c.update(exits_sha256=checksum))
        with pytest.raises(ValueError, match=message):
            timm_eed.from_pretrained(folder)


def test_main_weights_are_checked_by_shape_before_anything_is_built(model, folder):
    weights = tensors_of(folder / 'model.safetensors')
    for tensors, message in [
            ({**weights, 'fc.weight': X}, r"model\.safetensors does not fit .*'fc.weight' is \[2, 3, 32, 32\]"),
            ({'fc.bias': weights['fc.bias']}, r"no 'conv1.0.weight'; .* and \d+ more"),
    ]:
        save_file(tensors, folder / 'model.safetensors')
        checksum = file_sha256(folder / 'model.safetensors')
        edit(folder, 'eed/config.json', lambda c, checksum=checksum: c.update(main_sha256=checksum))
        with pytest.raises(ValueError, match=message):
            timm_eed.from_pretrained(folder)
    (folder / 'model.safetensors').write_bytes(b'{"not": "safetensors"}')
    edit(folder, 'eed/config.json', lambda c: c.update(main_sha256=file_sha256(folder / 'model.safetensors')))
    with pytest.raises(ValueError, match=r'model\.safetensors is no readable safetensors file'):
        timm_eed.from_pretrained(folder)


@pytest.mark.parametrize('change, message', [
    (lambda c: c.update(architecture='my_resnet'), "knows no architecture 'my_resnet'; update timm, or first import"),
    (lambda c: c.update(architecture='hf-hub:me/other'), 'must be the name of an architecture'),
    (lambda c: c.pop('architecture'), 'architecture must be'),
    (lambda c: c.pop('num_classes'), 'does not say num_classes'),
    (lambda c: c.update(num_classes=5), 'num_classes is said to be 7 and 5'),
    (lambda c: c.update(pretrained_cfg=[]), 'pretrained_cfg must be a mapping'),
    (lambda c: c['pretrained_cfg'].update(num_classes=10 ** 9), 'num_classes must be a whole number'),
    (lambda c: c['pretrained_cfg'].update(surprise=1), "timm knows no 'surprise'"),
    (lambda c: c['pretrained_cfg'].update(custom_load='hf'), 'not a timm state dict'),
    (lambda c: c['pretrained_cfg'].update(input_size=[3, 10 ** 9, 10 ** 9]), 'input_size must be a whole number'),
    (lambda c: c['pretrained_cfg'].update(input_size=[3, 5000, 224]), 'whole number from 1 to 4096'),
    (lambda c: c['pretrained_cfg'].update(std=[0, 0, 0]), 'std must be a number from 1e-06'),
    (lambda c: c['pretrained_cfg'].update(mean='x'), 'mean must be a list'),
    (lambda c: c['pretrained_cfg'].update(crop_pct='a'), 'crop_pct must be a number'),
    (lambda c: c['pretrained_cfg'].update(interpolation='a'), 'interpolation must be one of'),
    (lambda c: c.update(c.pop('pretrained_cfg')), 'pretrained_cfg must be a mapping'),
    (lambda c: c['model_args'].update(pretrained_strict=False), "'pretrained_strict' is an option of timm's factory"),
    (lambda c: c['model_args'].update(checkpoint_path='/etc/passwd'), "'checkpoint_path' is an option"),
    (lambda c: c['model_args'].update(features_only=True), "'features_only' is an option"),
    (lambda c: c['model_args'].update(channels=[10 ** 9]), 'must be a whole number'),
    (lambda c: c['model_args'].update(channels=[[[[[1]]]]]), 'too long or too deep'),
    (lambda c: c['model_args'].update(no_such_argument=1), 'timm cannot build the model in config.json: TypeError'),
    (lambda c: c['model_args'].update(channels=[999, 999, 999, 999]), r'model\.safetensors does not fit'),
])
def test_a_config_of_timms_that_does_more_than_describe_is_refused(folder, change, message):
    edit(folder, 'config.json', change)
    with pytest.raises(ValueError, match=message):
        timm_eed.from_pretrained(folder)


def test_images_of_any_size_in_a_config_cost_no_memory(model, folder):
    edit(folder, 'config.json', lambda c: c['pretrained_cfg'].update(input_size=[3, 4096, 4096]))
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            made.extend(t.numel() for t in (out if isinstance(out, (list, tuple)) else [out])
                        if isinstance(t, torch.Tensor) and t.device.type == 'cpu')
            return out

    with Watch():
        assert_same(timm_eed.from_pretrained(folder), model)
    assert 0 < max(made) < 1 << 25


def test_plain_folders_of_older_timm_get_fresh_exits(model, folder):
    shutil.rmtree(folder / 'eed')
    edit(folder, 'config.json', lambda c: c.update(**c.pop('pretrained_cfg'), labels=['x'] * 7))
    edit(folder, 'config.json', lambda c: (c.pop('model_args'), c.pop('global_pool')))
    loaded = timm_eed.create_model(f'local-dir:{folder}', pretrained=True)
    assert torch.equal(logits_of(loaded)[-1], logits_of(model)[-1])
    with pytest.raises(ValueError, match='it is a plain timm model; '):
        timm_eed.from_pretrained(folder)


def test_sources_in_a_config_are_not_followed(model, folder, tmp_path):
    """timm overrides them for folders; should that change, this tells."""
    elsewhere = dict(file=str(tmp_path / 'other.pth'), url='http://127.0.0.1:9/x.pth', hf_hub_id='me/other',
                     hf_hub_filename='pytorch_model.bin', source='file')
    edit(folder, 'config.json', lambda c: c['pretrained_cfg'].update(elsewhere))
    assert_same(timm_eed.from_pretrained(folder), model)


@pytest.mark.parametrize('text, message', [
    ('[' * 100_000, 'not readable as JSON'), ('[' * 800 + ']' * 800, 'a mapping'),
    ('{"exits": ' + '[' * 700 + ']' * 700 + ', "format_version": 1}', 'exits must be a mapping'),
    ('{"format_version": 1e999}', 'whole number'), ('\x00', 'not readable'),
    ('{"format_version": NaN}', 'NaN is no number'), ('{"a": 1, "a": 2}', 'a key occurs twice'), ('[]', 'a mapping'),
    ('{"format_version": 2}', 'has format 2, this timm_eed reads 1; update it'), (' ' * (1 << 20) + '{}', 'bytes'),
    ('{"format_version": ' + '9' * 5000 + '}', 'not readable'), ('{}', "'format_version' is missing")])
def test_texts_that_are_no_config(folder, text, message):
    (folder / 'eed/config.json').write_text(text)
    with pytest.raises(ValueError, match=message):
        timm_eed.from_pretrained(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
        ['conv', 'linear', 'exit_type', '__class__', '../x', 'os.system', 1, 2, 3, 0., .5, [], {}, [1, 2], 10 ** 30]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)
EDITS = st.lists(st.tuples(st.integers(0, 1000), st.sampled_from(['replace', 'delete', 'insert', 'swap']), JSON),
                 min_size=1, max_size=3)


def places(node):
    """Every (container, key) of a JSON document."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from places(node[key])


def mutated(content, edits):
    for number, kind, value in edits:
        found = list(places(content))
        if not found:
            return content
        node, key = found[number % len(found)]
        if kind == 'replace':
            node[key] = value
        elif kind == 'delete':
            del node[key]
        elif kind == 'swap':
            other, other_key = found[number * 7 % len(found)]
            try:
                node[key], other[other_key] = other[other_key], node[key]
            except (KeyError, IndexError):
                pass
        elif isinstance(node, dict):
            node[str(value)[:20]] = value
        else:
            node.insert(key, value)
    return content


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(edits=EDITS, cut=st.integers(-40, 0), with_early_exit=st.booleans())
def test_a_mutated_config_loads_right_or_says_why(model, saved, edits, cut, with_early_exit):
    path = saved / 'eed/config.json'
    original = path.read_text()
    content = json.loads(original)
    if with_early_exit:
        content['early_exit'] = dict(policy='entropy', thresholds=[.1, None, 2], temperatures=[1, 2, 3, 4])
    try:
        content = mutated(content, edits)
        text = json.dumps(content)
    except (ValueError, RecursionError):  # circular after a swap
        return
    try:
        path.write_text(text[:cut] if cut < -35 else text, encoding='utf-8', errors='surrogatepass')
        try:
            loaded = timm_eed.from_pretrained(saved)
        except ValueError as error:
            event('refused')
            reason = str(error)
            assert reason.startswith(f"Cannot load '{saved}': ") and len(reason) < 600
        else:
            event('loaded')
            assert_same(loaded, model)
            assert loaded.exit_indices == model.exit_indices
    finally:
        path.write_text(original)
