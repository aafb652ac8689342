"""lewis_hub on macOS and Windows: which calls it uses, and merges without those they lack."""

import ast
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import mypy
import pytest
import yaml

import lewis_hub
from lewis_hub import system
from lewis_hub.demo.zoo import seed_hub, zoo_folder

PACKAGE = Path(lewis_hub.__file__).parent
STUBS = Path(mypy.__file__).parent / "typeshed" / "stdlib"  # say what each system has
OTHERS = ("darwin", "win32")
LOWEST = (3, 11)
LACKING = Path(__file__).parent / "other_systems"
NOT_TAKEN = {("signal", "SIGKILL"), ("os", "set_blocking")}  # Linux itself needs them


@cache
def names_on(module: str, platform: str) -> set[str] | None:
    """The names in a module of the standard library; None of another module."""
    path = STUBS.joinpath(*module.split("."))
    file = path / "__init__.pyi" if path.is_dir() else path.with_suffix(".pyi")
    if not file.exists():
        return None
    names: set[str] = set()
    collect(ast.parse(file.read_text(encoding="utf-8")).body, platform, names)
    return names


def collect(statements, platform, names):
    known = {"sys": SimpleNamespace(platform=platform, version_info=LOWEST)}
    for each in statements:
        match each:
            case ast.If():
                is_true = eval(compile(ast.Expression(each.test), "stub", "eval"), known)
                collect(each.body if is_true else each.orelse, platform, names)
            case ast.FunctionDef() | ast.ClassDef():
                names.add(each.name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Assign():
                names.update(target.id for target in each.targets)
            case ast.Import() | ast.ImportFrom():
                names.update(alias.asname or alias.name for alias in each.names)


def lacking(tree):
    """(module, name) of each name of the standard library that one of the systems has not."""
    modules, used = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            used |= {(node.module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add((modules.get(node.value.id, ""), node.attr))
    return {
        (module, name)
        for module, name in used
        if name in (names_on(module, "linux") or ())
        and not all(name in (names_on(module, other) or ()) for other in OTHERS)
    }


@cache
def parsed():
    return {
        file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(PACKAGE.rglob("*.py"))
    }


def test_the_stubs_tell_the_systems_apart():
    code = (
        "import os as o, fcntl\nfrom signal import SIGKILL, SIGINT\no.pread, o.replace, fcntl.flock"
    )

    assert lacking(ast.parse(code)) == {("os", "pread"), ("fcntl", "flock"), ("signal", "SIGKILL")}


def test_only_one_module_uses_what_a_system_lacks():
    found = {file: names for file, tree in parsed().items() if (names := lacking(tree))}

    assert set(found) == {"system.py"}


def test_what_that_module_uses_is_taken_away_below():
    used = lacking(parsed()["system.py"]) - NOT_TAKEN
    taken = ast.parse((LACKING / "sitecustomize.py").read_text(encoding="utf-8"))
    words = {node.value for node in ast.walk(taken) if isinstance(node, ast.Constant)}

    assert {name for module, name in used if module not in words} <= words
    assert {"fcntl", "resource"} <= words


def is_portable(call):
    """Whether a call that opens, reads or writes text names what Windows decides otherwise."""
    words = {keyword.arg for keyword in call.keywords}
    match getattr(call.func, "attr", ""):
        case "write_text":
            return words >= {"encoding", "newline"}
        case "read_text":
            return "encoding" in words or bool(call.args)
        case "open":
            return "b" in ast.unparse(call.args[0]) or words >= {"encoding", "newline"}
    of_process = getattr(call.func, "attr", "") in ("run", "Popen", "check_output")
    return "text" not in words or not of_process


def test_texts_have_the_same_bytes_on_every_system():
    calls = [
        (file, call)
        for file, tree in parsed().items()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and file != "system.py"
    ]

    wrong = [f"{file}: {ast.unparse(call)}" for file, call in calls if not is_portable(call)]

    assert wrong == []


MERGE = {
    "models": [
        {"model": str(zoo_folder() / name), "parameters": {"weight": 0.5, "density": 0.4}}
        for name in ("expert-reverse", "expert-cipher")
    ],
    "base_model": str(zoo_folder() / "base"),
    "merge_method": "dare_ties",
    "dtype": "bfloat16",
}


def elsewhere():
    """The environment of a process on a system without the calls."""
    return {**os.environ, "PYTHONPATH": str(LACKING)}


def run(*words, env=None):
    command = [sys.executable, "-m", "lewis_hub", *map(str, words)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done


WITH_TIMES = ("README.md", "cost.json", "provenance.json", "report.html")


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in WITH_TIMES
    }


def test_the_calls_are_gone_in_the_other_processes():
    code = "import os; print(hasattr(os, 'preadv'), hasattr(os, 'posix_fallocate'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=elsewhere(), check=True
    )

    assert done.stdout.split() == [b"False", b"False"]


def test_a_merge_without_the_calls_has_the_same_bytes(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(MERGE), encoding="utf-8")
    first, second = tmp_path / "here", tmp_path / "elsewhere"

    run("merge", recipe, "-o", first, "-q", "--max-shard-size", "200KB")
    run("merge", recipe, "-o", second, "-q", "--max-shard-size", "200KB", env=elsewhere())

    assert len(list(first.glob("*.safetensors"))) > 1
    assert files_of(second) == files_of(first)


RECIPE = (zoo_folder() / "recipe.yaml").read_text(encoding="utf-8").replace("128", "2")


def test_a_merge_is_checked_and_pushed_without_the_calls(hub, tmp_path):
    seed_hub(hub.api())
    env = elsewhere() | {"HF_TOKEN": hub.write_token}
    recipe, merged = tmp_path / "recipe.yaml", tmp_path / "merged"
    recipe.write_text(RECIPE.partition("guide:")[0], encoding="utf-8")

    told = json.loads(run("check", recipe, "--json", "-q", env=env).stdout)
    run("merge", recipe, "-o", merged, "-q", env=env)
    pushed = json.loads(run("push", merged, "me/merged", "--json", "-q", env=env).stdout)

    assert told["problems"] == []
    assert pushed["repo"] == "me/merged"
    published = hub.api().list_repo_files("me/merged")
    assert {"model.safetensors", "README.md", "lewis/lock.json"} <= set(published)


@pytest.mark.slow
def test_importance_is_the_same_without_the_calls(hub, tmp_path):
    seed_hub(hub.api())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.partition("evaluate:")[0], encoding="utf-8")

    run("importance", recipe, "-o", tmp_path / "here", "-q")
    run("importance", recipe, "-o", tmp_path / "elsewhere", "-q", env=elsewhere())

    first, second = (
        (tmp_path / place / "importance.json").read_bytes() for place in ("here", "elsewhere")
    )
    assert first == second


@pytest.mark.slow
def test_scores_are_the_same_without_the_calls(hub):
    seed_hub(hub.api())
    tasks = ["--task", "zoo_reverse", "--include", zoo_folder() / "tasks", "--limit", 20]
    words = ["evaluate", zoo_folder() / "expert-reverse", *tasks, "--json", "-q"]

    first, second = (json.loads(run(*words, env=env).stdout) for env in (None, elsewhere()))

    assert first["tasks"]["zoo_reverse"]["n"] == 20
    assert second == first


@pytest.mark.slow
def test_the_demo_runs_without_the_calls(tmp_path):
    """It merges, measures and scores two models, and pushes one to a Hub, all of them without."""
    env = {name: value for name, value in elsewhere().items() if name != "HF_ENDPOINT"}

    told = json.loads(run("demo", "-o", tmp_path / "demo", "--json", "-q", env=env).stdout)

    assert told["status"] == "merged"
    assert told["commit"]


def test_threads_read_and_write_one_file_by_turns(tmp_path, monkeypatch):
    for name in ("preadv", "pwrite"):
        monkeypatch.delattr(os, name, raising=False)
    file = system.open_binary(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    pieces = {1000 * i: os.urandom(1000) for i in range(64)}

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda at: system.write_at(file, memoryview(pieces[at]), at), pieces))

        def read(position):
            into = bytearray(1000)
            return system.read_at(file, memoryview(into), position), bytes(into)

        found = dict(zip(pieces, pool.map(read, pieces), strict=True))
    at_the_end = system.read_at(file, memoryview(bytearray(8)), 64_000)
    os.close(file)

    assert found == {position: (1000, piece) for position, piece in pieces.items()}
    assert at_the_end == 0


@pytest.fixture
def keeps_open_files(monkeypatch):
    """Windows renames and deletes no open file."""
    monkeypatch.setattr(system, "MOVES_OPEN_FILES", False)
    monkeypatch.setattr(system, "RENAME_WAITS_S", (0.0, 0.0, 0.0))


@pytest.mark.usefixtures("keeps_open_files")
def test_a_folder_is_renamed_when_its_files_are_closed():
    class Held:
        n_tries = 0

        def rename(self, new):
            self.n_tries += 1
            if self.n_tries < 3:
                raise PermissionError

    held = Held()
    system.rename_folder(held, Path("new"))

    assert held.n_tries == 3


def test_a_process_is_killed_where_it_has_no_group(monkeypatch):
    monkeypatch.delattr(os, "killpg", raising=False)
    code = "import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], encoding="utf-8")

    system.kill_with_children(process)

    assert process.wait(10) != 0


def test_pipes_get_utf_8_on_windows(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")

    monkeypatch.setattr(system.os, "name", "nt")
    system.write_utf8(stream)
    monkeypatch.undo()

    assert stream.encoding == "utf-8"
