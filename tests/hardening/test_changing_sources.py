"""A source that is truncated, replaced or deleted while it is read: one message, never a signal."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_a_source_that_changes_while_it_is_merged_is_one_message(tmp_path, effort, first_seed):
    n_merges = 12 * min(effort, 20)
    path = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "hardening.changing", tmp_path, str(n_merges), str(first_seed)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    sys.stdout.write("\n".join(" ".join(one) for one in outcomes))  # pytest -rP shows it
    assert [one for one in outcomes if one[1] not in ("refused", "as before")] == []
    assert len(outcomes) == n_merges
    assert [one for one in outcomes if one[1] == "refused"]
