"""The modules of an embedding model: their classes, and the memory that all take together."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_models import embedder

from lewis_hub.errors import EvaluationError, SourceError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.embedding_files import in_folder
from lewis_hub.evaluate.embedding_modules import SUPPORTED, require_memory, require_supported
from lewis_hub.evaluate.embeddings import load_embedder

MODELS = "sentence_transformers.models"
DAMAGED = "The file is damaged: use an intact copy of the model."

needs_library = pytest.mark.skipif(
    not find_spec("sentence_transformers"), reason="sentence_transformers is not installed"
)


def module(folder, kind, settings, n_stored, n_times=1):
    """A module with as many stored values, listed so often."""
    place = folder / "1_M"
    place.mkdir(parents=True)
    save_file({"x": torch.zeros(n_stored)}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(settings))
    listed = [
        {"idx": i, "name": str(i), "path": "1_M", "type": f"{MODELS}.{kind}"}
        for i in range(n_times)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    return in_folder(folder)


SQUARE = {"in_features": 2048, "out_features": 2048}


@pytest.mark.parametrize(
    ("settings", "n_modules", "n_bytes"),
    [(SQUARE, 90, "1,511,485,920"), (SQUARE | {"use_residual": True}, 50, "1,678,592,800")],
)
def test_modules_take_no_more_than_their_files_allow(settings, n_modules, n_bytes, tmp_path):
    """One of 1 MB that was listed 7,000 times took 7 GB."""
    files = module(tmp_path, "Dense", settings, 4_194_304, n_modules)

    with pytest.raises(EvaluationError) as refused:
        require_memory(files)

    stored = f"{files.stored_bytes():,}"
    assert str(refused.value) == (
        f"{tmp_path}: its {n_modules} modules take {n_bytes} bytes as they are listed, but its "
        f"weights have {stored} bytes in its files; the limit is 16 times these and 1 GiB.\n"
        f"{DAMAGED}"
    )


def test_a_module_that_is_listed_several_times_may_be_within_the_limit(tmp_path):
    require_memory(module(tmp_path, "Dense", SQUARE, 4_194_304, 60))


def test_the_number_of_modules_has_a_limit(tmp_path):
    files = module(tmp_path, "Normalize", {}, 1, 101)

    with pytest.raises(EvaluationError) as refused:
        require_memory(files)

    assert str(refused.value) == (
        f"{tmp_path}: modules.json: it lists more than 100 modules.\n{DAMAGED}"
    )


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("Dense", {"in_features": 8, "out_features": 1e9}, "`out_features` is 1000000000.0"),
        ("LayerNorm", {"dimension": -1}, "`dimension` is -1"),
        ("LayerNorm", {"dimension": True}, "`dimension` is True"),
    ],
)
def test_sizes_of_modules_are_numbers(kind, settings, told, tmp_path):
    files = module(tmp_path, kind, settings, 1000)

    with pytest.raises(EvaluationError) as refused:
        require_memory(files)

    told = f"{told}, expected a whole number, 0 or more"
    assert str(refused.value) == f"{tmp_path}: 1_M/config.json: {told}.\n{DAMAGED}"


def test_a_vector_is_put_together_of_each_way_to_pool_at_most_once(tmp_path):
    """Of 20,000 parts, vectors of some thousand texts took gigabytes."""
    settings = {"embedding_dimension": 64, "pooling_mode": ["mean"] * 6}
    require_memory(module(tmp_path / "six", "Pooling", settings, 10))
    files = module(tmp_path, "Pooling", {**settings, "pooling_mode": ["mean"] * 7}, 10)

    with pytest.raises(EvaluationError) as refused:
        require_memory(files)

    told = "`pooling_mode` has 7 values, there are 6"
    assert str(refused.value) == f"{tmp_path}: 1_M/config.json: {told}.\n{DAMAGED}"


@pytest.mark.parametrize(
    "named",
    [
        "sentence_transformers.base.data_collator.torch",
        "sentence_transformers.base.model_card.SentenceTransformerModelCardData",
        "sentence_transformers.util.import_from_string",
        "sentence_transformers.base.modules.router.Router",
        "sentence_transformers.models.LSTM",
    ],
)
def test_no_other_modules_are_loaded(named, tmp_path):
    """`torch.load` was called, with the folder of the model; a router names more modules."""
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": named}]))

    with pytest.raises(EvaluationError) as refused:
        require_supported(in_folder(tmp_path))

    assert str(refused.value) == (
        f"{tmp_path}: its module `{named}` is none that is loaded.\n"
        "Use a model with modules of these classes of sentence-transformers: Dense, Dropout, "
        "LayerNorm, LogitScore, MLMTransformer, Normalize, Pooling, SpladePooling, Transformer."
    )


@needs_library
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_names_of_supported_modules_are_those_of_the_library():
    from sentence_transformers.base.modules import Module
    from sentence_transformers.util import import_from_string

    kinds = {named: import_from_string(named) for named in SUPPORTED}

    assert all(issubclass(kind, Module) for kind in kinds.values())
    assert {named.rpartition(".")[2] for named in kinds} == {one.__name__ for one in kinds.values()}
    assert len(set(kinds.values())) == 9


@needs_library
def test_a_model_whose_head_is_for_very_many_labels_is_not_built(tmp_path):
    """Its configuration was compared with the files as that of a model without a head."""
    embedder(tmp_path, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    large = {"hidden_size": 4096, "num_labels": 125_000}
    (tmp_path / "config.json").write_text(json.dumps(config | large))
    stated = {"transformer_task": "sequence-classification"}
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(stated))

    told = r"its config.json describes a model of 1,1\d\d,\d{3},\d{3} bytes, but its weights have"
    with pytest.raises(SourceError, match=f"{tmp_path}: {told}"):
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))


@needs_library
@pytest.mark.parametrize(
    ("file", "changed", "error"),
    [
        ("config.json", {"hidden_dropout_prob": "x"}, "StrictDataclassFieldValidationError"),
        ("2_Dense/config.json", {"activation_function": []}, "AttributeError"),
        ("1_Pooling/config.json", {"pooling_mode": 5}, "TypeError"),
    ],
)
def test_values_of_other_types_are_one_message(file, changed, error, tmp_path):
    """They were tracebacks after a merge, in its scoring, at each run."""
    embedder(tmp_path, 1)
    settings = tmp_path / file
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changed))

    with pytest.raises(EvaluationError) as caught:
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))

    told = f"{tmp_path}: cannot be loaded as an embedding model: {error}: "
    assert str(caught.value).startswith(told)
    assert str(caught.value).endswith("Expected: a folder that sentence-transformers can load.")


NAMED = {"modality_config": {"text": {"method_output_name": "pooler_output"}}}


@needs_library
@pytest.mark.parametrize(
    ("absent", "settings", "told"),
    [
        ("encoder.layer.1.output.dense.bias", {}, "encoder.layer.1.output.dense.bias (and 0 more"),
        ("encoder.", {}, "encoder.layer.0.attention.output.LayerNorm.bias (and 63 more"),
        ("pooler.", NAMED, "pooler.dense.bias (and 1 more"),
        ("pooler.", {}, None),
    ],
)
def test_weights_that_are_in_no_file_are_not_scored(absent, settings, told, tmp_path):
    """They were random, without a word."""
    embedder(tmp_path, 1)
    weights = tmp_path / "model.safetensors"
    kept = {name: one for name, one in load_file(weights).items() if not name.startswith(absent)}
    save_file(kept, weights, {"format": "pt"})
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(settings))
    asked = EvaluationSettings(backend="mteb")
    if told is None:
        assert load_embedder(tmp_path, asked).encode(["hello"]).shape == (1, 8)
        return

    with pytest.raises(EvaluationError) as caught:
        load_embedder(tmp_path, asked)

    assert str(caught.value) == (
        f"{tmp_path}: its files lack {told} of the weights that its architecture needs).\n"
        "The config does not describe these files: check the source, or take another."
    )


def made(kind, base):
    """A model as its author makes it by sentence-transformers."""
    from sentence_transformers import SentenceTransformer, SparseEncoder
    from sentence_transformers.sentence_transformer import modules as dense
    from sentence_transformers.sparse_encoder import modules as sparse

    encoder = dense.Transformer(str(base))
    if kind == "many layers":
        layers = [dense.LayerNorm(64), dense.Dense(64, 8), dense.Normalize()]
        return SentenceTransformer(modules=[encoder, dense.Pooling(64), *layers])
    encoder = dense.Transformer(str(base), transformer_task="fill-mask")
    return SparseEncoder(modules=[encoder, sparse.SpladePooling("max")])


@needs_library
@pytest.mark.parametrize(("kind", "size"), [("many layers", 8), ("sparse", 400)])
def test_models_that_the_library_makes_are_loaded(kind, size, tmp_path):
    made(kind, embedder(tmp_path / "base", 1)).save(str(tmp_path / "m"), create_model_card=False)

    loaded = load_embedder(tmp_path / "m", EvaluationSettings(backend="mteb"))

    assert tuple(loaded.encode(["hello", "there"]).shape) == (2, size)
