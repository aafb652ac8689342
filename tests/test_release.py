"""A release, rehearsed: release.yml's steps on a copy, and an index of packages on this machine."""

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from running_server import running
from test_wheel import sources

from lewis_hub import __version__
from lewis_hub.cli.init import render_workflow
from lewis_hub.distribution import requirement

ROOT = Path(__file__).parents[1]
REPOSITORY, TAG = "https://github.com/OWNER/REPO", f"v{__version__}"
BUILD = "import setuptools.build_meta as b; print(b.build_{}({!r}))"
METADATA = """
from importlib.metadata import metadata
told = metadata("lewis-hub")
print(*told.get_all("Project-URL"), told.get_payload(), sep="\\n")
"""
RELATIVE = re.compile(r"\]\((?!https?://|#)[^)]*\)")


@pytest.fixture(scope="module")
def for_pypi():
    return runpy.run_path(str(ROOT / ".ci" / "for_pypi.py"))


def test_links_to_files_become_absolute_and_others_stay(for_pypi):
    text = (
        "[a](docs/large.md#on-a-gpu), [b](https://x.y/z), [c](#try-it), ![d](docs/density.png)\n"
        '<img src="docs/card.png"> <a href="docs/jobs.md">'
    )

    assert for_pypi["absolute"](text, REPOSITORY, "v1") == (
        f"[a]({REPOSITORY}/blob/v1/docs/large.md#on-a-gpu), [b](https://x.y/z), [c](#try-it), "
        f"![d]({REPOSITORY}/raw/v1/docs/density.png)\n"
        f'<img src="{REPOSITORY}/raw/v1/docs/card.png"> '
        f'<a href="{REPOSITORY}/blob/v1/docs/jobs.md">'
    )


def test_the_addresses_of_the_repository_are_added_to_those_of_the_project(for_pypi):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    changed = tomllib.loads(for_pypi["with_addresses"](project, REPOSITORY, "v1"))["project"]

    own = tomllib.loads(project)["project"]
    assert changed.pop("urls") == own.pop("urls") | {
        "Repository": REPOSITORY,
        "Documentation": f"{REPOSITORY}/tree/v1/docs",
        "Issues": f"{REPOSITORY}/issues",
        "Releases": f"{REPOSITORY}/releases",
    }
    assert changed == own


def test_only_the_job_that_publishes_signs_in_and_no_token_is_stored():
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    build, publish = yaml.safe_load(text)["jobs"].values()

    assert build["permissions"] == {"contents": "read"}
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"] == "pypi"
    assert not any("run" in step for step in publish["steps"])
    assert "secrets." not in text
    (prepared,) = [s for s in build["steps"] if "for_pypi" in s.get("run", "")]
    assert prepared["env"]["REPOSITORY"] == "${{ github.server_url }}/${{ github.repository }}"


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (
            {"url": REPOSITORY, "vcs_info": {"vcs": "git", "commit_id": "a" * 40}},
            f"lewis-hub @ git+{REPOSITORY}@{'a' * 40}",
        ),
        ({"url": "file:///clone", "dir_info": {"editable": True}}, "lewis-hub==1.2"),
        (None, "lewis-hub==1.2"),
    ],
)
def test_workflows_and_jobs_install_the_commit_that_pip_installed(
    origin, expected, tmp_path, monkeypatch
):
    told = tmp_path / "lewis_hub-1.2.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.4\nName: lewis-hub\nVersion: 1.2\n")
    if origin:
        (told / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)

    assert requirement() == expected
    installs = [
        step["env"]["REQUIREMENT"]
        for job in yaml.safe_load(render_workflow("r.yaml"))["jobs"].values()
        for step in job["steps"]
        if step.get("name") == "Install"
    ]
    assert installs == [expected, expected]


@contextmanager
def index(folder):
    """Serve the packages in a folder as a package index does; yields its address."""
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    with running(server) as url:
        yield f"{url}/simple/"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The folder of an index with the wheel and the source archive of a release."""
    folder = tmp_path_factory.mktemp("release")
    source, packages = sources(folder), folder / "index" / "simple" / "lewis-hub"
    packages.mkdir(parents=True)
    python = partial(subprocess.run, cwd=source, check=True, capture_output=True)
    python([sys.executable, source / ".ci" / "for_pypi.py", REPOSITORY, TAG])
    for kind in ("sdist", "wheel"):
        python([sys.executable, "-c", BUILD.format(kind, str(packages))])
    links = (f'<a href="{file.name}">{file.name}</a>' for file in sorted(packages.iterdir()))
    page = f"<!DOCTYPE html><html><body>{' '.join(links)}</body></html>"
    (packages / "index.html").write_text(page, encoding="utf-8")
    return folder / "index"


def fresh_environment(folder):
    """An environment that shares only the dependencies with this one; returns its programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    known = [path for path in sys.path if path.endswith("-packages")]
    (packages / "dependencies.pth").write_text("\n".join(known), encoding="utf-8")
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-binary", "lewis-hub", "--no-build-isolation"]])
def test_a_release_is_installed_from_an_index_by_its_name(released, options, tmp_path):
    files = sorted(path.name for path in (released / "simple/lewis-hub").iterdir())
    programs = fresh_environment(tmp_path / "environment")
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    own |= {"PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def run(*words):
        done = subprocess.run(
            words, capture_output=True, encoding="utf-8", env=own, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with index(released) as url:
        pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install"]
        from_index = ["--no-deps", "--no-cache-dir", "--index-url", url, *options]
        run(*pip, "--ignore-installed", *from_index, "lewis-hub")  # one is among the dependencies

    assert files == [
        "index.html",
        f"lewis_hub-{__version__}-py3-none-any.whl",
        f"lewis_hub-{__version__}.tar.gz",
    ]
    place = run(programs / "python", "-c", "import lewis_hub; print(lewis_hub.__file__)")
    assert Path(place.strip()).is_relative_to(tmp_path / "environment")
    assert run(programs / "lewis-hub", "--version") == f"lewis-hub, version {__version__}\n"
    assert "regmean" in run(programs / "lewis-hub", "methods")
    told = run(programs / "python", "-c", METADATA)
    assert f"Repository, {REPOSITORY}\n" in told
    assert f"]({REPOSITORY}/blob/{TAG}/docs/" in told
    assert RELATIVE.findall(told) == []
