"""Push erasures to the Hub, in one commit, and pull them: the schema's files alone, all of one commit.

What the Hub or the connection refuses is raised as an [`ErasureHubError`] or [`ErasureNotFoundError`] that says what
to do, chained to the Hub's own error.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cards import base_repo, check_licence, merge_card, render_card
from ..demo import is_embedded
from ..errors import ErasureConfigError, ErasureError, ErasureFileError, ErasureInputError, ErasureNotFoundError
from ..logging import get_logger
from ..pictures import as_png
from ..schema import (
    CARD_FILE,
    CONFIG_FILE,
    GRID_FILE,
    LORA_FILE,
    MAX_CONFIG_BYTES,
    TENSOR_FILES,
    ErasureConfig,
    FileRecord,
)
from ..storage import Contents, check_file
from ..tensors import sha256
from .beside import Beside, Origin, Record, Withheld, beside_of, keep_record, read_beside
from .client import TIMEOUT, TIMEOUT_CACHED, explained, make_api, patiently
from .joining import check_side, join
from .options import CommitOptions, PushOptions, ReadOptions, Side


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = get_logger(__name__)

MODEL_INDEX = "model_index.json"
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
# The weights as diffusers and transformers save them: whole or in parts, without a variant.
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5}\.safetensors|\.safetensors(\.index\.json)?)", re.ASCII
)


# ------------------------------------------------------------------------------------------------------- pull


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit: its files are taken from the cache, or downloaded where the Hub may be asked.

    The token is left out of copies and pickles.
    """

    repo_id: str
    commit: str
    place: str
    subfolder: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    online: bool = True
    hurried: bool = False  # what is asked for can be done without, so a Hub that hangs is not waited for

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "token": None}

    def read(self, name: str, limit: int, expected: FileRecord | None = None, force: bool = False) -> bytes:
        """Read a file of at most `limit` bytes; a larger one is not downloaded.

        Args:
            name (`str`): the file's name.
            limit (`int`): its largest size.
            expected ([`FileRecord`], *optional*): its size and SHA-256.
            force (`bool`, *optional*, defaults to `False`): download it again.

        Raises:
            ErasureFileError: it is larger, or another one.
        """
        path = None if force else self._cached(name)
        in_cache = path is not None
        path = path or self._download(name, limit, force)
        try:
            _check_size(self.repo_id, name, path.stat().st_size, limit)
            data = path.read_bytes()
            if expected is not None:
                check_file(f"{name} of {self.repo_id}", data, expected)
        except ErasureFileError:
            if not in_cache or not self.online:
                raise
            logger.warning("%s of %s is damaged in the cache; it is downloaded again.", name, self.repo_id)
            return self.read(name, limit, expected, force=True)
        return data

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        where: dict[str, Any] = {"subfolder": self.subfolder, "revision": self.commit, "cache_dir": self.cache_dir}
        try:
            return Path(hf_hub_download(self.repo_id, name, local_files_only=True, **where))
        except LocalEntryNotFoundError:
            if self.online:
                return None
            raise

    def _download(self, name: str, limit: int, force: bool) -> Path:
        from huggingface_hub import hf_hub_download

        where: dict[str, Any] = {"subfolder": self.subfolder, "revision": self.commit, "cache_dir": self.cache_dir}
        _check_size(self.repo_id, name, self.head(name).size or 0, limit)
        timeout = TIMEOUT_CACHED if self.hurried else TIMEOUT
        return Path(
            hf_hub_download(self.repo_id, name, token=self.token, force_download=force, etag_timeout=timeout, **where)
        )

    def head(self, name: str) -> Any:
        """A file's size and hash, from the Hub."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.repo_id, name, subfolder=self.subfolder, revision=self.commit)
        if self.hurried:
            return get_hf_file_metadata(url, token=self.token, timeout=TIMEOUT_CACHED)
        return patiently(lambda: get_hf_file_metadata(url, token=self.token, timeout=TIMEOUT))

    def beside(self, strict: bool = False) -> Beside:
        """The card and its pictures; a warning where they cannot be read at once, or with `strict` the Hub's error."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        source = dataclasses.replace(self, hurried=not strict)

        def read(name: str, limit: int) -> bytes | None:
            try:
                with explained(self.repo_id, self.commit):
                    return source.read(name, limit)
            except ErasureNotFoundError as error:
                if isinstance(error.__cause__, LocalEntryNotFoundError) and name != GRID_FILE:
                    logger.warning("%s of %s is not in the cache, and the Hub was not asked.", name, self.repo_id)
                elif not isinstance(error.__cause__, EntryNotFoundError):
                    raise
                return None

        try:
            found = read_beside(read, self.repo_id)
        except ErasureError as error:
            if strict:
                raise
            logger.warning("The card of %s could not be read: %s", self.repo_id, error)
            found = Beside(where=self.repo_id)
        return dataclasses.replace(found, place=self.place)


def fetch(repo_id: str, options: ReadOptions) -> tuple[Contents, Snapshot]:
    """Download an erasure's files (or take them from the cache): those of the schema, all of one commit.

    Without a connection what is in the cache is used. A file that is larger than its limit is not downloaded.

    Returns:
        `tuple`: the files' contents, and where they came from.

    Raises:
        ErasureNotFoundError: no such folder, repository or revision, no erasure in it, or it is not in the cache.
        ErasureHubError: access was refused, or the Hub gave no answer.
        ErasureFileError: a file is not the one that the configuration names.
    """
    subfolder, revision, token = options.get("subfolder"), options.get("revision"), options.get("token")
    if subfolder and (subfolder.startswith("/") or ".." in re.split(r"[/\\]", subfolder)):
        raise ErasureInputError(f"`subfolder` must lie inside {repo_id}, not at {subfolder!r}.")
    with explained(repo_id, revision):
        chosen = options.get("cache_dir")
        cache = None if chosen is None else str(chosen)
        local = options.get("local_files_only", False)
        commit, online = _resolve(repo_id, subfolder, revision, token, cache, local)
        place = f"{repo_id}@{revision or 'main'}" + (f"/{subfolder}" if subfolder else "")
        snapshot = Snapshot(repo_id, commit, place, subfolder, token, cache, online)
        force = options.get("force_download", False) and online
        contents = Contents.read(
            snapshot.read(CONFIG_FILE, MAX_CONFIG_BYTES, force=force),
            lambda name, record: snapshot.read(name, record.size, record, force),
        )
    return contents, snapshot


def _resolve(
    repo_id: str, subfolder: str | None, revision: str | None, token: str | bool | None, cache: str | None, local: bool
) -> tuple[str, bool]:
    """The commit, and whether the Hub may be asked for its files. What is in the cache stands in for a Hub that hangs."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import is_offline_mode

    name = f"{subfolder}/{CONFIG_FILE}" if subfolder else CONFIG_FILE
    cached = isinstance(try_to_load_from_cache(repo_id, name, cache_dir=cache, revision=revision), str)
    api: Any = make_api(token, TIMEOUT_CACHED if cached else TIMEOUT)
    resolved = patiently(
        lambda: api.resolve_revision(repo_id, revision=revision, cache_dir=cache, local_files_only=local, token=token)
    )
    commit = resolved.resolved  # as a string it is what was asked for
    pinned = bool(_COMMIT.fullmatch(revision or ""))  # resolved without a request
    if not local and not pinned and not api.reached and not is_offline_mode():
        logger.warning(
            "The Hub gave no answer; %s is taken from the cache, as it was at commit %s. It may have changed since.",
            repo_id,
            commit,
        )
    return commit, not local and (api.reached or pinned)


def _check_size(repo_id: str, name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ErasureFileError(f"{name} of {repo_id} has {size} bytes; at most {limit} were expected.")


# ------------------------------------------------------------------------------------------------------- push


def push(
    config: ErasureConfig, files: Mapping[str, bytes], origin: Origin | None, repo_id: str, options: PushOptions
) -> "CommitInfo":
    """Push an erasure to the Hub in one commit. See [`Erasure.push_to_hub`].

    Args:
        config ([`ErasureConfig`]): its configuration as it is pushed.
        files (mapping): the files' contents by name, but the card.
        origin (*optional*): where what lies beside it is read; a [`Withheld`] one with a redacted erasure.
        repo_id (`str`): the repository.
        options ([`PushOptions`]): those that do not concern the erasure itself.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RevisionNotFoundError

    private, token, revision = options.get("private"), options.get("token"), options.get("revision")
    create_pr, card = options.get("create_pr", False), options.get("card")
    grid, license = options.get("grid"), options.get("license")
    if create_pr and revision not in (None, "main"):
        raise ErasureInputError("A pull request is made against the main branch: leave out `revision`.")
    if revision is not None and _COMMIT.fullmatch(revision):
        raise ErasureInputError(f"`revision` must be a branch to push to, not the commit {revision}.")
    check_side(card)
    check_licence(license)
    _check_base(config)
    message = options.get("commit_message") or f"Upload an erasure ({config.method.name})"
    redacts = isinstance(origin, Withheld)
    own = _own_beside(origin)
    local = own if grid is None else dataclasses.replace(own, pictures={**own.pictures, GRID_FILE: as_png(grid)})
    with explained(repo_id, revision, write=True):
        api = make_api(token)
        repo_id = patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        try:
            head = patiently(lambda: api.model_info(repo_id, revision=revision, timeout=TIMEOUT))
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
            head = api.model_info(repo_id, revision=revision, timeout=TIMEOUT)
        if private and head.private is False:
            raise ErasureInputError(
                f"{repo_id!r} exists and is public, so that what is pushed is too. Make it private in its settings on "
                "the Hub, or leave out `private`."
            )
        present = {item.rfilename for item in head.siblings or ()}
        there = Snapshot(repo_id, str(head.sha), f"{repo_id}@{revision or 'main'}", token=token)
        stale = _stale_files(there, present, {*files, CARD_FILE})
        hub = _beside_on_hub(there, present, local.pictures, () if grid is None else (GRID_FILE,))
        fresh = render_card(config, repo_id, grid=GRID_FILE in {*local.pictures, *present}, license=license)
        joined = join(fresh, local, hub, card=card)
        _tell_whose_text(joined.text_of, hub.where, config.redacted)
        pictures = {name: data for name, data in joined.pictures.items() if local.pictures.get(name) == data}
        added = {**files, CARD_FILE: joined.card.encode(), **pictures}
        operations: list[Any] = [CommitOperationAdd(name, data) for name, data in sorted(added.items())]
        operations += [CommitOperationDelete(name) for name in stale]
        info = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.sha,  # somebody else's push meanwhile is an error, not overwritten
        )
    if own.folder is not None and not create_pr and not redacts:
        keep_record(own.folder, Record(there.place, own.sight(), joined.seen))
    return info


def _check_base(config: ErasureConfig) -> None:
    if base_repo(config) is None and not is_embedded(config.base_model):
        raise ErasureInputError(
            "It is not known which model on the Hub the erasure is for (it was made on one from a folder, or is a plain "
            "LoRA), so nobody could follow its card. Name the base model: "
            '`push_to_hub(..., base_model="user/model")`, `push --base-model user/model`, or once for all '
            "`erasure.with_base_model(...)`, `erase --base-model`."
        )


def _own_beside(origin: Origin | None) -> Beside:
    """What lies beside the erasure where it was read from, as far as it may be published."""
    own = beside_of(origin)
    if isinstance(origin, Withheld):
        return own
    if own.place is not None:  # nobody edits a cache: what is on the Hub now is newer
        own = dataclasses.replace(own, record=Record(own.place, own.sight(), own.sight()))
        if own.problem is not None:
            logger.warning("The card of %s is left out: %s", own.where, own.problem[:300])
        return own
    return own.checked()


def _beside_on_hub(
    there: Snapshot, present: set[str], pictures: Mapping[str, bytes], replaced: Collection[str]
) -> Beside:
    """The repository's card, and of its pictures those of which the folder has another version."""

    def read(name: str, limit: int) -> bytes | None:
        if name not in present or (name != CARD_FILE and name not in pictures) or name in replaced:
            return None
        if name in pictures and there.head(name).etag in _etags(pictures[name]):
            return pictures[name]
        return there.read(name, limit)

    found = read_beside(read, there.repo_id, pictures)
    return dataclasses.replace(found.checked(), place=there.place)


def _etags(data: bytes) -> tuple[str, str]:
    """By what the Hub may know a file: its SHA-256, or git's hash of it."""
    return sha256(data), hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _tell_whose_text(side: Side | None, where: str, redacted: bool) -> None:
    check = " Check that it does not name what was redacted." if redacted else ""
    if side == "hub":
        logger.warning(
            "The text of the card of %s was edited by hand, so it is kept and only its metadata is updated.%s",
            where,
            check,
        )
    elif side == "local" and redacted:
        logger.warning("The card's text was edited by hand and goes along.%s", check)


def push_model(folder: Path, repo_id: str, options: CommitOptions) -> "CommitInfo":
    """Push the folder of a whole erased model in one commit; weights of an erased model that was there before go.

    Raises:
        ErasureHubError: the Hub refused it or gave no answer, or somebody else pushed meanwhile.
        ErasureInputError: the repository holds something else than an erased model.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    private, token = options.get("private"), options.get("token")
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    with explained(repo_id, None, write=True):
        api = make_api(token)
        repo_id = patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        head = patiently(lambda: api.model_info(repo_id, timeout=TIMEOUT))
        present = {item.rfilename for item in head.siblings or ()} - {".gitattributes"}
        if private and head.private is False:
            raise ErasureInputError(
                f"{repo_id!r} exists and is public; leave out `private`, or make it private first."
            )
        if present - {CARD_FILE} and not {CONFIG_FILE, MODEL_INDEX} <= present:
            raise ErasureInputError(
                f"{repo_id!r} holds something else than a whole erased model; push to another repository."
            )
        there = Snapshot(repo_id, str(head.sha), f"{repo_id}@main", token=token)
        stale = _stale_weights(there, present) - set(files)
        hub = _beside_on_hub(there, present, {}, ())
        if hub.card is not None:
            card, by_hand = merge_card(hub.card, (folder / CARD_FILE).read_text(encoding="utf-8"))
            _tell_whose_text("hub" if by_hand else None, hub.where, redacted=False)
            files[CARD_FILE] = card.encode()
        operations: list[Any] = [CommitOperationAdd(name, data) for name, data in files.items()]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=options.get("commit_message") or "Upload an erased model",
            create_pr=options.get("create_pr", False),
            parent_commit=head.sha,
        )


def _stale_files(there: Snapshot, present: set[str], new: set[str]) -> list[str]:
    """Tensor files of an earlier erasure that the new one does not have.

    Raises:
        ErasureInputError: the repository holds a LoRA of somebody's own, which would be overwritten.
    """
    if CONFIG_FILE not in present:
        if LORA_FILE in present & new:
            raise ErasureInputError(
                f"{there.repo_id!r} holds a LoRA that is no erasure ({LORA_FILE} without {CONFIG_FILE}), which would be "
                "overwritten. Push to another repository, or delete that file there first."
            )
        return []
    try:
        old = ErasureConfig.from_json(there.read(CONFIG_FILE, MAX_CONFIG_BYTES)).files
    except (ErasureConfigError, ErasureFileError):
        logger.warning(
            "%s holds an erasure that this version cannot read; it is replaced, but for its files %s, which stay.",
            there.repo_id,
            sorted({*TENSOR_FILES} & present - new),
        )
        return []
    return sorted({*old} & {*TENSOR_FILES} & present - new)


def _stale_weights(there: Snapshot, present: set[str]) -> set[str]:
    """What an earlier push of an erased model wrote that must not lie beside another's weights; other files stay."""
    from ..schema.erased_model import MAX_BYTES, PLACES, Provenance

    if not {CONFIG_FILE, MODEL_INDEX} <= present:
        return set()
    try:
        Provenance.from_json(there.read(CONFIG_FILE, MAX_BYTES))
        index = json.loads(there.read(MODEL_INDEX, MAX_CONFIG_BYTES))
        parts = {name for name, value in index.items() if isinstance(value, list)}
    except (ErasureConfigError, ErasureFileError, ValueError, AttributeError):
        logger.warning("%s holds a model that this version cannot read; nothing is deleted there.", there.repo_id)
        return set()
    split = [(name, *name.partition("/")[::2]) for name in present]
    return {name for name, part, file in split if name in PLACES or (part in parts and _WEIGHTS.fullmatch(file))}
