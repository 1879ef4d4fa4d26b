"""The model card: what it claims is what was measured, its snippets run, its metadata is the Hub's."""
import re
import sys

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from timm.models import register_model

import timm_eed
from timm_eed.model_card import FIGURE, accuracy_figure, exit_results, make_model_card, write_model_card

METRICS = {'loss': 1., 'top1': 75.25, 'top5': 90., 'top1_exit1': 50.5, 'top5_exit1': 70., 'top1_exit2': 60.,
           'top1_exit3': 70., 'top1_ensemble': 76.}
pytestmark = [
    pytest.mark.usefixtures('one_thread'),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]


@register_model
def resnet_of_the_tests(pretrained=False, **kwargs):
    """A network that timm alone does not know."""
    return timm.models.build_model_with_cfg(
        timm.models.ResNet, 'resnet_of_the_tests', pretrained,
        **dict(block=timm.models.resnet.BasicBlock, layers=(1, 1, 1, 1), channels=(8, 16, 24, 32), **kwargs))


@pytest.fixture
def model():
    return timm_eed.create_model('test_resnet', num_classes=7).eval()


def snippets(card):
    return re.findall(r'```python\n(.*?)```', card.text, flags=re.DOTALL)


def test_results_are_told_per_exit(model):
    card = ModelCard(str(make_model_card(
        model, 'me/tiny', metrics=METRICS, license='mit', dataset_name='Digits: "all" of them', datasets=['me/digits'],
        data_config=dict(input_size=(3, 64, 64)), base_model='timm/test_resnet.r160_in1k')))
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag, data.datasets, data.base_model) == (
        'mit', 'timm', 'image-classification', ['me/digits'], 'timm/test_resnet.r160_in1k')
    assert {'timm', 'timm_eed', 'early-exit'} <= set(data.tags)
    found = {(r.metric_name, r.metric_args['exit']): r.metric_value for r in data.eval_results}
    assert found == {
        ('top-1 accuracy, exit1', 'exit1'): 50.5, ('top-5 accuracy, exit1', 'exit1'): 70.,
        ('top-1 accuracy, exit2', 'exit2'): 60., ('top-1 accuracy, exit3', 'exit3'): 70.,
        ('top-1 accuracy, main', 'main'): 75.25, ('top-5 accuracy, main', 'main'): 90.,
        ('top-1 accuracy, ensemble', 'ensemble'): 76.}
    assert {r.dataset_name for r in data.eval_results} == {'Digits: "all" of them'}
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in card.text.splitlines() if line[:5] == '| exi']
    for row, cost, info in zip(rows, timm_eed.profile(model, (3, 64, 64)), model.exit_info()):
        assert row[:3] == [cost.exit, f'`{info.module}`', f'{cost.gflops:.4g}']
        assert row[5] == f"{METRICS[f'top1_{cost.exit}']:.2f} %"
    assert len(rows) == 3


def test_runs_recipe_thresholds_and_citation_are_told(model):
    model.early_exit_config = dict(policy='confidence', thresholds=[.9, None, .5], temperatures=None)
    card = make_model_card(
        model, 'me/tiny', metrics=METRICS, results={'top1': dict(mean=75., std=.5, n=3), 'top1_exit1': dict(mean=50.)},
        recipe=dict(lr=.1, opt='sgd'), citation='@misc{mine}', description='Small.')
    assert '75.00 ± 0.50 % (n = 3) |' in card.text and '50.00 % (n = 1) |' in card.text
    assert '```yaml\nlr: 0.1\nopt: sgd\n```' in card.text
    assert '```bibtex\n@misc{mine}\n```' in card.text and '@misc{rw2019timm' in card.text
    assert 'policy `confidence`, thresholds 0.9, never, 0.5' in card.text
    assert card.data.license is None  # nobody passed one


def test_without_results_nothing_is_claimed(model):
    card = make_model_card(model, 'me/tiny')
    assert card.data.eval_results is None and '%' not in card.text.split('| main |')[1].splitlines()[0].split('|')[-2]
    assert 'Accuracy on' not in card.text


def test_both_snippets_run(hub, model, tmp_path, monkeypatch):
    timm_eed.push_to_hub(model, 'me/tiny', metrics=METRICS, card=dict(license='mit', dataset_name='digits'))
    files = hub.repos['me/tiny'].files()
    card = ModelCard(files['README.md'].decode())
    x = torch.randn(2, 3, 64, 64)
    plain, multi = snippets(card)
    assert 'timm_eed' not in plain
    names = {'x': x}
    with torch.no_grad():
        exec(plain, names)
        assert torch.equal(names['model'](x), model(x))
        exec(multi, names)
        assert all(map(torch.equal, names['out'].logits, model.forward_exits(x).logits))
    assert f'({FIGURE})' in card.text and files[FIGURE].startswith(b'\x89PNG')
    with pytest.raises(ValueError, match=r"model card: .*unexpected keyword argument 'licence'"):
        timm_eed.push_to_hub(model, 'me/tiny', card=dict(licence='mit'))


@pytest.mark.parametrize('name, package', [('resnet_of_the_tests', __name__), ('cifar_resnet20', 'timm_eed')])
def test_the_card_names_the_package_that_registers_the_backbone(hub, tmp_path, name, package):
    model = timm_eed.create_model(name, num_classes=4).eval()
    timm_eed.push_to_hub(model, 'me/own')
    card = ModelCard(hub.repos['me/own'].files()['README.md'].decode())
    assert f'`import {package}` comes first, also with plain timm' in card.text
    for code in snippets(card):
        assert code.startswith(f'import {package}  # first') and code.count(f'import {package}\n') == 0
    x = torch.randn(1, 3, 32, 32)
    loaded = timm_eed.from_pretrained('me/own', cache_dir=tmp_path).eval()
    plain = timm.create_model('hf-hub:me/own', pretrained=True, cache_dir=tmp_path).eval()
    with torch.no_grad():
        assert all(map(torch.equal, loaded.forward_exits(x).logits, model.forward_exits(x).logits))
        assert torch.equal(plain(x), model(x))


def test_the_figure_shows_every_classifier(model, tmp_path):
    pytest.importorskip('matplotlib')
    from matplotlib.axes import Axes
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        annotate = Axes.annotate
        patch.setattr(Axes, 'annotate', lambda *args, **kwargs: (drawn.append(args[1:3]), annotate(*args, **kwargs)))
        rows = exit_results(model, METRICS)
        assert accuracy_figure(rows, tmp_path / 'x.png')
    assert sorted(drawn) == sorted((row.exit, (row.gflops, row.scores['top1'])) for row in rows)
    assert len(np.unique(np.asarray(Image.open(tmp_path / 'x.png').convert('RGB')).reshape(-1, 3), axis=0)) > 10
    assert not accuracy_figure(exit_results(model, {'top1': 1.}), tmp_path / 'y.png')  # one point is no curve


def test_multi_label_results_are_told(model, tmp_path):
    pytest.importorskip('matplotlib')
    metrics = {'loss': 1., 'map': 75.25, 'macro_f1': 60., 'micro_f1': 62., 'map_exit1': 50.5, 'macro_f1_exit1': 40.}
    card = write_model_card(tmp_path, model, 'me/tiny', metrics=metrics, results={'map_exit1': dict(mean=51.)})
    data = ModelCard.load(tmp_path / 'README.md').data
    found = {(r.metric_type, r.metric_name): r.metric_value for r in data.eval_results}
    assert found == {
        ('mean_average_precision', 'mAP, exit1'): 50.5, ('f1', 'macro F1, exit1'): 40.,
        ('mean_average_precision', 'mAP, main'): 75.25, ('f1', 'macro F1, main'): 60.}
    assert '| mAP | macro F1 | mAP over runs |' in card.text and '| 50.50 % | 40.00 % | 51.00 % (n = 1) |' in card.text
    assert data.metrics == ['f1', 'mean_average_precision'] and (tmp_path / FIGURE).exists()


def test_without_matplotlib_there_is_a_note_and_no_figure(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    card = write_model_card(tmp_path, model, 'me/tiny', metrics=METRICS)
    assert 'pip install "timm-eed[plot]"' in caplog.text
    assert '![' not in card.text and not (tmp_path / FIGURE).exists()
    assert (tmp_path / 'README.md').read_text() == str(card)
