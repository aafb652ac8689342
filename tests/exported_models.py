"""Tiny random models of the architectures that are exported, with both kinds of tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

import lewis_hub
from lewis_hub.checkpoint.reader import TensorReader, local_checkpoint
from lewis_hub.export.gguf import GgufPlan, gguf_bytes, plan_gguf, write_gguf
from lewis_hub.export.vocabulary import FILES
from lewis_hub.files import sha256_of
from lewis_hub.recipe.formats import ExportFormat, file_name

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 416,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
}  # fmt: skip
HEADS = {"head_dim": 16, "query_pre_attn_scalar": 16}
CASES: dict[str, dict[str, Any]] = {  # name -> settings beside SIZES
    "llama": {"model_type": "llama", "attention_bias": True},
    "llama-3": {"model_type": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "sliding_window": 8, **HEADS},
    "gemma3": {
        "model_type": "gemma3_text", "sliding_window": 8, "num_hidden_layers": 7, **HEADS,
    },
    "phi3": {"model_type": "phi3", "sliding_window": None, "resid_pdrop": 0.0},
    "phi3-long": {
        "model_type": "phi3", "rope_parameters": LONGROPE, "sliding_window": None,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
PIECES = {"mistral", "gemma2", "gemma3", "phi3", "phi3-long"}  # the others have a BPE on bytes
TEXT = """The cat sleeps on the sofa. It's raining; 12 cats & 345 dogs run home, don't they?
  Ünïcödé 日本語 text    with spaces\n\n and\ttabs. print("hello", x[0]) # 3.14159"""


def build(name: str, folder: Path, **more: Any) -> Path:
    """Save a model and its tokenizer; all weights, norms too, are random."""
    settings = SIZES | CASES[name] | more
    model_type = settings.pop("model_type")
    config = transformers.AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = pieces_tokenizer() if name in PIECES else bytes_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def bytes_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The zoo's tokenizer, which begins a text with <|begin|>, with one more token."""
    zoo = lewis_hub.zoo_folder() / "base" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(zoo))
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 1)]
    )
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def pieces_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A BPE like that of SentencePiece: ▁ for spaces, a token for each other byte."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = BpeTrainer(vocab_size=390, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT.replace("日本語", "")] * 4, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:3]
    document["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<end_of_turn>", normalized=False)])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def planned(folder: Path) -> GgufPlan:
    """The plan of the file of a model."""
    files = {name: folder / name for name in FILES if (folder / name).exists()}
    return plan_gguf(
        local_checkpoint(folder.name, folder),
        json.loads((folder / "config.json").read_text()),
        {name: path.read_bytes() for name, path in files.items()},
    )


def write(folder: Path, export: ExportFormat) -> Path:
    """Write the file of a model beside it."""
    file, plan = folder / file_name(export), planned(folder)
    advanced: list[int] = []
    with TensorReader(folder, folder.name) as reader:
        sha256 = write_gguf(plan, export, reader, file, advanced.append)
    assert sha256 == sha256_of(file)
    assert sum(advanced) == gguf_bytes(plan, export)
    return file
