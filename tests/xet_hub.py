"""The loopback hub with Xet storage, as the real Hub has it, through the local store of the hf_xet client.

`local:///folder` is a scheme of hf_xet's own tests. The store is open to the process that uploads, so each download
gets a copy; which file an uploaded SHA-256 is follows from the store's shards.
"""
import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

from loopback_hub import ROUTES, Call, HubError, LoopbackHub, M

WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30


class XetFile(bytes):
    """Stands for a file whose content is in the store."""
    sha256: str
    size: int
    xet_hash: str


class XetHub(LoopbackHub):
    """Large files go through Xet; `uploads` and `downloads` count the tokens handed out."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.store = folder / 'store'
        self.store.mkdir()
        self.uploads = self.downloads = 0
        super().__init__()

    @property
    def routes(self) -> Dict[str, List[Tuple[str, str]]]:
        own = [(rf'GET {M}/xet-(write|read)-token/([^/]+)', 'xet_token')]
        return {**ROUTES, 'hub': [*own, *ROUTES['hub']]}

    def xet_token(self, call: Call, repo_id: str, kind: str, revision: str) -> Any:
        call.repo(repo_id, revision, write=kind == 'write')
        store = self.store
        if kind == 'write':
            self.uploads += 1
        else:
            self.downloads += 1
            store = Path(tempfile.mkdtemp(dir=self.folder)) / 'copy'
            shutil.copytree(self.store, store)
        answer = dict(accessToken='xet', exp=4102444800, casUrl=f'local://{store}')
        return 200, json.dumps(answer).encode(), {
            'X-Xet-Cas-Url': answer['casUrl'], 'X-Xet-Access-Token': 'xet', 'X-Xet-Token-Expiration': '4102444800'}

    def stored(self, oid: str, size: int) -> bytes:
        file = XetFile(oid.encode())
        try:
            file.sha256, file.size, file.xet_hash = oid, size, self.known_files()[oid]
        except KeyError:
            raise HubError(400, message='an object was not uploaded') from None
        return file

    def known_files(self) -> Dict[str, str]:
        """Xet hashes by SHA-256."""
        found: Dict[str, str] = {}
        for shard in self.store.rglob('shards/*.mdb'):
            data, position = shard.read_bytes(), 48  # after the header, records of 48 bytes
            while data[position:position + 32] != b'\xff' * 32:
                file_hash = data[position:position + 32]
                flags, entries = struct.unpack_from('<II', data, position + 32)
                position += 48 * (1 + entries * (2 if flags & WITH_VERIFICATION else 1))
                if flags & WITH_METADATA:
                    found[_hexadecimal(data[position:position + 32])] = _hexadecimal(file_hash)
                    position += 48
        return found

    def describe(self, data: bytes) -> Tuple[str, int]:
        return (data.sha256, data.size) if isinstance(data, XetFile) else super().describe(data)

    def entry(self, path: str, data: bytes) -> Dict[str, Any]:
        entry = super().entry(path, data)
        return dict(entry, xetHash=data.xet_hash) if isinstance(data, XetFile) else entry

    def resolve(self, call: Call, repo_id: str, revision: str, path: str) -> Any:
        status, body, headers = super().resolve(call, repo_id, revision, path)
        data = call.repo(repo_id, revision)[0].files(revision)[path]
        if isinstance(data, XetFile):
            link = f'<{self.url}/api/models/{repo_id}/xet-read-token/{revision}>; rel="xet-auth"'
            headers.update({'X-Xet-Hash': data.xet_hash, 'Link': link})
        return status, body, headers


def _hexadecimal(raw: bytes) -> str:
    """Four little-endian words."""
    return ''.join(raw[i:i + 8][::-1].hex() for i in range(0, 32, 8))
