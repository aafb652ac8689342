"""Files of others that are almost valid: they are read, or refused by an error of ours.

Each case takes less than 5 s of processor time and 1 GB. `corpus/` keeps what was found and
mended.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from effort import EFFORT, SEED

if sys.platform != "linux":
    pytest.skip("time and memory are limited by Linux", allow_module_level=True)

from hardening.fuzz import CORPUS, kept
from hardening.targets import TARGETS

N_CASES = 100_000
GROUPS = (
    ("headers", "indexes"),
    ("quantised", "cards", "tasks"),
    ("adapters", "tokenizers", "recipes"),
    ("locks", "results", "folders"),
    ("models", "exports"),
)


def test_each_target_is_fuzzed_once():
    assert sorted(name for group in GROUPS for name in group) == sorted(TARGETS)
    assert sum(target.share for target in TARGETS.values()) == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize("group", GROUPS, ids="-".join)
def test_files_that_are_almost_valid_are_read_or_refused(group):
    n_cases = str(N_CASES * EFFORT)
    done = subprocess.run(
        [sys.executable, "-m", "hardening.fuzz", n_cases, str(SEED), *group],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(CORPUS.parents[1]), *sys.path])},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    sys.stdout.write(json.dumps(figures, indent=1))  # pytest -rP shows it
    assert [figure["findings"] for figure in figures] == [{}] * len(group)
    assert [f["n_cases"] for f in figures] == [
        len(kept(name)) + round(TARGETS[name].share * N_CASES * EFFORT) for name in group
    ]
