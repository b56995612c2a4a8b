"""Push erasures to the Hub, in one commit, and pull them: the schema's files alone, all of one commit.

What the Hub or the connection refuses is raised as an [`ErasureHubError`] or [`ErasureNotFoundError`] that says what
to do, chained to the Hub's own error.
"""

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ._version import __version__
from .cards import merge_card, render_card
from .compat import hub_transport_error, resolve_revision, revision_resolution_error
from .errors import (
    ErasureConfigError,
    ErasureError,
    ErasureFileError,
    ErasureHubError,
    ErasureInputError,
    ErasureNotFoundError,
)
from .logging import get_logger
from .schema import CARD_FILE, CONFIG_FILE, GRID_FILE, LORA_FILE, MAX_CONFIG_BYTES, TENSOR_FILES, ErasureConfig
from .tensors import sha256


if TYPE_CHECKING:
    import torch
    from huggingface_hub import CommitInfo, HfApi
    from PIL import Image

    from .artifact import Erasure

logger = get_logger(__name__)

T = TypeVar("T")

WAITS = (1.0, 2.0)  # seconds between the attempts to reach a Hub that does not answer
TIMEOUT = 10.0  # seconds for one short request; huggingface_hub would wait without end
MAX_CARD_BYTES = 1024 * 1024
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


# ----------------------------------------------------------------------------------------------------- errors


@contextmanager
def _explained(repo_id: str, revision: str | None, write: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP client raise into this library's errors, chained and with advice."""
    from huggingface_hub import errors as hub

    login = "Log in with `hf auth login`, or give `token=`."
    try:
        yield
    except ErasureError:
        raise
    except hub.HFValidationError as error:
        if write:
            raise ErasureInputError(f"{repo_id!r} cannot be the id of a repository: {error}") from error
        raise ErasureNotFoundError(f"{repo_id!r} is neither a local folder nor a repository id: {error}") from error
    except hub.GatedRepoError as error:
        raise ErasureHubError(
            f"Access to {repo_id!r} must be asked for on its page on the Hub; then use the token of that account. {login}"
        ) from error
    except hub.RepositoryNotFoundError as error:
        if write:
            raise ErasureHubError(
                f"{repo_id!r} does not exist, or this token may not see it or write to it. Check the name. {login}"
            ) from error
        raise ErasureNotFoundError(
            f"{repo_id!r} is neither a local folder nor a repository that this token can see. Check the name; for a "
            "private repository log in with `hf auth login` or give `token=`."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ErasureNotFoundError(
            f"{repo_id!r} has no revision {revision!r}; its branches and tags are listed on its page on the Hub."
        ) from error
    except hub.LocalEntryNotFoundError as error:
        raise ErasureNotFoundError(
            f"{repo_id!r} is not a local folder and is not (wholly) in the cache, and the Hub was not asked "
            "(`local_files_only=True` or HF_HUB_OFFLINE=1) or gave no answer. Pull it once with a connection."
        ) from error
    except hub.EntryNotFoundError as error:
        if write:
            raise ErasureHubError(f"A file of {repo_id!r} vanished while this push was made; push again.") from error
        raise ErasureNotFoundError(
            f"{repo_id!r} holds no erasure: there is no {CONFIG_FILE}, or a file that it names is missing. If it is a "
            'plain LoRA, load it as one with `load_erasure(..., method="lora")`.'
        ) from error
    except hub.OfflineModeIsEnabled as error:
        raise ErasureHubError(
            f"The Hub may not be asked for {repo_id!r}: offline mode is on. Unset HF_HUB_OFFLINE."
        ) from error
    except hub.LocalTokenNotFoundError as error:
        raise ErasureHubError(f"There is no Hub token. {login}") from error
    except revision_resolution_error() as error:
        offline = error.__cause__ is None or isinstance(error.__cause__, hub.OfflineModeIsEnabled)
        kind = ErasureNotFoundError if offline else ErasureHubError
        raise kind(
            f"{repo_id!r} is not a local folder and not in the cache, and the Hub "
            + (
                "was not asked (`local_files_only=True` or HF_HUB_OFFLINE=1). Pull it once with a connection."
                if offline
                else f"gave no answer ({_brief(error.__cause__)}). Check the connection and HF_ENDPOINT, and try again."
            )
        ) from error
    except hub.HfHubHTTPError as error:
        raise ErasureHubError(_refusal(repo_id, error, write)) from error
    except (hub_transport_error(), ConnectionError) as error:
        done = (
            "Nothing of the push is visible unless all of it is. Push again; an erasure that did arrive is not pushed "
            "twice."
            if write
            else "What was downloaded is kept; try again."
        )
        raise ErasureHubError(
            f"The connection to the Hub failed ({_brief(error)}) while {repo_id!r} was in use. {done}"
        ) from error
    except RuntimeError as error:  # what an upload to the large-file store raises, around the reason
        if not write or error.__cause__ is None:
            raise
        raise ErasureHubError(
            f"{_brief(error)} ({_brief(error.__cause__)}) Nothing of the push is visible. Push again."
        ) from error
    except ValueError as error:
        if not write:
            raise
        raise ErasureHubError(f"The Hub does not accept this push to {repo_id!r}: {str(error)[:500]}") from error
    except OSError as error:
        raise ErasureHubError(
            f"{repo_id!r} could not be {'pushed' if write else 'downloaded into the cache'}: {_brief(error)}. Check the "
            "disk and the connection, and try again."
        ) from error


def _refusal(repo_id: str, error: Any, write: bool) -> str:
    status = error.response.status_code
    advice = {
        401: "The token is not valid. Make a new one, and log in with `hf auth login` or give `token=`.",
        403: f"The token may not {'write to' if write else 'read'} {repo_id!r}. Use one with that right"
        + (", or propose the erasure with `create_pr=True`." if write else "."),
        412: "Somebody else pushed meanwhile; nothing was changed. Push again.",
        413: "The files are too large for the Hub; save in float16 (`dtype=torch.float16`) or at a smaller rank.",
        429: "Too many requests; wait a few minutes and try again.",
    }
    what = advice.get(status, "The Hub failed; try again later." if status >= 500 else "")
    return f"{repo_id!r}: the Hub answered {status}. {what} ({_brief(error)})"


def _brief(error: BaseException | None) -> str:
    text = str(getattr(error, "server_message", None) or error or "").strip()
    return (text.splitlines() or [type(error).__name__])[0][:200]


def _patiently(call: Callable[[], T]) -> T:
    """Call again after a moment, and say so, where the Hub gave no answer; at most twice."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    unresolved = revision_resolution_error()
    for wait in WAITS:
        try:
            return call()
        except (hub_transport_error(), unresolved) as error:
            cause = error.__cause__ if isinstance(error, unresolved) else error
            if cause is None or isinstance(cause, OfflineModeIsEnabled):
                raise
            logger.warning("The Hub did not answer (%s); trying again in %g s.", _brief(cause), wait)
            time.sleep(wait)
    return call()


def _make_api(token: str | bool | None) -> "HfApi":
    from huggingface_hub import HfApi

    class Api(HfApi):
        """The Hub's client with a time limit on the requests for a repository's head; notes whether one succeeded."""

        reached = False

        def repo_info(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["timeout"] = kwargs.get("timeout") or TIMEOUT
            info = super().repo_info(*args, **kwargs)
            self.reached = True
            return info

    return Api(token=token, library_name="diffusers_erasure", library_version=__version__)


# ------------------------------------------------------------------------------------------------------- pull


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
    """Download an erasure's files (or take them from the cache): those of the schema, all of one commit.

    Without a connection what is in the cache is used. A file that is larger than its limit is not downloaded.

    Returns:
        `tuple`: the files' contents by name, and the commit that they came from.

    Raises:
        ErasureNotFoundError: no such folder, repository or revision, no erasure in it, or it is not in the cache.
        ErasureHubError: access was refused, or the Hub gave no answer.
        ErasureFileError: a file is not the one that the configuration names.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    if subfolder and (subfolder.startswith("/") or ".." in re.split(r"[/\\]", subfolder)):
        raise ErasureInputError(f"`subfolder` must lie inside {repo_id}, not at {subfolder!r}.")
    with _explained(repo_id, revision):
        cache = None if cache_dir is None else str(cache_dir)
        api: Any = _make_api(token)
        commit = _patiently(
            lambda: resolve_revision(
                api,
                repo_id,
                revision=revision,
                cache_dir=cache,
                local_files_only=local_files_only,
                token=token,
            )
        )
        # A full commit is resolved without a request.
        online = not local_files_only and (api.reached or bool(_COMMIT.fullmatch(revision or "")))
        where: dict[str, Any] = {"subfolder": subfolder, "revision": commit}

        def cached(name: str) -> Path | None:
            try:
                return Path(hf_hub_download(repo_id, name, cache_dir=cache, local_files_only=True, **where))
            except LocalEntryNotFoundError:
                if online:
                    return None
                raise

        def download(name: str, limit: int, force: bool) -> Path:
            url = hf_hub_url(repo_id, name, **where)
            head = _patiently(lambda: get_hf_file_metadata(url, token=token, timeout=TIMEOUT))
            _check_size(repo_id, name, head.size or 0, limit)
            return Path(hf_hub_download(repo_id, name, cache_dir=cache, token=token, force_download=force, **where))

        def read(name: str, limit: int, expected: str | None = None, force: bool = False) -> bytes:
            path = None if force else cached(name)
            in_cache = path is not None
            path = path or download(name, limit, force)
            try:
                _check_size(repo_id, name, path.stat().st_size, limit)
                data = path.read_bytes()
                if expected is not None and sha256(data) != expected:
                    raise ErasureFileError(
                        f"{name} of {repo_id} is not the file that its {CONFIG_FILE} names: another SHA-256. It was cut "
                        "short or changed; `force_download=True` fetches it again."
                    )
            except ErasureFileError:
                if not in_cache or not online:
                    raise
                logger.warning("%s of %s is damaged in the cache; it is downloaded again.", name, repo_id)
                return read(name, limit, expected, force=True)
            return data

        force = force_download and online
        files = {CONFIG_FILE: read(CONFIG_FILE, MAX_CONFIG_BYTES, force=force)}
        for name, record in ErasureConfig.from_json(files[CONFIG_FILE]).files.items():
            files[name] = read(name, record.size, record.sha256, force=force)
    return files, commit


def _check_size(repo_id: str, name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ErasureFileError(f"{name} of {repo_id} has {size} bytes; at most {limit} were expected.")


# ------------------------------------------------------------------------------------------------------- push


def push(
    erasure: "Erasure",
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    dtype: "torch.dtype | None" = None,
    redact_concepts: bool = False,
    grid: "Image.Image | None" = None,
    license: str | None = None,
) -> "CommitInfo":
    """Push an erasure to the Hub in one commit: all of it becomes visible, or nothing.

    A tensor file of an earlier erasure that this one does not have is deleted in the same commit. A card whose text was
    edited by hand is kept; then only its metadata is updated.

    Args:
        erasure ([`Erasure`]): the erasure.
        repo_id (`str`): the repository, such as `"user/no-cat"`; it is created where it does not exist.
        private (`bool`, *optional*): whether a repository that is created is private; the account's default otherwise.
            `True` with a repository that exists and is public is refused.
        token (`str` or `bool`, *optional*): the token; the stored one by default.
        revision (`str`, *optional*): the branch, created from the main one where it does not exist; main by default.
        create_pr (`bool`, *optional*, defaults to `False`): propose the commit as a pull request.
        commit_message (`str`, *optional*): the commit's message.
        dtype (`torch.dtype`, *optional*): dtype of the tensors; as they are by default (float32).
        redact_concepts (`bool`, *optional*, defaults to `False`): leave out the concepts' names.
        grid (`PIL.Image.Image`, *optional*): a picture for the card, of images before and after.
        license (`str`, *optional*): identifier of the licence, for the card's metadata.

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit, with its address and that of the pull request.

    Raises:
        ErasureHubError: the Hub refused it or gave no answer, or somebody else pushed meanwhile.
        ErasureInputError: the repository's name, or what it holds, does not allow it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RevisionNotFoundError

    if create_pr and revision not in (None, "main"):
        raise ErasureInputError("A pull request is made against the main branch: leave out `revision`.")
    if revision is not None and _COMMIT.fullmatch(revision):
        raise ErasureInputError(f"`revision` must be a branch to push to, not the commit {revision}.")
    files = erasure.to_files(dtype=dtype, redact_concepts=redact_concepts)
    config = ErasureConfig.from_json(files[CONFIG_FILE])
    message = commit_message or f"Upload an erasure ({config.method.name})"
    render_card(config, license=license)  # a wrong licence is told before the Hub is asked
    if grid is not None:
        buffer = io.BytesIO()
        grid.save(buffer, "PNG")
        files[GRID_FILE] = buffer.getvalue()
    with _explained(repo_id, revision, write=True):
        api = _make_api(token)
        repo_id = _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        try:
            head = _patiently(lambda: api.model_info(repo_id, revision=revision, timeout=TIMEOUT))
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
            head = api.model_info(repo_id, revision=revision, timeout=TIMEOUT)
        if private and head.private is False:
            raise ErasureInputError(
                f"{repo_id!r} exists and is public, so that what is pushed is too. Make it private in its settings on "
                "the Hub, or leave out `private`."
            )
        present = {item.rfilename for item in head.siblings or ()}
        stale = _stale_files(api, repo_id, head.sha, present, set(files))
        card = render_card(config, repo_id, grid=grid is not None, license=license)
        if CARD_FILE in present:
            card = _merged(api, repo_id, head.sha, card, config.redacted)
        files[CARD_FILE] = card.encode()
        operations: list[Any] = [CommitOperationAdd(name, data) for name, data in sorted(files.items())]
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.sha,  # somebody else's push meanwhile is an error, not overwritten
        )


def push_model(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> "CommitInfo":
    """Push the folder of a whole erased model in one commit; files of an erased model that was there before go.

    Raises:
        ErasureHubError: the Hub refused it or gave no answer, or somebody else pushed meanwhile.
        ErasureInputError: the repository holds something else than an erased model.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    with _explained(repo_id, None, write=True):
        api = _make_api(token)
        repo_id = _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        head = _patiently(lambda: api.model_info(repo_id, timeout=TIMEOUT))
        present = {item.rfilename for item in head.siblings or ()} - {".gitattributes"}
        if private and head.private is False:
            raise ErasureInputError(
                f"{repo_id!r} exists and is public; leave out `private`, or make it private first."
            )
        if present - {CARD_FILE} and not {CONFIG_FILE, "model_index.json"} <= present:
            raise ErasureInputError(
                f"{repo_id!r} holds something else than a whole erased model; push to another repository."
            )
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in sorted(present - set(files))]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload an erased model",
            create_pr=create_pr,
            parent_commit=head.sha,
        )


def _read(api: "HfApi", repo_id: str, commit: str | None, name: str, limit: int) -> bytes:
    path = Path(api.hf_hub_download(repo_id, name, revision=commit))
    _check_size(repo_id, name, path.stat().st_size, limit)
    return path.read_bytes()


def _stale_files(api: "HfApi", repo_id: str, commit: str | None, present: set[str], new: set[str]) -> list[str]:
    """Tensor files of an earlier erasure that the new one does not have.

    Raises:
        ErasureInputError: the repository holds a LoRA of somebody's own, which would be overwritten.
    """
    if CONFIG_FILE not in present:
        if LORA_FILE in present & new:
            raise ErasureInputError(
                f"{repo_id!r} holds a LoRA that is no erasure ({LORA_FILE} without {CONFIG_FILE}), which would be "
                "overwritten. Push to another repository, or delete that file there first."
            )
        return []
    try:
        old = set(ErasureConfig.from_json(_read(api, repo_id, commit, CONFIG_FILE, MAX_CONFIG_BYTES)).files)
    except (ErasureConfigError, ErasureFileError):
        logger.warning("%s holds an erasure that this version cannot read; it is replaced.", repo_id)
        old = set(TENSOR_FILES)
    return sorted(({*old, GRID_FILE} & present) - new)


def _merged(api: "HfApi", repo_id: str, commit: str | None, card: str, redacted: bool) -> str:
    try:
        old = _read(api, repo_id, commit, CARD_FILE, MAX_CARD_BYTES).decode("utf-8-sig")
        merged, kept = merge_card(old, card)
    except ValueError as error:
        raise ErasureInputError(
            f"The {CARD_FILE} of {repo_id!r} cannot be kept, as its metadata cannot be read: "
            f"{str(error)[:300]}. Correct or delete it on the Hub, and push again."
        ) from error
    if kept:
        logger.warning(
            "The text of the card of %s was edited by hand, so it is kept and only its metadata is updated.%s",
            repo_id,
            " Check that it does not name what was redacted." if redacted else "",
        )
    return merged
