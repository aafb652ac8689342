"""Repeats published merges: python benchmarks/reproduce.py SUITE RESULTS [--plan] [--smoke]

SUITE: lewis-paper, mergebench-3b, mergebench-8b, glue-flan-t5 or glue-gpt2. First it tells what is
gated, how much disk and how many GPU hours the suite needs; nothing is downloaded before. `--plan`
ends there. Then it merges and scores row by row. RESULTS keeps each row, and the commits of all
repos, so that a second run continues the first with the same models. At the end there is a table:
published, ours, difference, and whether it is within two standard errors; then the mean, the worst
task, forgetting, seconds and memory. `--limit N` scores the first N items of each task, and judges
nothing. `--device cuda` uses a GPU. `--smoke` runs the suite with tiny models and data on an
embedded Hub.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reproduce_plan import plan
from reproduce_scores import Scoring, own_tasks
from reproduce_suites import GLUE, NAMES, Setting, Suite, expected, read_suite
from reproduce_tables import tables
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import lewis_hub
from lewis_hub.workflow.resolve import hub_api
from lewis_hub.workflow.resources import Execution

SMOKE_ITEMS = 4


@dataclass(frozen=True)
class Row:
    """What was measured of a row.

    Attributes:
        scores: task -> score.
        abilities: lm-eval task -> score.
        seconds: of making the merge.
    """

    scores: Mapping[str, float]
    abilities: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    peak_bytes: int | None = None


class Runner:
    """Makes and scores the rows of a suite; each is stored as a file."""

    def __init__(self, suite: Suite, results: Path, at: Mapping[str, str], how: Scoring) -> None:
        self.suite, self.results, self.at, self.how = suite, results, dict(at), how

    def run(self) -> None:
        for setting in self.suite.settings:
            at, how = self.at, self.how
            if self.suite.scoring == "glue-heads":
                at, how = self._bodies(setting)
            for name, parts in self._rows(setting):
                file = self.results / setting.name / f"{name}.json"
                if file.exists() or parts is None:
                    continue
                row = self._row(setting, name, at, how)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(asdict(row)), encoding="utf-8")
                told = ", ".join(f"{task} {x:.3f}" for task, x in row.scores.items())
                print(f"{setting.name}, {name}: {told}", flush=True)

    def found(self) -> dict[str, dict[str, Row]]:
        """All stored rows: setting -> row."""
        return {
            setting.name: {
                name: Row(**json.loads(file.read_text(encoding="utf-8")))
                for name, _ in self._rows(setting)
                if (file := self.results / setting.name / f"{name}.json").exists()
            }
            for setting in self.suite.settings
        }

    def _rows(self, setting: Setting) -> Iterator[tuple[str, Any]]:
        """Rows with the base first, whose abilities show what is forgotten."""
        if self.suite.abilities and "base" not in setting.rows:
            yield "base", "base"
        yield from setting.rows.items()

    def _row(self, setting: Setting, name: str, at: Mapping[str, str], how: Scoring) -> Row:
        if name == "base":
            return self._scored(setting.base, setting, at[setting.base], how)
        if name == "experts":
            own = {
                task: how.of(self._folder(at[setting.experts[task]]), {task: setting.tasks[task]})
                for task in own_tasks(setting)
            }
            return Row({task: one[task] for task, one in own.items()})
        with TemporaryDirectory(dir=self.results) as scratch:
            file, merged = Path(scratch) / "recipe.yaml", Path(scratch) / "merged"
            file.write_text(json.dumps(setting.recipe(name, at)), encoding="utf-8")
            started = time.perf_counter()
            read = lewis_hub.read_recipe(file)
            lewis_hub.merge_models(read, merged, self.how.execution, progress=False)
            seconds = time.perf_counter() - started
            told = json.loads((merged / "lewis" / "cost.json").read_text(encoding="utf-8"))
            peaks = [stage["peak_rss_bytes"] or 0 for stage in told["stages"]]
            row = self._scored(name, setting, str(merged), how)
            return replace(row, seconds=seconds, peak_bytes=max(peaks) or None)

    def _scored(self, name: str, setting: Setting, place: str, how: Scoring) -> Row:
        lm_eval = self.suite.scoring == "lm-eval"
        scores = how.of(place if lm_eval else self._folder(place), setting.tasks)
        abilities = how.by_lm_eval(place, self.suite.abilities) if self.suite.abilities else {}
        assert scores, name
        return Row(scores, abilities)

    def _folder(self, place: str) -> Path:
        """A folder, or the download of repo@commit."""
        if Path(place).is_dir():
            return Path(place)
        from huggingface_hub import snapshot_download

        repo, _, sha = place.partition("@")
        return Path(snapshot_download(repo, revision=sha))

    def _bodies(self, setting: Setting) -> tuple[dict[str, str], Scoring]:
        """Each model without its head, as safetensors in a folder; heads stay where they were."""
        at, heads = dict(self.at), {}
        for repo in setting.models:
            folder = self._folder(self.at[repo])
            body = self.results / "bodies" / repo.replace("/", "--")
            if not (body / "config.json").exists():
                AutoModel.from_pretrained(folder).save_pretrained(body)
                AutoTokenizer.from_pretrained(folder).save_pretrained(body)
            at[repo] = str(body.resolve())
            heads |= {task: folder for task, own in setting.experts.items() if own == repo}
        return at, replace(self.how, heads=heads)


def main() -> None:
    """Tell what is needed, run what is not stored, and print the table."""
    disable_progress_bar()
    told = _arguments()
    results = told.results.resolve() / told.suite
    if told.smoke:
        raise SystemExit(_smoke(told.suite, told.results.resolve()))
    suite, include, limit = read_suite(told.suite), None, told.limit
    if told.tiny:
        from reproduce_smoke import tiny

        suite, include = tiny(suite, told.tiny)
        limit = SMOKE_ITEMS
    results = results / f"first-{limit}" if limit else results
    asked = plan(suite, results, hub_api())
    print("\n".join(asked.lines()), flush=True)
    problems = asked.problems
    if suite.runs_code and not told.allow_code_execution:
        problems.append("code: add --allow-code-execution, in a sandbox, or this suite cannot run")
    print("\n".join(["", *problems]), flush=True)
    if told.plan or problems:
        raise SystemExit(bool(problems))
    execution = Execution(device=told.device, allow_code=suite.runs_code)
    at = asked.pins(results)
    revision = at[GLUE].partition("@")[2] if GLUE in at else None
    how = Scoring(suite, execution, limit, include=include, revision=revision)
    runner = Runner(suite, results, at, how)
    runner.run()
    whole = tables(suite, expected(suite.name), runner.found(), limit)
    (results / "table.md").write_text(whole, encoding="utf-8")
    print(whole)


def _smoke(suite: str, results: Path) -> int:
    """Run the suite in a process of its own, whose Hub is an embedded one with tiny models."""
    from reproduce_smoke import put_models

    from lewis_hub.localhub.server import serve

    shutil.rmtree(results / suite / f"first-{SMOKE_ITEMS}", ignore_errors=True)  # of another Hub
    results.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=results) as scratch, serve(Path(scratch) / "hub") as hub:
        put_models(read_suite(suite), hub.api())
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.write_token,
            "HF_HOME": str(Path(scratch) / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": scratch,  # where the smoke run's fusion_bench is
        }
        command = [sys.executable, __file__, suite, str(results), "--allow-code-execution"]
        done = subprocess.run([*command, "--tiny", scratch], env=environment, check=False)
        for left in results.glob("*/*/bodies"):
            shutil.rmtree(left)
    return done.returncode


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suite", choices=NAMES)
    parser.add_argument("results", type=Path)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allow-code-execution", action="store_true")
    parser.add_argument("--tiny", type=Path, help=argparse.SUPPRESS)  # what --smoke runs
    return parser.parse_args()


if __name__ == "__main__":
    main()
