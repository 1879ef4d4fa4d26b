"""The command `timm-eed`."""
from pathlib import Path

import pytest

import timm_eed
from timm_eed.cli import main


def test_info_shows_the_exits(capsys):
    main(['info', 'test_resnet', '--img-size', '64', '--num-classes', '5'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'test_resnet, input 3x64x64, 5 classes, conv exits'
    model = timm_eed.create_model('test_resnet', num_classes=5)
    rows = timm_eed.profile(model, (3, 64, 64))
    assert [line.split()[0] for line in lines[3:]] == [row.exit for row in rows]
    assert lines[3].split()[1] == 'layer1' and '16x16' in lines[3]
    for line, row in zip(lines[3:], rows):
        assert f'{row.gflops:.3f}' in line.split() and f'{row.params / 1e6:.2f}' in line.split()


def test_info_takes_a_pattern_and_shows_what_cannot_be_wrapped(capsys):
    main(['info', 'qwen3_vit_88m*'])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].split()[0] == 'qwen3_vit_88m'
    assert 'encoder without a classifier' in lines[2]


def test_info_shows_what_does_not_run_beside_what_does(capsys):
    main(['info', 'levit_128*', '--img-size', '100'])  # LeViT's attention has one size
    main(['info', 'vit_tiny_*_p8_224*', '--img-size', '100'])
    lines = capsys.readouterr().out.splitlines()
    assert all('does not run with images of 100 x 100' in line for line in lines if not line.startswith('model'))
    assert len(lines) > 3


@pytest.mark.parametrize('name, message', [
    ('levit_128s --img-size 100', 'does not run with images of 100 x 100'), ('docs', 'timm-eed benchmark'),
    ('resnet5O', 'did you mean'), ('nothing_like*', 'no timm model matches')])
def test_info_names_the_fix(name, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(SystemExit, match=message):
        main(['info', *name.split()])
