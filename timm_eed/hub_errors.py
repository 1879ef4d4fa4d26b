"""What goes wrong between here and the Hugging Face Hub: tried again where that helps, else said in one sentence."""
import json
import logging
import time
from typing import Any, Callable, Optional, TypeVar, Union

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of the client's HTTP library, httpx or httpx2
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ['Token', 'check_token', 'explained', 'first_line', 'retrying', 'why_not_loaded']

_logger = logging.getLogger(__name__)

Token = Union[str, bool, None]
T = TypeVar('T')

WAITS = (1., 2., 4.)  # seconds before each further try
_TRANSIENT = (408, 412, 429, 500, 502, 503, 504)  # 412: someone else's commit came first, the next try builds on it


def check_token(token: Token) -> None:
    """Refuse what cannot be a token, before an HTTP library quotes it in an error message.

    Raises:
        ValueError: If it holds anything but visible ASCII characters.
    """
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and ' ' not in token and token):
        raise ValueError(
            'token holds blanks, line ends or other characters that no token has; pass it without them, or leave '
            'it out to use the one of `hf auth login` or HF_TOKEN.')


def retrying(call: Callable[[], T], repo_id: str, revision: Optional[str] = None, once: bool = False) -> T:
    """The result of a call to the Hub, tried again after faults that pass, unless `once` says it must not be.

    Raises:
        ValueError: What the caller can mend: names, revisions, tokens.
        ConnectionError: If the Hub still cannot be reached or fails.
    """
    for wait in (None,) if once else (*WAITS, None):
        try:
            return call()
        except Exception as error:
            if wait is None or not _is_transient(error):
                raise explained(error, repo_id, revision) from _chained(error)
            _logger.warning(f"'{repo_id}': {_reason(error)}; trying again in {wait:g} s.")
            time.sleep(wait)
    raise AssertionError('unreachable')


def explained(error: Exception, repo_id: str, revision: Optional[str] = None) -> Exception:
    """The error to raise instead of one of the client library's; its own where it is a programming error."""
    status = _status(error)
    if isinstance(error, GatedRepoError):
        return ValueError(
            f"'{repo_id}' is gated: accept its conditions on its page, and use a token of the account that did.")
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        if 'authorization' not in error.response.request.headers:  # type: ignore[attr-defined]
            return ValueError(f"'{repo_id}' needs a token: log in with `hf auth login`, set HF_TOKEN or pass token=.")
        return ValueError(
            f"the Hub does not take the token for '{repo_id}', it is wrong or expired: `hf auth login` renews it; "
            'for a public repo unset HF_TOKEN or pass token=False.')
    if isinstance(error, RepositoryNotFoundError):
        return ValueError(
            f"there is no repo '{repo_id}', or it is private and the token may not see it: check the name, and log "
            'in with `hf auth login`, set HF_TOKEN or pass token=.')
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"'{repo_id}' has no revision '{revision or 'main'}'; its page lists branches and tags.")
    if status == 403:
        return ValueError(
            f"the token may not do this to '{repo_id}'; use one with write access to it, or create_pr=True.")
    if status == 412:
        return ValueError(f"'{repo_id}' kept changing while this was pushed; nothing was written, push again.")
    if isinstance(error, LocalEntryNotFoundError) and not _is_transient(error):
        return ValueError(
            f"the cache holds no complete copy of '{repo_id}' at revision '{revision or 'main'}' and downloads are "
            'off; load it once online (and see cache_dir).')
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return ValueError(f"'{repo_id}': {_reason(error)}.")
    if isinstance(error, (HTTPError, OSError, RuntimeError, json.JSONDecodeError)):
        return ConnectionError(f"no success with '{repo_id}' on the Hub: {_reason(error)}; try again later.")
    return error


def why_not_loaded(error: Exception, name: str) -> str:
    """A sentence on what kept timm from making a model with pretrained weights."""
    if isinstance(error, (HfHubHTTPError, LocalEntryNotFoundError, EntryNotFoundError, HTTPError)):
        return str(explained(error, name))
    return f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0][:300]}'


def _is_transient(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT
    if isinstance(error, json.JSONDecodeError) or type(error).__name__ == 'FileMetadataError':
        return True  # a proxy's or a failing server's page instead of the answer
    if isinstance(error, HTTPError):
        return True  # no answer at all
    if isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        return _is_transient(error.__cause__)  # what kept the client from the Hub, or an upload from its end
    return type(error) is OSError and 'onsistency check' in str(error)  # fewer bytes than promised


def _status(error: BaseException) -> Optional[int]:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _chained(error: Exception) -> Optional[Exception]:
    """What to show as the cause: messages of HTTP libraries may quote headers, and with them the token."""
    return error if isinstance(error, (HfHubHTTPError, LocalEntryNotFoundError)) else None


def _reason(error: BaseException) -> str:
    """The deepest cause, in a few words."""
    while isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__
    status = _status(error)
    if status is not None:
        message: Any = getattr(error, 'server_message', None)
        return f"it answers {status}" + (f' ({str(message).splitlines()[0][:200]})' if message else '')
    if isinstance(error, HTTPError):
        return f'the connection failed ({type(error).__name__})'
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, for the end of a sentence."""
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:300]}' if lines else type(error).__name__
