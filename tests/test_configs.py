"""Every configuration of the paper's rows parses, builds and takes two steps; the page about them is current."""
import argparse
import sys
from pathlib import Path

import pytest
import torch
import yaml

from timm_eed.training import build
from timm_eed.training.arguments import parse_args

CONFIGS = sorted(p for p in Path('hub_configs').glob('*.yaml') if 'paper' in yaml.safe_load(p.read_text()))


@pytest.fixture(scope='module')
def tables():
    sys.path.insert(0, 'benchmarks')
    try:
        import paper_tables
        return paper_tables
    finally:
        sys.path.pop(0)


def test_there_is_one_per_row(tables):
    rows = {tables.configuration(*row)[0]: tables.configuration(*row)[1] for row in tables.rows()}
    assert len(rows) == 4 * 10 + 4 * 3 + 2 * 3
    assert {p.stem for p in CONFIGS} == set(rows)
    for path in CONFIGS:  # `results:` is filled in by hand
        written, made = yaml.safe_load(path.read_text()), yaml.safe_load(rows[path.stem])
        assert {**written, 'results': {}} == made


def test_the_page_is_generated_from_them(tables):
    assert Path('docs/paper.md').read_text() == tables.page()


@pytest.mark.parametrize('row, printed', [
    ('cifar100_resnet18_eed_mse', [73.26, 76.34, 78.75, 79.25]), ('cifar100_vgg19_none', [73.27]),
    ('cifar100_resnet101_eed_mse_features', [73.45, 78.01, 81.40, 81.24]),
    ('cifar100_wide_resnet28_10_eed_kl', [72.44, 79.73, 80.58]),
    ('imagenet_resnet50_kd_kl', [51.86, 63.13, 73.30, 74.24])])
def test_printed_numbers(row, printed):
    assert list(yaml.safe_load(Path(f'hub_configs/{row}.yaml').read_text())['paper'].values()) == printed


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_two_steps(path, caplog):
    args = parse_args(['--config', str(path), '--device', 'cpu'])
    assert 'unknown key' not in caplog.text
    device = build.setup_device(args)
    model = build.build_model(args, device)
    assert model.num_classes == (100 if path.stem.startswith('cifar') else 1000)
    assert getattr(model, 'num_exits', 1) == len(yaml.safe_load(path.read_text())['paper'])
    task = build.build_task(args, model, device)
    optimizer = build.build_optimizer(args, task)
    _, epochs = build.build_scheduler(args, optimizer, 1)
    assert epochs == args.epochs
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    task.train()
    for step in range(2):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        loss = task(torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([3, 7]))['loss']
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if p.ndim > 1)


def test_the_schedule_falls_at_the_papers_epochs():
    args = parse_args(['--config', 'hub_configs/cifar100_resnet18_eed_mse.yaml', '--device', 'cpu'])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler, _ = build.build_scheduler(argparse.Namespace(**vars(args)), optimizer, 1)
    lrs = []
    for epoch in range(200):
        scheduler.step(epoch)
        lrs.append(round(optimizer.param_groups[0]['lr'], 6))
    # timm counts from one: the 75th, 130th and 180th epochs are the first at the lower rate
    assert [epoch + 1 for epoch in range(1, 200) if lrs[epoch] < lrs[epoch - 1]] == [75, 130, 180]
    assert [lrs[0], lrs[75], lrs[130], lrs[180]] == [.1, .01, .001, .0001]
