"""The command line and the YAML files beside it."""
import argparse
import logging
import re

import pytest
import yaml

from timm_eed.training.arguments import build_parser, parse_args, parse_teacher


def write(tmp_path, **content):
    path = tmp_path / 'run.yaml'
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_the_documented_command():
    args = parse_args('--model resnet50 --eed-alpha 1 --data imagenet'.split())
    assert (args.model, args.eed_alpha, args.data_dir) == ('resnet50', 1., 'imagenet')
    assert parse_args(['imagenet']).data_dir == parse_args(['--data-dir', 'imagenet']).data_dir == 'imagenet'


def test_yaml_below_the_command_line_above_the_defaults(tmp_path):
    path = write(tmp_path, **{'lr': '3e-4', 'eed-beta': 1, 'epochs': 7, 'scale': [.5, 1], 'mean': .5, 'amp': True,
                              'data': 'folder', 'model_kwargs': {'drop': .1}, 'clip_grad': None})
    args = parse_args(['-c', path, '--epochs', '9'])
    assert (args.lr, args.eed_beta, args.epochs, args.scale, args.mean) == (3e-4, 1., 9, [.5, 1.], [.5])
    assert args.amp is True and args.data_dir == 'folder' and args.model_kwargs == {'drop': .1}
    assert args.batch_size == 128
    assert parse_args(['other', '-c', path]).data_dir == 'other'


def test_unknown_key_warns_with_the_nearest_flag(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        parse_args(['-c', write(tmp_path, eed_alhpa=2)])
    assert "unknown key 'eed_alhpa' is ignored; did you mean 'eed_alpha'?" in caplog.text


@pytest.mark.parametrize('content, message', [
    (dict(epochs='many'), "epochs: must be int, not 'many'"),
    (dict(epochs=1.5), 'epochs: must be a whole number, not 1.5'),
    (dict(epochs=None), r'epochs: must have a value \(the default is 300\)'),
    (dict(epochs=True), 'epochs: must be one int, not True'),
    (dict(amp='yes'), "amp: must be true or false, not 'yes'"),
    (dict(lr=[.1, .2]), 'lr: must be one float'),
    (dict(eed_method='cd'), "eed_method: must be one of 'eed', 'kd', 'ce', 'none', not 'cd'"),
    (dict(input_size=[3, 32]), 'input_size: must be 3 values, not 2'),
    (dict(model_kwargs=[1]), r'model_kwargs: must be a mapping, not \[1\]'),
])
def test_wrong_yaml_values_end_with_a_message(tmp_path, capsys, content, message):
    with pytest.raises(SystemExit):
        parse_args(['-c', write(tmp_path, **content)])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize('text, message', [
    ('- a\n- b', 'must be a mapping'), ('a: [', 'is not YAML'), (None, 'cannot read'),
    ('!!python/object/apply:os.system ["true"]', 'is not YAML'),
])
def test_unreadable_yaml(tmp_path, capsys, text, message):
    path = tmp_path / 'x.yaml'
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        parse_args(['-c', str(path)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('flags, message', [
    ('--eed-alpha -1', 'alpha=-1.0 must be a finite number of at least 0'),
    ('--eed-temperature 0', 'temperature=0.0 must be greater than 0'),
    ('--eed-teacher exit0', "teacher 'exit0' is not known; say ensemble, main, or members as in exit1+exit3+main"),
    ('--eed-method kd --eed-teacher exit1', '--eed-teacher goes with --eed-method eed, not with kd'),
    ('--eed-method none --freeze-backbone', 'drop one of them'),
    ('--resume auto', '--resume auto needs --experiment'),
    ('--jsd-loss', 'add --aug-splits 3'),
    ('--batch-size 0', '--batch-size must be at least 1, not 0'),
    ('--amp --model-dtype bfloat16', 'drop --amp or --model-dtype'),
    ('--scale .5', '--scale takes two numbers, least and greatest, not 1'),
    ('--workers -1', '--workers must be at least 0'),
    ('-vb 0', '--validation-batch-size must be at least 1, not 0'),
    ('--pretrained --pretrained-path nowhere', 'the file must exist'),
])
def test_flags_that_cannot_work_end_at_parsing(capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_args(flags.split())
    assert message in capsys.readouterr().err


def test_teachers_by_name():
    assert parse_teacher('ensemble') == 'ensemble'
    assert parse_teacher('exit1+exit3+main') == [0, 2, -1]


def test_help_is_grouped_and_says_something_about_every_flag():
    parser = build_parser()
    text = parser.format_help()
    assert 'Exits and exit-ensemble distillation' in text and '(default: None)' not in text
    assert all(action.help for action in parser._actions)
    documented = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    assert len(documented) > 120
