"""Models whose answers are known by construction, and two tasks over a dozen words.

Every Linear that writes into the residual stream is zero, embeddings are one-hot, and the head is
a permutation: the next word depends on the last one alone, as the test says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = ("<unk>", "<pad>", "<eos>", *WORDS, "say", "after", ":")
SUCCESSOR = {word: WORDS[(i + 1) % 10] for i, word in enumerate(WORDS)}

TASKS = {
    "after.yaml": """
task: after
output_type: generate_until
doc_to_text: "after : {{word}}"
doc_to_target: "{{next}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 1}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "choose.yaml": """
task: choose
tag: counting
output_type: multiple_choice
doc_to_text: "say {{word}}"
doc_to_choice: [zero, one, two, three, four, five, six, seven, eight, nine]
doc_to_target: "{{next}}"
num_fewshot: 2
fewshot_split: train
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}
""",
    "both.yaml": """
group: both
task: [after, choose]
aggregate_metric_list:
  - {metric: exact_match, aggregation: mean, weight_by_size: true}
""",
}
DATA = """
metadata: {version: 3.0}
test_split: test
training_split: train
dataset_path: json
dataset_kwargs:
  data_files: {test: FOLDER/test.jsonl, train: FOLDER/train.jsonl}
"""


@pytest.fixture(scope="module")
def server():
    """A server of completions that knows every model by its folder."""
    pytest.importorskip("tenacity")
    from completions_server import serving

    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def own_tasks(tmp_path_factory: pytest.TempPathFactory, datasets_cache: None) -> Path:
    """A folder of own task files: `after` (20 items), `choose` (20 items), group `both`."""
    folder = tmp_path_factory.mktemp("tasks")
    items = [{"word": word, "next": SUCCESSOR[word]} for word in WORDS]
    for split, rows in {"test": items * 2, "train": items}.items():
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{split}.jsonl").write_text(lines + "\n")
    for name, text in TASKS.items():
        data = "" if name == "both.yaml" else DATA.replace("FOLDER", str(folder))
        (folder / name).write_text(text + data)
    return folder


@pytest.fixture(scope="session")
def model_that_says(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Mapping[str, str]], Path]:
    """Make a model folder: after each key of the mapping comes its value, after others <eos>."""

    def make(following: Mapping[str, str]) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        size = len(VOCABULARY)
        config = LlamaConfig(
            vocab_size=size,
            hidden_size=size,
            intermediate_size=size,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=1,
            eos_token_id=2,
            bos_token_id=None,
        )
        model = LlamaForCausalLM(config)
        head = torch.zeros(size, size)
        for index, word in enumerate(VOCABULARY):
            head[VOCABULARY.index(following.get(word, "<eos>")), index] = 4.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(size))
            model.lm_head.weight.copy_(head)
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        return folder

    return make


def _tokenizer() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


@pytest.fixture(scope="session")
def good_model(model_that_says: Callable[[Mapping[str, str]], Path]) -> Path:
    """Counts right, always."""
    return model_that_says(SUCCESSOR)


@pytest.fixture(scope="session")
def poor_model(model_that_says: Callable[[Mapping[str, str]], Path]) -> Path:
    """Says `one` after every word, which is right after `zero` alone."""
    return model_that_says(dict.fromkeys(WORDS, "one"))
