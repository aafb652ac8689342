"""What workflows install beside a token: every file is pinned by its hash, and the pins fit."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from lewis_hub.cli.init import render_workflow

ROOT = Path(__file__).parents[1]
LOCKS = (ROOT / "templates/workflows/requirements.txt", ROOT / ".ci/build.txt")
HASH = re.compile(r" \\\n +--hash=sha256:[0-9a-f]{64}(?= \\\n|\n)")


def pinned(lock):
    """The requirements of a lock; each has to have hashes."""
    found = []
    text = re.sub(r"^#.*\n", "", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for entry in re.split(r"\n(?=\S)", text.strip()):
        first, n_hashes = entry.partition(" \\")[0], len(HASH.findall(entry + "\n"))
        assert n_hashes == entry.count("\n") >= 1, entry
        found.append(Requirement(first))
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_file_is_pinned_by_its_hash(lock):
    for one in pinned(lock):
        assert re.fullmatch(r"==[^,]+", str(one.specifier)), one


def test_the_lock_fits_what_lewis_hub_depends_on():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = pinned(LOCKS[0])

    for wanted in map(Requirement, project["dependencies"]):
        name = wanted.name.replace("_", "-").lower()
        versions = [str(one.specifier)[2:] for one in locked if one.name == name]
        assert versions, f"run `make lock`: it lacks {name}"
        assert all(wanted.specifier.contains(version) for version in versions), name
    assert not [one.name for one in locked if one.name.startswith(("nvidia", "cuda", "triton"))]
    on_linux = [str(one) for one in locked if one.name == "torch" and "==" in str(one.marker)]
    assert re.fullmatch(r"torch==[\d.]+\+cpu; sys_platform == \"linux\"", *on_linux)


def installs(document):
    jobs = document.get("jobs") or {"": document["runs"]}
    steps = [step for job in jobs.values() for step in job["steps"]]
    return [step["run"] for step in steps if "pip install" in step.get("run", "")]


def test_nothing_is_installed_beside_a_token_but_by_hash():
    """lewis-hub itself is pinned by its commit or release, and brings no dependencies."""
    action = (ROOT / ".github/actions/lewis-hub/action.yml").read_text(encoding="utf-8")
    scripts = [
        script
        for document in (action, render_workflow("recipe.yaml"))
        for script in installs(yaml.safe_load(document))
    ]

    assert len(scripts) == 3
    for script in scripts:
        tool, itself, rest = re.findall(r"pip install (.+?)(?: &&|$)", script)
        assert "--require-hashes" in tool
        assert "--no-deps --no-build-isolation" in itself
        assert itself.endswith('"$REQUIREMENT"')
        assert rest.endswith("--no-deps --no-build-isolation --require-hashes -r")
        (build,) = re.findall(r"'(setuptools==\S+) --hash=(sha256:[0-9a-f]{64})'", script)
        assert f"{build[0]} \\" in LOCKS[0].read_text(encoding="utf-8")
        assert f"--hash={build[1]}" in LOCKS[0].read_text(encoding="utf-8")


def test_the_release_is_built_by_tools_that_are_pinned():
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    scripts = "".join(installs(yaml.safe_load(text)))

    assert "--require-hashes -r .ci/build.txt" in scripts
    assert "python -m build --no-isolation" in scripts
    assert {one.name for one in pinned(LOCKS[1])} >= {"build", "setuptools"}


def test_torch_for_cpus_takes_the_place_of_the_one_with_cuda():
    lock = runpy.run_path(str(ROOT / ".ci" / "lock.py"))
    resolved = (
        "six==1.0 \\\n    --hash=sha256:aa\n"
        "nvidia-x==2 ; sys_platform == 'linux' \\\n    --hash=sha256:bb\n"
        "torch==2.13.0 \\\n    --hash=sha256:cc\n"
    )
    wheel = "/whl/cpu/torch-2.13.0%2Bcpu-cp313-cp313-manylinux_2_28_{}.whl#sha256={}"
    others = '<a href="/whl/cpu/torch-2.13.0%2Bcpu-cp313-cp313-win_amd64.whl#sha256=' + "e" * 64
    page = "".join(
        f'<a href="{wheel.format(machine, digit * 64)}">' for machine, digit in ("ab", "cd")
    )

    assert lock["locked"](resolved, f'{page}{others}">').splitlines()[2:] == [
        "six==1.0 \\",
        "    --hash=sha256:aa",
        "torch==2.13.0+cpu ; sys_platform == 'linux' \\",
        "    --hash=sha256:" + "b" * 64 + " \\",
        "    --hash=sha256:" + "d" * 64,
        "torch==2.13.0 ; sys_platform != 'linux' \\",
        "    --hash=sha256:cc",
    ]
