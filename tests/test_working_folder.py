"""Files beside a recipe are neither settings nor code of what runs there."""

import subprocess
import sys

SECRET = "hunter2-in-a-file-elsewhere"
PICTURE = "from lewis_hub.report.plots import own_style\nwith own_style(): pass"
KERNEL = """
from lewis_hub.kernels.machine_code import intermediate_code
intermediate_code("decode.widen_array")
"""
CHILD = """
import subprocess, sys
from lewis_hub.cli import main
main._run = lambda: subprocess.call([sys.executable, "-c", "import planted"])
main.main()
"""


def python(code, folder):
    """Run code as the command runs: without the working folder on the path."""
    words = [sys.executable, "-P", "-c", code]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


def test_a_picture_reads_no_settings_of_the_working_folder(tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "matplotlibrc").symlink_to(tmp_path / "secret")

    done = python(PICTURE, tmp_path / "clone")

    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_a_kernel_is_translated_without_settings_of_the_working_folder(tmp_path):
    (tmp_path / ".numba_config.yaml").write_text("dump_llvm: 1\n")

    done = python(KERNEL, tmp_path)

    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_a_process_that_a_command_starts_imports_nothing_from_the_working_folder(tmp_path):
    (tmp_path / "planted.py").write_text("raise SystemExit(0)")

    done = python(CHILD, tmp_path)

    assert "No module named 'planted'" in done.stderr
    assert done.returncode == 1
