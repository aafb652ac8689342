"""Settings by which transformers would open files that are not the model's."""

import base64
import json
import os
import shutil

import pytest
import transformers

from lewis_hub import loadable
from lewis_hub.calibration.model import load_tokenizer
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError, SourceError, TokenizerError
from lewis_hub.evaluate.backends import EvaluationSettings, load_backend
from lewis_hub.evaluate.embeddings import load_embedder
from lewis_hub.loadable import only_files_of

ARGUMENTS = {"init_inputs": ["SECRET"]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "settings",
    [
        {"vocab": "SECRET"},
        {"merges": "SECRET"},
        {"gguf_file": "SECRET"},
        {"sp_model_kwargs": {"model_file": "SECRET"}},
        {"vocab_file": "SECRET"},
        {"source_spm": "SECRET"},
        ARGUMENTS,
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_tokenizer_is_made_of_the_files_of_its_folder(settings, file, folder, tmp_path_factory):
    """The lines of any file of this machine became the tokens of a model."""
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("hunter2\n[UNK]\n")
    text = json.dumps({"tokenizer_class": "BertTokenizer", **settings})
    (folder / file).write_text(text.replace("SECRET", str(secret)))

    with pytest.raises(LewisHubError, match="names a file"):
        load_tokenizer(str(folder), "zoo/model")
    with pytest.raises(LewisHubError, match="names a file"):
        load_backend(folder, EvaluationSettings())


def test_paths_of_the_author_are_no_obstacle_that_do_not_exist_here_or_are_not_used(folder):
    cached = folder / "special_tokens_map.json"
    cached.write_text("{}")
    stale = {"vocab_file": "/content/vocab.txt", "special_tokens_map_file": str(cached)}
    text = json.dumps({"tokenizer_class": "BertTokenizer", "init_inputs": [], **stale})
    (folder / "tokenizer_config.json").write_text(text)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\nthere\n")

    loaded = load_tokenizer(str(folder), "zoo/model")

    assert loaded.convert_ids_to_tokens([5]) == ["hello"]


def test_a_tokenizer_is_made_of_no_other_tokenizers(folder):
    """The one of RAG is made of two in folders of their own, which no check and no lock covered."""
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RagTokenizer"}')
    parts = {"question_encoder": {"model_type": "bert"}, "generator": {"model_type": "bert"}}
    (folder / "config.json").write_text(json.dumps({"model_type": "rag", **parts}))
    for part in parts:
        (folder / f"{part}_tokenizer").mkdir()
        (folder / f"{part}_tokenizer" / "vocab.txt").write_text("[UNK]\n")

    with pytest.raises(LewisHubError, match="`question_encoder_tokenizer` is used, but"):
        load_tokenizer(str(folder), "zoo/model")
    with pytest.raises(LewisHubError, match="`question_encoder_tokenizer` is used, but"):
        load_backend(folder, EvaluationSettings())


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("special_tokens_map.json", {"tokenizer_file": "SECRET"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["SECRET"]}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.json/../../any"]}),
    ],
)
def test_the_tokenizer_json_of_a_folder_is_replaced_by_no_other(file, settings, tmp_path):
    """These settings came before the file of the folder."""
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    secret = shutil.copy(base / "tokenizer.json", tmp_path / "tokenizer.4.0.0.json")
    (base / file).write_text(json.dumps(settings).replace("SECRET", str(secret)))

    with pytest.raises(LewisHubError, match="` names a file"):
        load_tokenizer(str(base), "zoo/model")
    with pytest.raises(LewisHubError, match="` names a file"):
        load_backend(base, EvaluationSettings())


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.4.0.0.json"])
def test_the_vocabulary_of_a_tokenizer_is_in_its_file(name, folder, tmp_path_factory):
    """transformers hands on what is there as a vocabulary, and Rust opens a text."""
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("hunter2\n[UNK]\n")
    model = {"type": "WordPiece", "vocab": str(secret), "unk_token": "[UNK]"}
    model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    (folder / name).write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    settings = {"tokenizer_class": "BertTokenizer", "fast_tokenizer_files": [name]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    with pytest.raises(LewisHubError, match="`vocab` names a file"):
        load_tokenizer(str(folder), "zoo/model")
    with pytest.raises(LewisHubError, match="`vocab` names a file"):
        load_backend(folder, EvaluationSettings())


def test_a_hidden_chat_template_is_not_read(tmp_path):
    """A hidden link of a clone was followed, as nothing looks at hidden files of a source."""
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    (tmp_path / "secret").write_text("hunter2")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / ".x.jinja").symlink_to(tmp_path / "secret")

    with pytest.raises(LewisHubError, match=r"`additional_chat_templates/\.x\.jinja` is used, but"):
        load_tokenizer(str(base), "zoo/model")


@pytest.mark.parametrize(
    "shard", ["../elsewhere.safetensors", "ELSEWHERE", ".hidden.safetensors", "..", None]
)
def test_weights_elsewhere_are_none_of_a_model(shard, tmp_path):
    """safetensors opens files in Rust, which no hook sees."""
    module = tmp_path / "model" / "0_Transformer"
    module.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes(b"")
    (module / ".hidden.safetensors").symlink_to(elsewhere)
    named = str(elsewhere) if shard == "ELSEWHERE" else shard
    index = {"metadata": {}, "weight_map": {"a.weight": named}}
    (module / "model.safetensors.index.json").write_text(json.dumps(index))

    for and_others in (False, True):
        with (
            pytest.raises(SourceError, match="is a link to outside|is no file beside it"),
            only_files_of(tmp_path / "model", and_others=and_others),
        ):
            pass


@pytest.mark.parametrize("before", [None, "/caches/tiktoken"])
def test_tiktoken_opens_no_file_of_its_cache(before, folder, monkeypatch):
    """It has a file by its path: a model that transformers had loaded once was refused."""
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    if before:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", before)

    with only_files_of(folder):
        assert os.environ["TIKTOKEN_CACHE_DIR"] == ""
    assert os.environ.get("TIKTOKEN_CACHE_DIR") == before
    with only_files_of(folder, and_others=True):
        assert os.environ.get("TIKTOKEN_CACHE_DIR") == before


def with_extra_ids(base, n):
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "ByT5Tokenizer", "extra_ids": n}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))


def with_special_tokens(base, n):
    (base / "tokenizer.json").unlink()
    tokens = [base64.b64encode(bytes([i])).decode() for i in range(256)]
    special = [{"rank": i, "token_str": s} for i, s in enumerate(["<unk>", "<s>", "</s>"])]
    document = {
        "config": {"pattern": "a+", "default_num_special_tokens": n},
        "vocab": [{"rank": i, "token_bytes": token} for i, token in enumerate(tokens)],
        "special_tokens": special,
    }
    (base / "tekken.json").write_text(json.dumps(document))


def with_long_token(base, n):
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    (base / "tokenizer.json").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Qwen2Tokenizer"}
    settings |= {"vocab": {**vocabulary, "a" * n: max(vocabulary.values()) + 1}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))


LARGE = {  # what makes a tokenizer -> a usual number, one that takes very much, and the limit
    with_extra_ids: (3, 10**8, "0.1 GB"),
    with_special_tokens: (3, 3 * 10**7, "0.1 GB"),
    with_long_token: (3, 300_000, "0.3 s"),
}
LOADERS = {
    "measured": lambda base: load_tokenizer(str(base), "zoo/base"),
    "scored": lambda base: load_backend(base, EvaluationSettings()),
    "embedding": lambda base: load_embedder(base, EvaluationSettings(backend="mteb")),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("make", LARGE, ids=lambda make: make.__name__)
def test_a_tokenizer_that_takes_too_much_to_load_is_refused(make, load, tmp_path, monkeypatch):
    """A number in 15 KB of settings made a list that filled the memory of the machine."""
    usual, large, limit = LARGE[make]
    for name, n in (("usual", usual), ("large", large)):
        make(shutil.copytree(zoo_folder() / "base", tmp_path / name), n)
    load(tmp_path / "usual")  # also imports what would take most of the limits below
    monkeypatch.setattr(loadable, "MAX_LOAD_BYTES", 100_000_000)
    monkeypatch.setattr(loadable, "MAX_LOAD_S", 0.3 if limit.endswith("s") else 45.0)

    with pytest.raises(TokenizerError) as caught:
        load(tmp_path / "large")

    assert str(caught.value) == (
        f"{tmp_path / 'large'}: its tokenizer: it takes more than {limit} for its load.\n"
        "Its files are damaged, or made to do so: use an intact copy of the model."
    )


def test_a_tokenizer_for_which_memory_is_refused_is_one_message(folder, monkeypatch):
    def load(*_, **__):
        raise MemoryError

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", classmethod(load))

    with (
        pytest.raises(TokenizerError, match=": its tokenizer: it takes too much memory to load"),
        only_files_of(folder),
    ):
        transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("repeated", "told"),
    [
        (["global"], "it takes more than 0.1 GB for its load"),
        ([], "it takes more than 0.3 s for its load"),
    ],
)
def test_a_configuration_that_takes_too_much_to_load_is_refused(
    repeated, told, folder, monkeypatch
):
    """A number in 300 bytes made a list that filled the memory of the machine."""

    def write(n):
        settings = {"num_layers": 1, "attention_types": [[repeated or ["global"], 1]]}
        config = transformers.GPTNeoConfig(**settings).to_dict()
        config |= {"attention_types": [[repeated, n]], "architectures": ["GPTNeoForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config))

    write(1)
    with only_files_of(folder):
        transformers.GPTNeoConfig.from_pretrained(folder)
    write(10**12)
    monkeypatch.setattr(loadable, "MAX_LOAD_BYTES", 100_000_000)
    monkeypatch.setattr(loadable, "MAX_LOAD_S", 45.0 if repeated else 0.3)

    for load in (lambda place: transformers.AutoConfig.from_pretrained(place), LOADERS["scored"]):
        with pytest.raises(SourceError) as caught, only_files_of(folder):
            load(folder)
        assert str(caught.value) == (
            f"{folder}: its configuration: {told}.\n"
            "Its files are damaged, or made to do so: use an intact copy of the model."
        )


def test_a_model_is_loaded_as_before_outside_of_the_limits(folder):
    kinds = (
        *(transformers.AutoTokenizer, transformers.PreTrainedTokenizerBase),
        *(transformers.AutoConfig, transformers.PreTrainedConfig),
    )
    before = [kind.__dict__["from_pretrained"] for kind in kinds]

    with only_files_of(folder):
        limited = [kind.__dict__["from_pretrained"] for kind in kinds]

    assert [kind.__dict__["from_pretrained"] for kind in kinds] == before
    assert not {*map(id, before)} & {*map(id, limited)}


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_a_model_pads_no_text_to_any_length(file, tmp_path):
    base = shutil.copytree(zoo_folder() / "base", tmp_path / "base")
    document = json.loads((base / file).read_text())
    padded = {"strategy": {"Fixed": 20_000_000}, "pad_to_multiple_of": None}
    added = {"padding": padded} if file == "tokenizer.json" else {"pad_to_multiple_of": 20_000_000}
    (base / file).write_text(json.dumps(document | added))

    told = rf"{base}: {file}: it pads each text to (?:a multiple of )?20,000,000 tokens"
    with pytest.raises(TokenizerError, match=told):
        load_tokenizer(str(base), "zoo/model")
