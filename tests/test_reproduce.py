"""Suites of published merges: their values, what they need, and runs on tiny models."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from reproduce_plan import plan
from reproduce_suites import NAMES, Expected, Setting, Suite, expected, read_suite
from reproduce_tables import tables

from lewis_hub.localhub.hub import Hub


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_a_source_and_a_tolerance_or_says_why_there_is_none(name):
    suite, published = read_suite(name), expected(name)

    assert published.keys() == {setting.name for setting in suite.settings}
    for setting in suite.settings:
        assert published[setting.name].keys() == setting.rows.keys()
        for tasks in published[setting.name].values():
            assert tasks.keys() == setting.tasks.keys()
            for one in tasks.values():
                if one.value is None:
                    assert (one.n, one.tolerance) == (None, None)
                    assert one.source.startswith(("not found: ", "ours; "))
                else:
                    assert one.n
                    variance = 2 * one.value * (1 - one.value) / one.n
                    assert one.tolerance == pytest.approx(2 * math.sqrt(variance), abs=1e-3)
                    assert any(x in one.source for x in ("uiuctml/", "tanganke/", "vidhirambhia/"))


def test_published_means_are_those_of_their_tables():
    rows = expected("glue-gpt2")["gpt2"]

    def mean(row: str) -> float:
        values = [one.value for one in rows[row].values() if one.value is not None]
        return round(100 * sum(values) / len(values), 1)

    assert {row: mean(row) for row in rows} == {
        "experts": 82.0,
        "simple_average": 56.1,
        "task_arithmetic": 70.0,
        "ties": 70.0,
        "regmean": 68.8,
    }


def test_a_plan_tells_gates_sizes_and_commits_before_anything_is_downloaded(hub: Hub, tmp_path):
    api = hub.api()
    for repo in ("org/base", "org/expert"):
        api.create_repo(repo)
        for name, n in (("model.safetensors", 300_000), ("pytorch_model.bin", 900_000)):
            api.upload_file(path_or_fileobj=bytes(n), path_in_repo=name, repo_id=repo)
    api.update_repo_settings("org/base", gated="auto")
    setting = Setting("s", "org/base", {"e": "org/expert", "f": "org/none"}, {}, {})
    suite = Suite("s", "A suite", "arXiv 1", "lm-eval", 2, [setting])

    found = plan(suite, tmp_path, HfApi(hub.url, token=hub.read_token))

    sha = api.repo_info("org/expert").sha
    assert [(r.name, r.gated, r.n_bytes) for r in found.repos] == [
        ("org/base", True, 300_000),
        ("org/expert", False, 300_000),
        ("org/none", False, 0),
    ]
    assert found.disk_bytes == 600_000 + 3 * 300_000
    assert f"| org/expert | no | 0.00 | {sha[:12]} |" in list(found.lines())
    assert "GPU hours on one GPU with 80 GB, a guess: 2." in list(found.lines())
    assert found.problems[-1].startswith("org/none: not found or not readable (")
    stranger = plan(suite, tmp_path, HfApi(hub.url, token=False))
    at = f"{hub.url}/org/base"
    assert stranger.problems[0] == (
        f"org/base: gated: accept its licence at {at}, and set HF_TOKEN"
    )


def test_later_runs_use_the_commits_of_the_first(hub: Hub, tmp_path):
    api = hub.api()
    api.create_repo("org/base")
    setting = Setting("s", "org/base", {}, {}, {})
    suite = Suite("s", "A suite", "arXiv 1", "lm-eval", 2, [setting])
    first = plan(suite, tmp_path, api).pins(tmp_path)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/base")

    assert plan(suite, tmp_path, api).pins(tmp_path) == first
    assert first["org/base"].startswith("org/base@")


def test_a_difference_is_judged_by_the_tolerance_unless_items_were_left_out():
    setting = Setting("s", "b", {}, {"x": "acc", "y": "acc"}, {"ties": {}, "base": "base"})
    suite = Suite("suite", "A suite", "arXiv 1", "lm-eval", 2, [setting])
    published = {
        "ties": {"x": Expected(0.5, 100, 0.14, "."), "y": Expected(0.9, 100, 0.08, ".")},
        "base": {"x": Expected(None, None, None, "not found"), "y": Expected(0.1, 9, 0.1, ".")},
    }
    found = {
        "base": _row({"x": 0.2, "y": 0.1}, {"a": 0.6}),
        "ties": _row({"x": 0.6, "y": 0.7}, {"a": 0.5}, seconds=12.0, peak_bytes=3_000_000),
    }

    lines = tables(suite, {"s": published}, {"s": found}).splitlines()

    assert "| ties | x | 0.500 | 0.600 | +0.100 | yes |" in lines
    assert "| ties | y | 0.900 | 0.700 | -0.200 | no |" in lines
    assert "| base | x |  | 0.200 |  |  |" in lines
    assert "| ties | 0.700 | 0.650 | x 0.600 | +0.100 | 12 | 3 MB |" in lines
    trial = tables(suite, {"s": published}, {"s": found}, limit=4).splitlines()
    assert trial[0] == "The first 4 items of each task: a trial."
    assert "| ties | y | 0.900 | 0.700 | -0.200 |  |" in trial


def _row(scores, abilities, seconds=None, peak_bytes=None):
    return SimpleNamespace(
        scores=scores, abilities=abilities, seconds=seconds, peak_bytes=peak_bytes
    )


@pytest.mark.slow
@pytest.mark.parametrize("suite", NAMES)
def test_a_suite_runs_from_plan_to_table_on_tiny_models(suite, tmp_path):
    command = [sys.executable, "benchmarks/reproduce.py", suite, str(tmp_path), "--smoke"]
    told = subprocess.run(command, check=False, capture_output=True, encoding="utf-8")

    assert told.returncode == 0, told.stderr
    assert told.stdout.index("GPU hours") < told.stdout.index("### ")
    folder = tmp_path / suite / "first-4"
    merged = {
        (setting.name, row)
        for setting in read_suite(suite).settings
        for row, parts in setting.rows.items()
        if parts is not None
    }
    assert merged <= {(file.parent.name, file.stem) for file in folder.glob("*/*.json")}
    assert (folder / "table.md").read_text(encoding="utf-8").startswith("The first 4 items")
    assert not list(Path(tmp_path).rglob("*.safetensors"))
