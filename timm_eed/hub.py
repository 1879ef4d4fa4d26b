"""Multi-exit models on the Hugging Face Hub: one repo, which plain timm loads as a plain model.

The layout and its checks are in `pretrained`. Tokens are the client library's matter (`hf auth login`, HF_TOKEN, or
the `token` argument): none is stored or logged here.
"""
import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    snapshot_download,
)
from huggingface_hub.utils import validate_repo_id
from timm.models import parse_model_name

from .hub_errors import Token, check_token, retrying
from .multi_exit import MultiExitWrapper, wrap
from .pretrained import EXITS_CONFIG, FILES, MAIN, StaleExitsError, has_exits, load_backbone, load_multi_exit
from .repo_config import read_exits_config

__all__ = ['Source', 'check_repo_id', 'from_pretrained', 'load_source', 'push_folder', 'push_to_hub']

_logger = logging.getLogger(__name__)

_PICKLES = ('.bin', '.pth', '.pt', '.pth.tar', '.ckpt', '.pkl', '.pickle')


def from_pretrained(
        repo_or_dir: Union[str, Path],
        *,
        revision: Optional[str] = None,
        token: Token = None,
        cache_dir: Optional[Union[str, Path]] = None,
        local_files_only: bool = False,
) -> MultiExitWrapper:
    """A published or saved multi-exit model, with the weights of all exits; in training mode, as timm's models are.

    Nothing that is loaded is unpickled or run; files that are not what `save_pretrained` writes are refused.

    Args:
        repo_or_dir: Repo as 'user/name' or 'user/name@revision', or a folder; timm's prefixes 'hf-hub:' and
            'local-dir:' say which where it could be both (a folder wins).
        revision: Branch, tag or commit.
        token: For private repos; None takes the one of `hf auth login` or HF_TOKEN, False none.
        cache_dir: Folder of downloads, huggingface_hub's own if not given.
        local_files_only: Load from the cache alone.

    Raises:
        ValueError: If repo or revision do not exist, the token is not accepted, or the files do not fit together; if
            only the main weights were replaced, the message names the revision where the exits still fit.
        ConnectionError: If the Hub cannot be reached, after some tries, and the cache does not hold the model.

    Examples:

        ```python
        model = timm_eed.from_pretrained('user/resnet50_eed').eval()
        out = model.forward_exits(x)
        ```
    """
    return _load(Source(repo_or_dir, revision, token, cache_dir, local_files_only))


def load_source(
        source: 'Source',
        exit_indices: Optional[Union[int, Sequence[int]]] = None,
        exit_type: Optional[str] = None,
        **timm_kwargs: Any,
) -> MultiExitWrapper:
    """What `timm_eed.create_model` gives for the pretrained model of a repo or folder.

    Raises:
        ValueError: As `from_pretrained`.
        ConnectionError: As `from_pretrained`.
    """
    if source.has_exits and exit_indices is None and exit_type is None:
        return _load(source, **timm_kwargs)
    try:
        there = read_exits_config(source.folder) if source.has_exits else None
        exit_type = exit_type or (there.exit_type if there else 'conv')
        model = wrap(load_backbone(source.folder, **timm_kwargs), exit_indices, exit_type)
    except ValueError as error:
        raise ValueError(f"Cannot load '{source.name}': {error}") from error
    if there is None:
        return model
    if exit_type == there.exit_type and (exit_indices is None or model.exit_indices == there.exit_indices):
        return _load(source, **timm_kwargs)
    _logger.warning(f"'{source.name}' has {there.exit_type} exits behind stages {there.exit_indices}; those asked for, "
                    f'{exit_type} behind {model.exit_indices}, are untrained.')
    return model


class Source:
    """A repo's snapshot or a folder: `folder` holds its files, all of one commit. Arguments: see `from_pretrained`."""

    def __init__(
            self,
            repo_or_dir: Union[str, Path],
            revision: Optional[str] = None,
            token: Token = None,
            cache_dir: Optional[Union[str, Path]] = None,
            local_files_only: bool = False,
    ):
        self.name = name = str(repo_or_dir)
        self.revision, self.token, self.repo_id = revision, token, ''
        kind: Optional[str] = None
        if name.split(':')[0] in ('hf-hub', 'hf_hub', 'local-dir'):
            kind, name = parse_model_name(name)
        if kind == 'local-dir' or (not kind and os.path.isdir(name)):
            if revision:
                raise ValueError(f"'{name}' is a folder and has no revisions; leave revision={revision!r} out.")
            if not os.path.isdir(name):
                raise ValueError(f"there is no folder '{name}'.")
            self.folder = Path(name)
            return
        self.repo_id, _, at = name.partition('@')
        if at and revision:
            raise ValueError(f"'{name}' names a revision and revision={revision!r} another one; say one of them.")
        self.revision = revision or at or None
        check_repo_id(self.repo_id)
        check_token(token)
        self.offline = local_files_only or constants.HF_HUB_OFFLINE
        self.folder = Path(retrying(lambda: snapshot_download(
            self.repo_id, revision=self.revision, token=token, cache_dir=cache_dir, allow_patterns=list(FILES),
            local_files_only=local_files_only, **_library()), self.repo_id, self.revision))

    @property
    def has_exits(self) -> bool:
        """Whether exits came along, and not a plain timm model alone."""
        return has_exits(self.folder)


def _load(source: Source, **timm_kwargs: Any) -> MultiExitWrapper:
    try:
        return load_multi_exit(source.folder, **timm_kwargs)
    except ValueError as error:
        message = f"Cannot load '{source.name}': {error}"
        if source.repo_id and source.offline and not source.has_exits:
            message += ' The cached copy may be plain timm\'s, which leaves exits out; load it once online.'
        if isinstance(error, StaleExitsError):
            message += ' ' + _advice(source, error.main_sha256)
        raise ValueError(message) from error


def _advice(source: Source, main_sha256: str) -> str:
    if not source.repo_id:
        return 'Save the whole model again, or restore the file.'
    fitting = None if source.offline else _fitting_revision(source, main_sha256)
    if fitting is None:
        return 'An older revision of the repo may still fit, see its history.'
    return f"They still fit at revision='{fitting}'."


def _fitting_revision(source: Source, main_sha256: str) -> Optional[str]:
    """The latest commit whose main weights have this checksum, from the file lists alone; None if there is none."""
    api = HfApi(token=source.token, **_library())
    try:
        for commit in api.list_repo_commits(source.repo_id, revision=source.revision)[:200]:
            entries: Any = api.get_paths_info(source.repo_id, [MAIN, EXITS_CONFIG], revision=commit.commit_id)
            checksums = [entry.lfs.sha256 for entry in entries if entry.path == MAIN and entry.lfs]
            if checksums == [main_sha256] and len(entries) == 2:
                return commit.commit_id
    except Exception as error:  # a better message is not worth another error
        _logger.debug(f'{type(error).__name__} while looking through the history')
    return None


def push_to_hub(
        model: MultiExitWrapper,
        repo_id: str,
        *,
        token: Token = None,
        private: Optional[bool] = None,
        revision: Optional[str] = None,
        create_pr: bool = False,
        commit_message: str = 'Add multi-exit model',
        card: Optional[Union[str, ModelCard, Mapping[str, Any]]] = None,
        overwrite_card: bool = False,
        metrics: Optional[Mapping[str, float]] = None,
        data_config: Optional[Dict[str, Any]] = None,
        model_config: Optional[Dict[str, Any]] = None,
) -> CommitInfo:
    """Publish a model, in one commit: `from_pretrained(repo_id)` loads it with its exits, plain timm as a plain model.

    Weight pickles in the repo's root, which would no longer fit, are removed by the same commit; its model card stays
    unless `overwrite_card`.

    Args:
        model: A multi-exit model.
        repo_id: Repo as 'user/name'; made if it does not exist.
        token: A token that may write; None takes the one of `hf auth login` or HF_TOKEN.
        private: Whether a new repo is private; the account's default if None.
        revision: Branch to push to, made if it does not exist; main if None.
        create_pr: Open a pull request instead.
        commit_message: Title of the commit.
        card: Model card; a mapping has what `timm_eed.model_card.make_model_card` cannot know (`license`,
            `dataset_name`, `description`, ..), None makes a short card from the model and `metrics`.
        overwrite_card: Replace a model card that is there.
        metrics, data_config, model_config: See `MultiExitWrapper.save_pretrained`.

    Returns:
        The client library's description of the commit: `commit_url`, `oid`, `pr_url`.

    Raises:
        ValueError: If the model cannot be published, or repo, revision or token are not accepted.
        ConnectionError: If the Hub cannot be reached or fails, after some tries; the repo is then as it was.
    """
    from .model_card import write_model_card  # draws on profiling and more, which loading does without
    if not isinstance(model, MultiExitWrapper):
        raise ValueError(f'{type(model).__name__} has no exits; timm.models.push_to_hf_hub publishes plain models.')
    check_repo_id(repo_id)
    with TemporaryDirectory() as folder:
        text = card if isinstance(card, (str, ModelCard)) else None
        model.save_pretrained(folder, metrics=metrics, data_config=data_config, model_config=model_config, card=text)
        if text is None:
            made = dict(card) if isinstance(card, Mapping) else {}
            write_model_card(folder, model, repo_id, metrics=metrics, data_config=data_config, **made)
        return push_folder(
            folder, repo_id, token=token, private=private, revision=revision, create_pr=create_pr,
            commit_message=commit_message, overwrite_card=overwrite_card)


def push_folder(
        folder: Union[str, Path],
        repo_id: str,
        *,
        token: Token = None,
        private: Optional[bool] = None,
        revision: Optional[str] = None,
        create_pr: bool = False,
        commit_message: str = 'Add multi-exit model',
        overwrite_card: bool = False,
) -> CommitInfo:
    """Publish a folder that `save_pretrained` wrote, with all files in it; see `push_to_hub`."""
    check_token(token)
    check_repo_id(repo_id)
    root = Path(folder)
    api = HfApi(token=token, **_library())
    retrying(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
    if revision and not revision.startswith('refs/'):
        retrying(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id, revision)

    def commit() -> CommitInfo:
        # against the head of now: whoever pushes in between makes this fail (412) and be built again
        head = api.model_info(repo_id, revision=revision)
        present = [sibling.rfilename for sibling in head.siblings or []]
        return api.create_commit(
            repo_id, _operations(root, present, overwrite_card), commit_message=commit_message, revision=revision,
            parent_commit=head.sha, create_pr=create_pr)

    # should the answer to a commit get lost, the next try finds all files there and makes no second one; a pull
    # request would be opened twice
    return retrying(commit, repo_id, revision, once=create_pr)


def _operations(root: Path, present: List[str], overwrite_card: bool) -> List[Any]:
    files = [path.relative_to(root).as_posix() for path in sorted(root.rglob('*')) if path.is_file()]
    if 'README.md' in present and not overwrite_card:
        _logger.warning('The repo keeps its model card, which may tell of older weights (overwrite_card=True, '
                        '--overwrite-card: replace it).')
        files = [name for name in files if name != 'README.md']
    stale = [name for name in present if '/' not in name and name.endswith(_PICKLES) and name not in files]
    return [CommitOperationAdd(name, str(root / name)) for name in files] + [
        CommitOperationDelete(name) for name in stale]


def check_repo_id(repo_id: str) -> None:
    """Raise a ValueError if a name is not of the form user/name."""
    if repo_id.count('/') != 1:
        raise ValueError(f"'{repo_id}' is neither a folder nor a repo of the form 'user/name'.")
    validate_repo_id(repo_id)


def _library() -> Dict[str, Any]:
    from . import __version__
    return dict(library_name='timm_eed', library_version=__version__)
