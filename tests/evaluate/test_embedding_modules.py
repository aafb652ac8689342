"""The modules of an embedding model: their classes, and the memory that all take together."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_models import embedder
from tokenizers import Tokenizer

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


def module(folder, kind, settings, n_stored, n_times=1, file="config.json"):
    """A module with as many stored values, listed so often."""
    place = folder / "1_M"
    place.mkdir(parents=True)
    save_file({"x": torch.zeros(n_stored)}, place / "model.safetensors")
    (place / file).write_text(json.dumps(settings))
    listed = [
        {"idx": i, "name": str(i), "path": "1_M", "type": f"{MODELS}.{kind}"}
        for i in range(n_times)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    return in_folder(folder)


@pytest.mark.parametrize(
    ("kind", "settings", "file", "n_modules", "n_bytes"),
    [
        ("Dense", {"in_features": 2048, "out_features": 2048}, "config.json", 90, "1,511,485,920"),
        (
            "CNN",  # the sum of its kernels
            {"in_embedding_dimension": 1, "out_channels": 1, "kernel_sizes": [4_000_000] * 90},
            "cnn_config.json",
            1,
            "1,441,488,576",
        ),
        (
            "LSTM",
            {"embedding_dimension": 64, "hidden_dim": 2000, "num_layers": 10},
            "lstm_config.json",
            1,
            "5,120,164,880",
        ),
    ],
)
def test_modules_take_no_more_than_their_files_allow(
    kind, settings, file, n_modules, n_bytes, tmp_path
):
    """One of 1 MB that was listed 7,000 times took 7 GB."""
    n_stored = 4_194_304 if kind != "CNN" else 100_000
    files = module(tmp_path, kind, settings, n_stored, n_modules, file)

    with pytest.raises(EvaluationError) as refused:
        require_memory(files)

    stored = f"{files.stored_bytes():,}"
    assert str(refused.value) == (
        f"{tmp_path}: its {n_modules} modules take {n_bytes} bytes as they are listed, but its "
        f"weights have {stored} bytes in its files; the limit is 16 times these and 1 GiB.\n"
        f"{DAMAGED}"
    )


def test_a_module_that_is_listed_several_times_may_be_within_the_limit(tmp_path):
    settings = {"in_features": 2048, "out_features": 2048}
    require_memory(module(tmp_path, "Dense", settings, 4_194_304, 60))


def test_a_vocabulary_counts_as_often_as_it_is_read(tmp_path):
    """The words of a file of 12 MB, listed 100 times, took 84 s."""
    words = [f"w{i}" for i in range(100_000)]
    require_memory(module(tmp_path / "a", "BoW", {"vocab": words}, 1000, 60))

    with pytest.raises(EvaluationError, match=r"its 90 modules take 1,[45]\d\d,\d{3},\d{3} bytes"):
        require_memory(module(tmp_path / "b", "BoW", {"vocab": words}, 1000, 90))


def test_modules_inside_of_a_router_count(tmp_path):
    files = module(tmp_path, "Router", {}, 4_194_304)
    types = {f"q{i}": f"{MODELS}.Dense" for i in range(90)}
    (tmp_path / "1_M" / "router_config.json").write_text(json.dumps({"types": types}))
    settings = {"in_features": 2048, "out_features": 2048, "use_residual": True}
    for name in types:
        (tmp_path / "1_M" / name).mkdir()
        (tmp_path / "1_M" / name / "config.json").write_text(json.dumps(settings))

    with pytest.raises(EvaluationError, match=r"its 91 modules take 3,0\d\d,\d{3},\d{3} bytes"):
        require_memory(files)


@pytest.mark.parametrize("inner", [None, "."])
def test_the_number_of_modules_has_a_limit(inner, tmp_path):
    """A router may name itself."""
    files = module(tmp_path, "Router" if inner else "Normalize", {}, 1, 1 if inner else 101)
    if inner:
        types = {inner: f"{MODELS}.Router"}
        (tmp_path / "1_M" / "router_config.json").write_text(json.dumps({"types": types}))

    with pytest.raises(EvaluationError) as refused:
        require_memory(files)

    assert str(refused.value) == (
        f"{tmp_path}: modules.json: it lists more than 100 modules.\n{DAMAGED}"
    )


@pytest.mark.parametrize("route", [["d"] * 98, "d" * 98, ["p", *["d"] * 98]])
def test_modules_count_as_often_as_routes_run_them(route, tmp_path):
    """A route that ran one module 290,000 times took minutes for a few texts."""
    files = module(tmp_path, "Router", {}, 1)
    types = {"p": f"{MODELS}.Pooling", "d": f"{MODELS}.Normalize"}

    def write(**routes):
        document = {"types": types, "structure": {"document": route, **routes}}
        (tmp_path / "1_M" / "router_config.json").write_text(json.dumps(document))

    write(broken=[{}], none=None)
    require_memory(files)
    write(query=["d"])
    with pytest.raises(EvaluationError, match="it lists more than 100 modules"):
        require_memory(files)


@pytest.mark.parametrize(
    ("kind", "settings", "file", "told"),
    [
        (
            "WeightedLayerPooling",  # a list of so many numbers
            {"embedding_dimension": 8, "num_hidden_layers": 4, "layer_start": -(10**9)},
            "config.json",
            "`layer_start` is -1000000000, expected a whole number, 0 or more",
        ),
        (
            "CNN",
            {"in_embedding_dimension": 8, "kernel_sizes": [1, [2, 3]]},
            "cnn_config.json",
            "`kernel_sizes` is [1, [2, 3]], expected whole numbers",
        ),
        (
            "Dense",
            {"in_features": 8, "out_features": 1e9},
            "config.json",
            "`out_features` is 1000000000.0, expected a whole number, 0 or more",
        ),
    ],
)
def test_sizes_of_modules_are_numbers(kind, settings, file, told, tmp_path):
    files = module(tmp_path, kind, settings, 1000, file=file)

    with pytest.raises(EvaluationError) as refused:
        require_memory(files)

    assert str(refused.value) == f"{tmp_path}: 1_M/{file}: {told}.\n{DAMAGED}"


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
    ("kind", "settings", "file"),
    [
        (
            "LSTM",
            {"embedding_dimension": 1, "hidden_dim": 1, "num_layers": 101},
            "lstm_config.json",
        ),
        ("CNN", {"in_embedding_dimension": 1, "kernel_sizes": [1] * 101}, "cnn_config.json"),
    ],
)
def test_a_module_of_very_many_parts_is_not_built(kind, settings, file, tmp_path):
    """900 small layers took more than a minute to be built and compared."""
    files = module(tmp_path, kind, settings, 10**6, file=file)

    with pytest.raises(EvaluationError) as refused:
        require_memory(files)

    where = f"{tmp_path}: 1_M/{file}"
    assert str(refused.value) == f"{where}: it has more than 100 layers or kernels.\n{DAMAGED}"


@pytest.mark.parametrize(
    "named",
    [
        "sentence_transformers.base.data_collator.torch",
        "sentence_transformers.base.model_card.SentenceTransformerModelCardData",
        "sentence_transformers.util.import_from_string",
    ],
)
def test_what_is_no_module_of_the_library_is_not_called(named, tmp_path):
    """`torch.load` was called, with the folder of the model."""
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": named}]))

    with pytest.raises(EvaluationError) as refused:
        require_supported(in_folder(tmp_path))

    assert str(refused.value) == (
        f"{tmp_path}: its module `{named}` is no class of sentence-transformers.\n"
        "No other code is run: use another model."
    )


@needs_library
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_module_of_the_library_is_supported():
    import sentence_transformers.base.modules as base
    import sentence_transformers.sentence_transformer.modules as dense
    import sentence_transformers.sparse_encoder.modules as sparse
    from sentence_transformers.util import import_from_string

    kinds = {getattr(part, name) for part in (base, dense, sparse) for name in part.__all__}
    kinds -= {base.Module, base.InputModule}  # of which the others are made

    assert {f"{kind.__module__}.{kind.__name__}" for kind in kinds} <= SUPPORTED
    named = {f"{MODELS}.{kind.__name__}" for kind in kinds if kind.__module__ in str(dense)}
    assert named <= SUPPORTED
    assert issubclass(import_from_string(f"{MODELS}.Pooling"), base.Module)


@needs_library
def test_a_model_whose_head_is_for_very_many_labels_is_not_built(tmp_path):
    """Its configuration was compared with the files as that of a model without a head."""
    embedder(tmp_path, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    large = {"hidden_size": 512, "num_labels": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(config | large))
    stated = {"transformer_task": "sequence-classification"}
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(stated))

    told = r"its config.json describes a model of 2,0\d\d,\d{3},\d{3} bytes, but its weights have"
    with pytest.raises(SourceError, match=f"{tmp_path}: {told}"):
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))


@needs_library
@pytest.mark.parametrize(
    ("file", "changed", "error"),
    [
        ("config.json", {"hidden_dropout_prob": "x"}, "StrictDataclassFieldValidationError"),
        ("2_Dense/config.json", {"activation_function": []}, "AttributeError"),
        ("1_Pooling/router_config.json", {"parameters": "x", "structure": {}}, "AttributeError"),
    ],
)
def test_values_of_other_types_are_one_message(file, changed, error, tmp_path):
    """They were tracebacks after a merge, in its scoring, at each run."""
    embedder(tmp_path, 1)
    settings = tmp_path / file
    known = json.loads(settings.read_text()) if settings.exists() else {"types": {}}
    settings.write_text(json.dumps(known | changed))
    if "router" in file:
        listed = (tmp_path / "modules.json").read_text()
        (tmp_path / "modules.json").write_text(listed.replace("models.Pooling", "models.Router"))

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
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer import modules as dense
    from sentence_transformers.sparse_encoder import modules as sparse

    encoder = dense.Transformer(str(base))
    if kind == "many layers":
        layers = [dense.LayerNorm(64), dense.Dense(64, 8), dense.Normalize()]
        return SentenceTransformer(modules=[encoder, dense.Pooling(64), *layers])
    if kind == "kernels":
        return SentenceTransformer(modules=[encoder, dense.CNN(64, 32), dense.Pooling(96)])
    if kind == "router":
        words = Tokenizer.from_file(str(base / "tokenizer.json"))
        queries = [dense.StaticEmbedding(words, embedding_dim=64)]
        router = Router.for_query_document(queries, [encoder, dense.Pooling(64)])
        return SentenceTransformer(modules=[router])
    encoder = dense.Transformer(str(base), transformer_task="fill-mask")
    return SparseEncoder(modules=[encoder, sparse.SpladePooling("max")])


@needs_library
@pytest.mark.parametrize(
    ("kind", "size"), [("many layers", 8), ("kernels", 96), ("router", 64), ("sparse", 400)]
)
def test_models_that_the_library_makes_are_loaded(kind, size, tmp_path):
    made(kind, embedder(tmp_path / "base", 1)).save(str(tmp_path / "m"), create_model_card=False)

    loaded = load_embedder(tmp_path / "m", EvaluationSettings(backend="mteb"))

    assert tuple(loaded.encode(["hello", "there"]).shape) == (2, size)
