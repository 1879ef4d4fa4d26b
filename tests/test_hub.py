"""Publishing and loading, the real client against a hub on the loopback interface."""
import functools
import logging
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_session import SETTINGS
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from timm.models import push_to_hf_hub

import timm_eed
from timm_eed import hub_errors

pytestmark = [
    pytest.mark.usefixtures('one_thread'),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]  # the client's own, at each upload

X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
LAYOUT = {'.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'eed/config.json', 'eed/exits.safetensors'}


@functools.lru_cache
def make_model(seed=0, name='test_resnet', **kwargs):
    torch.manual_seed(seed)
    model = timm_eed.create_model(name, **{'num_classes': 7, **kwargs})
    with torch.no_grad():
        model.train().forward_exits(torch.randn(4, 3, 32, 32))  # batch norm statistics that are not the initial ones
    return model.eval()


def logits_of(model, x=X):
    with torch.no_grad():
        return model.eval().forward_exits(x).logits


def assert_same(model, other):
    assert all(torch.equal(a, b) for a, b in zip(logits_of(model), logits_of(other)))


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def load(tmp_path):
    """`from_pretrained` into a cache of this test."""
    return lambda *args, **kwargs: timm_eed.from_pretrained(*args, cache_dir=tmp_path / 'cache', **kwargs)


def in_new_process(code, home, **env):
    """Run code in a process of its own; gives the tensors it put into `out`."""
    out = home / 'out.safetensors'
    save_file({'x': X}, home / 'x.safetensors')
    setup = ('import sys, torch\nfrom safetensors.torch import load_file, save_file\n'
             f'torch.set_num_threads({torch.get_num_threads()})\n'  # sums depend on it
             f"X = load_file({str(home / 'x.safetensors')!r})['x']\nout = {{}}\n")
    finish = f'save_file(out, {str(out)!r})\n'
    environment = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    environment.update(SETTINGS, HF_HOME=str(home), **env)
    environment['PYTHONPATH'] = os.pathsep.join(map(str, (Path(timm_eed.__file__).parents[1], Path(__file__).parent)))
    command = [sys.executable, '-c', setup + code + finish]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(out)


PLAIN_TIMM = '''
import timm
for name in ('me/tiny', 'me/tiny@v1'):
    model = timm.create_model('hf-hub:' + name, pretrained=True).eval()
    with torch.no_grad():
        out[name] = model(X)
assert 'timm_eed' not in sys.modules
'''
WITH_EXITS = '''
import timm_eed
for name in ('me/tiny', 'me/tiny@v1', 'me/secret', 'me/cifar'):
    model = timm_eed.from_pretrained(name).eval()
    with torch.no_grad():
        out.update({f'{name}/{i}': z for i, z in enumerate(model.forward_exits(X).logits)})
'''


def test_one_repo_two_readers_online_offline_at_a_tag_and_private(hub, tmp_path):
    models = {'me/tiny@v1': make_model(1), 'me/tiny': make_model(2), 'me/secret': make_model(3),
              'me/cifar': make_model(4, 'cifar_resnet20')}
    timm_eed.push_to_hub(models['me/tiny@v1'], 'me/tiny')
    HfApi().create_tag('me/tiny', tag='v1')
    timm_eed.push_to_hub(models['me/tiny'], 'me/tiny')
    timm_eed.push_to_hub(models['me/secret'], 'me/secret', private=True)
    timm_eed.push_to_hub(models['me/cifar'], 'me/cifar')
    assert set(hub.repos['me/tiny'].files()) == LAYOUT
    assert [len(hub.repos[name].commits) for name in ('me/tiny', 'me/secret')] == [3, 2]  # each starts with one
    assert hub.repos['me/secret'].private and not hub.repos['me/tiny'].private

    hub.log.clear()
    found = in_new_process(PLAIN_TIMM, tmp_path)
    assert all(torch.equal(found[name], logits_of(models[name])[-1]) for name in ('me/tiny', 'me/tiny@v1'))
    assert set(hub.fetched()) == {'config.json', 'model.safetensors'}

    home = tmp_path / 'empty'
    home.mkdir()
    expected = {f'{name}/{i}': z for name, model in models.items() for i, z in enumerate(logits_of(model))}
    for env in (dict(HF_TOKEN='hf_me'), dict(HF_HUB_OFFLINE='1')):
        hub.log.clear()
        found = in_new_process(WITH_EXITS, home, **env)
        assert found.keys() == expected.keys() and all(torch.equal(found[k], z) for k, z in expected.items())
        assert bool(hub.log) == ('HF_TOKEN' in env)
    assert all(request.token is None for request in hub.log if request.origin == 'store')


def test_create_model_takes_timms_spelling(hub, model, tmp_path, caplog):
    timm_eed.push_to_hub(model, 'me/tiny')
    model.save_pretrained(tmp_path / 'folder')
    names = ['hf-hub:me/tiny', 'hf_hub:me/tiny', 'hf-hub:me/tiny@main', f"local-dir:{tmp_path / 'folder'}"]
    for name in names:
        assert_same(timm_eed.create_model(name, pretrained=True, cache_dir=tmp_path), model)
    for name in ('me/tiny', 'hf-hub:me/tiny', tmp_path / 'folder', names[-1]):
        assert_same(timm_eed.from_pretrained(name, cache_dir=tmp_path), model)
    fresh = timm_eed.create_model(names[0], exit_indices=[2])
    assert fresh.exit_indices == [2] and not torch.equal(logits_of(fresh)[-1], logits_of(model)[-1])
    other = timm_eed.create_model(names[0], pretrained=True, exit_type='linear', cache_dir=tmp_path)
    assert other.exit_type == 'linear' and torch.equal(logits_of(other)[-1], logits_of(model)[-1])
    for asked in (dict(exit_type='conv'), dict(exit_indices=model.exit_indices)):  # those that are there
        assert_same(timm_eed.create_model(names[0], pretrained=True, cache_dir=tmp_path, **asked), model)
    other.save_pretrained(tmp_path / 'linear')
    for asked in (dict(exit_type='linear'), {}):
        assert_same(timm_eed.create_model(f"local-dir:{tmp_path / 'linear'}", pretrained=True, **asked), other)
    asked = timm_eed.create_model(f"local-dir:{tmp_path / 'linear'}", pretrained=True, exit_type='conv')
    assert asked.exit_type == 'conv' and "linear' has linear exits" in caplog.text
    five = timm_eed.create_model(names[0], pretrained=True, num_classes=5, cache_dir=tmp_path).eval()
    with torch.no_grad():
        assert all(map(torch.equal, five.forward_exits(X).features, model.forward_exits(X).features))
    assert {z.shape for z in logits_of(five)} == {(2, 5)}


def test_a_plain_timm_repo_gets_fresh_exits(hub, model, load, tmp_path):
    push_to_hf_hub(model.backbone, 'me/plain', safe_serialization=True)
    loaded = timm_eed.create_model('hf-hub:me/plain', pretrained=True, cache_dir=tmp_path)
    assert torch.equal(logits_of(loaded)[-1], logits_of(model)[-1])
    with pytest.raises(ValueError, match=r"Cannot load 'me/plain': there are no exits .* it is a plain timm model"):
        load('me/plain')


def test_a_plain_push_over_it_leads_to_the_revision_that_fits(hub, model, load):
    fitting = timm_eed.push_to_hub(model, 'me/tiny').oid
    replaced = make_model(5).backbone
    push_to_hf_hub(replaced, 'me/tiny')
    assert 'pytorch_model.bin' in hub.repos['me/tiny'].files()
    hub.log.clear()
    with pytest.raises(ValueError, match=f"main weights were replaced .* still fit at revision='{fitting}'"):
        load('me/tiny')
    assert not any('pytorch_model.bin' in request.path for request in hub.log)
    assert_same(load('me/tiny', revision=fitting), model)

    after = make_model(6)
    oid = timm_eed.push_to_hub(after, 'me/tiny').oid
    repo = hub.repos['me/tiny']
    assert set(repo.files(oid)) == LAYOUT  # the pickle went with the same commit
    assert repo.commits[oid]['parent'] in repo.commits and len(repo.commits) == 4
    assert_same(load('me/tiny'), after)


def test_a_card_that_is_there_stays(hub, model):
    timm_eed.push_to_hub(model, 'me/tiny', card='# Mine\n')
    timm_eed.push_to_hub(make_model(1), 'me/tiny', card='# New\n')
    assert hub.repos['me/tiny'].files()['README.md'] == b'# Mine\n'
    timm_eed.push_to_hub(make_model(2), 'me/tiny', card='# New\n', overwrite_card=True)
    assert hub.repos['me/tiny'].files()['README.md'] == b'# New\n'
    with pytest.raises(ValueError, match=r'Invalid metadata in README\.md'):
        timm_eed.push_to_hub(model, 'me/other', card='---\n- no mapping\n---\n')


def test_branches_and_pull_requests(hub, model, load):
    timm_eed.push_to_hub(make_model(1), 'me/tiny')
    timm_eed.push_to_hub(model, 'me/tiny', revision='dev')
    assert_same(load('me/tiny', revision='dev'), model)
    assert_same(load('me/tiny@main'), make_model(1))
    info = timm_eed.push_to_hub(make_model(2), 'me/tiny', create_pr=True, token='hf_you')
    assert info.pr_url.endswith('/discussions/1')
    assert_same(load('me/tiny', revision='refs/pr/1'), make_model(2))
    assert_same(load('me/tiny'), make_model(1))
    with pytest.raises(ValueError, match=r"may not do this to 'me/tiny'; use one with write access .*create_pr=True"):
        timm_eed.push_to_hub(model, 'me/tiny', token='hf_you')


COMMIT = 'POST /api/models/me/tiny/commit'


@pytest.mark.parametrize('pattern, kind', [
    ('POST /api/repos/create', 503), ('GET /api/models/', 503), ('POST .*/preupload/', 503), ('POST .*/batch', 503),
    ('POST /api/validate-yaml', 503), ('PUT /', 503), ('PUT /', 'cut'), ('POST .*/verify', 'cut'), (COMMIT, 503),
    (COMMIT, 'cut'), (COMMIT, 'lost'), (COMMIT, 429)])
def test_a_passing_fault_does_not_stop_a_push(hub, model, load, pattern, kind):
    hub.fail(pattern, kind)
    timm_eed.push_to_hub(model, 'me/tiny')
    assert not hub.faults[0].times  # it was met
    assert len(hub.repos['me/tiny'].commits) == 2  # not a second one where only the answer was lost
    assert_same(load('me/tiny'), model)


@pytest.mark.parametrize('pattern, kind', [
    ('GET /api/models/', 503), ('GET .*/tree/', 'cut'), ('HEAD .*/resolve/.*config', 503), ('GET .*/resolve/', 'cut'),
    ('GET /[0-9a-f]{64}', 'cut'), ('GET /[0-9a-f]{64}', 503), ('HEAD .*safetensors', 'lost')])
def test_a_passing_fault_does_not_stop_a_download(hub, model, load, pattern, kind):
    timm_eed.push_to_hub(model, 'me/tiny')
    hub.fail(pattern, kind)
    assert_same(load('me/tiny'), model)
    assert not hub.faults[0].times


@pytest.mark.parametrize('pattern, kind, error, message', [
    ('', 503, ConnectionError, r"no success with 'me/tiny' on the Hub: it answers 503; try again later\."),
    ('', 'lost', ConnectionError, r'the connection failed \(RemoteProtocolError\)'),
    ('PUT /', 'cut', ConnectionError, 'the connection failed'),
    ('PUT /', 403, ConnectionError, 'it answers 403'),
    ('POST .*/batch', 400, ConnectionError, 'it answers 400'),
    (COMMIT, 'cut', ConnectionError, 'the connection failed'),
    (COMMIT, 503, ConnectionError, 'it answers 503'),
    (COMMIT, 412, ValueError, 'kept changing while this was pushed; nothing was written, push again'),
    (COMMIT, 403, ValueError, "the token may not do this to 'me/tiny'"),
])
def test_a_lasting_fault_ends_a_push_in_a_sentence(hub, model, load, pattern, kind, error, message):
    timm_eed.push_to_hub(make_model(1), 'me/tiny')
    before = hub.repos['me/tiny'].files()
    hub.fail(pattern, kind, times=1000)
    with pytest.raises(error, match=message) as raised:
        timm_eed.push_to_hub(model, 'me/tiny')
    assert '\n' not in str(raised.value) and len(str(raised.value)) < 250
    hub.faults.clear()
    assert hub.repos['me/tiny'].files() == before
    assert_same(load('me/tiny'), make_model(1))
    timm_eed.push_to_hub(model, 'me/tiny')
    assert_same(load('me/tiny'), model)


def cached_files(cache):
    return {path.name for path in cache.rglob('*') if path.is_file() and 'blobs' in path.parts}


@pytest.mark.parametrize('pattern, kind, message', [
    ('', 503, 'it answers 503; try again later'),
    ('GET /[0-9a-f]{64}', 'cut', 'the connection failed'),
    ('GET /[0-9a-f]{64}', 500, 'it answers 500'),
    ('HEAD .*/resolve/', 503, 'it answers 503'),
])
def test_a_lasting_fault_leaves_nothing_half_written_in_the_cache(hub, model, load, tmp_path, pattern, kind, message):
    timm_eed.push_to_hub(model, 'me/tiny')
    hub.fail(pattern, kind, times=1000)
    with pytest.raises(ConnectionError, match=message) as raised:
        load('me/tiny')
    assert '\n' not in str(raised.value)
    whole = {hub_file for data in hub.repos['me/tiny'].files().values() for hub_file in names_of(data)}
    assert cached_files(tmp_path / 'cache') <= whole
    with pytest.raises(ValueError, match="the cache holds no complete copy of 'me/tiny' at revision 'main'"):
        load('me/tiny', local_files_only=True)
    hub.faults.clear()
    assert_same(load('me/tiny'), model)
    assert_same(load('me/tiny', local_files_only=True), model)


def names_of(data):
    from loopback_hub import _git_sha, _sha256
    return _git_sha(data), _sha256(data)


def test_a_push_in_between_is_built_upon(hub, model, load):
    """Someone else's commit arrives after the head was read: the commit is refused and made again on top."""
    timm_eed.push_to_hub(make_model(1), 'me/tiny')

    def intrude(hub):
        repo = hub.repos['me/tiny']
        repo.commit('main', 'by someone else', {**repo.files(), 'pytorch_model.bin': b'', 'notes.txt': b'kept'})
    hub.fail(COMMIT, intrude)
    timm_eed.push_to_hub(model, 'me/tiny')
    assert set(hub.repos['me/tiny'].files()) == LAYOUT | {'notes.txt'}
    titles = [commit['title'] for commit in hub.repos['me/tiny'].commits.values()]
    assert titles[-2:] == ['by someone else', 'Add multi-exit model']
    assert_same(load('me/tiny'), model)


def test_what_the_caller_can_mend_is_a_value_error(hub, model, load, monkeypatch, tmp_path):
    timm_eed.push_to_hub(model, 'me/tiny')
    timm_eed.push_to_hub(model, 'me/secret', private=True)
    hub.repos['me/empty'] = hub.repos['me/tiny'].__class__(private=False)
    hub.repos['me/empty'].commit('main', 'initial', {'config.json': hub.repos['me/tiny'].files()['config.json']})
    hub.repos['me/pickle'] = hub.repos['me/empty'].__class__(private=False)
    hub.repos['me/pickle'].commit('main', 'initial', {**hub.repos['me/empty'].files(), 'pytorch_model.bin': b'cos'})
    for args, kwargs, message in [
            (['me/none'], {}, "there is no repo 'me/none', or it is private"),
            (['me/secret'], dict(token='hf_you'), "there is no repo 'me/secret', or it is private"),
            (['me/secret'], dict(token=False), "there is no repo 'me/secret', or it is private"),
            (['me/tiny'], dict(revision='v9'), "'me/tiny' has no revision 'v9'"),
            (['me/tiny@v9'], {}, "'me/tiny' has no revision 'v9'"),
            (['me/tiny@v9'], dict(revision='v8'), 'say one of them'),
            (['me/tiny'], dict(token='hf_old'), 'wrong or expired: .*unset HF_TOKEN or pass token=False'),
            (['me/tiny'], dict(token='hf_me\n'), 'token holds blanks'),
            (['me/empty'], {}, r'there is no model\.safetensors'),
            (['me/pickle'], {}, r'there is no model\.safetensors, .*\(pickles\) are not read'),
            (['nowhere'], {}, "'nowhere' is neither a folder nor a repo of the form 'user/name'"),
            (['me/in/valid'], {}, 'neither a folder nor a repo'),
            (['me/in valid'], {}, 'Repo id must'),
            (['local-dir:/no/where'], {}, "there is no folder '/no/where'"),
            ([tmp_path], dict(revision='v1'), 'is a folder and has no revisions'),
    ]:
        with pytest.raises(ValueError, match=message):
            load(*args, **kwargs)
    with pytest.raises(ValueError, match=r'\(pickles\) are not read'):
        timm_eed.create_model('hf-hub:me/pickle', pretrained=True, cache_dir=tmp_path)
    assert not any(name.endswith('.bin') for name in hub.fetched())

    monkeypatch.setenv('HF_TOKEN', 'hf_expired')  # 401 on a public repo
    for call in (lambda: load('me/tiny'), lambda: timm_eed.push_to_hub(model, 'me/tiny')):
        with pytest.raises(ValueError, match='it is wrong or expired'):
            call()
    assert_same(load('me/tiny', token=False), model)
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(ValueError, match="'me/tiny' needs a token: log in with `hf auth login`"):
        timm_eed.push_to_hub(model, 'me/tiny')
    with pytest.raises(ValueError, match=r'timm\.models\.push_to_hf_hub publishes plain models'):
        timm_eed.push_to_hub(model.backbone, 'me/tiny')


def test_tokens_are_neither_logged_nor_stored(hub, model, load, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    logging.getLogger('huggingface_hub').setLevel(logging.DEBUG)
    hub.tokens['hf_sesame'] = 'me'
    messages = []
    for pattern, kind in [('', 503), ('PUT', 'cut'), (COMMIT, 'cut'), (COMMIT, 403)]:
        hub.faults.clear()
        hub.fail(pattern, kind, times=1000)
        with pytest.raises((ValueError, ConnectionError)) as raised:
            timm_eed.push_to_hub(model, 'me/tiny', token='hf_sesame')
        messages.append(str(raised.getrepr(style='native')).replace("token='hf_sesame'", ''))
    hub.faults.clear()
    timm_eed.push_to_hub(model, 'me/tiny', token='hf_sesame')
    load('me/tiny', token='hf_sesame')
    with pytest.raises(ValueError) as raised:
        load('me/tiny', token='hf_sesame\n')
    messages.append(str(raised.value))
    assert any(request.token == 'hf_sesame' for request in hub.log)
    said = [*messages, caplog.text, *capfd.readouterr()]
    assert not any('sesame' in text for text in said)
    written = [path for path in tmp_path.rglob('*') if path.is_file()]
    stored = [*(path.read_bytes() for path in written), *hub.repos['me/tiny'].files().values()]
    assert len(written) > 4 and not any(b'sesame' in content for content in stored)


def test_a_dead_hub_falls_back_on_the_cache(hub, model, load, monkeypatch):
    timm_eed.push_to_hub(model, 'me/tiny')
    load('me/tiny')
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')
    assert_same(load('me/tiny'), model)
    with pytest.raises(ConnectionError, match='the connection failed'):
        load('me/other')


def test_half_a_cache_is_told_from_a_plain_repo(hub, model, load, tmp_path):
    """Plain timm caches the main files alone; offline that must not look like a repo without exits."""
    timm_eed.push_to_hub(model, 'me/tiny')
    timm.create_model('hf-hub:me/tiny', pretrained=True, cache_dir=tmp_path / 'cache')
    with pytest.raises(ValueError, match='load it once online'):
        load('me/tiny', local_files_only=True)
    assert_same(load('me/tiny'), model)


def test_waits_are_seconds():
    assert 3 < sum(hub_errors.WAITS) < 20


WITH_XET = '''
import os
from pathlib import Path
from xet_hub import XetHub
hub = XetHub(Path(os.environ['HF_HOME']))
hub.tokens['hf_me'] = 'me'
os.environ['HF_ENDPOINT'] = hub.url
import timm, timm_eed
model = timm_eed.create_model('test_resnet', num_classes=7).eval()
timm_eed.push_to_hub(model, 'me/tiny')
assert hub.uploads and not any(request.origin == 'store' for request in hub.log)
loaded = timm_eed.from_pretrained('me/tiny').eval()
assert hub.downloads and not any(request.origin == 'store' for request in hub.log)
plain = timm.create_model('hf-hub:me/tiny', pretrained=True).eval()
with torch.no_grad():
    out.update({f'pushed {i}': z for i, z in enumerate(model.forward_exits(X).logits)})
    out.update({f'loaded {i}': z for i, z in enumerate(loaded.forward_exits(X).logits)})
    out['plain 3'] = plain(X)
timm.models.push_to_hf_hub(timm.create_model('test_resnet', num_classes=7), 'me/tiny')
try:
    timm_eed.from_pretrained('me/tiny')
except ValueError as error:
    fitting = str(error).split("revision='")[1][:40]
timm_eed.from_pretrained('me/tiny', revision=fitting)
assert len(hub.repos['me/tiny'].commits[fitting]['files']) == 6
'''


def test_the_same_through_xet(tmp_path):
    """How the real Hub stores large files; the rest of the suite uses plain LFS."""
    pytest.importorskip('hf_xet')
    found = in_new_process(WITH_XET, tmp_path, HF_HUB_DISABLE_XET='0', HF_TOKEN='hf_me')
    for i in range(4):
        assert torch.equal(found[f'pushed {i}'], found[f'loaded {i}'])
    assert torch.equal(found['plain 3'], found['pushed 3'])
