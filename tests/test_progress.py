import io
import sys

import pytest

import lewis_hub
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.display import Silent
from lewis_hub.progress import Bars, Lines, shown


def test_an_argument_asks_for_progress(monkeypatch):
    own = Lines()
    assert shown(own) is own
    assert isinstance(shown(progress=False), Silent)
    assert isinstance(shown(progress=True), Lines)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert isinstance(shown(progress=True), Bars)


def test_lines_tell_the_start_and_the_end_of_a_stage(capsys):
    with Lines().stage("Merging", 2_000_000, "bytes") as advance:
        advance(2_000_000)
    Lines().say("A note")

    out, err = capsys.readouterr()
    first, last, note = err.splitlines()
    assert (out, first, note) == ("", "Merging: 2.0 MB", "A note")
    assert last.startswith("Merging: done in ")


@pytest.mark.parametrize(("asked", "told"), [({}, True), ({"progress": False}, False)])
def test_python_functions_show_progress_unless_told_otherwise(tmp_path, capsys, asked, told):
    recipe = lewis_hub.Recipe(
        models=[str(zoo_folder() / "base"), str(zoo_folder() / "expert-reverse")],
        merge_method="linear",
    )

    lewis_hub.merge_models(recipe, tmp_path / "merged", **asked)

    out, err = capsys.readouterr()
    assert out == ""
    assert ("Merging: " in err) is told
