"""The script's flags against a table of those of timm's train script (names, types, defaults; no text)."""
import ast
import csv
from pathlib import Path

import pytest
from timm.utils import ParseKwargs

from timm_eed.training.arguments import parse_args
from timm_eed.training.flags import build_parser

ROWS = list(csv.DictReader((Path(__file__).parent / 'timm_train_flags.csv').open(newline='')))
# added to timm's script later, with type and default
LATER = {
    '--task': ('str', 'classification'), '--multilabel-threshold': ('float', .5), '--target-format': ('str', None),
    '--loss': ('str', None), '--poly-epsilon': ('float', 2.), '--poly-gamma': ('float', 0.),
    '--loss-class-weight': ('float', None), '--loss-pos-weight': ('float', None), '--stop-epoch': ('int', None),
    '--save-epochs': ('int', None), '--lr-decay-fn': ('str', None), '--lr-stable-timescale': ('float', None)}
# what is there, but stricter: a choice where timm's takes any text and fails later
STRICTER = {'--amp-dtype', '--model-dtype', '--clip-mode', '--remode', '--mixup-mode', '--lr-base-scale', '--dist-bn',
            '--worker-seeding'}
# what is there and ends at parsing, with the reason
REFUSED = [
    (['--naflex-loader'], 'NaFlex'), (['--tta', '2'], 'augmented copies'), (['--torchscript'], 'plain models'),
    (['--kd-model-name', 'resnet18', '--kd-distill-type', 'feature'], 'teaches logits'), (['--loss', 'db'], 'counts'),
    (['--kd-model-name', 'resnet18', '--task', 'multilabel'], 'softmax'),
    (['--stop-epoch', '0'], '--stop-epoch'), (['--stop-epoch', '301'], '--stop-epoch'),
    (['--save-epochs', '5', '400'], '--save-epochs: 400'), (['--train-batch-sizes', '8'], '--train-img-sizes')]


@pytest.fixture(scope='module')
def actions():
    return {name: action for action in build_parser()._actions for name in action.option_strings or [action.dest]}


def literal(text):
    if text == '':
        return None
    if '/' in text:  # [3.0 / 4.0, ..]
        return [float(a) / float(b) for a, b in (part.split('/') for part in text.strip('[]').split(','))]
    return ast.literal_eval(text)


def test_the_table_is_the_whole_of_it():
    assert len(ROWS) == 173


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row['names'].split()[-1])
def test_flag(row, actions):
    names = row['names'].split()
    assert all(name in actions for name in names)
    action = actions[names[0]]
    assert all(actions[name] is action for name in names)
    if row['action'] == 'store_true':
        assert action.nargs == 0 and action.const is True and action.default is False
        return
    assert isinstance(action, ParseKwargs) == row['action'].endswith('ParseKwargs')
    assert (action.type or str).__name__ == (row['type'] or 'str')
    assert (action.nargs or '') == (int(row['nargs']) if row['nargs'].isdigit() else row['nargs'])
    assert action.default == literal(row['default'])
    assert action.const == literal(row['const'] if row['const'] != 'None' else '')
    choices = literal(row['choices'])
    if choices is not None:
        assert set(choices) <= set(action.choices)
    else:
        assert action.choices is None or names[0] in STRICTER


@pytest.mark.parametrize('name', LATER)
def test_later_flags(name, actions):
    kind, default = LATER[name]
    assert (actions[name].type or str).__name__ == kind and actions[name].default == default


@pytest.mark.parametrize('argv, message', REFUSED)
def test_what_is_refused_says_why(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert message in capsys.readouterr().err
