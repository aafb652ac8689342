import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from lewis_hub.cli.main import OUT_OF_MEMORY, cli, disk_failure
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError

HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "lm_eval",
    "matplotlib",
    "llvmlite",
    "numba",
    "numpy",
    "pydantic",
}


def run(*words, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lewis_hub", *words],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_starts_without_any_heavy_library():
    code = (
        "import sys, lewis_hub.cli.main; print(' '.join(m.partition('.')[0] for m in sys.modules))"
    )

    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

    assert not HEAVY & set(loaded.split())


@pytest.mark.parametrize(
    "command",
    [
        "bench",
        "check",
        "compare",
        "demo",
        "evaluate",
        "guides",
        "hub",
        "importance",
        "init",
        "merge",
        "methods",
        "push",
    ],
)
def test_every_command_has_help_with_json_and_quiet(command, tmp_path):
    done = run(command, "--help", cwd=tmp_path)

    assert done.returncode == 0
    assert "--json" in done.stdout
    assert "-q, --quiet" in done.stdout


def test_help_lists_commands_with_whole_summaries_and_options_in_sections(tmp_path):
    listed = run("--help", cwd=tmp_path, COLUMNS="60").stdout
    merge = run("merge", "--help", cwd=tmp_path).stdout

    assert "..." not in listed.partition("Commands:")[2]
    assert "Decide whether to" in run("actions", "--help", cwd=tmp_path).stdout
    sections = re.findall(r"^([A-Z].*):$", merge, re.MULTILINE)
    assert sections == [
        *("Publishing", "Output", "Scores and calibration", "This machine"),
        *("Hugging Face Jobs", "Permissions", "Options"),
    ]
    named = re.findall(r"^  (?:-\w, )?(--[\w-]+)", merge, re.MULTILINE)
    options = [one for one in cli.commands["merge"].params if isinstance(one, click.Option)]
    assert sorted(named) == sorted([*(one.opts[-1] for one in options), "--help"])


@pytest.mark.parametrize(
    ("shell", "line"), [("bash", "plain,"), ("zsh", "plain\n"), ("fish", "plain,")]
)
def test_the_shell_completes_commands_and_options(shell, line, tmp_path):
    completes = {"_LEWIS_HUB_COMPLETE": f"{shell}_complete"}
    program = str(Path(sys.executable).with_name("lewis-hub"))

    def complete(*words):
        place = words[-1] if shell == "fish" else str(len(words))
        typed = {"COMP_WORDS": " ".join(["lewis-hub", *words]), "COMP_CWORD": place}
        environment = {"PATH": "/usr/bin:/bin", **completes, **typed}
        done = subprocess.run(
            [program], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert f"{line}merge" in complete("mer")
    assert f"{line}--push" in complete("merge", "--pu")
    assert "file" in complete("check", "rec")


def test_a_missing_recipe_is_one_message_and_exit_code_1(tmp_path):
    done = run("check", cwd=tmp_path)

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "lewis-hub: recipe.yaml: the file does not exist.\n"
        "Name a recipe, or write one with `lewis-hub init`.\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "gpu"], "device `gpu`: torch knows no such device"),
        (["--device", "mps"], "finds no GPU of a Mac.\nUse `--device cpu`; `mps` needs Apple"),
        (["--runner", "thread"], "there is no runner `thread`"),
        (["--ray-address", "auto"], "`auto` was given for the runner `threads`"),
        (
            ["--runner", "ray", "--ray-address", "head"],
            "`head` is not the address of a Ray cluster",
        ),
    ],
)
def test_a_wrong_runner_or_device_is_refused_before_any_work(words, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "base_model: no/base\nmodels: [{model: no/expert}]\nmerge_method: task_arithmetic\n"
    )

    with pytest.raises(LewisHubError, match=re.escape(message)) as caught:
        cli(["merge", str(tmp_path / "recipe.yaml"), *words], standalone_mode=False)

    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_that_cannot_be_merged_is_exit_code_1(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"base_model: {zoo_folder() / 'base'}\n"
        f"models: [{{model: {zoo_folder() / 'expert-cipher'}}}]\n"
        "merge_method: task_arithmetic\nguide: {name: uniform}\n"
    )

    done = run("check", "--json", cwd=tmp_path)

    assert done.returncode == 1
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem.startswith("guide: `task_arithmetic` keeps every entry")


def test_with_json_a_failure_is_one_document_on_stdout(tmp_path):
    done = run("merge", "--json", cwd=tmp_path)

    assert done.returncode == 1
    assert json.loads(done.stdout) == {
        "status": "failed",
        "error": {
            "kind": "RecipeError",
            "message": "recipe.yaml: the file does not exist.\n"
            "Name a recipe, or write one with `lewis-hub init`.",
        },
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("merge", "--pusch"), "No such option '--pusch'"),
        (("mrege",), "No such command 'mrege'"),
        (
            ("push", ".", "my model"),
            "Invalid value for '[REPO]': expected owner/name such as me/my-merge, found 'my model'",
        ),
        (
            ("merge", "--repo", "$(id)/x"),
            "Invalid value for '--repo': expected owner/name such as me/my-merge, found '$(id)/x'",
        ),
        (
            ("push", ".", "me/x", "--tag", "v 1"),
            "Invalid value for '--tag': expected the name of a tag, such as v1.0, by the rules of",
        ),
        (
            ("tune", "--budget", "nan"),
            "Invalid value for '--budget': expected a finite number, found",
        ),
        (("tune", "--budget", "0"), "Invalid value for '--budget': 0.0 is not in the range x>0."),
        (("push", "missing", "me/x"), "Invalid value for 'FOLDER': Directory 'missing' does not"),
    ],
)
def test_wrong_usage_is_exit_code_2(words, message, tmp_path):
    done = run(*words, cwd=tmp_path)

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_schema_prints_the_json_schema(tmp_path):
    done = run("schema", cwd=tmp_path)

    assert json.loads(done.stdout)["title"] == "Recipe"


def test_warnings_of_libraries_are_kept_off_the_terminal_and_ours_are_not():
    code = """
import sys, warnings
from lewis_hub.cli import main
sys.argv = ["lewis-hub", "--version"]
main._run()
warnings.warn_explicit("theirs", UserWarning, "a.py", 1, module="torch.nn")
warnings.warn_explicit("ours", UserWarning, "b.py", 1, module="lewis_hub.merge.engine")
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "ours" in done.stderr
    assert "theirs" not in done.stderr


def in_shards(name, folder):
    """A model of the zoo with a shard for each tensor, and one more for each of 60 others."""
    shutil.copytree(zoo_folder() / name, folder / name)
    tensors = load_file(folder / name / "model.safetensors")
    (folder / name / "model.safetensors").unlink()
    tensors |= {f"model.other.{number}": torch.ones(2) for number in range(60)}
    for number, (tensor, value) in enumerate(tensors.items()):
        save_file({tensor: value}, folder / name / f"{number}.safetensors", {"format": "pt"})
    weight_map = {tensor: f"{number}.safetensors" for number, tensor in enumerate(tensors)}
    index = json.dumps({"weight_map": weight_map})
    (folder / name / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return len(tensors)


def test_more_shards_are_merged_than_files_may_be_open_at_first(tmp_path):
    """All shards of all models are open at once, and macOS starts programs with 256 files."""
    n_shards = sum(in_shards(name, tmp_path) for name in ("base", "expert-reverse"))
    recipe = "merge_method: task_arithmetic\nbase_model: ./base\nmodels: [./expert-reverse]\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    merge = f"{sys.executable} -m lewis_hub merge recipe.yaml -o"
    assert n_shards > 150

    def limited(option, output):
        command = ["bash", "-c", f"ulimit {option} 100 && {merge} {output}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert limited("-Sn", "merged").returncode == 0
    refused = limited("-n", "refused")
    assert refused.returncode == 1
    problem, remedy = refused.stderr.splitlines()[-2:]
    assert re.fullmatch(rf"lewis-hub: {tmp_path}/.+/\d+.safetensors: Too many open files.", problem)
    assert remedy == "Allow more open files, such as with `ulimit -n 10240`, then run it again."


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        *(
            (number, "DiskFull", "the disk is full, or a quota or limit is reached (writing x).")
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        ),
        (errno.EIO, "DiskError", "x: it cannot be read or written (Input/output error)."),
        (errno.EROFS, "DiskError", "x: it cannot be read or written (Read-only file system)."),
        (errno.EACCES, "DiskError", "x: it cannot be read or written (Permission denied)."),
        (errno.EEXIST, "DiskError", "x: it cannot be read or written (File exists)."),
        (errno.EINTR, "DiskError", "x: it cannot be read or written (Interrupted system call)."),
        (errno.EMFILE, "TooManyFiles", "x: Too many open files."),
        (errno.EBUSY, "DiskError", "x: it cannot be read or written (Device or resource busy)."),
        *(
            (number, "DiskError", f"x: it cannot be read or written ({os.strerror(number)}).")
            for number in (errno.ENOTCONN, errno.ETIMEDOUT)
        ),
    ],
)
def test_an_error_of_the_disk_is_one_message(number, kind, message):
    said = disk_failure(OSError(number, os.strerror(number), "x"))

    assert said is not None
    assert (said[0], said[1].splitlines()[0]) == (kind, message)


def test_another_error_of_the_system_keeps_its_traceback():
    assert disk_failure(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None
    assert disk_failure(OSError("of a library")) is None
    assert disk_failure(TimeoutError(errno.ETIMEDOUT, "of a connection")) is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("MemoryError()", OUT_OF_MEMORY),
        (
            "RuntimeError('[enforce fail at x] DefaultCPUAllocator: not enough memory')",
            OUT_OF_MEMORY,
        ),
        ("RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", OUT_OF_MEMORY),
    ],
)
def test_too_little_memory_is_one_message(error, message, tmp_path):
    code = (
        "import sys; from lewis_hub.cli import main\n"
        f"@main.cli.command()\ndef fails(): raise {error}\n"
        "sys.argv = ['lewis-hub', 'fails']; main.main()"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"lewis-hub: {message}\n"


def test_a_cache_that_cannot_be_written_is_one_message(hub, tmp_path):
    hub.api().create_repo("zoo/a")
    (tmp_path / "file").write_text("not a folder")
    recipe = "base_model: zoo/a\nmerge_method: linear\nmodels: [{model: zoo/a}]\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    place = tmp_path / "file" / "home"

    done = run("check", cwd=tmp_path, HF_HOME=str(place), HF_ENDPOINT=hub.url)

    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        rf"lewis-hub: {place}\S*: it cannot be read or written \(Not a directory\)\.\n"
        r"Make it usable, or name other folders: -o for the output, HF_HOME for caches\.\n",
        done.stderr,
    )


@pytest.mark.parametrize("name", ["HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"])
@pytest.mark.parametrize("value", ["ten", ""])
def test_a_setting_that_huggingface_hub_cannot_read_is_one_message(name, value, tmp_path):
    done = run("check", "recipe.yaml", cwd=tmp_path, **{name: value})

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"lewis-hub: {name}: it is not a whole number of seconds.\n"
        "Expected: a number such as 10, or no such variable.\n"
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a folder that is used")
@pytest.mark.parametrize("words", [["init", "--base", "a/b", "--expert", "c/d"], ["hub"]])
def test_a_working_folder_that_was_deleted_is_one_message(words, tmp_path):
    command = shlex.join([sys.executable, "-m", "lewis_hub", *words])
    script = f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir {tmp_path}/gone && {command}"

    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "lewis-hub: The working folder: it was deleted.\n"
        "Change to another one with `cd`, then run the same command again.\n"
    )


NO_RECIPE = (
    "lewis-hub: none.yaml: the file does not exist.\n"
    "Name a recipe, or write one with `lewis-hub init`.\n"
)
FULL = (
    "lewis-hub: the disk is full, or a quota or limit is reached.\n"
    "Free some space, then run the same command again: finished work is kept.\n"
)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is full")
@pytest.mark.parametrize(
    ("words", "streams", "code", "message"),
    [
        ("methods --json", ">/dev/full", 1, FULL),
        ("check none.yaml --json", ">/dev/full", 1, NO_RECIPE),
        ("check none.yaml --json", ">&-", 1, NO_RECIPE),
        ("methods --json", ">&-", 0, ""),
        ("check none.yaml", "2>/dev/full", 1, ""),
        ("nonsense", "2>/dev/full", 2, ""),
        ("methods", ">&- 2>&- <&-", 0, ""),
    ],
)
def test_a_stream_that_is_full_or_closed_is_no_traceback(words, streams, code, message, tmp_path):
    command = shlex.join([sys.executable, "-m", "lewis_hub", *words.split()])

    done = subprocess.run(
        ["sh", "-c", f"{command} {streams}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (code, message)


def test_a_failure_that_nobody_reads_is_one_message(tmp_path):
    command = shlex.join([sys.executable, "-m", "lewis_hub", "check", "none.yaml", "--json"])

    done = subprocess.run(
        ["sh", "-c", f"{command} | true"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.stderr == NO_RECIPE


@pytest.mark.skipif(os.name == "nt", reason="names of files are Unicode there")
def test_names_that_are_not_unicode_are_one_message(tmp_path):
    done = run("compare", b"\xff.json", "other.json", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "lewis-hub: '\\udcff.json': Input should be a valid string, unable to parse raw data as a "
        "unicode string.\nWrite owner/name, owner/name@revision or the path of a folder.\n"
    )
