"""Truncated models and exported ones give the logits of the model they come from."""
import sys

import numpy as np
import pytest
import torch
from test_early_exit import FAMILIES
from test_multi_exit import randomise

import timm_eed
from timm_eed.export import export_onnx, export_program, truncate


def make(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    model = timm_eed.create_model(name, num_classes=5, **kwargs).eval()
    randomise(model)
    return model


def check_truncated(model, x):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model.forward_exits(x).logits
        for i, expected in enumerate(logits):
            assert torch.equal(truncate(model, i)(x), expected)
        assert all(torch.equal(z, a) for z, a in zip(model.forward_exits(x).logits, logits))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('row', FAMILIES)
def test_truncated_models_of_every_family(row):
    torch.manual_seed(0)
    model = timm_eed.create_model(row['name'], num_classes=5, exit_type='linear').eval()
    randomise(model)
    check_truncated(model, torch.randn(2, *map(int, row['input'].split('x'))))


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext'])
def test_a_truncated_model_stands_alone(name, tmp_path):
    model = make(name, exit_type='linear')
    x = torch.randn(2, *timm_eed.probe.input_size(model.backbone))
    truncated = truncate(model, 1)
    assert truncated.num_classes == 5 and truncated.pretrained_cfg == model.pretrained_cfg
    assert not truncated.training
    sizes = [sum(p.numel() for p in truncate(model, i).parameters()) for i in range(4)]
    assert sizes == sorted(set(sizes)) == [row.params for row in timm_eed.profile(model)]
    with torch.no_grad():
        expected = truncated(x)
        torch.save(truncated.state_dict(), tmp_path / 'exit2.pth')
        other = truncate(timm_eed.create_model(name, num_classes=5, exit_type='linear').eval(), 1)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(torch.load(tmp_path / 'exit2.pth', weights_only=True))
        assert torch.equal(other(x), expected)
        for p in truncated.parameters():
            p.zero_()
        assert torch.equal(model.forward_exits(x).logits[1], expected)  # weights are copies
    assert type(truncate(model, -1)) is type(model.backbone)


def test_a_truncated_model_can_be_trained_further():
    truncated = truncate(make().train(), 0)
    assert truncated.training
    truncated(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in truncated.parameters())


def test_refusals_name_the_fix():
    model = make()
    with pytest.raises(ValueError, match=r'exit_index=4 is out of range, choose 0 \(exit1\) to 3'):
        truncate(model, 4)
    with pytest.raises(ValueError, match='has no exits; make them with'):
        truncate(model.backbone, 0)
    with pytest.raises(ValueError, match='has no exits; make them with'):
        export_program(truncate(model, 0), all_exits=True)


def test_onnx_without_the_extra_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r'pip install "timm-eed\[export\]"'):
        export_onnx(make(), tmp_path / 'model.onnx')


PARTS = {
    'main': (lambda model: model, {}),
    'all exits': (lambda model: model, dict(all_exits=True)),
    'truncated': (lambda model: truncate(model, 1), {}),
    'bare': (lambda model: truncate(model, -1), {}),
}
NAMES = ['test_resnet', 'test_vit', 'test_convnext', 'test_mambaout']


def expected_outputs(model, part, x):
    with torch.no_grad():
        logits = model.forward_exits(x).logits
    return {'main': logits[-1:], 'bare': logits[-1:], 'all exits': logits, 'truncated': logits[1:2]}[part]


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('name', NAMES)
def test_export_program(name, part):
    model = make(name)
    choose, kwargs = PARTS[part]
    size = (3, 160, 160) if name == 'test_vit' else (3, 64, 64)
    program = export_program(choose(model), size, **kwargs).module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, *size)
        outputs = program(x)
        for z, expected in zip([outputs] if torch.is_tensor(outputs) else outputs, expected_outputs(model, part, x)):
            assert torch.allclose(z, expected, atol=1e-5)


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('name', NAMES)
def test_export_onnx(name, part, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = make(name)
    choose, kwargs = PARTS[part]
    size = (3, 160, 160) if name == 'test_vit' else (3, 64, 64)
    names = export_onnx(choose(model), tmp_path / 'model.onnx', size, **kwargs)
    assert names == (['exit1', 'exit2', 'exit3', 'main'] if part == 'all exits' else ['logits'])
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    for batch in (1, 2, 5):
        x = torch.randn(batch, *size)
        expected = expected_outputs(model, part, x)
        outputs = session.run(names, {'images': x.numpy()})
        assert len(outputs) == len(expected)
        for z, reference in zip(outputs, expected):
            assert np.abs(z - reference.numpy()).max() <= 1e-4 * float(reference.abs().max())
