"""What is installed: the wheel's content, its modules without extras, and its commands."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from lewis_hub import __version__

ROOT = Path(__file__).parents[1]
WITHOUT_EXTRAS = (
    "import runpy, sys; sys.path.insert(0, sys.argv[1]);"
    "sys.modules.update(dict.fromkeys(['starlette', 'uvicorn', 'markdown_it', 'ray',"
    " 'model_signing', 'optuna']));"
    "runpy.run_path(sys.argv[2])"
)


def sources(tmp_path):
    """A copy of what is packaged, because setuptools builds beside what it reads."""
    copy = tmp_path / "source"
    for folder in ("lewis_hub", "templates", ".ci"):
        shutil.copytree(ROOT / folder, copy / folder)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.mark.slow
def test_a_wheel_without_extras_imports_every_module_and_contains_the_templates(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, sources(tmp_path)], check=True)
    wheel = tmp_path / f"lewis_hub-{__version__}-py3-none-any.whl"
    installed = tmp_path / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)

    for name in ("workflows/remerge.yml", "card.md.j2", "recipe.yaml.j2", "hub/style.css"):
        assert (installed / "lewis_hub/templates" / name).read_text() == (
            ROOT / "templates" / name
        ).read_text()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, installed, ROOT / ".ci" / "installed.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    imported, left_out = done.stdout.splitlines()
    assert imported.endswith(f"modules of {installed}/lewis_hub")
    assert "lewis_hub.localhub.routes" in left_out
    assert "lewis_hub.hub.publish" not in left_out


def test_both_commands_have_the_same_entry_point():
    scripts = {point.name: point.value for point in entry_points(group="console_scripts")}

    assert scripts["hf-lewis"] == scripts["lewis-hub"] == "lewis_hub.cli.main:main"


def test_hf_runs_the_extension_as_hf_lewis(tmp_path):
    """As `hf extensions install` leaves it, which itself needs GitHub."""
    place = tmp_path / ".local/share/hf/extensions/hf-lewis"
    place.mkdir(parents=True)
    script = Path(sys.executable).with_name("hf-lewis")
    manifest = {
        "owner": "me",
        "repo": "hf-lewis",
        "repo_id": "me/hf-lewis",
        "short_name": "lewis",
        "executable_path": str(script),
        "type": "python",
        "installed_at": datetime.now(UTC).isoformat(),
    }
    (place / "manifest.json").write_text(json.dumps(manifest))
    hf = [sys.executable, "-m", "huggingface_hub.cli.hf", "lewis"]
    own = {**os.environ, "HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}

    done = subprocess.run([*hf, "methods", "-q", "--json"], capture_output=True, text=True, env=own)
    failed = subprocess.run([*hf, "check", "none.yaml"], capture_output=True, text=True, env=own)

    assert "ties" in {method["name"] for method in json.loads(done.stdout)["methods"]}
    assert failed.returncode == 1
    assert "lewis-hub: none.yaml" in failed.stderr
