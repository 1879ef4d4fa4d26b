"""From a training run to the Hub and back, through the script and the command."""
import argparse
import csv
import shutil

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

import timm_eed
import train_eed
from timm_eed.commands import publish
from timm_eed.training.flags import build_parser
from timm_eed.training.publish import _from_arguments
from timm_eed.training.runs import load_run

SMALL = ('--model test_resnet --img-size 32 -b 12 -j 0 --epochs 2 --warmup-epochs 0 --lr .01 --device cpu '
         '--num-classes 3 --experiment run --mean .4 --std .3').split()
X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
pytestmark = [
    pytest.mark.usefixtures('one_thread'),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]


@pytest.fixture
def train(image_folder, tmp_path, monkeypatch):
    """Run the script on the image folder; gives the folder of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_eed, 'setup_default_logging', lambda: None)

    def run(*flags):
        train_eed.main([*SMALL, '--data', str(image_folder), '--output', str(tmp_path / 'out'), *flags])
        return tmp_path / 'out' / 'run'
    return run


@pytest.fixture
def config(tmp_path):
    """A published model's file: flags, results, card."""
    path = tmp_path / 'model.yaml'
    path.write_text(yaml.safe_dump(dict(
        model='test_resnet', lr=.01, epochs=2, batch_size=12,
        results=dict(top1=dict(mean=50., std=1., n=3), top1_exit1=40),
        card=dict(license='mit', dataset_name='three digits', datasets='me/digits'))))
    return str(path)


def command(*argv):
    parser = argparse.ArgumentParser()
    publish.add_parser(parser.add_subparsers())
    args = parser.parse_args(['publish', *map(str, argv)])
    args.run(args)


def assert_published(repo_or_dir, folder, cache, checkpoint='last'):
    expected = load_run(str(folder), checkpoint).model
    loaded = timm_eed.from_pretrained(repo_or_dir, cache_dir=cache).eval()
    plain = timm.create_model(
        f'hf-hub:{repo_or_dir}' if '/' not in str(repo_or_dir)[:1] else f'local-dir:{repo_or_dir}', pretrained=True,
        cache_dir=cache).eval()
    with torch.no_grad():
        assert all(map(torch.equal, loaded.forward_exits(X).logits, expected.forward_exits(X).logits))
        assert torch.equal(plain(X), expected(X))
    return loaded


def last_row(folder):
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))[-1]


def test_training_ends_on_the_hub(hub, train, config, tmp_path, capsys):
    folder = train('--config', config, '--push-to-hub', 'me/tiny', '--model-ema', '--model-ema-decay', '.5')
    assert 'Published: ' + hub.url in capsys.readouterr().out
    loaded = assert_published('me/tiny', folder, tmp_path / 'cache')
    saved = torch.load(folder / 'last.pth.tar', weights_only=False)
    assert not torch.equal(saved['state_dict']['backbone.fc.weight'], saved['state_dict_ema']['backbone.fc.weight'])
    assert torch.equal(loaded.backbone.fc.weight, saved['state_dict_ema']['backbone.fc.weight'])
    cfg = loaded.pretrained_cfg
    assert (list(cfg['input_size']), list(cfg['mean']), cfg['license']) == ([3, 32, 32], [.4] * 3, 'mit')
    card = ModelCard(hub.repos['me/tiny'].files()['README.md'].decode())
    found = {(r.metric_name.split()[0], r.metric_args['exit']): r.metric_value for r in card.data.eval_results}
    row = last_row(folder)
    assert len(found) == 10
    for (kind, name), value in found.items():
        column = f"eval_{kind.replace('-', '')}{'' if name == 'main' else '_' + name}"
        assert value == pytest.approx(float(row[column]), abs=1e-4)
    assert '50.00 ± 1.00 % (n = 3)' in card.text and '40.00 % (n = 1)' in card.text
    recipe = yaml.safe_load(card.text.split('```yaml\n')[1].split('```')[0])
    assert recipe['model'] == 'test_resnet' and recipe['lr'] == .01 and recipe['model_ema'] is True
    assert recipe['eed_method'] == 'eed'  # although it is the default
    assert str(tmp_path) not in card.text and not {'data_dir', 'output', 'device', 'push_to_hub'} & set(recipe)


def test_a_failed_push_loses_nothing(hub, train, tmp_path, capsys):
    hub.fail('POST /api/repos/create', 403, times=1000)
    with pytest.raises(SystemExit) as raised:
        train('--push-to-hub', 'me/tiny')
    folder = tmp_path / 'out' / 'run'
    again = f'timm-eed publish {folder}/args.yaml --checkpoint {folder} --repo me/tiny'
    assert 'the run is complete, but was not published: the token may not do this' in str(raised.value)
    assert str(raised.value).endswith(f'Try again with: {again}')
    assert 'ensemble' in capsys.readouterr().out  # the closing table came first
    hub.faults.clear()
    command(*again.split()[2:])
    assert capsys.readouterr().out.startswith(f'{hub.url}/me/tiny/commit/')
    assert_published('me/tiny', folder, tmp_path / 'cache')


def test_the_command_takes_any_checkpoint_and_a_dry_run_pushes_nothing(hub, train, config, tmp_path, capsys, caplog):
    folder = train()
    capsys.readouterr()
    hub.log.clear()
    first = folder / 'checkpoint-0.pth.tar'
    command(config, '--checkpoint', first, '--repo', 'me/tiny', '--dry-run', tmp_path / 'dry')
    shown = capsys.readouterr().out
    assert (tmp_path / 'dry' / 'README.md').read_text() == shown[:-1] and '50.00 ± 1.00 %' in shown
    assert not hub.log
    assert_published(tmp_path / 'dry', folder, tmp_path / 'cache', 'checkpoint-0.pth.tar')
    command(config, '--checkpoint', folder, '--repo', 'me/tiny', '--private', '--revision', 'dev')
    assert hub.repos['me/tiny'].private and 'eed/config.json' in hub.repos['me/tiny'].files('dev')
    assert_published('me/tiny@dev', folder, tmp_path / 'cache')
    caplog.clear()
    assert 'unknown key' not in caplog.text
    other = tmp_path / 'other.yaml'
    other.write_text('lr: 0.5\n')
    command(other, '--checkpoint', folder, '--repo', 'me/tiny', '--dry-run', tmp_path / 'dry')
    assert 'says lr: 0.5, the run had 0.01' in caplog.text


def test_metrics_of_other_weights_are_not_claimed(hub, train, config, tmp_path, caplog):
    folder = train('--model-ema', '--model-ema-force-cpu')
    command(config, '--checkpoint', folder, '--repo', 'me/tiny', '--dry-run', tmp_path / 'dry')
    assert 'no metrics are claimed' in caplog.text
    assert ModelCard.load(tmp_path / 'dry' / 'README.md').data.eval_results is None
    (folder / 'args.yaml').write_text((folder / 'args.yaml').read_text().replace('force_cpu: true', 'force_cpu: false'))
    shutil.copy(folder / 'last.pth.tar', folder / 'recovery-1-3.pth.tar')
    command(config, '--checkpoint', folder / 'recovery-1-3.pth.tar', '--repo', 'me/tiny', '--dry-run', tmp_path / 'dry')
    assert 'from within an epoch, no metrics are claimed' in caplog.text
    (folder / 'summary.csv').unlink()
    command(config, '--checkpoint', folder, '--repo', 'me/tiny', '--dry-run', tmp_path / 'dry')
    assert 'did not evaluate epoch 1' in caplog.text


@pytest.mark.parametrize('content, message', [
    ('card: [license]', "the section 'card' must be a mapping"), ('card: {licence: mit}', "unknown key 'licence'"),
    ('results: {main: 75.}', "results: 'main' is no metric; choose top1"),
    ('results: {top1: high}', 'results: top1 must be a number'), ('results: {top1: {std: 1}}', 'must be a number'),
    ('- 1', 'must be a mapping'), ('{', 'cannot read')])
def test_sections_are_checked_before_anything_runs(tmp_path, content, message):
    (tmp_path / 'x.yaml').write_text(content)
    with pytest.raises(ValueError, match=message):
        command(tmp_path / 'x.yaml', '--checkpoint', tmp_path, '--repo', 'me/x')


def test_what_cannot_be_published_is_said_at_the_start(hub, train, monkeypatch, capsys, tmp_path):
    for flags, message in [
            (['--push-to-hub', 'tiny'], "'tiny' is no repo of the form user/name"),
            (['--push-to-hub', 'me/tiny', '--eed-method', 'none'], 'publishes models with exits')]:
        with pytest.raises(SystemExit):
            train(*flags)
        assert message in capsys.readouterr().err
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(SystemExit):
        train('--push-to-hub', 'me/tiny')
    assert 'needs a token: log in with `hf auth login`, or set HF_TOKEN' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
    folder = train('--eed-method', 'none', '--epochs', '1')
    with pytest.raises(ValueError, match=r'trained without exits .*push_to_hf_hub'):
        command(folder / 'args.yaml', '--checkpoint', folder, '--repo', 'me/tiny')


@pytest.mark.parametrize('flags, expected', [
    ('--model resnet50 --pretrained', 'timm/resnet50.a1_in1k'), ('--model resnet50', None),
    ('--model resnet50.tv_in1k --pretrained', 'timm/resnet50.tv_in1k'), ('--model cifar_resnet20 --pretrained', None),
    ('--model hf-hub:you/net@v1 --pretrained', 'you/net')])
def test_what_training_started_from(flags, expected):
    args = build_parser().parse_args(flags.split())
    assert _from_arguments(args).get('base_model') == expected


def test_the_card_says_what_training_started_from(train, config, tmp_path):
    folder = train('--epochs', '1')
    args = folder / 'args.yaml'
    args.write_text(args.read_text().replace('pretrained: false', 'pretrained: true'))
    command(config, '--checkpoint', folder, '--repo', 'me/tiny', '--dry-run', tmp_path / 'dry')
    card = ModelCard.load(tmp_path / 'dry' / 'README.md')
    assert card.data.base_model == 'timm/test_resnet.r160_in1k' and 'pretrained: true' in card.text
