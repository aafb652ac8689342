"""The tutorial, typed as it stands there: its files, commands and program, on its own Hub."""

import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import HfApi

PAGES = Path(__file__).parents[1] / "docs" / "tutorial"
BLOCK = re.compile(r'```(bash|python|yaml)(?: title="([^"]+)")?\n(.+?)```', re.DOTALL)
INSTALL = "pip install"  # it is installed


def blocks(name):
    """The language, title and content of each block of a page."""
    return BLOCK.findall((PAGES / name).read_text(encoding="utf-8"))


@contextmanager
def first_shell(folder, environment):
    """Type the command of the first shell, and yield the line that it asks to type in a second."""
    ((command,),) = [
        [text] for _, title, text in blocks("first-merge.md") if title == "First shell"
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # so that tests can run side by side
    running = subprocess.Popen(
        [*command.split(), "--port", str(port)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield next(line for line in running.stdout if line.strip().startswith("export "))
    finally:
        running.terminate()
        running.communicate()


def typed(names, export):
    """What the pages say, as one script of a shell; a line `---` follows each page."""
    script = ["set -e", export]
    for name in names:
        for language, title, text in blocks(name):
            if language == "yaml":
                script.append(f"cat > {title} <<'END'\n{text}END")
            elif language == "python":
                script.append(f"python - <<'END'\n{text}END")
            elif title != "First shell" and not text.startswith(INSTALL):
                script.append(text)
        script.append("echo ---")
    return "\n".join(script)


@pytest.mark.slow  # it merges four times, and scores eight models
def test_the_tutorial_works_as_it_is_written(tmp_path):
    known = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    programs = str(Path(sys.executable).parent)
    environment = known | {
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    with first_shell(tmp_path, environment) as export:
        address, token = re.findall(r"HF_(?:ENDPOINT|TOKEN)=(\S+)", export)
        pages = ("first-merge.md", "own-tasks.md", "weekly.md")
        done = subprocess.run(
            ["bash", "-c", typed(pages, export)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        api = HfApi(endpoint=address, token=token)
        commits = {name: api.list_repo_commits(name) for name in ("me/first-merge", "me/scored")}

    first, own, weekly, _ = done.stdout.split("---\n")
    assert "No problems found." in first
    assert "Nothing changed: this merge is in" in first  # the folder is pushed as it is
    assert "Question: reverse MAFEZ\nAnswer: ZEFAM" in first
    assert f"Published {address}/me/first-merge" in first
    assert len(commits["me/first-merge"]) == 2  # with that of the empty repo
    assert "my_reverse" in own
    assert "my_cipher" in own
    assert f"Published {address}/me/scored" in own
    assert "expert zoo/expert-cipher" in weekly
    assert len(commits["me/scored"]) == 3
    assert "expert zoo/expert-cipher" in commits["me/scored"][0].title
    assert (tmp_path / "own-tasks/.github/workflows/remerge.yml").is_file()
