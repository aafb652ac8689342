"""The one place where a failure of the Hub, or on the way to it, becomes a message to the user."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx2
from huggingface_hub import constants
from huggingface_hub import errors as hf
from huggingface_hub.utils import get_token

from lewis_hub.errors import PublishError, SourceError
from lewis_hub.hub.cache import cached_revisions
from lewis_hub.hub.retries import asked_pause_s
from lewis_hub.hub.source import RepoType

if TYPE_CHECKING:
    from huggingface_hub import HfApi


TOKEN = re.compile(r"hf_[A-Za-z0-9]{4,}|(?i:bearer)\s+\S+")
LOG_IN = "set HF_TOKEN or run `hf auth login`"
SIGN_IN = "/oauth/token"
AGAIN = "run the same command again: finished work is kept"


@dataclass(frozen=True)
class Asked:
    """What was asked of the Hub, for the message if it fails."""

    api: HfApi
    repo: str
    repo_type: RepoType = "model"
    revision: str | None = None
    kind: type[SourceError] | type[PublishError] = SourceError

    @property
    def url(self) -> str:
        """The repo's page."""
        prefix = "datasets/" if self.repo_type == "dataset" else ""
        return f"{self.api.endpoint}/{prefix}{self.repo}"

    @property
    def token(self) -> str | None:
        """The token that calls carry, if there is one; never part of a message."""
        if self.api.token is False:
            return None
        if isinstance(self.api.token, str):
            return self.api.token
        try:
            return get_token()
        except (hf.OIDCError, hf.HfHubHTTPError, httpx2.TransportError):
            return None  # could not sign in as a workflow: the calls themselves say why

    def failed(self, problem: str, remedy: str) -> SourceError | PublishError:
        """The error, with whatever looks like a token taken out."""
        written = f"{self.repo}@{self.revision}" if self.revision else self.repo
        return self.kind(written, self._redacted(problem), self._redacted(remedy))

    def _redacted(self, text: str) -> str:
        return TOKEN.sub("<token>", text.replace(self.token, "<token>") if self.token else text)


@contextmanager
def hub_failures(asked: Asked) -> Iterator[None]:
    """Turn whatever goes wrong with the Hub inside the block into `asked.kind`."""
    try:
        yield
    except hf.HfHubHTTPError as error:
        raise _refused(error, asked) from error
    except (hf.OfflineModeIsEnabled, hf.LocalEntryNotFoundError, httpx2.TransportError) as error:
        raise _unreached(error, asked) from error
    except hf.LocalTokenNotFoundError as error:
        raise no_token(asked) from error
    except hf.OIDCError as error:
        remedy = "Give the workflow `permissions: id-token: write` and set HF_OIDC_RESOURCE."
        raise asked.failed(f"keyless sign-in failed: {error}", remedy) from error
    except (hf.FileMetadataError, json.JSONDecodeError) as error:
        raise asked.failed(
            f"{asked.api.endpoint} does not answer as a Hub does", "Check HF_ENDPOINT."
        ) from error
    except RuntimeError as error:  # huggingface_hub wraps what goes wrong in an upload
        if not isinstance(error.__cause__, httpx2.HTTPError):
            raise
        with hub_failures(asked):
            raise error.__cause__ from None


def no_token(asked: Asked) -> SourceError | PublishError:
    """Something needs a token and there is none."""
    remedy = f"Make one with write access at {asked.api.endpoint}/settings/tokens, then {LOG_IN}."
    return asked.failed("there is no token to sign in with", remedy)


def _refused(error: hf.HfHubHTTPError, asked: Asked) -> SourceError | PublishError:
    status = error.response.status_code
    if error.response.url.path == SIGN_IN and status < 500:
        remedy = f"Name this workflow in {asked.url}/settings as a trusted publisher."
        return asked.failed(f"keyless sign-in was refused{_said(error)}", remedy)
    if isinstance(error, hf.GatedRepoError):
        found = "this token has not been granted it" if asked.token else "there is no token"
        then = "run the same command again" if asked.token else LOG_IN
        remedy = f"Ask for access at {asked.url}, then {then}."
        return asked.failed(f"access is gated and {found}", remedy)
    if isinstance(error, hf.DisabledRepoError):
        return asked.failed("access to it has been disabled", f"See {asked.url}, or use another.")
    if isinstance(error, hf.RevisionNotFoundError):
        return asked.failed(f"this {asked.repo_type} has no such revision", _revisions(asked))
    if isinstance(error, hf.RemoteEntryNotFoundError):
        path = error.response.url.path.partition("/resolve/")[2].partition("/")[2]
        return asked.failed(f"it has no file `{path}`", f"See {asked.url}.")
    if status == 401 and asked.token and not isinstance(error, hf.RepositoryNotFoundError):
        return asked.failed(
            f"{asked.api.endpoint} does not know this token",
            f"It may be mistyped, expired or from another Hub: {LOG_IN}.",
        )
    if isinstance(error, hf.RepositoryNotFoundError) or status == 401:
        return _not_found(asked)
    if status == 403:
        doing = "read this" if asked.kind is SourceError else "write here"
        return asked.failed(
            f"this token may not {doing}{_said(error)}",
            f"Use a token that may ({asked.api.endpoint}/settings/tokens): {LOG_IN}.",
        )
    return _stumbled(error, asked)


def _stumbled(error: hf.HfHubHTTPError, asked: Asked) -> SourceError | PublishError:
    status, host = error.response.status_code, asked.api.endpoint
    if status == 429:
        pause_s = asked_pause_s(error)
        wait = f"Wait {pause_s:.0f} s" if pause_s else "Wait a few minutes"
        return asked.failed(f"{host} asks to slow down (429)", f"{wait}, then {AGAIN}.")
    if status >= 500:
        problem = f"{host} failed with {status} again and again{_said(error)}"
        return asked.failed(problem, f"Its trouble usually passes: wait a little, then {AGAIN}.")
    problem = f"{host} refused this with {status}{_said(error)}"
    return asked.failed(problem, "Change what it names, then run the same command again.")


def _said(error: hf.HfHubHTTPError) -> str:
    words = " ".join((error.server_message or "").split()).rstrip(".")
    return f": {words[:300]}" if words else ""


def _not_found(asked: Asked) -> SourceError | PublishError:
    other: RepoType = "dataset" if asked.repo_type == "model" else "model"
    if _exists(asked, other):
        return asked.failed(
            f"this is a {other}, not a {asked.repo_type}", f"Name a {asked.repo_type}."
        )
    problem = f"no {asked.repo_type} of this name on {asked.api.endpoint}"
    if asked.token:
        problem += ", or it is private and this token may not see it"
        return asked.failed(
            problem, "Check the spelling, and whose token this is: `hf auth whoami`."
        )
    return asked.failed(problem, f"Check the spelling; if it is private, {LOG_IN}.")


def _exists(asked: Asked, repo_type: RepoType) -> bool:
    try:
        asked.api.repo_info(asked.repo, repo_type=repo_type, timeout=10)
    except (httpx2.HTTPError, OSError):
        return False
    return True


def _revisions(asked: Asked) -> str:
    try:
        refs = asked.api.list_repo_refs(asked.repo, repo_type=asked.repo_type)
    except (httpx2.HTTPError, OSError):
        return f"See {asked.url} for its branches and tags."
    named = [
        f"{kind} {', '.join(ref.name for ref in found[:8])}"
        for kind, found in (("branches:", refs.branches), ("tags:", refs.tags))
        if found
    ]
    return f"Name one of its {'; '.join(named)}; or a commit sha."


def _unreached(error: Exception, asked: Asked) -> SourceError | PublishError:
    cause = error.__cause__ if isinstance(error, hf.LocalEntryNotFoundError) else error
    if isinstance(cause, hf.HfHubHTTPError):
        return _refused(cause, asked)
    if asked.kind is PublishError:
        cached = ""
    else:
        revisions = cached_revisions(asked.repo, asked.repo_type)
        where = f"the cache ({constants.HF_HUB_CACHE})"
        cached = f" In {where}: {', '.join(revisions)}." if revisions else f" It is not in {where}."
    if cause is None or isinstance(cause, hf.OfflineModeIsEnabled):
        problem = "HF_HUB_OFFLINE is set and not all of it is in the cache"
        return asked.failed(problem, f"Unset HF_HUB_OFFLINE, then {AGAIN}.{cached}")
    how = "no answer in time" if isinstance(cause, httpx2.TimeoutException) else str(cause)
    problem = f"cannot reach {asked.api.endpoint} ({how or type(cause).__name__})"
    use_cache = " HF_HUB_OFFLINE=1 uses what is cached." if "In the cache" in cached else ""
    remedy = f"Check the network and HF_ENDPOINT, then {AGAIN}.{cached}{use_cache}"
    return asked.failed(problem, remedy)
