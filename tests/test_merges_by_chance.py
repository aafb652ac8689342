"""A BPE tokenizer whose file has a `dropout`: each use would give other tokens by chance."""

import json
import shutil
from importlib.util import find_spec

import pytest
from tokenizers import Tokenizer

from lewis_hub.calibration.model import load_tokenizer as load_for_calibration
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.evaluate.backends import EvaluationSettings, load_backend
from lewis_hub.evaluate.embeddings import load_embedder
from lewis_hub.merge.token_matches import spell, split
from lewis_hub.tokenizer import load_tokenizer, read_vocabulary

TEXT = "ten plus seven is seventeen"


@pytest.fixture
def base(tmp_path):
    """A model whose tokenizer leaves out each second merge, and the tokens without that."""
    folder = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    document = json.loads((folder / "tokenizer.json").read_text())
    tokens = Tokenizer.from_str(json.dumps(document)).encode(TEXT).ids
    document["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder, document, tokens


def test_the_tokenizers_library_leaves_out_no_merge(base):
    _, document, tokens = base
    tokenizer = load_tokenizer("zoo/base", document)

    assert [tokenizer.encode(TEXT).ids for _ in range(20)] == [tokens] * 20


def test_calibration_leaves_out_no_merge(base):
    folder, _, tokens = base
    tokenizer = load_for_calibration(str(folder), "zoo/base")

    assert [tokenizer(TEXT)["input_ids"] for _ in range(20)] == [tokens] * 20


def test_scoring_leaves_out_no_merge(base):
    folder, _, tokens = base
    model = load_backend(folder, EvaluationSettings())

    assert [model.tok_encode(TEXT) for _ in range(20)] == [tokens] * 20


@pytest.mark.skipif(not find_spec("sentence_transformers"), reason="an extra")
def test_scoring_of_embeddings_leaves_out_no_merge(base):
    folder, _, tokens = base
    model = load_embedder(folder, EvaluationSettings())

    assert [model.tokenizer(TEXT)["input_ids"] for _ in range(20)] == [tokens] * 20


def test_texts_that_are_split_into_tokens_leave_out_no_merge(base):
    _, document, tokens = base
    vocabulary = read_vocabulary("zoo/base", {"tokenizer.json": json.dumps(document).encode()})
    model = spell(vocabulary, {}, len(vocabulary.ids))

    assert split(model, [TEXT.encode()] * 20) == [tuple(tokens)] * 20
