import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from click.testing import CliRunner

from lewis_hub.cli.main import cli
from lewis_hub.demo.bench import Case, cases, measure_cases, run
from lewis_hub.errors import MergeError

MERGEKIT = os.environ.get("LEWIS_HUB_MERGEKIT", "")
TINY = ("bench", "--hidden-size", "64", "--blocks", "1", "--runs", "1")


def invoke(*words):
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    return done


def measured(case, folder):
    """In a small process: a child's peak memory starts at that of its parent."""
    (timing,) = measure_cases([case], folder, None, 1)
    return timing


@pytest.mark.slow
def test_a_case_is_measured_without_mergekit(tmp_path):
    case = Case(64, 1, "ties", 2)

    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        timing = pool.submit(measured, case, tmp_path).result()

    assert timing.mergekit is None
    assert timing.ratio is None
    assert timing.ours.seconds > 0
    assert 10e6 < timing.ours.peak_bytes < 1e9
    assert timing.to_json()["n_parameters"] == 2 * 32_000 * 64 + 4 * 64 * 64 + 3 * 64 * 170 + 3 * 64
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["0", "1", "2"]
    assert not (tmp_path / "output").exists()


def test_the_cases_are_those_of_the_published_table():
    assert [case.name for case in cases(1536, 14).values()] == [
        "0.5 B, ties, 2 experts",
        "0.5 B, dare_ties, 2 experts",
        "0.5 B, della, 2 experts",
        "0.5 B, linear, 2 experts",
        "0.5 B, ties, 8 experts",
        "1.2 B, ties, 2 experts",
    ]


def test_a_program_that_fails_is_named_with_its_message(tmp_path):
    script = "import sys; sys.exit('no such architecture')"

    with pytest.raises(MergeError, match="exit code 1: no such architecture"):
        run(["python", "-c", script], tmp_path / "output")


def test_a_hidden_size_that_heads_do_not_divide_is_refused():
    done = CliRunner().invoke(cli, ["bench", "--hidden-size", "100"])

    assert done.exit_code == 2
    assert "--hidden-size: it is not a multiple of 64" in done.output


@pytest.mark.slow  # twelve merges
def test_bench_without_mergekit_prints_our_figures_and_says_how_to_install_it(monkeypatch):
    monkeypatch.setenv("PATH", "")

    done = invoke(*TINY)

    assert "pip install mergekit" in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert all(line.rstrip().endswith("-") for line in lines[1:])


@pytest.mark.slow
@pytest.mark.skipif(not MERGEKIT, reason="LEWIS_HUB_MERGEKIT is not set: no mergekit here")
def test_bench_compares_with_mergekit():
    found = json.loads(invoke(*TINY, "--mergekit", MERGEKIT, "--json", "-q").stdout)

    assert found["status"] == "measured"
    assert [case["case"]["method"] for case in found["cases"]][:2] == ["ties", "dare_ties"]
    for case in found["cases"]:
        assert case["ratio"] == case["mergekit"]["seconds"] / case["ours"]["seconds"] > 1
