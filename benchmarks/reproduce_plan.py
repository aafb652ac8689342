"""What a suite needs, before anything is downloaded: gates, disk, GPU hours, packages."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from reproduce_suites import Suite

WEIGHTS = (".safetensors", ".bin")
PINS = "pins.json"


@dataclass(frozen=True)
class Repo:
    """A repo at the commit that its branch `main` has now.

    Attributes:
        problem: why it cannot be used; None: it can.
    """

    name: str
    kind: str
    sha: str | None = None
    gated: bool = False
    n_bytes: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Plan:
    """All repos of a suite, and the room that they take."""

    suite: Suite
    repos: Sequence[Repo]
    free_bytes: int

    @property
    def disk_bytes(self) -> int:
        """Downloads, and three merges of the size of a base in bfloat16."""
        bases = {setting.base for setting in self.suite.settings}
        largest = max((one.n_bytes for one in self.repos if one.name in bases), default=0)
        return sum(one.n_bytes for one in self.repos) + 3 * largest

    @property
    def problems(self) -> list[str]:
        """What is in the way, each with what to do."""
        found = [f"{one.name}: {one.problem}" for one in self.repos if one.problem]
        if self.disk_bytes > self.free_bytes:
            needed, free = self.disk_bytes / 1e9, self.free_bytes / 1e9
            found.append(
                f"disk: {needed:.1f} GB are needed, {free:.1f} GB are free. Free some, or name a "
                "folder on another disk as RESULTS and as HF_HOME."
            )
        package = self.suite.package
        if package and not importlib.util.find_spec(package.partition("=")[0].replace("-", "_")):
            found.append(f"prompts: run pip install --no-deps '{package}'")
        return found

    def lines(self) -> Iterator[str]:
        """What is told before a download."""
        yield f"{self.suite.title} ({self.suite.paper})"
        yield ""
        yield "| repo | gated | GB | commit |"
        yield "|---|---|---:|---|"
        for one in self.repos:
            gated = "yes" if one.gated else "no"
            yield f"| {one.name} | {gated} | {one.n_bytes / 1e9:.2f} | {(one.sha or '?')[:12]} |"
        yield ""
        yield f"Disk: {self.disk_bytes / 1e9:.1f} GB, {self.free_bytes / 1e9:.1f} GB are free."
        if self.suite.scoring == "lm-eval":
            yield "Data of lm-eval's tasks come on top."
        yield f"GPU hours on one GPU with 80 GB, a guess: {self.suite.gpu_hours:g}."
        if self.suite.runs_code:
            yield "Runs code that the models write: allowed by --allow-code-execution only."

    def pins(self, results: Path) -> dict[str, str]:
        """repo -> repo@commit; the first run stores the commits, and later runs use them."""
        file = results / PINS
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        known |= {one.name: one.sha for one in self.repos if one.name not in known}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        return {name: f"{name}@{sha}" for name, sha in known.items()}


def plan(suite: Suite, results: Path, api: HfApi) -> Plan:
    """Ask the Hub about each repo once; nothing is downloaded."""
    repos = [_repo(name, "model", api) for name in suite.models]
    repos += [_repo(name, "dataset", api) for name in suite.datasets]
    place = next(path for path in (results, *results.resolve().parents) if path.exists())
    return Plan(suite, repos, shutil.disk_usage(place).free)


def _repo(name: str, kind: str, api: HfApi) -> Repo:
    try:
        info = api.repo_info(name, repo_type=kind, files_metadata=True)
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        return Repo(name, kind, problem=f"not found or not readable ({reason})")
    problem = None
    if info.gated:
        try:
            api.auth_check(name, repo_type=kind)
        except GatedRepoError:
            problem = f"gated: accept its licence at {api.endpoint}/{name}, and set HF_TOKEN"
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    wanted = [n for n in sizes if n.endswith(WEIGHTS[0])] or list(sizes)
    n_bytes = sum(sizes[one] for one in wanted)
    return Repo(name, kind, info.sha, bool(info.gated), n_bytes, problem)
