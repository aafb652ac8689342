"""Publish a merge: compare it with the merge in the target repo, and push it."""

from __future__ import annotations

import errno
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from pydantic import TypeAdapter, ValidationError

from lewis_hub import errors
from lewis_hub.display import Progress
from lewis_hub.documents import MAX_JSON_BYTES
from lewis_hub.errors import GateRefusedError, OutputError
from lewis_hub.evaluate.gate import FILE, GateVerdict
from lewis_hub.evaluate.scores import Scores
from lewis_hub.files import require_no_links_among, text_of, write_whole
from lewis_hub.hub import publish as hub_publish
from lewis_hub.hub.digests import digests_of
from lewis_hub.hub.facts import states_a_licence
from lewis_hub.hub.failures import HubRepo, address
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.publish import Additions, Publication, Published, PushedCommit, publish
from lewis_hub.hub.source import Source, SourceFile
from lewis_hub.hub.tags import require_taggable, tagged_commit
from lewis_hub.hub.target import (
    Target,
    open_target,
    own_pull_requests,
    read_target,
    will_be_public,
)
from lewis_hub.recipe.evaluation import Gates
from lewis_hub.recipe.formats import exports_in
from lewis_hub.recipe.schema import Publishing
from lewis_hub.report import cost, difference, markdown, page
from lewis_hub.report import lock as locks
from lewis_hub.report.card import DISAGREE, eval_result_paths
from lewis_hub.report.difference import differences
from lewis_hub.report.findings import gate_sentences, refusal, scores_table
from lewis_hub.report.lock import FILE as LOCK
from lewis_hub.report.lock import Lock
from lewis_hub.workflow.evaluate import CARD, SCORES, judge_again, read_scores, read_verdict
from lewis_hub.workflow.fetch import require_disk
from lewis_hub.workflow.job import MergeJob
from lewis_hub.workflow.report import RECIPE
from lewis_hub.workflow.republish import benchmarks_in, readdress

IMPORTANCE = "lewis/importance.json"
TITLE = "Merge with lewis-hub"
BELOW = f"{TITLE}, below the quality gate"
LONGEST_TITLE = 100

STEPS = ".steps.json"  # of `workflow.steps`; a push leaves it out


@dataclass(frozen=True)
class PreviousMerge:
    """The merge in the target repo."""

    source: Source  # the repo at the commit that was read
    lock: Lock
    changes: tuple[difference.ChangelogEntry, ...]  # its changelog; empty if not readable

    def holds(self, planned: Lock) -> bool:
        """Return whether it is the planned merge with all files, by the digests of the Hub."""
        found = {file.path: file.digest for file in self.source.files}
        return same_merge(self.lock, planned) and all(
            path in found and found[path].startswith(("git-sha1:", f"sha256:{file.sha256}"))
            for path, file in self.lock.outputs.items()
        )

    def read(self, path: str, api: HfApi) -> str | None:
        """Read a small file as text; None if it is missing or differs from the lock."""
        content = read_small(api, self.source, path)
        expected = self.lock.outputs.get(path)
        if content is None or expected is None:
            return None
        if hashlib.sha256(content).hexdigest() != expected.sha256:
            return None
        return content.decode("utf-8", errors="replace")


def previous_merge(target: Target, api: HfApi) -> PreviousMerge | None:
    """Read lock and changelog of the merge that a push would replace; None without a valid lock."""
    if target.head is None or LOCK not in target.digests:
        return None
    files = tuple(SourceFile(path, 0, digest) for path, digest in target.digests.items())
    source = Source(target.repo, "model", None, target.head, files, None)

    def read(path: str) -> str:
        return (read_small(api, source, path) or b"").decode("utf-8", "replace")

    try:
        lock = Lock.from_json(read(LOCK))
    except OutputError:
        return None
    try:
        changes = difference.from_json(read(difference.FILE))
    except OutputError:
        changes = ()
    return PreviousMerge(source, lock, changes)


def same_merge(found: Lock, planned: Lock) -> bool:
    """Return whether a merge is the planned one, with its scoring, licence and exports."""
    asked, stated = (one.recipe.get("publish") for one in (planned, found))
    stated = stated if isinstance(stated, Mapping) else {}  # a repo's lock may hold any value
    licensed = asked is None or asked.get("license") == stated.get("license")
    exported = {*exports_in(planned.recipe)} <= {*exports_in(found.recipe)}
    return same_model(found, planned) and licensed and exported


def same_model(found: Lock, planned: Lock) -> bool:
    """Return whether a merge has the weights and the scoring of the planned merge.

    The user's own task files are scoring too: they are the outputs that are known beforehand.
    """
    scoring, tasks = planned.recipe.get("evaluate"), planned.outputs.items()
    scored = scoring == found.recipe.get("evaluate") and tasks <= found.outputs.items()
    return found.digest == planned.digest and (scoring is None or scored)


def lock_in(folder: Path) -> Lock | None:
    """Return the lock of a folder; None if it has no valid lock.

    Raises:
        OSError: the system cannot read it.
        PublishError: a link leads out of the folder of a lock, which may have come with a recipe:
            card and report are read there, and written again.
    """
    try:
        (folder / LOCK).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    hub_publish.files_of(folder)
    try:
        return Lock.from_json(text_of(folder / LOCK, MAX_JSON_BYTES))
    except errors.LewisHubError:
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EFBIG):  # no file, or larger than any lock
            return None
        raise  # it may be a valid lock, which the disk cannot read now


def complete_in(folder: Path) -> Lock | None:
    """Return the lock of a folder that has all its files, by their sizes; otherwise None.

    Its recipe may be another one: a run that was to rewrite it and then the lock was interrupted.
    """
    found = lock_in(folder)
    outputs = found.outputs.items() if found else ()
    try:
        sizes = [((folder / path).stat().st_size, path, file.n_bytes) for path, file in outputs]
    except (OSError, ValueError):  # missing, or a name that no file can have
        return None
    return found if all(n == stated or path == RECIPE for n, path, stated in sizes) else None


@dataclass(frozen=True)
class Destination:
    """A repo as it was before the work began."""

    asked: Publishing  # the publishing settings
    target: Target
    # the merge in the repo; None if it holds another model or no model
    previous: PreviousMerge | None


def open_destination(asked: Publishing, api: HfApi) -> Destination:
    """Check before any work that a push can succeed."""
    target = open_target(api, asked.repo, asked.landing)
    return Destination(asked, target, previous_merge(target, api))


def published_file(
    path: str, destination: Destination | None, api: HfApi, scratch: Path
) -> list[Path]:
    """Copy measurements of the merge in the target repo, if they are there as its lock has them."""
    document = _measured(path, destination, api) if destination else None
    if document is None:
        return []
    file = scratch / f"published-{Path(path).name}"
    write_whole(file, document)
    return [file]


def _measured(path: str, destination: Destination, api: HfApi) -> str | None:
    """Return measurements that the target repo has; None if it is someone else's.

    Nothing in a file shows that it was measured, so its authors must be those who could replace the
    merge itself: not those of a repo that only takes pull requests.
    """
    is_own = destination.asked.landing == "commit"
    return destination.previous.read(path, api) if destination.previous and is_own else None


def published_already(destination: Destination, planned: Lock, api: HfApi) -> Published | None:
    """Return main, or an open pull request, if it already holds the planned merge.

    A tag stays on an earlier commit that holds it too: others pushed after it.
    """
    asked = destination.asked
    commit = _commit_with(planned, asked, destination.previous, api)
    if commit is None:
        return None
    tag = None if commit.pull_request_url else asked.tag
    if tag and _is_tagged(planned, HubRepo.to_publish(api, asked.repo), commit, tag):
        tag = None
    return hub_publish.publish_tag(api, asked.repo, commit, tag)


def published_results(
    published: Published, destination: Destination, api: HfApi
) -> tuple[Scores | None, GateVerdict | None]:
    """Return the scores of the merge that was found on the Hub, and the gate's verdict on it.

    What missed its gate and is on main was pushed by force: it has no verdict. In a pull request
    it is still refused.
    """
    found, is_proposed = destination.previous, published.pull_request_url is not None
    if is_proposed:
        hub_repo = HubRepo.to_publish(api, destination.asked.repo)
        found = previous_merge(read_target(hub_repo, published.commit_sha), api)
    if found is None:
        return None, None
    document, content = found.read(SCORES, api), read_small(api, found.source, FILE)
    scores, verdict = Scores.from_json(document) if document else None, None
    with suppress(errors.EvaluationError):  # the file is not part of the lock: it may be damaged
        verdict = GateVerdict.from_json((content or b"").decode("utf-8", errors="replace"))
    return scores, None if verdict and verdict.missed and not is_proposed else verdict


def require_free_tag(destination: Destination, api: HfApi) -> None:
    """Refuse, before any work, a tag that the commit of a new merge could not get."""
    asked, target = destination.asked, destination.target
    require_taggable(HubRepo.to_publish(api, asked.repo), target, asked.landing, asked.tag)


def _is_tagged(planned: Lock, hub_repo: HubRepo, commit: PushedCommit, tag: str) -> bool:
    """Whether a tag is on another commit that holds the planned merge."""
    tagged = tagged_commit(hub_repo, tag)
    if tagged in (None, commit.commit_sha):
        return False
    found = previous_merge(read_target(hub_repo, tagged), hub_repo.api)
    return found is not None and found.holds(planned)


def _commit_with(
    planned: Lock, asked: Publishing, main: PreviousMerge | None, api: HfApi
) -> PushedCommit | None:
    """Return the commit that holds a planned merge, on main or in an open pull request of ours.

    A lock states the digests of the files beside it, so it says nothing of a stranger's.
    """
    if main and main.holds(planned):
        return PushedCommit(main.source.commit_sha)
    return _proposed_by_us(planned, asked.repo, api) if asked.landing == "pull-request" else None


def _proposed_by_us(planned: Lock, repo: str, api: HfApi) -> PushedCommit | None:
    """Return an open pull request of the token's user that holds a planned merge."""
    for url, target in own_pull_requests(HubRepo.to_publish(api, repo)):
        proposed = previous_merge(target, api)
        if proposed and proposed.holds(planned):
            return PushedCommit(proposed.source.commit_sha, url)
    return None


def is_published(folder: Path, destination: Destination, api: HfApi) -> bool:
    """Return whether the target repo holds every file of a folder, so that it may be replaced."""
    previous = destination.previous
    if previous is None or lock_in(folder) != previous.lock:
        return False
    known = {folder / STEPS, *hub_publish.files_of(folder).values()}
    is_whole = all(path in known or path.is_dir() for path in folder.rglob("*"))
    return is_whole and hub_publish.matches_folder(api, folder, destination.target)


def push(
    folder: Path,
    destination: Destination,
    api: HfApi,
    progress: Progress,
    sent: Additions | None = None,
    *,
    force: bool,
) -> Published:
    """Push a folder in one commit, unless the repo changed since `destination` was opened.

    The commit's message and the folder's changelog and card list the changes against the previous
    merge. With `force`, a merge that missed its gate is pushed as usual, and the commit names the
    gate. `sent` are files that are uploaded already. See `pipeline.publish`.
    """
    hub_publish.files_of(folder)  # before anything of it is read
    _require_licence(folder)
    asked, lock = destination.asked, lock_in(folder)
    if lock:
        _require_its_files(folder, lock, sent or {})
    verdict = judge_folder(folder, asked.repo, api)
    missed = verdict if verdict and verdict.missed else None
    if missed and stays_here(missed, destination) and not force:
        raise refused(folder, missed, None)
    proposes = missed is not None and not force
    if proposes and lock and (proposed := _proposed_by_us(lock, asked.repo, api)):
        return hub_publish.publish_tag(api, asked.repo, proposed, None)
    if lock:
        readdress(folder, lock, asked.repo)
    changes = _record_changes(folder, destination.previous)
    lines = [f"- {change}" for change in difference.shown(changes)]
    publication = Publication(
        message=_title(changes, BELOW if missed else TITLE),
        description="\n".join([*([_below(folder, missed), ""] if missed else []), *lines]),
        landing="pull-request" if proposes else asked.landing,
        tag=None if proposes else asked.tag,
        private=asked.private,
        expected_parent=destination.target.head or hub_publish.NO_REPO,
        former=_unlisted(destination.previous),
    )
    with progress.stage("Publishing", hub_publish.folder_bytes(folder), "bytes") as advance:
        return publish(api, folder, asked.repo, publication, advance, sent)


def _unlisted(previous: PreviousMerge | None) -> frozenset[str]:
    """Return what a merge may have beside its card and the files that its lock lists.

    Of a merge whose lock cannot be read, such as that of another version, the changelog stays.
    """
    described = {LOCK, locks.PROVENANCE_FILE, FILE, cost.FILE, page.FILE}
    if previous is None:
        return frozenset(described)
    boards = benchmarks_in(previous.lock.recipe)
    return frozenset({*described, difference.FILE, *eval_result_paths(boards).values()})


def judge_folder(folder: Path, repo: str, api: HfApi) -> GateVerdict | None:
    """Return the verdict on a merge, compared with what its repo holds now.

    A new verdict is written into the folder; a signature of it is deleted then. A push to another
    repo than the recipe's changes no verdict.

    Raises:
        OSError: the system cannot read it.
        PublishError: a link leads out of the folder, which is written to before it is pushed.
    """
    hub_publish.files_of(folder)  # before anything is written or deleted
    lock = lock_in(folder)
    recipe = lock.recipe if lock else {}
    try:
        gates = TypeAdapter(Gates).validate_python(recipe["evaluate"]["gate"])
        named = recipe["publish"]["repo"] if recipe.get("publish") else repo
    except (KeyError, TypeError, ValidationError):
        return read_verdict(folder)
    return judge_again(gates if named == repo else (), folder, repo, api)


def _require_its_files(folder: Path, lock: Lock, sent: Additions) -> None:
    """Refuse a folder that lacks a file of its lock or has other weights: the lock would be false.

    So would the scores, and the repo would lose the files that are missing here.
    """
    remedy = f"Merge again. Or delete {LOCK} and {FILE}, to push it as another model."
    present = {path for path in lock.outputs if (folder / path).is_file()}
    if absent := lock.outputs.keys() - present - sent.keys():
        raise errors.PublishError(str(folder), f"{min(absent)} is missing", remedy)
    weights = sorted(path for path in present if path.endswith((".safetensors", ".gguf")))
    for path, digest in zip(weights, digests_of([folder / one for one in weights]), strict=True):
        if digest != f"sha256:{lock.outputs[path].sha256}":
            raise errors.PublishError(str(folder), f"{path} is not what the merge wrote", remedy)


def _require_licence(folder: Path) -> None:
    """Refuse a merge whose parents' licences differ if its card states no licence."""
    card = folder / CARD
    content = card.read_bytes() if card.exists() else b""
    if DISAGREE.encode() in content and not states_a_licence(content):
        raise errors.PublishError(
            str(folder),
            f"its parents' licences differ, and {CARD} states none",
            "Decide which licence a merge of them may have: write `license: ...` into the "
            f"metadata at the top of {CARD}, or set `publish.license` and merge again.",
        )


def stays_here(verdict: GateVerdict, destination: Destination) -> bool:
    """Return whether a merge that missed its gate is not proposed either, as to a new repo."""
    return verdict.stops or (bool(verdict.missed) and destination.target.head is None)


def refused(folder: Path, verdict: GateVerdict, proposed_at: str | None) -> GateRefusedError:
    """Return the error for a missed gate; `proposed_at` is the address of the pull request."""
    problem = f"below the quality gate: {refusal(verdict)}"
    if proposed_at:
        remedy = f"Main is unchanged; the merge is proposed at {proposed_at}."
    else:
        command = f"lewis-hub push {shlex.quote(str(folder))} OWNER/NAME --force"
        remedy = f"Nothing was pushed, and the merge is kept. `{command}` publishes it anyway."
    return GateRefusedError(str(folder), problem, remedy)


def _below(folder: Path, verdict: GateVerdict) -> str:
    """Return verdict and scores for a pull request."""
    reasons = "\n".join(f"- {markdown.text(sentence)}" for sentence in gate_sentences(verdict))
    scores = read_scores(folder)
    table = scores_table(scores) if scores else ""
    return f"This merge missed its quality gate.\n\n{reasons}\n\n{table}"


def _title(changes: Sequence[str], title: str) -> str:
    if not changes:
        return title
    more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
    first = difference.shown(changes[:1])[0].partition(" (")[0]  # without the names of files
    room = LONGEST_TITLE - len(title) - len(more) - 2
    return f"{title}: {first if len(first) <= room else first[: room - 1] + '…'}{more}"


def _record_changes(folder: Path, previous: PreviousMerge | None) -> tuple[str, ...]:
    """Return the changes against a previous merge.

    Changelog and card in the folder then list all changes of the target repo, and of no other.
    """
    lock, card, changelog = lock_in(folder), folder / CARD, folder / difference.FILE
    if not lock:
        return ()
    changes = differences(previous.lock, lock) if previous else ()
    entries = previous.changes if previous else ()
    if previous and changes:
        today, sha = datetime.now(UTC).date(), previous.source.commit_sha
        entries = (difference.ChangelogEntry(today, sha, lock.digest, changes), *entries)
    if card.exists() and (entries or changelog.exists()):
        write_whole(card, difference.in_card(card.read_text(encoding="utf-8"), entries))
    if entries and card.exists():
        write_whole(changelog, difference.to_json(entries))
    else:
        changelog.unlink(missing_ok=True)
    return changes


@dataclass(frozen=True)
class Preflight:
    """The result of a preflight."""

    # `unchanged`: the target repo holds this merge already; `merge`: on this disk; `stream`: from
    # Hub to Hub, because this disk is too small; `jobs`: on Hugging Face Jobs, as asked
    way: Literal["unchanged", "merge", "stream", "jobs"]
    why: str  # the reason, as a sentence
    commit_url: str | None = None  # of the commit that holds the merge
    is_public: bool = True  # whether everybody may read the merge once it is published


def preflight(
    job: MergeJob, asked: Publishing, output: Path | None, api: HfApi, *, force: bool
) -> Preflight:
    """Compare a job with the disk and the target; see `pipeline.preflight`."""
    found, planned = _place(job, output), job.planned
    if found.way == "stream":  # scores need whole models
        unscored = {key: part for key, part in planned.recipe.items() if key != "evaluate"}
        planned = replace(planned, recipe=unscored)
    hub_repo = HubRepo.to_publish(api, asked.repo)
    target = read_target(hub_repo)
    previous = previous_merge(target, api)
    commit = None if force else _commit_with(planned, asked, previous, api)
    if commit:
        why = f"{asked.repo}@{commit.commit_sha[:8]} holds this merge already."
        url = f"{address(api)}/{asked.repo}/commit/{commit.commit_sha}"
        return Preflight("unchanged", why, url)
    destination = Destination(asked, target, previous)
    require_free_tag(destination, api)
    if job.guide:
        place, profile = job.guide.beside[0] / "importance.json", None
        if not place.exists() and (profile := _measured(IMPORTANCE, destination, api)):
            require_no_links_among(place.parent)
            place.parent.mkdir(exist_ok=True)
            write_whole(place, profile)
    return replace(found, is_public=will_be_public(hub_repo, target, private=asked.private))


def _place(job: MergeJob, output: Path | None) -> Preflight:
    """Decide where to merge by the room on the disk of `output`; None: on Hugging Face Jobs."""
    if output is None:
        return Preflight("jobs", "Hugging Face Jobs merge, as asked.")
    needs = job.disk_needs()
    try:
        require_disk(output, needs.download_bytes, needs.made_bytes)
    except OutputError as shortage:
        why = ""
        if job.evaluation and job.evaluation.gates:
            why = "A quality gate scores whole models"
        elif job.draws_by_own_tasks:  # a stream is published by the job that draws them
            why = "Texts are drawn by own task files, and the job that publishes runs no code"
        if why:
            remedy = (
                f"{why}, so the merge cannot be streamed: use a machine with a larger disk, for "
                "example with `lewis-hub merge --push --on jobs`."
            )
            raise OutputError(shortage.where, shortage.problem, remedy) from None
        return Preflight("stream", f"{shortage.where}: {shortage.problem}.")
    return Preflight("merge", "The disk is large enough.")
