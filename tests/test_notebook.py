"""The notebook in docs/ runs from top to bottom, as on Colab."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from zoo_hub import put_zoo

import lewis_hub

FILE = Path(__file__).parents[1] / "docs" / "first_merge.ipynb"


def notebook():
    return nbformat.read(FILE, as_version=4)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def run(folder, **settings):
    """Run the notebook in a folder with other settings; return what each code cell showed."""
    book = notebook()
    (parameters,) = [one for one in book.cells if "parameters" in one.metadata.get("tags", ())]
    for name, value in settings.items():
        line = rf"^{name} = .*$"
        parameters.source, n = re.subn(line, f"{name} = {value!r}", parameters.source, flags=re.M)
        assert n == 1
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=300, resources=resources, kernel_name="python3").execute()
    return [shown(cell) for cell in code_cells(book)]


def shown(cell):
    """The text of a cell's outputs; of progress and warnings nothing."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            texts.append(output.text)
        data = output.get("data", {})
        texts += [data[kind] for kind in ("text/markdown", "text/html") if kind in data]
        texts += ["a picture"] if "image/png" in data else []
    return "\n".join(texts)


def test_the_notebook_is_committed_without_outputs():
    book = notebook()

    nbformat.validate(book)
    assert [cell.outputs for cell in code_cells(book)] == [[]] * len(code_cells(book))
    assert {cell.execution_count for cell in code_cells(book)} == {None}


@pytest.mark.slow
def test_the_notebook_merges_scores_asks_shows_the_card_and_pushes(hub, tmp_path, monkeypatch):
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    repo = f"{hub.user}/from-a-notebook"

    _, _, _, draft, checked, merged, answer, card, pushed, _ = run(tmp_path, LIMIT=20, REPO=repo)

    assert "merge_method: regmean" in draft
    assert "<td>zoo/expert-reverse</td>" in checked
    assert "No problems found." in checked
    assert "<td>zoo_cipher</td>" in merged
    assert answer.startswith("Question: encode LUTY\nAnswer: MVU"), answer
    assert "# Merged model" in card
    assert "**It keeps " in card
    assert card.endswith("a picture")
    assert repo in pushed
    assert hub.api().model_info(repo).private
    assert lewis_hub.verify(tmp_path / "merged", progress=False).problems == ()


@pytest.mark.slow
def test_without_a_hub_the_notebook_starts_one_itself(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    *_, answer, card, pushed, _ = run(tmp_path, LIMIT=5)

    assert answer.startswith("Question: encode LUTY\nAnswer: MVU"), answer
    assert "How it was merged" in card
    assert pushed == ""
