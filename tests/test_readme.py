"""The README does what it says: its snippet prints what it shows, its flags exist."""
import contextlib
import io
import re
from pathlib import Path

import pytest

from timm_eed import cli
from timm_eed.training.flags import build_parser

README = (Path(__file__).parent.parent / 'README.md').read_text(encoding='utf-8')


def test_snippets_print_what_is_shown():
    pairs = re.findall(r'```python\n(.*?)```\n\n```\n(.*?)```', README, flags=re.DOTALL)
    assert len(pairs) == README.count('```python')
    for code, shown in pairs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, 'README.md', 'exec'), {})
        assert printed.getvalue() == shown


@pytest.mark.parametrize('name', ['early_exit.md'])
def test_snippets_of_the_docs_run(name):
    text = (Path(__file__).parent.parent / 'docs' / name).read_text(encoding='utf-8')
    snippets = re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL)
    assert snippets
    for code in snippets:
        exec(compile(code, name, 'exec'), {})


def test_flags_named_exist():
    flags = set(re.findall(r'(?<![\w-])--[a-z][a-z0-9-]+', README)) - {'--nproc'}  # torchrun's
    commands = cli.build_parser()._subparsers._group_actions[0].choices.values()
    parsers = [build_parser(), *commands]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    assert flags - known == set()


def test_files_named_exist():
    for path in re.findall(r'^([\w./]+\.py|[\w./]+/) {2,}', README, flags=re.MULTILINE):
        assert (Path(__file__).parent.parent / path).exists(), path


def test_the_exit_table_is_what_the_command_prints(capsys):
    shown = re.search(r'```bash\ntimm-eed (info .*?)\n```\n\n```\n(.*?)```', README, flags=re.DOTALL)
    cli.main(shown[1].split())
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown[2].splitlines()
