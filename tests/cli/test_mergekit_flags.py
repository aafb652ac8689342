"""An option of mergekit's commands gets the answer that docs/mergekit.md gives."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from lewis_hub.cli.main import cli
from lewis_hub.cli.mergekit_flags import ANSWERS, SAME

MERGEKIT = os.environ.get("LEWIS_HUB_MERGEKIT", "")
DOCUMENTED = (Path(__file__).parents[2] / "docs" / "mergekit.md").read_text(encoding="utf-8")


def refusal(*words):
    run = CliRunner().invoke(cli, ["merge", "config.yaml", "out", *words])
    assert run.exit_code == 2, run.output
    return run.output


@pytest.mark.parametrize("flag", ANSWERS)
def test_an_option_of_mergekit_is_answered(flag):
    assert f"{flag} is an option of mergekit. Here: {ANSWERS[flag]}." in refusal(flag)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--no-copy-tokenizer"], "--copy-tokenizer"),
        (["--out-shard-size", "1B"], "--out-shard-size"),
        (["-vv"], "-v"),
        (["-j", "8"], "-j"),
    ],
)
def test_forms_of_an_option_are_answered(words, flag):
    assert f"Here: {ANSWERS[flag]}." in refusal(*words)


def test_an_option_that_neither_has_is_no_such_option():
    assert "No such option '--alow-crimes'." in refusal("--alow-crimes")


def test_the_page_has_the_same_answers():
    rows = dict(re.findall(r"^\| `(-[\w-]+)` \| (.*) \|$", DOCUMENTED, re.MULTILINE))

    assert rows == ANSWERS
    assert f"| `{'`, `'.join(SAME)}` | the same |" in DOCUMENTED


ASK = """
import json
from mergekit.scripts import multimerge, run_yaml
found = {o for c in (run_yaml, multimerge) for p in c.main.params for o in p.opts if o[0] == "-"}
print(json.dumps(sorted(found)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not MERGEKIT, reason="LEWIS_HUB_MERGEKIT is not set: no mergekit here")
def test_every_option_of_mergekit_has_an_answer():
    python = Path(MERGEKIT).parent / "python"
    told = subprocess.run([python, "-c", ASK], capture_output=True, text=True, check=True).stdout

    assert set(json.loads(told.splitlines()[-1])) == {*ANSWERS, *SAME}
