"""Where the files of a model lie, a folder or a repository on the Hub, and how parts of them are read."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import ErasureFileError, ErasureHubError
from ..hub.client import explained


WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)  # of a file in the same folder
GAP = 16_384  # bytes between two parts that are read with them: less than what another request costs
REQUESTS = 32  # at the same time
TIMEOUT = 30.0  # seconds for one part
Range = tuple[str, int, int]  # a file, the first byte, and the one behind the last


class Place(ABC):
    """A folder of files."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A small file as a whole; `None` where there is none."""

    @abstractmethod
    def part(self, where: Range) -> bytes:
        """Bytes of a file; fewer where it ends before."""

    def names(self) -> list[str]:
        """The files that hold the weights.

        Raises:
            ErasureFileError: the index that names them is damaged, or names files elsewhere.
        """
        index = self.read(INDEX)
        if index is None:
            return [WEIGHTS]
        try:
            names = sorted(set(json.loads(index)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ErasureFileError(f"{INDEX} is no index of weights: {error}") from error
        # Whoever wrote the index has no say in what else of the disk is read.
        strange = [name for name in names if not isinstance(name, str) or not NAME.fullmatch(name)]
        if strange:
            raise ErasureFileError(f"{INDEX} names {strange[0]!r}, which is no file beside it.")
        return names

    def parts(self, wanted: Sequence[Range]) -> list[bytes]:
        """Several parts; those that lie close together are read together."""
        found: dict[int, bytes] = {}
        order = sorted(range(len(wanted)), key=lambda i: wanted[i])
        groups: list[tuple[Range, list[int]]] = []
        for i in order:
            name, start, stop = wanted[i]
            if groups and groups[-1][0][0] == name and start <= groups[-1][0][2] + GAP:
                (_, first, last), own = groups[-1]
                groups[-1] = (name, first, max(last, stop)), [*own, i]
            else:
                groups.append(((name, start, stop), [i]))
        for ((_, first, _), own), data in zip(groups, self._together([where for where, _ in groups]), strict=True):
            found.update({i: data[wanted[i][1] - first : wanted[i][2] - first] for i in own})
        return [found[i] for i in range(len(wanted))]

    def _together(self, wanted: Sequence[Range]) -> list[bytes]:
        return [self.part(where) for where in wanted]


@dataclass(frozen=True)
class Folder(Place):
    """A local folder.

    Attributes:
        path: the folder.
    """

    path: Path

    def read(self, name: str) -> bytes | None:
        file = self.path / name
        return file.read_bytes() if file.is_file() else None

    def part(self, where: Range) -> bytes:
        name, start, stop = where
        with (self.path / name).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def names(self) -> list[str]:
        if (self.path / INDEX).is_file() or (self.path / WEIGHTS).is_file():
            return super().names()
        # A variant, such as that in half precision.
        return sorted(path.name for path in self.path.glob("diffusion_pytorch_model*.safetensors"))


@dataclass(frozen=True)
class Repository(Place):
    """A folder of a repository on the Hub.

    Attributes:
        repo: its id.
        revision: a commit, a branch or a tag; `None` for the main branch.
        folder: the folder there.
        found: where the Hub has sent the first request for each file, as its files lie on other servers.
    """

    repo: str
    revision: str | None
    folder: str
    found: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def read(self, name: str) -> bytes | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with explained(self.repo, self.revision):
            try:
                path = hf_hub_download(self.repo, f"{self.folder}/{name}", revision=self.revision)
            except LocalEntryNotFoundError:  # nobody knows whether there is one
                raise
            except EntryNotFoundError:
                return None
        return Path(path).read_bytes()

    def part(self, where: Range) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        name, start, stop = where
        asked = hf_hub_url(self.repo, f"{self.folder}/{name}", revision=self.revision)
        url = self.found.get(name, asked)
        elsewhere = urlsplit(url).netloc != urlsplit(asked).netloc  # a signed address, which no token goes to
        headers = {**({} if elsewhere else build_hf_headers()), "range": f"bytes={start}-{stop - 1}"}
        with explained(self.repo, self.revision):
            response: Any = http_backoff("GET", url, headers=headers, timeout=TIMEOUT)
            hf_raise_for_status(response)
        self.found[name] = str(response.url)
        if response.status_code != 206 or len(response.content) > stop - start:
            raise ErasureHubError(f"{url} is not sent in parts: the server answered {response.status_code}.")
        return response.content

    def _together(self, wanted: Sequence[Range]) -> list[bytes]:
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(self.part, wanted))
