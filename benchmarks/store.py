"""A store of finished work: what takes minutes is done once, in several processes, and a run that broke off goes on."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm.auto import tqdm

from diffusers_erasure import __version__
from diffusers_erasure.storage import write_file


FORMAT = 3  # of the stored results


class Work(Protocol):
    """Something to do, a frozen dataclass."""

    def identity(self) -> Mapping[str, Any]:
        """All that the result depends on, but the library's code and the embedded model."""


Item = TypeVar("Item", bound=Work)
Result = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """
    Results as one small JSON file each, under a hash of what the work depends on, with a folder of files where any belong
    to it.

    A result is written in one go and after its files, with its own checksum: what was cut off does not count. Changes of the
    library's code are not noticed: hence [`Store.fresh`].

    Args:
        folder (`Path`): Where they are.
        since (`float`, *optional*): What was made before this time does not count.
    """

    folder: Path
    since: float = 0.0

    @classmethod
    def fresh(cls, folder: Path) -> Store:
        """A store in which nothing counts that is there now."""
        return cls(folder, time.time())

    def key(self, item: Work) -> str:
        parts = {"format": FORMAT, "version": __version__, "kind": type(item).__name__, **item.identity()}
        return _digest(parts)[:32]

    def files_of(self, item: Work) -> Path:
        """The folder of the files that belong to a result."""
        return self.folder / self.key(item)

    def new_files(self, item: Work) -> Path:
        """The same, made anew: what a run left that was broken off is gone."""
        folder = self.files_of(item)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def read(self, item: Work) -> Result | None:
        """A result; None where there is none that counts."""
        try:
            data = json.loads(self._file(item).read_text(encoding="utf-8"))
            whole = data["made"] >= self.since and data["checksum"] == _digest(data["result"])
            return data["result"] if whole and all((self.folder / name).exists() for name in data["files"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, item: Work, result: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        files = sorted(str(path.relative_to(self.folder)) for path in self.files_of(item).rglob("*"))
        data = {"made": time.time(), "checksum": _digest(result), "files": files, "result": result}
        text = json.dumps({**data, "of": item.identity()}, default=repr) + "\n"
        write_file(self._file(item), text.encode())

    def _file(self, item: Work) -> Path:
        return self.folder / f"{self.key(item)}.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def do_all(
    items: Iterable[Item],
    work: Callable[[Item, Store], Result],
    store: Store,
    jobs: int = 1,
    *,
    label: str = "",
    together: Callable[[Item], Any] = lambda item: item,
    size: Callable[[Item], int] = lambda item: 1,
) -> dict[Item, Result]:
    """
    The results of items: the stored ones and, in `jobs` processes of one thread each, the others.

    Args:
        items: What is wanted. They do not build on one another.
        work (`Callable`): Does one, given the store for its files; a function of a module.
        store ([`Store`]): Where results are kept.
        jobs (`int`, *optional*, defaults to 1): Processes; with 1 all is done in this one.
        label (`str`, *optional*): What the progress bar says.
        together (`Callable`, *optional*): Items for which it gives the same are done one after the other in one process.
        size (`Callable`, *optional*): How much an item is, for the bar and for the order: the largest come first.
    """
    results = {item: store.read(item) for item in items}
    groups: dict[Any, list[Item]] = {}
    for item, result in results.items():
        if result is None:
            groups.setdefault(together(item), []).append(item)
    # So that none begins a long one last.
    waiting = sorted(groups.values(), key=lambda group: sum(map(size, group)), reverse=True)
    with tqdm(desc=label, total=sum(sum(map(size, group)) for group in waiting), disable=not waiting) as bar:
        for group, done in _finished(waiting, work, store, jobs):
            results |= zip(group, done, strict=True)
            bar.update(sum(map(size, group)))
    return {item: result for item, result in results.items() if result is not None}


def _finished(
    groups: list[list[Item]], work: Callable[[Item, Store], Result], store: Store, jobs: int
) -> Iterator[tuple[list[Item], list[Result]]]:
    if jobs == 1:
        for group in groups:
            yield group, _do(group, work, store)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_do, group, work, store): group for group in groups}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is stored by then stays
            raise


def _do(group: list[Item], work: Callable[[Item, Store], Result], store: Store) -> list[Result]:
    """Do and keep a group; read back, so that a stored and a fresh result are the same."""
    torch.set_num_threads(1)
    done = []
    for item in group:
        store.write(item, work(item, store))
        result = store.read(item)
        assert result is not None
        done.append(result)
    return done
