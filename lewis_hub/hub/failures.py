"""Failures of the Hub and of the network: which calls are repeated, and what the user reads.

huggingface_hub itself retries uploads and HEAD requests, but no lookup, download or commit.
"""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import httpx2
from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub import errors as hf
from huggingface_hub.utils import (
    _http,
    get_token,
    hf_raise_for_status,
    parse_ratelimit_headers,
)
from pydantic import TypeAdapter, ValidationError

from lewis_hub.display import shortened, some_of, without_credentials
from lewis_hub.errors import PublishError, SourceError
from lewis_hub.files import DISK_FULL
from lewis_hub.hub.answers import (
    COMPRESSION,
    hide_unlisted,
    limit_body,
    limit_pages,
    limit_pauses,
    limit_silence,
    note_next_page,
    note_purpose,
    require_true_names,
)
from lewis_hub.hub.heads import limit_heads
from lewis_hub.hub.origins import asking, hide_access_elsewhere, origin, place, withhold_token
from lewis_hub.hub.source import RepoType, Source, cached_revisions

if TYPE_CHECKING:
    from types import FrameType

    from huggingface_hub import HfApi

T = TypeVar("T")

PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
LONGEST_PART = 2000  # letters of a problem or a remedy, which may repeat what the Hub says
LONGEST_PAUSE_S = 60.0  # a longer Retry-After is an error that names it
N_CONNECTION_RETRIES = 2  # a refused connection seldom recovers within seconds
TOKEN = re.compile(
    r"hf_[\w-]{4,}(?:\.[\w-]{12,})*"  # parts of a JWT, and no suffix of a file
    r"|(?<![A-Za-z0-9])eyJ[\w-]{8,}(?:\.[\w-]+)*"  # a JWT, as of a workflow's identity
    r"|(?iu:bearer\s+\S+)",
    re.ASCII,
)
LOG_IN = "set HF_TOKEN or run `hf auth login`"
SIGN_IN = "/oauth/token"
CUT = "Consistency check failed"  # huggingface_hub's error if a file has not its size
OS_ERROR = re.compile(r"\(os error (\d{1,5})\)")  # in errors of hf-xet
AGAIN = "run the same command again: finished work is kept"
# errors of huggingface_hub in an answer that has another shape than a Hub's
MISREAD = (
    *(LookupError, TypeError, AttributeError, NameError, ArithmeticError, RecursionError),
    httpx2.InvalidURL,  # of a redirection
)
PROXIES = {f"{scheme}_PROXY" for scheme in ("ALL", "HTTP", "HTTPS", "NO")}  # that httpx reads
CERTIFICATES = {"SSL_CERT_FILE", "SSL_CERT_DIR"}
NO_ANSWER = (httpx2.HTTPError, OSError, ValueError, *MISREAD)  # to a question for a message


@dataclass(frozen=True)
class HubRepo:
    """A repo, the client that calls the Hub for it, and the error if a call fails."""

    api: HfApi
    name: str
    repo_type: RepoType = "model"
    revision: str | None = None
    error_type: type[SourceError] | type[PublishError] = SourceError

    @classmethod
    def of(cls, api: HfApi, source: Source) -> HubRepo:
        """The repo of a source at its commit."""
        return cls(api, source.name, source.repo_type, source.commit_sha)

    @classmethod
    def to_publish(cls, api: HfApi, name: str) -> HubRepo:
        """A model to publish to: its errors are of type `PublishError`."""
        return cls(api, name, error_type=PublishError)

    def file_url(self, path: str) -> str:
        """The address of a file."""
        return hf_hub_url(
            self.name,
            path,
            repo_type=self.repo_type,
            revision=self.revision,
            endpoint=self.api.endpoint,
        )

    @property
    def url(self) -> str:
        """The repo's page."""
        prefix = "datasets/" if self.repo_type == "dataset" else ""
        return f"{address(self.api)}/{prefix}{self.name}"

    @property
    def token(self) -> str | None:
        """The token of the calls, if there is one; it never appears in a message."""
        if self.api.token is False:
            return None
        if isinstance(self.api.token, str):
            return self.api.token
        limit_waiting()  # trusted publishing and a login that has ended ask the Hub for a token
        try:
            found = get_token()
        except (hf.OIDCError, httpx2.HTTPError, ValueError, *MISREAD):
            return None  # the calls themselves report the cause
        return found if isinstance(found, str) else None

    def failed(self, problem: str, remedy: str) -> SourceError | PublishError:
        """The error, each part on a line, without tokens and without credentials in addresses."""
        written = f"{self.name}@{self.revision}" if self.revision else self.name
        told = (shortened(self.redacted(part), LONGEST_PART) for part in (problem, remedy))
        return self.error_type(written, *told)

    def another_file(self, path: str) -> SourceError | PublishError:
        """The error of a file that is not the one that the Hub listed."""
        problem = f"`{path}` is another file than {self.api.endpoint} lists"
        return self.failed(problem, "Run the same command again; it resolves the files again.")

    def redacted(self, text: str) -> str:
        """The text on one line, without tokens and without credentials in addresses."""
        identity = os.environ.get("HF_OIDC_ID_TOKEN", "").strip()
        for secret in filter(None, (self.token, identity)):
            for spelled in (secret, repr(secret)[1:-1]):
                text = text.replace(spelled, "<token>")
        return " ".join(TOKEN.sub("<token>", without_credentials(text)).split())


def address(api: HfApi) -> str:
    """The Hub's address for readers: HF_ENDPOINT may contain a user and a password."""
    return without_credentials(str(api.endpoint))


def retry(call: Callable[[], T]) -> T:
    """Call until it succeeds, as long as errors are transient: 408, 429, 5xx, lost connections."""
    limit_waiting()
    for attempt, pause_s in enumerate(PAUSES_S):
        try:
            return call()
        except (hf.HfHubHTTPError, httpx2.TransportError, OSError) as error:
            if not is_transient(error):
                raise
            if isinstance(error, httpx2.ConnectError) and attempt >= N_CONNECTION_RETRIES:
                raise
            if asks_for_long_pause(error):
                raise
            after_s = retry_after_s(error)
            time.sleep(pause_s if after_s is None else after_s)
    return call()


def limit_waiting() -> None:
    """Limit pauses, silence, speed and size of answers, and who gets tokens, in huggingface_hub.

    The limits hold in later sessions, too: where huggingface_hub itself repeats a call, a refused
    connection makes a new one.
    """
    make = _http._GLOBAL_CLIENT_FACTORY  # there is no public attribute
    if not isinstance(make, _LimitedSessions):
        _http._GLOBAL_CLIENT_FACTORY = _LimitedSessions(make)
    _limit(get_session())  # it may have been made before


@dataclass(frozen=True)
class _LimitedSessions:
    """Makes sessions whose calls are limited."""

    make: Callable[[], httpx2.Client]

    def __call__(self) -> httpx2.Client:
        try:
            return _limit(self.make())
        except (ImportError, httpx2.InvalidURL, ValueError, OSError) as error:
            raise _unusable_settings(error) from None  # its text may have a proxy's password


def _unusable_settings(error: Exception) -> SourceError:
    """The error of variables of the environment that allow no connection at all."""
    kinds = CERTIFICATES if isinstance(error, OSError) else PROXIES
    names = [name for name in os.environ if name.upper() in kinds]
    problem = f"no connection can be made with {some_of(names) or 'its settings'}"
    if isinstance(error, ImportError):
        problem += ": a SOCKS proxy needs the package socksio"
        return SourceError("the environment", problem, "Install it: `pip install socksio`.")
    return SourceError("the environment", problem, "Correct these variables, or unset them.")


def _limit(session: httpx2.Client) -> httpx2.Client:
    session.headers["Accept-Encoding"] = COMPRESSION
    requests, answers = (session.event_hooks[kind] for kind in ("request", "response"))
    if limit_body not in answers:
        limit_heads(session)
        requests.extend((note_purpose, limit_pages, withhold_token, limit_silence))
        answers.extend((limit_pauses, hide_access_elsewhere, hide_unlisted))
        answers.extend((_require_short_pause, note_next_page))
        answers.extend((require_true_names, limit_body))
    return session


def _require_short_pause(answer: httpx2.Response) -> None:
    pause_s = _asked_pause_s(answer)
    if _is_passing(answer.status_code) and pause_s is not None and pause_s > LONGEST_PAUSE_S:
        hf_raise_for_status(answer)


def retry_transfer(call: Callable[[], object], done: Callable[[], int], at_least: int = 1) -> None:
    """Retry a transfer that resumes where it stopped.

    `call` keeps what it received before it failed, and `done` gives its amount. The transfer fails
    only when several attempts in a row transferred less than `at_least`.
    """
    while True:
        before = done()
        try:
            retry(call)
        except httpx2.TransportError:
            if done() - before < at_least:
                raise
        else:
            return


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later, and was not repeated yet."""
    if _was_repeated(error):
        return False
    if isinstance(error, hf.HfHubHTTPError):
        return _is_passing(error.response.status_code)
    if isinstance(error, httpx2.TransportError):
        return not isinstance(error, httpx2.UnsupportedProtocol | httpx2.ProxyError)
    return isinstance(error, OSError) and CUT in str(error)


def _was_repeated(error: BaseException) -> bool:
    """Whether huggingface_hub itself repeated the call as often as it does; it repeats some."""
    found = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    known = [frame.f_locals for frame in found if _package(frame) == "huggingface_hub"]
    return any(one["nb_tries"] >= one["max_retries"] for one in known if "nb_tries" in one)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_passing(status: int) -> bool:
    return status in {408, 429} or status >= 500


def retry_after_s(error: BaseException) -> float | None:
    """The pause that the server requires before a retry, if it names one."""
    return _asked_pause_s(error.response) if isinstance(error, hf.HfHubHTTPError) else None


def asks_for_long_pause(error: BaseException) -> bool:
    """Whether the server requires a longer pause than any call waits."""
    return (retry_after_s(error) or 0) > LONGEST_PAUSE_S


def _asked_pause_s(answer: httpx2.Response) -> float | None:
    limit = parse_ratelimit_headers(answer.headers)
    if answer.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    seconds = answer.headers.get("retry-after", "").strip()
    return float(seconds) if seconds.isdecimal() else None  # of any script, as huggingface_hub


def call_hub(hub_repo: HubRepo, call: Callable[[], T]) -> T:
    """Call until it succeeds as `retry` does; a failure is an error of `hub_repo.error_type`."""
    with hub_failures(hub_repo):
        return retry(call)


@contextmanager
def hub_failures(hub_repo: HubRepo) -> Iterator[None]:
    """Turn every failure of the Hub inside the block into an error of `hub_repo.error_type`."""
    limit_waiting()
    try:
        with asking(str(hub_repo.api.endpoint)):
            yield
    except hf.HfHubHTTPError as error:
        raise hub_repo.failed(*_refused(error, hub_repo)) from error
    except (hf.OfflineModeIsEnabled, hf.LocalEntryNotFoundError, httpx2.RequestError) as error:
        raise hub_repo.failed(*_unreachable(error, hub_repo)) from error
    except hf.LocalTokenNotFoundError as error:
        raise no_token(hub_repo) from error
    except hf.OIDCError as error:
        remedy = "Give the workflow `permissions: id-token: write` and set HF_OIDC_RESOURCE."
        raise hub_repo.failed(f"trusted publishing failed: {error}", remedy) from error
    except (hf.FileMetadataError, json.JSONDecodeError) as error:
        problem = f"{hub_repo.api.endpoint} does not answer like a Hub"
        raise hub_repo.failed(problem, "Check HF_ENDPOINT.") from error
    except (*MISREAD, ValueError) as error:
        if not _is_misread(error):
            raise
        raise hub_repo.failed(*_misread(error, hub_repo)) from error
    except (OSError, RuntimeError) as error:
        if (cause := _cause_of(error)) is None:
            raise
        with hub_failures(hub_repo):
            raise cause from None


def _cause_of(error: OSError | RuntimeError) -> BaseException | None:
    """What failed in a transfer, also a full disk; None if it is no failure of the Hub."""
    if CUT in str(error):  # huggingface_hub received another number of bytes
        return httpx2.RemoteProtocolError("another number of bytes arrived than the file has")
    if isinstance(error.__cause__, (httpx2.HTTPError, *MISREAD, ValueError)):
        return error.__cause__  # huggingface_hub wraps the errors of an upload
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    has_cause = error.__cause__ is not None or getattr(error, "errno", None) is not None
    if _package(frame) != "huggingface_hub" or has_cause:  # hf-xet has neither frames nor numbers
        return None
    number = int(found[1]) if (found := OS_ERROR.search(str(error))) else 0
    if number in DISK_FULL:
        return OSError(number, os.strerror(number))
    return httpx2.RemoteProtocolError(str(error))


def _is_misread(error: Exception) -> bool:
    """Whether a client of the Hub failed in an answer, and not what it called or its caller."""
    packages = [_package(frame) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return (
        not {"huggingface_hub", "httpx2"}.isdisjoint(packages)
        and "datasets" not in packages
        and packages[-1] != "lewis_hub"
        and not isinstance(error, hf.HFValidationError)
    )


def _misread(error: Exception, hub_repo: HubRepo) -> tuple[str, str]:
    """Problem and remedy of a call in which a client of the Hub failed."""
    if isinstance(error, UnicodeEncodeError) and not (hub_repo.token or "").isascii():
        return "the token has a letter that no token has", f"It may be mistyped: {LOG_IN}."
    kind = type(error).__name__
    problem = f"{hub_repo.api.endpoint} does not answer like a Hub ({kind}: {error})"
    return problem, "Check HF_ENDPOINT."


def read_answer(hub_repo: HubRepo, shape: TypeAdapter[T], answer: object) -> T:
    """The parts of an answer that `shape` names; an error if it has another shape."""
    with hub_failures(hub_repo):
        try:
            return shape.validate_python(answer)
        except ValidationError as error:
            raise hf.FileMetadataError(str(error)) from error


def no_token(hub_repo: HubRepo) -> SourceError | PublishError:
    """The error of a call that needs a token without one."""
    settings = f"{hub_repo.api.endpoint}/settings/tokens"
    remedy = f"Make one with write access at {settings}, then {LOG_IN}."
    return hub_repo.failed("there is no token to sign in with", remedy)


def _refused(error: hf.HfHubHTTPError, hub_repo: HubRepo) -> tuple[str, str]:
    """Problem and remedy of an answer that is an error."""
    status, host, noun = error.response.status_code, hub_repo.api.endpoint, hub_repo.repo_type
    said = hub_repo.redacted(error.server_message or "").rstrip(".")[:300]  # no part of a token
    because = f": {said}" if said else ""
    if error.response.url.path == SIGN_IN and not _is_passing(status):
        remedy = f"Name this workflow in {hub_repo.url}/settings as a trusted publisher."
        return f"trusted publishing was refused{because}", remedy
    if isinstance(error, hf.GatedRepoError):
        found = "this token has no access" if hub_repo.token else "there is no token"
        then = "run the same command again" if hub_repo.token else LOG_IN
        return f"access is gated and {found}", f"Ask for access at {hub_repo.url}, then {then}."
    if isinstance(error, hf.DisabledRepoError):
        return "access to it has been disabled", f"See {hub_repo.url}, or use another."
    if isinstance(error, hf.RevisionNotFoundError):
        return f"this {noun} has no such revision", _revisions(hub_repo)
    if isinstance(error, hf.RemoteEntryNotFoundError):
        path = error.response.url.path.partition("/resolve/")[2].partition("/")[2]
        return f"it has no file `{path}`", f"See {hub_repo.url}."
    missing = isinstance(error, hf.RepositoryNotFoundError)
    if status == 401 and hub_repo.token and not missing:
        remedy = f"It may be mistyped, expired or from another Hub: {LOG_IN}."
        return f"{host} does not know this token", remedy
    if missing or status == 401:
        return _not_found(hub_repo)
    if status == 403:
        doing = "read this" if hub_repo.error_type is SourceError else "write here"
        remedy = f"Use a token that may ({host}/settings/tokens): {LOG_IN}."
        return f"this token may not {doing}{because}", remedy
    if status == 429:
        pause_s = retry_after_s(error)
        wait = f"Wait {pause_s:.0f} s" if pause_s else "Wait a few minutes"
        return f"{host} limits the rate of requests (429)", f"{wait}, then {AGAIN}."
    if asks_for_long_pause(error):
        problem = f"{host} answers {status} and requires a pause of {retry_after_s(error):,.0f} s"
        return problem, f"Calls wait at most {LONGEST_PAUSE_S:.0f} s. Wait that long, then {AGAIN}."
    if status >= 500:
        problem = f"{host} still fails with {status} after several attempts{because}"
        return problem, f"This is usually temporary: wait a little, then {AGAIN}."
    remedy = "Correct the cause that it names, then run the same command again."
    return f"{host} refused this with {status}{because}", remedy


def _not_found(hub_repo: HubRepo) -> tuple[str, str]:
    noun: RepoType = hub_repo.repo_type
    other: RepoType = "dataset" if noun == "model" else "model"
    if _exists(hub_repo, other):
        return f"this is a {other}, not a {noun}", f"Name a {noun}."
    problem = f"no {noun} of this name on {hub_repo.api.endpoint}"
    if not hub_repo.token:
        return problem, f"Check the spelling; if it is private, {LOG_IN}."
    problem += ", or it is private and this token may not see it"
    return problem, "Check the spelling, and whose token this is: `hf auth whoami`."


def _exists(hub_repo: HubRepo, repo_type: RepoType) -> bool:
    try:
        hub_repo.api.repo_info(hub_repo.name, repo_type=repo_type, timeout=10)
    except NO_ANSWER:
        return False
    return True


def _revisions(hub_repo: HubRepo) -> str:
    try:
        refs = hub_repo.api.list_repo_refs(hub_repo.name, repo_type=hub_repo.repo_type)
        named = [
            f"{kind} {some_of([ref.name for ref in found])}"
            for kind, found in (("branches:", refs.branches), ("tags:", refs.tags))
            if found
        ]
    except NO_ANSWER:
        return f"See {hub_repo.url} for its branches and tags."
    return f"Name one of its {'; '.join(named)}; or a commit sha."


def _unreachable(error: Exception, hub_repo: HubRepo) -> tuple[str, str]:
    """Problem and remedy of a call without an answer."""
    cause = error.__cause__ if isinstance(error, hf.LocalEntryNotFoundError) else error
    if isinstance(cause, hf.HfHubHTTPError):
        return _refused(cause, hub_repo)
    cached = use_cache = ""
    if hub_repo.error_type is SourceError:
        where = f"the cache ({constants.HF_HUB_CACHE})"
        cached = f" It is not in {where}."
        if revisions := cached_revisions(hub_repo.name, hub_repo.repo_type):
            cached = f" In {where}: {', '.join(revisions)}."
            use_cache = " HF_HUB_OFFLINE=1 uses what is cached."
    if cause is None or isinstance(cause, hf.OfflineModeIsEnabled):
        problem = "HF_HUB_OFFLINE is set and the cache does not hold all its files"
        return problem, f"Unset HF_HUB_OFFLINE, then {AGAIN}.{cached}"
    how = "no answer in time" if isinstance(cause, httpx2.TimeoutException) else str(cause)
    host, settings = hub_repo.api.endpoint, "the network and HF_ENDPOINT"
    asked = getattr(cause, "_request", None)  # `request` fails if there is none
    if asked is not None and origin(asked.url) != origin(host):
        host, settings = f"{place(asked.url)}, which {host} names", "that this machine may reach it"
    problem = f"cannot reach {host} ({how or type(cause).__name__})"
    return problem, f"Check {settings}, then {AGAIN}.{cached}{use_cache}"
