"""A Hugging Face Hub on the loopback interface, for the real huggingface_hub client to talk to.

Git storage is a dictionary per commit; large files go through a second origin, the object store, which rejects any
token. Every request is logged, and faults are injected by rule. Set `HF_ENDPOINT` to `hub.url` before huggingface_hub
is imported.
"""
import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TIME = '2026-01-01T00:00:00.000Z'
LARGE = ('.safetensors', '.bin', '.png')


class Request(NamedTuple):
    """A logged request; origin is 'hub' or 'store'."""
    origin: str
    method: str
    path: str
    token: Optional[str]


@dataclass
class Fault:
    """A rule: requests whose 'METHOD /path' matches fail, so many times.

    kind: a status to answer with; 'cut': half of the body comes through, then the connection ends; 'lost': the
    request is carried out and the answer lost; or a function, called with the hub before the request goes on.
    """
    pattern: str
    kind: Union[int, str, Callable[['LoopbackHub'], None]]
    times: int = 1


@dataclass
class Repo:
    """Commits by their hash, each with parent, title and files."""
    private: bool
    commits: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    branches: Dict[str, str] = field(default_factory=dict)
    tags: Dict[str, str] = field(default_factory=dict)
    pulls: int = 0

    def commit(self, branch: str, title: str, files: Dict[str, bytes]) -> str:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(repr((parent, title, sorted(files), len(self.commits))).encode()).hexdigest()
        self.commits[oid] = dict(parent=parent, title=title, files=files)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> Optional[str]:
        return self.branches.get(revision) or self.tags.get(revision) or (
            revision if revision in self.commits else None)

    def files(self, revision: str = 'main') -> Dict[str, bytes]:
        oid = self.resolve(revision)
        assert oid is not None
        return self.commits[oid]['files']


class HubError(Exception):
    """An answer that is an error, with the headers that tell the client which."""

    def __init__(self, status: int, code: str = '', message: str = ''):
        self.status = status
        self.headers = {k: v for k, v in (('X-Error-Code', code), ('X-Error-Message', message)) if v}


class LoopbackHub:
    """The server; `tokens` maps tokens to users."""

    def __init__(self) -> None:
        self.tokens: Dict[str, str] = {}
        self.repos: Dict[str, Repo] = {}
        self.objects: Dict[str, bytes] = {}
        self.log: List[Request] = []
        self.faults: List[Fault] = []
        self.lock = threading.RLock()
        self.sockets: List[socket.socket] = []
        self.servers = [self._serve('hub'), self._serve('store')]
        self.url, self.store_url = (f'http://127.0.0.1:{server.server_address[1]}' for server in self.servers)

    @property
    def routes(self) -> Dict[str, List[Tuple[str, str]]]:
        """Patterns of 'METHOD /path' by origin, and what answers them."""
        return ROUTES

    def _serve(self, origin: str) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), dict(hub=self, origin=origin)))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()
        return server

    def reset(self) -> None:
        """Forget everything."""
        with self.lock:
            for content in (self.tokens, self.repos, self.objects, self.log, self.faults):
                content.clear()

    def fail(self, pattern: str, kind: Any, times: int = 1) -> None:
        """Inject a fault, see `Fault`."""
        self.faults.append(Fault(pattern, kind, times))

    def fetched(self) -> List[str]:
        """Files of repos that were asked for."""
        return [path.split('/resolve/', 1)[1].split('/', 1)[1] for _, _, path, _ in self.log if '/resolve/' in path]

    def close(self) -> None:
        """Stop, also the connections that clients keep alive."""
        for server in self.servers:
            server.shutdown()
            server.server_close()
        for connection in self.sockets:
            _cut(connection)

    # what the routes below do, by name

    def whoami(self, call: 'Call') -> Any:
        if call.user is None:
            raise HubError(401)
        return dict(type='user', name=call.user, orgs=[], auth={})

    def create(self, call: 'Call') -> Any:
        user = call.need_user()
        body = call.json()
        repo_id = f"{body.get('organization') or user}/{body['name']}"
        url = f'{self.url}/{repo_id}'
        if not repo_id.startswith(f'{user}/'):
            raise HubError(403, message="You don't have the rights to create a model under this namespace")
        if repo_id in self.repos:
            return 409, dict(error='You already created this model repo', url=url)
        self.repos[repo_id] = repo = Repo(private=body.get('visibility') == 'private' or body.get('private') is True)
        repo.commit('main', 'initial commit', {'.gitattributes': b''})
        return dict(url=url)

    def validate(self, call: 'Call') -> Any:
        match = re.match(r'---\n(.*?)\n---', call.json()['content'], re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError:
            metadata = None
        if not isinstance(metadata, dict):
            return 400, dict(errors=[dict(message='metadata is no mapping')], warnings=[])
        return dict(errors=[], warnings=[])

    def info(self, call: 'Call', repo_id: str, revision: str = 'main') -> Any:
        repo, oid = call.repo(repo_id, revision)
        return dict(
            id=repo_id, author=repo_id.split('/')[0], sha=oid, private=repo.private, gated=False, tags=[],
            siblings=[dict(rfilename=path) for path in repo.commits[oid]['files']], lastModified=TIME, createdAt=TIME)

    def tree(self, call: 'Call', repo_id: str, revision: str) -> Any:
        repo, oid = call.repo(repo_id, revision)
        return [self.entry(path, data) for path, data in repo.commits[oid]['files'].items()]

    def paths_info(self, call: 'Call', repo_id: str, revision: str) -> Any:
        repo, oid = call.repo(repo_id, revision)
        files = repo.commits[oid]['files']
        return [self.entry(path, files[path]) for path in parse_qs(call.body.decode())['paths'] if path in files]

    def entry(self, path: str, data: bytes) -> Dict[str, Any]:
        if not _is_large(path):
            return dict(type='file', oid=_git_sha(data), size=len(data), path=path)
        sha256, size = self.describe(data)
        return dict(type='file', oid=_git_sha(data), size=size, path=path, lfs=dict(
            oid=sha256, size=size, pointerSize=130))

    def describe(self, data: bytes) -> Tuple[str, int]:
        """SHA-256 and size of a large file."""
        return _sha256(data), len(data)

    def stored(self, oid: str, size: int) -> bytes:
        """A large file that was uploaded before its commit."""
        if oid not in self.objects:
            raise HubError(400, message='an object was not uploaded')
        return self.objects[oid]

    def refs(self, call: 'Call', repo_id: str) -> Any:
        repo, _ = call.repo(repo_id)
        return dict(converts=[], **{kind: [
            dict(name=name, ref=f'refs/heads/{name}', targetCommit=oid) for name, oid in getattr(repo, kind).items()]
            for kind in ('branches', 'tags')})

    def commits(self, call: 'Call', repo_id: str, revision: str) -> Any:
        repo, oid = call.repo(repo_id, revision)
        found = []
        while oid:
            commit = repo.commits[oid]
            found.append(dict(id=oid, title=commit['title'], message='', date=TIME, authors=[]))
            oid = commit['parent']
        return found

    def tag(self, call: 'Call', repo_id: str, revision: str) -> Any:
        repo, oid = call.repo(repo_id, revision, write=True)
        if call.json()['tag'] in repo.tags:
            raise HubError(409)
        repo.tags[call.json()['tag']] = oid
        return 201, {}

    def branch(self, call: 'Call', repo_id: str, name: str) -> Any:
        repo, oid = call.repo(repo_id, write=True)
        if name in repo.branches:
            raise HubError(409)
        repo.branches[name] = oid
        return 201, {}

    def preupload(self, call: 'Call', repo_id: str, revision: str) -> Any:
        repo, oid = call.repo(repo_id, revision, write='create_pr' not in call.query)
        there = repo.commits[oid]['files']
        return dict(files=[dict(
            path=file['path'], uploadMode='lfs' if _is_large(file['path']) else 'regular', shouldIgnore=False,
            oid=None if file['path'] not in there else
            self.describe(there[file['path']])[0] if _is_large(file['path']) else _git_sha(there[file['path']]))
            for file in call.json()['files']])

    def lfs_batch(self, call: 'Call', repo_id: str) -> Any:
        call.need_user()
        objects = []
        for item in call.json()['objects']:
            actions = dict(upload=dict(href=f"{self.store_url}/{item['oid']}", header={}),
                           verify=dict(href=f'{self.url}/{repo_id}.git/info/lfs/verify'))
            objects.append(item if item['oid'] in self.objects else dict(item, actions=actions))
        return dict(transfer='basic', objects=objects)

    def lfs_verify(self, call: 'Call', repo_id: str) -> Any:
        call.need_user()
        if len(self.objects.get(call.json()['oid'], b'')) != call.json()['size']:
            raise HubError(422)
        return {}

    def commit(self, call: 'Call', repo_id: str, revision: str) -> Any:
        pull = 'create_pr' in call.query
        repo, oid = call.repo(repo_id, revision, write=not pull)
        header, *operations = (json.loads(line) for line in call.body.splitlines())
        parent = header['value'].get('parentCommit')
        if parent and parent != oid:
            raise HubError(412, message='A commit has happened since. Please refresh and try again.')
        files = dict(repo.commits[oid]['files'])
        for operation in operations:
            value = operation['value']
            if operation['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif operation['key'] == 'lfsFile':
                files[value['path']] = self.stored(value['oid'], value['size'])
            elif files.pop(value['path'], None) is None:
                raise HubError(404, 'EntryNotFound', "A file with this name doesn't exist")
        if pull:
            repo.pulls += 1
            revision = f'refs/pr/{repo.pulls}'
            repo.branches[revision] = oid
        oid = repo.commit(revision, header['value']['summary'], files)
        answer = dict(commitOid=oid, commitUrl=f'{self.url}/{repo_id}/commit/{oid}', success=True)
        if pull:
            answer['pullRequestUrl'] = f'{self.url}/{repo_id}/discussions/{repo.pulls}'
        return answer

    def resolve(self, call: 'Call', repo_id: str, revision: str, path: str) -> Any:
        repo, oid = call.repo(repo_id, revision)
        headers = {'X-Repo-Commit': oid}
        data = repo.commits[oid]['files'].get(path)
        if data is None:
            error = HubError(404, 'EntryNotFound', 'Entry not found')
            error.headers.update(headers)
            raise error
        if not _is_large(path):
            return 200, data, {**headers, 'ETag': f'"{_git_sha(data)}"'}
        sha256, size = self.describe(data)
        return 302, b'', {
            **headers, 'Location': f'{self.store_url}/{sha256}', 'X-Linked-Etag': f'"{sha256}"',
            'X-Linked-Size': str(size)}

    def store_put(self, call: 'Call', oid: str) -> Any:
        if _sha256(call.body) != oid:
            raise HubError(400, message='wrong checksum')
        self.objects[oid] = call.body
        return 200, b'', {}

    def store_get(self, call: 'Call', oid: str) -> Any:
        data = self.objects[oid]
        start = re.match(r'bytes=(\d+)-', call.headers.get('Range') or '')
        if start:
            begin = int(start[1])
            return 206, data[begin:], {'Content-Range': f'bytes {begin}-{len(data) - 1}/{len(data)}'}
        return 200, data, {'ETag': f'"{oid}"'}


M = r'/api/models/([^/]+/[^/]+)'
R = r'/([^/]+/[^/]+)'
ROUTES: Dict[str, List[Tuple[str, str]]] = {
    'hub': [
        (r'GET /api/whoami-v2', 'whoami'), (r'POST /api/repos/create', 'create'),
        (r'POST /api/validate-yaml', 'validate'), (rf'GET {M}', 'info'), (rf'GET {M}/revision/([^/]+)', 'info'),
        (rf'GET {M}/tree/([^/]+)', 'tree'), (rf'POST {M}/paths-info/([^/]+)', 'paths_info'), (rf'GET {M}/refs', 'refs'),
        (rf'GET {M}/commits/([^/]+)', 'commits'), (rf'POST {M}/tag/([^/]+)', 'tag'),
        (rf'POST {M}/branch/([^/]+)', 'branch'), (rf'POST {M}/preupload/([^/]+)', 'preupload'),
        (rf'POST {R}\.git/info/lfs/objects/batch', 'lfs_batch'), (rf'POST {R}\.git/info/lfs/verify', 'lfs_verify'),
        (rf'POST {M}/commit/([^/]+)', 'commit'), (rf'(?:GET|HEAD) {R}/resolve/([^/]+)/(.+)', 'resolve'),
    ],
    'store': [(r'PUT /(\w+)', 'store_put'), (r'GET /(\w+)', 'store_get')],
}


class Call:
    """One request, with the rights of who sent it."""

    def __init__(self, hub: LoopbackHub, headers: Any, query: Dict[str, List[str]], body: bytes, token: Optional[str]):
        self.hub, self.headers, self.query, self.body, self.token = hub, headers, query, body, token
        if token is not None and token not in hub.tokens:
            raise HubError(401, message='Invalid credentials in Authorization header')
        self.user = hub.tokens.get(token or '')

    def json(self) -> Any:
        return json.loads(self.body)

    def need_user(self) -> str:
        if self.user is None:
            raise HubError(401, message='Invalid username or password.')
        return self.user

    def repo(self, repo_id: str, revision: str = 'main', write: bool = False) -> Tuple[Repo, str]:
        repo = self.hub.repos.get(repo_id)
        owner = repo_id.split('/')[0] == self.user
        if repo is None or (repo.private and not owner):
            raise HubError(404 if self.user else 401, 'RepoNotFound', 'Repository not found')
        if write and not owner:
            self.need_user()
            raise HubError(403, message='Forbidden: pass create_pr=1')
        oid = repo.resolve(unquote(revision))
        if oid is None:
            raise HubError(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return repo, oid


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    origin: str
    protocol_version = 'HTTP/1.1'
    wbufsize = -1  # headers and body in one packet
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub.sockets.append(self.connection)

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        line = f'{self.command} {url.path}'
        authorization = self.headers.get('Authorization')
        token = authorization.split()[-1] if authorization else None
        with self.hub.lock:
            self.hub.log.append(Request(self.origin, self.command, url.path, token))
            fault = next((f for f in self.hub.faults if f.times and re.search(f.pattern, line)), None)
            if fault:
                fault.times -= 1
        kind = fault.kind if fault else None
        size = int(self.headers.get('Content-Length') or 0)
        if kind == 'cut' and size:
            self.rfile.read(size // 2)
            return _cut(self.connection)
        body = self._chunks() if 'chunked' in (self.headers.get('Transfer-Encoding') or '') else self.rfile.read(size)
        if callable(kind):
            kind(self.hub)
        try:
            if isinstance(kind, int):
                raise HubError(kind)
            if self.origin == 'store' and token:
                raise HubError(400, message='tokens are no business of the store')
            status, data, headers = self._result(line, body, parse_qs(url.query, keep_blank_values=True), token)
        except HubError as error:
            status, data, headers = error.status, b'', error.headers
        if kind == 'lost':
            return _cut(self.connection)
        self.send_response(status)
        for name, value in {'Content-Length': str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if kind == 'cut':
            self.wfile.write(data[:len(data) // 2])
            self.wfile.flush()
            return _cut(self.connection)
        if self.command != 'HEAD':
            self.wfile.write(data)

    def _result(
            self, line: str, body: bytes, query: Dict[str, List[str]], token: Optional[str],
    ) -> Tuple[int, bytes, Dict[str, str]]:
        for pattern, name in self.hub.routes[self.origin]:
            match = re.fullmatch(pattern, line)
            if match:
                with self.hub.lock:
                    call = Call(self.hub, self.headers, query, body, token)
                    result = getattr(self.hub, name)(call, *map(unquote, match.groups()))
                if isinstance(result, tuple) and len(result) == 3:
                    return result
                status, content = result if isinstance(result, tuple) else (200, result)
                return status, json.dumps(content).encode(), {'Content-Type': 'application/json'}
        raise HubError(404, message=f'no such route: {line}')

    def _chunks(self) -> bytes:
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the client was first
    connection.close()


def _is_large(path: str) -> bool:
    return path.endswith(LARGE)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_sha(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
