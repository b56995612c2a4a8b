"""How this library speaks to the Hub: its client with time limits, patience, and errors that say what to do."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from .._version import __version__
from ..compat import hub_transport_error
from ..errors import ErasureError, ErasureHubError, ErasureInputError, ErasureNotFoundError
from ..logging import get_logger
from ..schema import CONFIG_FILE


if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = get_logger(__name__)

T = TypeVar("T")

WAITS = (1.0, 2.0)  # seconds between the attempts to reach a Hub that does not answer
TIMEOUT = 10.0  # seconds for one short request; huggingface_hub would wait without end
TIMEOUT_CACHED = 2.5  # ... to connect, and to answer, where the cache can stand in, or a fresh card


@contextmanager
def explained(repo_id: str, revision: str | None, write: bool = False) -> Iterator[None]:
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
    except hub.RevisionResolutionError as error:
        offline = error.__cause__ is None or isinstance(error.__cause__, hub.OfflineModeIsEnabled)
        kind = ErasureNotFoundError if offline else ErasureHubError
        raise kind(
            f"{repo_id!r} is not a local folder and not in the cache, and the Hub "
            + (
                "was not asked (`local_files_only=True` or HF_HUB_OFFLINE=1). Pull it once with a connection."
                if offline
                else f"gave no answer ({brief(error.__cause__)}). Check the connection and HF_ENDPOINT, and try again."
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
            f"The connection to the Hub failed ({brief(error)}) while {repo_id!r} was in use. {done}"
        ) from error
    except RuntimeError as error:  # what an upload to the large-file store raises, around the reason
        if not write or error.__cause__ is None:
            raise
        raise ErasureHubError(
            f"{brief(error)} ({brief(error.__cause__)}) Nothing of the push is visible. Push again."
        ) from error
    except ValueError as error:
        if not write:
            raise
        raise ErasureHubError(f"The Hub does not accept this push to {repo_id!r}: {str(error)[:500]}") from error
    except OSError as error:
        raise ErasureHubError(
            f"{repo_id!r} could not be {'pushed' if write else 'downloaded into the cache'}: {brief(error)}. Check the "
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
    return f"{repo_id!r}: the Hub answered {status}. {what} ({brief(error)})"


def brief(error: BaseException | None) -> str:
    text = str(getattr(error, "server_message", None) or error or "").strip()
    return (text.splitlines() or [type(error).__name__])[0][:200]


def patiently(call: Callable[[], T]) -> T:
    """Call again after a moment, and say so, where the Hub gave no answer; at most twice."""
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionResolutionError

    for wait in WAITS:
        try:
            return call()
        except (hub_transport_error(), RevisionResolutionError) as error:
            cause = error.__cause__ if isinstance(error, RevisionResolutionError) else error
            if cause is None or isinstance(cause, OfflineModeIsEnabled):
                raise
            logger.warning("The Hub did not answer (%s); trying again in %g s.", brief(cause), wait)
            time.sleep(wait)
    return call()


def make_api(token: str | bool | None, timeout: float = TIMEOUT) -> "HfApi":
    from huggingface_hub import HfApi

    class Api(HfApi):
        """The Hub's client with a time limit on the requests for a repository's head; notes whether one succeeded."""

        reached = False

        def repo_info(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["timeout"] = kwargs.get("timeout") or timeout
            info = super().repo_info(*args, **kwargs)
            self.reached = True
            return info

    return Api(token=token, library_name="diffusers_erasure", library_version=__version__)
