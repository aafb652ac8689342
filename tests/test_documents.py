"""The commands in the documents, typed as they stand there: on the zoo, over HTTP.

Those of docs/jobs.md are typed in `test_jobs_end_to_end.py`, those of docs/tutorial in
`test_tutorial.py`, and those of docs/tuning.md search for an hour; a Ray cluster, a package index
and Sigstore are not here.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from zoo_hub import put_zoo

from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder

ROOT = Path(__file__).parents[1]
PAGES = (
    *("README.md", "docs/index.md", "docs/provenance.md", "docs/automation.md", "docs/large.md"),
    *("docs/embeddings.md", "docs/vision-language.md"),
)
BASH = re.compile(r"```bash\n(.+?)```", re.DOTALL)
LINES = [
    re.sub(r"\s+#.*", "", line)
    for page in PAGES
    for block in BASH.findall((ROOT / page).read_text())
    for line in block.splitlines()
]
COMMANDS = [line for line in LINES if line.startswith("lewis-hub ") and "--runner ray" not in line]
REPO = "lewis/merge"
NAMES = {
    "YOU/YOUR-MERGE": REPO,
    "ORG/BASE": "zoo/base",
    "ORG/CODE": "zoo/expert-reverse",
    "ORG/MATH": "zoo/expert-cipher",
}
PUBLISH = f"publish: {{repo: {REPO}, license: apache-2.0, tag: v1}}\n"


def run(*words):
    done = CliRunner().invoke(cli, words)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def place(hub, tmp_path, monkeypatch):
    """A working folder with a recipe, keys and a merge, which is signed and published as v1."""
    pytest.importorskip("model_signing")
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    monkeypatch.chdir(tmp_path)
    text = (zoo_folder() / "recipe.yaml").read_text().replace("samples: 128", "samples: 2")
    Path("recipe.yaml").write_text(text.partition("evaluate:")[0] + PUBLISH)
    for line in LINES:
        if line.startswith("openssl "):
            subprocess.run(shlex.split(line), check=True, capture_output=True)
    run("merge", "--push", "--sign", "key.pem", "-q")
    for name, seed in {"old": 1, "new": 2}.items():
        text = Path("recipe.yaml").read_text().replace("seed: 42", f"seed: {seed}")
        Path(f"{name}.yaml").write_text(text)
    return tmp_path


@pytest.mark.slow  # it merges for each of them
def test_every_command_in_the_documents_runs(hub, place):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    assert len(COMMANDS) >= 14
    for number, line in enumerate(COMMANDS):
        for name, own in NAMES.items():
            line = line.replace(name, own)
        words = shlex.split(line)[1:]
        if words[0] == "merge":  # as if it were the first of its folder and its repo
            shutil.rmtree("merged", ignore_errors=True)
            text = Path("recipe.yaml").read_text().replace(REPO, f"lewis/merge-{number}")
            Path("again.yaml").write_text(text)
            words = [f"lewis/merge-{number}" if word == REPO else word for word in words]
            words = [word for word in words if word != "recipe.yaml"] + ["again.yaml"]
        if words[0] == "init" and "--github" not in words:
            words += ["-o", f"{number}.yaml"]

        run(*words)

    assert hub.api().repo_exists("lewis/merge-0")


def test_signatures_are_checked_by_the_command_in_the_documents(place):
    (line,) = [line for line in LINES if line.startswith("model_signing verify key")]

    words = shlex.split(line)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", *words], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


def test_keyless_signing_has_the_options_that_the_documents_name():
    pytest.importorskip("model_signing")
    (line,) = [line for line in LINES if line.startswith("model_signing sign sigstore")]

    words = shlex.split(line)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", *words[:2], "--help"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert all(word in done.stdout for word in words if word.startswith("--"))
