"""Models from the Hugging Face Hub: weights, configuration and tokenizer only, resumable, cached, clear when offline.

The cache is huggingface_hub's own, shared with transformers. No code of a repository is ever fetched or run.
"""

import errno
import re
from pathlib import Path
from typing import Any

from tinylab.errors import CheckpointError, NothingFoundError
from tinylab.formats.weight_map import PICKLED, SAFETENSORS, has_weights, weight_files
from tinylab.runs.durable import disk_error

PATTERNS = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
]
_PICKLED = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
"""Asked for only where a repository has no safetensors; read without unpickling (formats/torch_archive.py)."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"(?!.*\.\.)[\w][\w./+-]{0,200}")


def fetch(
    repository: str,
    revision: str | None = None,
    *,
    cache: Path | None = None,
    endpoint: str | None = None,
    offline: bool = False,
) -> Path:
    """The folder of a model in the cache, downloaded if it is not there; its name is the commit.

    An interrupted download resumes where it stopped. Without a network the cached commit of the same revision is used.
    Raises NothingFoundError for a repository or revision that does not exist, is closed, or is not cached while
    offline; CheckpointError for a full disk or a broken download.
    """
    if not _ID.fullmatch(repository) or ".." in repository:
        raise NothingFoundError(f"a Hub id must look like owner/name; found {repository!r}")
    if revision is not None and not _REVISION.fullmatch(revision):
        raise NothingFoundError(f"a revision of {repository} must be a branch, tag or commit; found {revision!r}")
    folder = _snapshot(repository, revision, PATTERNS, cache, endpoint, offline)
    if not has_weights(folder, SAFETENSORS):
        folder = _snapshot(repository, revision, PATTERNS + _PICKLED, cache, endpoint, offline)
    _require_complete(folder, repository, revision)
    return folder


def _snapshot(
    repository: str, revision: str | None, patterns: list[str], cache: Path | None, endpoint: str | None, offline: bool
) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import OfflineModeIsEnabled

    what = repository if revision is None else f"{repository} at revision {revision}"
    try:
        found = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=patterns,
            cache_dir=cache,
            endpoint=endpoint,
            local_files_only=offline,
        )
    except errors.GatedRepoError as error:
        reason = f"{repository} must be open to you: accept its terms on its page and set HF_TOKEN"
        raise NothingFoundError(reason) from error
    except errors.RevisionNotFoundError as error:
        reason = f"{repository} has no revision {revision or 'main'}; its page lists branches and tags"
        raise NothingFoundError(reason) from error
    except errors.RepositoryNotFoundError as error:
        reason = f"the Hub has no model {repository}, or it is private (set HF_TOKEN); check the name"
        raise NothingFoundError(reason) from error
    except (errors.LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise NothingFoundError(
            f"{what} is not in the cache and the Hugging Face Hub cannot be reached. Connect and repeat (unset "
            "HF_HUB_OFFLINE if it is set), or copy the model's folder here and name that"
        ) from error
    except (OSError, errors.HfHubHTTPError, errors.HFValidationError, ValueError) as error:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
        if isinstance(error, OSError) and error.errno in full:
            raise disk_error(Path(error.filename or cache or _default_cache()), error) from error
        raise CheckpointError(f"cannot download {what}: {error}. What is done is kept: repeat the command") from error
    return Path(str(found))


def _require_complete(folder: Path, repository: str, revision: str | None) -> None:
    """Raise unless the snapshot has a configuration and every weight file that its weight map names."""
    where = repository if revision is None else f"{repository}@{revision}"
    if not (folder / "config.json").is_file():
        raise NothingFoundError(f"{where} must be a model with a config.json; found none in it")
    kinds = [kind for kind in (SAFETENSORS, PICKLED) if has_weights(folder, kind)]
    if not kinds:
        raise NothingFoundError(f"{where} must hold weights as safetensors or .bin; found none in it")
    try:
        for kind in kinds:
            weight_files(folder, kind)
    except CheckpointError as error:
        raise CheckpointError(f"the cache's copy of {where} is incomplete: {error}") from error


def _default_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def disk_use(cache: Path | None = None) -> list[dict[str, Any]]:
    """Every cached model revision: repository, revisions (branch names), commit, bytes, files, path; largest first.

    Revisions of one repository may share files; `bytes` counts each revision alone.
    """
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        info = scan_cache_dir(cache or _default_cache())
    except CacheNotFound:
        return []
    rows = [
        {
            "repository": repo.repo_id,
            "revisions": ", ".join(sorted(found.refs)) or "-",
            "commit": found.commit_hash,
            "bytes": found.size_on_disk,
            "files": found.nb_files,
            "path": str(found.snapshot_path),
        }
        for repo in info.repos
        if repo.repo_type == "model"
        for found in repo.revisions
    ]
    return sorted(rows, key=lambda row: (-row["bytes"], row["repository"], row["commit"]))


def remove(repository: str, revision: str | None = None, *, cache: Path | None = None) -> int:
    """Delete a model from the cache, or one revision (branch, tag or commit) of it; the bytes freed.

    Files that another revision still needs stay. Raises NothingFoundError when nothing of it is cached.
    """
    from huggingface_hub import scan_cache_dir

    commits = [
        row["commit"]
        for row in disk_use(cache)
        if row["repository"] == repository
        and (revision is None or revision in (row["commit"], *row["revisions"].split(", ")))
    ]
    if not commits:
        what = repository if revision is None else f"{repository}@{revision}"
        raise NothingFoundError(f"{what} must be in the cache to be removed; see tinylab checkpoints --cached")
    plan = scan_cache_dir(cache or _default_cache()).delete_revisions(*commits)
    plan.execute()
    return plan.expected_freed_size
