"""What `sentence_bert_config.json` of an embedding model may say, and what sets its padding."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from sentence_models import embedder

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.embedding_settings import require_known_settings
from lewis_hub.evaluate.embeddings import load_embedder

FILE = "sentence_bert_config.json"
REMEDY = "Remove it in a copy of the model: it is loaded and run by its own files and sizes only."
FLAGS = (
    "trust_remote_code, use_cache, is_causal, is_decoder, output_hidden_states, "
    "use_bidirectional_attention, unpad_inputs, use_memory_efficient_attention"
)
PADDED = "processing_kwargs.text"
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
LOGITS = {"method": "forward", "method_output_name": "logits"}


def text(**settings):
    return {"processing_kwargs": {"text": settings}}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            text(padding="max_length", max_length=20_000_000, truncation=False),
            f"`{PADDED}.max_length` is 20000000, expected a whole number from 0 to 1,024",
        ),
        (
            text(padding="max_length"),  # to any length of the tokenizer
            f"`{PADDED}.max_length` is null, expected a whole number from 0 to 1,024",
        ),
        (
            text(pad_to_multiple_of=20_000_000),
            f"`{PADDED}.pad_to_multiple_of` is 20000000, expected a whole number from 0 to 1,024",
        ),
        (
            {"processing_kwargs": {"common": {"padding": "max_length", "max_length": 2_000_000}}},
            '`processing_kwargs.common.padding` is "max_length", expected only return_tensors, '
            "return_mm_token_type_ids",
        ),
        (
            {"processing_kwargs": {"chat_template": {"max_length": 2_000_000}}},
            "`processing_kwargs.chat_template.max_length` is 2000000, expected only "
            "add_generation_prompt, continue_final_message, restore_suffix, enable_thinking, "
            "add_vision_id",
        ),
        (
            {"query_expansion": {"strategy": "fixed", "length": 20_000_000}},
            "`query_expansion.length` is 20000000, expected a whole number from 0 to 1,024",
        ),
        (
            {"config_args": {"vocab_size": 30_000_000}},
            "`config_args.vocab_size` is 30000000, expected only dtype, torch_dtype, "
            f"attn_implementation, {FLAGS}",
        ),
        (
            {"model_kwargs": {"ignore_mismatched_sizes": True}},
            "`model_kwargs.ignore_mismatched_sizes` is true, expected only dtype, torch_dtype, "
            "attn_implementation, use_safetensors, low_cpu_mem_usage, add_pooling_layer, "
            f"{FLAGS}",
        ),
        (
            {"modality_config": {"text": {"method": "generate", "method_output_name": None}}},
            '`modality_config.text.method` is "generate", expected forward or get_..._features',
        ),
        (
            {"model_kwargs": {"attn_implementation": "evil/kernel"}},
            '`model_kwargs.attn_implementation` is "evil/kernel", expected eager or sdpa or '
            "flash_attention_2 or flash_attention_3 or flex_attention",
        ),
        (
            {"tokenizer_args": {"tokenizer_file": "/tmp/tokenizer.json"}},
            '`tokenizer_args.tokenizer_file` is "/tmp/tokenizer.json", expected only '
            "model_max_length, padding_side, truncation_side, min_pixels, max_pixels, "
            "trust_remote_code, use_fast, do_lower_case, legacy, add_prefix_space, add_bos_token, "
            "add_eos_token, clean_up_tokenization_spaces, fix_mistral_regex, strip_accents, "
            "tokenize_chinese_chars",
        ),
        (
            {"tokenizer_name_or_path": "gpt2"},
            '`tokenizer_name_or_path` is "gpt2", expected null',
        ),
        ({"max_seq_length": True}, "`max_seq_length` is true, expected a whole number"),
        (
            {"do_lower_case": "x" * 200},
            f'`do_lower_case` is "{"x" * 99}..., expected true or false',
        ),
    ],
)
def test_what_published_models_do_not_say_is_refused(settings, told):
    """It padded each text to 20 million tokens, replaced sizes, or wrote texts for ever."""
    with pytest.raises(EvaluationError) as refused:
        require_known_settings("org/model", FILE, settings)

    assert str(refused.value) == f"org/model: {FILE}: {told}.\n{REMEDY}"


@pytest.mark.parametrize(
    "settings",
    [
        {"max_seq_length": 256, "do_lower_case": False},  # all-MiniLM, e5, EmbeddingGemma
        {"max_seq_length": 512, "do_lower_case": True},  # bge
        {"max_seq_length": 32_768, "do_lower_case": False},  # gte-Qwen
        {"max_seq_length": None, "do_lower_case": False},
        {
            "max_seq_length": 8192,
            "do_lower_case": False,
            "model_args": {"trust_remote_code": True},  # jina
            "tokenizer_args": {"padding_side": "left"},
            "config_args": {"trust_remote_code": True, "is_causal": False},
        },
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": FORWARD},
            "module_output_name": "token_embeddings",
        },
        {
            "transformer_task": "any-to-any",
            "modality_config": {
                "text": {"method": "forward", "method_output_name": ["hidden_states", -1]},
                "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
                "image+text": FORWARD,
                "message": {**FORWARD, "format": "structured"},
            },
            "module_output_name": "token_embeddings",
            "unpad_inputs": False,
        },
        {
            "transformer_task": "text-generation",
            "modality_config": {"text": LOGITS, "message": {**LOGITS, "format": "flat"}},
            "module_output_name": "causal_logits",
            "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
        },
        text(padding="max_length", max_length=64, truncation=True),  # SigLIP
        text(max_length=8192),  # it only cuts
        {"query_length": 32, "query_expansion": {"strategy": "fixed", "length": 32}},
    ],
)
def test_what_published_models_say_is_allowed(settings):
    require_known_settings("org/model", FILE, settings)


@pytest.mark.skipif(
    not find_spec("sentence_transformers"), reason="sentence_transformers is not installed"
)
def test_what_sentence_transformers_saves_is_loaded_again(tmp_path):
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(embedder(tmp_path / "m", 1)), device="cpu").save(str(tmp_path / "n"))
    stated = json.loads((tmp_path / "n" / FILE).read_text())
    assert stated["modality_config"]["text"]["method"] == "forward"

    loaded = load_embedder(tmp_path / "n", EvaluationSettings(backend="mteb"))

    assert loaded.encode("hello").shape == (8,)


@pytest.mark.skipif(
    not find_spec("sentence_transformers"), reason="sentence_transformers is not installed"
)
@pytest.mark.parametrize("name", [FILE, "0_Transformer/sentence_xlnet_config.json"])
def test_these_files_are_looked_at_in_every_folder(name, tmp_path):
    embedder(tmp_path, 1)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(text(pad_to_multiple_of=20_000_000)))

    with pytest.raises(EvaluationError) as refused:
        load_embedder(tmp_path, EvaluationSettings(backend="mteb"))

    assert str(refused.value).startswith(f"{tmp_path}: {name}: `{PADDED}.pad_to_multiple_of` is")
