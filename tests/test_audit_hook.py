"""Code opens only what it may: files of a model, or files that a user's tasks name."""

import json
import logging
import os
import py_compile
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import cache_from_source
from pathlib import Path

import pytest
import transformers

from lewis_hub.audit_hook import confined_to, opening_only
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import SourceError

OPENS = "to load it opens .*, which is no file of this model"


def convert(file):
    try:
        file.read_text()
    except OSError:
        raise ValueError("cannot be read") from None


def go_on_without(file):
    try:
        return file.read_text()
    except PermissionError as error:
        return f"no {error.filename}"


def connect(address):
    with socket.socket() as client:
        client.connect(address)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "secret"
    file.write_text("hunter2")
    return file


def through_a_link(model, secret):
    (model / "link").symlink_to(secret)
    return model / "link"


def beside_a_link_to_a_folder(model, secret):
    (secret.parent / "folder").mkdir()
    (model / "link").symlink_to(secret.parent / "folder")
    return f"{model}/link/../secret"


def waiting(model, secret):
    os.mkfifo(model / "fifo")
    return model / "fifo"


WAYS = {
    "absolute": lambda model, secret: secret,
    "bytes": lambda model, secret: bytes(secret),
    "relative": lambda model, secret: os.path.relpath(secret),
    "above": lambda model, secret: model / ".." / "secret",
    "link": through_a_link,
    "link to a folder": beside_a_link_to_a_folder,
    "FIFO": waiting,
    "environment": lambda model, secret: "/proc/self/environ",
    "root": lambda model, secret: f"/proc/self/root{secret}",
    "passwords": lambda model, secret: "/usr/../etc/passwd",
    "endless": lambda model, secret: "/dev/zero",
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("opens", [open, lambda path: os.open(path, os.O_RDONLY)])
def test_no_file_elsewhere_is_opened(way, opens, model, secret):
    path = way(model, secret)

    with pytest.raises(SourceError, match=OPENS), confined_to(model):
        opens(path)


def test_the_message_names_the_file_that_made_another_error(model, secret):
    with pytest.raises(SourceError) as raised, confined_to(model):
        convert(secret)

    assert str(raised.value) == (
        f"{model}: to load it opens {secret}, which is no file of this model.\n"
        "Its settings lead there; only the files of a model are used. Remove them in a copy."
    )


def test_other_errors_stay_and_a_library_may_go_on_without_a_file(model, secret):
    with confined_to(model):
        assert go_on_without(secret) == f"no {secret}"
    with pytest.raises(KeyError), confined_to(model):
        {}["key"]


WRITTEN = {
    "relative": lambda model: Path("model"),
    "link": lambda model: model.with_name("link"),
    "above": lambda model: Path("..") / model.parent.name / "model",
    "above a link": lambda model: Path("elsewhere", "..", "link"),
    "absolute and above": lambda model: model / ".." / "model",
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN.keys())
def test_files_of_the_model_are_opened(written, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "inner" / "folder").mkdir(parents=True)
    (tmp_path / "inner" / "link").symlink_to(model)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "inner" / "folder")
    folder = written(model)

    with confined_to(folder):
        assert (folder / "config.json").read_text() == "{}"
        assert (model / "config.json").read_text() == "{}"
        assert not (folder / "missing.json").is_file()
        with pytest.raises(FileNotFoundError):
            (folder / "missing.json").read_text()


def test_files_of_a_cache_are_links_to_its_blobs(tmp_path):
    repo = tmp_path / "hub" / "models--zoo--base"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for blobs in (repo / "blobs", repo.parent / "blobs"):
        blobs.mkdir()
        (blobs / "1").write_text("{}")
    (snapshot / "own.json").symlink_to("../../blobs/1")
    (snapshot / "of_xet.json").symlink_to("../../../blobs/1")
    other = tmp_path / "hub" / "models--me--private" / "blobs"
    other.mkdir(parents=True)
    (other / "1").write_text("hunter2")
    (snapshot / "link.json").symlink_to("../../../models--me--private/blobs/1")

    with confined_to(snapshot):
        assert (snapshot / "own.json").read_text() == "{}"
        assert (snapshot / "of_xet.json").read_text() == "{}"
    with pytest.raises(SourceError), confined_to(snapshot):
        (snapshot / "link.json").read_text()
    with pytest.raises(SourceError), confined_to(snapshot):
        (other / "1").read_text()


def test_the_working_folder_is_none_of_a_package(model, secret, monkeypatch):
    """It is in the path of Python where a script is run in it."""
    monkeypatch.chdir(secret.parent)
    monkeypatch.syspath_prepend(str(secret.parent))
    monkeypatch.syspath_prepend("")

    with pytest.raises(SourceError), confined_to(model):
        Path("secret").read_text()


def test_the_folder_of_a_script_is_none_of_a_package(model, secret, tmp_path_factory):
    """It is the first in the path of Python, and often the home of a user."""
    script = secret.parent / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom lewis_hub.audit_hook import confined_to\n"
        f"with confined_to(Path({str(model)!r})):\n    Path({str(secret)!r}).read_text()\n"
    )
    ended = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )

    assert f"to load it opens {secret}, which is no file" in ended.stderr


def test_a_log_file_of_yours_is_written(model, tmp_path):
    """Libraries tell what they load, and a log may be opened, or begun anew, only then."""
    handler = logging.FileHandler(tmp_path / "log", delay=True)
    logger = logging.getLogger("library")
    logger.addHandler(handler)
    try:
        with confined_to(model):
            logger.warning("loaded")
    finally:
        logger.removeHandler(handler)
        handler.close()

    assert (tmp_path / "log").read_text() == "loaded\n"


def test_packages_new_files_and_other_threads_go_on(model, secret):
    found = []
    other = threading.Thread(target=lambda: found.append(secret.read_text()))

    with confined_to(model):
        assert Path(transformers.__file__).read_text()
        assert Path(os.__file__).read_text()
        assert b"\0" not in Path("/proc/self/status").read_bytes()
        with tempfile.TemporaryFile() as unnamed, tempfile.NamedTemporaryFile() as named:
            assert unnamed.write(b"new") == named.write(b"new")
        other.start()
        other.join()

    assert found == ["hunter2"]
    assert secret.read_text() == "hunter2"  # after the block, too


def test_what_a_package_opens_when_it_is_imported_is_its_own(model, secret, monkeypatch):
    """Such as the settings of matplotlib in the home of a user."""
    packages = secret.parent / "packages"
    packages.mkdir()
    (packages / "settings_at_import.py").write_text(
        f"from pathlib import Path\nTEXT = Path({str(secret)!r}).read_text()\n"
        f"def read():\n    return Path({str(secret)!r}).read_text()\n"
    )
    monkeypatch.syspath_prepend(str(packages))

    with confined_to(model):
        import settings_at_import
    assert settings_at_import.TEXT == "hunter2"
    with pytest.raises(SourceError), confined_to(model):
        settings_at_import.read()
    sys.modules.pop("settings_at_import")


def test_a_block_in_an_import_is_confined_too(model, secret):
    scripts = secret.parent / "scripts"
    scripts.mkdir()
    (scripts / "script.py").write_text(
        "from pathlib import Path\nfrom lewis_hub.audit_hook import confined_to\n"
        f"with confined_to(Path({str(model)!r})):\n    Path({str(secret)!r}).read_text()\n"
    )
    code = f"import sys; sys.path.append({str(scripts)!r}); import script"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert f"to load it opens {secret}, which is no file" in ended.stderr


@pytest.mark.parametrize(
    ("connects", "to"),
    [
        (socket.create_connection, r"127\.0\.0\.1"),
        (connect, r"\('127\.0\.0\.1', \d+\)"),
    ],
)
def test_no_connection_is_opened(connects, to, model):
    with socket.create_server(("127.0.0.1", 0)) as server:
        message = f"opens a connection to {to}, which"
        with pytest.raises(SourceError, match=message), confined_to(model):
            connects(server.getsockname())


def test_a_setting_that_names_a_file_leads_nowhere(tmp_path):
    """sentence-transformers takes the weights of this module from any file that `path` names."""
    from sentence_transformers import SparseEncoder

    secret = tmp_path / "secret.json"
    secret.write_text('{"hunter2": 1.5}')
    module = tmp_path / "model" / "0_SparseStaticEmbedding"
    module.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(zoo_folder() / "base" / name, module / name)
    (module / "config.json").write_text(json.dumps({"path": str(secret)}))
    kind = "sentence_transformers.sparse_encoder.modules.SparseStaticEmbedding"
    modules = [{"idx": 0, "name": "0", "path": module.name, "type": kind}]
    (module.parent / "modules.json").write_text(json.dumps(modules))
    folder = module.parent

    with pytest.raises(SourceError, match=f"to load it opens {secret}"), confined_to(folder):
        SparseEncoder(str(folder), local_files_only=True)


def python_of(folder, text):
    """Run Python as if it were a file of a folder; return what it defines."""
    found = {"Path": Path, "folder": folder}
    exec(compile(text, str(folder / "own.py"), "exec"), found)
    return found


def reader(folder):
    return python_of(folder, "def read(name): return (folder / name).read_text()")["read"]


def test_python_of_a_folder_reads_only_the_files_of_it_that_are_named(model, secret):
    (model / "words.json").write_text("[]")
    read = reader(model)
    with opening_only(lambda: [model / "config.json"], model, elsewhere=True) as refused:
        assert read("config.json") == "{}"
        assert read("../secret") == "hunter2"
        assert (model / "words.json").read_text() == "[]"  # by this file, which is elsewhere
        with pytest.raises(PermissionError, match="no file that the task names"):
            read("words.json")
        with pytest.raises(FileNotFoundError):
            read("absent.json")
        python_of(model, "(folder / 'log').write_text('a line')")
        assert refused == [str(model / "words.json")]
    assert read("words.json") == "[]"


def test_python_of_a_folder_reads_no_other_files_elsewhere(model, secret, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name in ("temporary/file", ".hidden/file", "nltk_data/file"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("fetched")
    read = reader(model)
    with opening_only(list, model, elsewhere=False) as refused:
        assert [read(f"../{one}/file") for one in ("temporary", ".hidden", "nltk_data")] == [
            "fetched"
        ] * 3
        assert read(zoo_folder() / "base" / "config.json").startswith("{")
        with pytest.raises(PermissionError):
            read("../secret")
    assert refused == [str(secret)]


@pytest.mark.parametrize("place", [".projects/p", "temporary/p", "nltk_data/p"])
def test_files_of_a_project_are_its_own_wherever_it_is(tmp_path, monkeypatch, place):
    """A home may be below /var, and a project in a hidden or a temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    tasks = tmp_path / place / "tasks"
    tasks.mkdir(parents=True)
    (tasks.parent / "words.json").write_text("[]")
    (tasks.parent / ".cache").mkdir()
    (tasks.parent / ".cache" / "rows").write_text("[1]")
    with opening_only(list, tasks, elsewhere=False) as refused:
        assert reader(tasks)("../.cache/rows") == "[1]"
        with pytest.raises(PermissionError):
            reader(tasks)("../words.json")
    assert refused == [str(tasks.parent / "words.json")]


def test_a_folder_that_python_of_tasks_puts_into_the_path_is_no_package(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "shared_of_tasks.py").write_text("WORD = 'encode'")
    with opening_only(list, model, elsewhere=False) as refused:
        monkeypatch.syspath_prepend(str(tmp_path / "lib"))
        with pytest.raises(PermissionError):
            python_of(model, "import shared_of_tasks")
    assert {*refused} == {str(tmp_path / "lib" / "shared_of_tasks.py")}


def test_the_rule_holds_in_other_threads(model):
    (model / "words.json").write_text("[]")
    read = reader(model)
    with opening_only(list, model, elsewhere=True) as refused, ThreadPoolExecutor(1) as pool:
        failed = pool.submit(read, "words.json").exception()
    assert isinstance(failed, PermissionError)
    assert refused == [str(model / "words.json")]


def test_code_in_the_folder_that_asked_for_the_rule_is_not_meant(model):
    """As a script of the user that merges, beside the task files."""
    (model / "words.json").write_text("[]")
    text = """
def script():
    with opening_only(list, folder, elsewhere=True) as refused:
        return (folder / "words.json").read_text(), refused
"""
    found = {"folder": model, "opening_only": opening_only}
    exec(compile(text, str(model / "script.py"), "exec"), found)

    assert found["script"]() == ("[]", [])


def test_compiled_python_of_a_folder_counts_as_its_source(model):
    for name in ("named", "unnamed"):
        (model / f"{name}.py").write_text("")
        py_compile.compile(str(model / f"{name}.py"))
    read = python_of(model, "def read(name): return Path(name).read_bytes()")["read"]
    with opening_only(lambda: [model / "named.py"], model, elsewhere=True) as refused:
        assert read(cache_from_source(str(model / "named.py")))
        with pytest.raises(PermissionError):
            read(cache_from_source(str(model / "unnamed.py")))
    assert refused == [str(model / "unnamed.py")]


def test_packages_and_caches_in_a_folder_may_be_read(model, monkeypatch):
    """As where the folder of the recipe has both the task files and a virtual environment."""
    package = model / "venv" / "lib" / "package"
    package.mkdir(parents=True)
    (package / "data.json").write_text("[1]")
    (model / "cache").mkdir()
    (model / "cache" / "rows.json").write_text("[2]")
    monkeypatch.setattr(sys, "prefix", str(model / "venv"))
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(model / "cache"))
    (model / "words.json").write_text("[3]")
    with opening_only(list, model, elsewhere=True) as refused:
        read = reader(model)
        assert read("venv/lib/package/data.json") == "[1]"
        assert read("cache/rows.json") == "[2]"
        assert reader(package)("../../../words.json") == "[3]"  # code of the package
        with pytest.raises(PermissionError):
            read("words.json")
    assert refused == [str(model / "words.json")]
