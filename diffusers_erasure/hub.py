"""Pull erasures from the Hub: the revision is resolved once, and only the schema's files are fetched."""

import os
from pathlib import Path
from typing import Any

from .errors import ErasureError, ErasureNotFoundError
from .schema import CONFIG_FILE, MAX_CONFIG_BYTES, ErasureConfig


def fetch(
    repo_id: str,
    *,
    subfolder: str | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    force_download: bool,
    local_files_only: bool,
) -> tuple[dict[str, bytes], str | None]:
    """Download an erasure's files (or take them from the cache).

    Returns:
        `tuple`: the files' contents by name, and the commit that they came from.

    Raises:
        ErasureNotFoundError: no such folder, repository, or erasure in it.
        huggingface_hub.errors.HfHubHTTPError: access was refused, or the server failed.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def download(name: str, commit: str | None, limit: int) -> Path:
        arguments: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        path = Path(
            hf_hub_download(
                repo_id, name, subfolder=subfolder, revision=commit, force_download=force_download, **arguments
            )
        )
        if path.stat().st_size > limit:
            raise ErasureError(f"{name} of {repo_id} has {path.stat().st_size} bytes; at most {limit} were expected.")
        return path

    try:
        config_path = download(CONFIG_FILE, revision, MAX_CONFIG_BYTES)
        commit = _commit_of(config_path)
        files = {CONFIG_FILE: config_path.read_bytes()}
        for name, record in ErasureConfig.from_json(files[CONFIG_FILE]).files.items():
            files[name] = download(name, commit or revision, record.size).read_bytes()
    except HFValidationError as error:
        raise ErasureNotFoundError(f"{repo_id!r} is neither a local folder nor a repository id: {error}") from error
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        raise ErasureNotFoundError(
            f"{repo_id!r} is neither a local folder nor a repository that this token can see. Check the name; for a "
            "private repository log in with `hf auth login` or give `token=`."
        ) from error
    except RevisionNotFoundError as error:
        raise ErasureNotFoundError(f"{repo_id!r} has no revision {revision!r}.") from error
    except LocalEntryNotFoundError as error:
        raise ErasureNotFoundError(
            f"{repo_id!r} is not a local folder, is not (wholly) in the cache, and could not be downloaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except EntryNotFoundError as error:
        raise ErasureNotFoundError(
            f"{repo_id!r} holds no erasure: there is no {CONFIG_FILE}. If it is a plain LoRA, load it as one with "
            '`load_erasure(..., method="lora")`.'
        ) from error
    return files, commit


def _commit_of(path: Path) -> str | None:
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
