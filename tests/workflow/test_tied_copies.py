"""Files that store a tied table several times, as older ones of T5, BART, Whisper and BERT do."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import fine_tuned, tiny_model

import lewis_hub
from lewis_hub.checkpoint import names
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import SourceError
from lewis_hub.recipe.read import parse_recipe

HEADS = {
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "marian": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "bert": "AutoModelForMaskedLM",
    "gpt2": "AutoModelForCausalLM",
}
ENCODER, SHARED = "encoder.embed_tokens.weight", "shared.weight"


@pytest.fixture
def models(tmp_path):
    """Writes models `b` and `e` of an architecture, and recipes that merge `e` into `b`."""

    def write(kind):
        model = tiny_model(kind, getattr(transformers, HEADS[kind]))
        for seed, name in enumerate("be"):
            fine_tuned(model, seed).save_pretrained(tmp_path / name)
            tokenizer = (zoo_folder() / "base" / "tokenizer.json").read_bytes()
            (tmp_path / name / "tokenizer.json").write_bytes(tokenizer)
        return dict(model.all_tied_weights_keys)

    def change(name, edit):
        path = tmp_path / name / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file({n: t.clone() for n, t in tensors.items()}, path, {"format": "pt"})

    def merged(output, more=""):
        text = f"base_model: {tmp_path}/b\nmodels: [{{model: {tmp_path}/e, parameters: "
        text += f"{{weight: 0.5}}}}]\nmerge_method: task_arithmetic\n{more}"
        asked = parse_recipe(text, "recipe.yaml")
        return lewis_hub.merge_models(asked, tmp_path / output, progress=False).output

    write.change, write.merged, write.folder = change, merged, tmp_path
    return write


def with_copies(tied):
    return lambda tensors: tensors.update({one: tensors[of] for one, of in tied.items()})


@pytest.mark.parametrize("kind", HEADS)
def test_copies_of_tied_tensors_change_nothing_of_a_merge(kind, models):
    tied = models(kind)
    assert tied
    wanted = load_file(models.merged("plain") / "model.safetensors")

    models.change("b", with_copies(tied))
    of_base = models.merged("of_base", "missing: base\n")
    models.change("e", with_copies(tied))
    of_both = models.merged("of_both")

    for made in (of_base, of_both):
        stored = load_file(made / "model.safetensors")
        assert stored.keys() == wanted.keys()
        assert all(torch.equal(stored[name], wanted[name]) for name in stored)
    loaded = getattr(transformers, HEADS[kind]).from_pretrained(of_base).state_dict()
    assert all(torch.equal(loaded[one], wanted[of]) for one, of in tied.items())


def test_a_file_of_copies_alone_has_the_table_under_the_name_of_the_others(models):
    tied = models("t5")
    wanted = load_file(models.merged("plain") / "model.safetensors")

    models.change("e", with_copies(tied))
    models.change("e", lambda tensors: tensors.pop(SHARED))
    stored = load_file(models.merged("made", "missing: base\n") / "model.safetensors")

    assert torch.equal(stored[SHARED], wanted[SHARED])
    assert stored.keys() == wanted.keys()


def test_a_head_of_its_own_stays_where_encoder_and_decoder_share_a_table(models):
    """T5 1.1 says `tie_word_embeddings: false`, which is about the head alone."""
    tied = models("t5")
    for name in "be":
        path = models.folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
        models.change(name, lambda tensors: tensors.update({"lm_head.weight": -tensors[SHARED]}))
    wanted = load_file(models.merged("plain") / "model.safetensors")
    shared = {one: of for one, of in tied.items() if one != "lm_head.weight"}

    models.change("b", with_copies(shared))
    stored = load_file(models.merged("made", "missing: base\n") / "model.safetensors")

    assert torch.equal(stored["lm_head.weight"], wanted["lm_head.weight"])
    assert torch.equal(stored[SHARED], wanted[SHARED])
    assert stored.keys() == wanted.keys()


def test_encoder_and_decoder_with_tables_of_their_own_stay_apart():
    assert names.shared_table("model.decoder.embed_tokens.weight") == "model.shared.weight"
    assert names.shared_table("model.embed_tokens.weight") is None
    assert names.shared_table("decoder.block.0.embed_tokens.weight") is None


def test_a_marian_model_with_two_tables_keeps_both(models):
    config = transformers.MarianConfig(
        vocab_size=390, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
        share_encoder_decoder_embeddings=False, pad_token_id=0, decoder_start_token_id=0,
        max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.MarianMTModel(config)
    for seed, name in enumerate("be"):
        fine_tuned(model, seed).save_pretrained(models.folder / name)
        tokenizer = (zoo_folder() / "base" / "tokenizer.json").read_bytes()
        (models.folder / name / "tokenizer.json").write_bytes(tokenizer)
    wanted = load_file(models.merged("plain") / "model.safetensors")

    models.change("b", with_copies({"lm_head.weight": "model.decoder.embed_tokens.weight"}))
    stored = load_file(models.merged("made") / "model.safetensors")

    tables = {f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")}
    assert tables <= stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], wanted[name]) for name in stored)


def test_a_copy_that_differs_from_the_shared_table_is_refused(models):
    models("t5")
    models.change("b", lambda tensors: tensors.update({ENCODER: -tensors[SHARED]}))

    with pytest.raises(SourceError) as caught:
        models.merged("made", "missing: base\n")

    assert str(caught.value) == (
        f"{models.folder}/b: its architecture ties `{ENCODER}` to `{SHARED}`, but its file stores "
        f"a `{ENCODER}` that differs from `{SHARED}`, and programs disagree which of the two they "
        f"load.\nUse a copy of the model whose file has no `{ENCODER}`."
    )


def test_a_model_with_a_hundred_heads_keeps_them(models):
    """Each was compared with all names: 20,000 of them took 18 minutes."""
    models("gpt2")
    heads = {f"x{i}.lm_head.weight" for i in range(101)}

    def add(tensors):
        tensors.update({name: tensors["transformer.wte.weight"] for name in heads})

    for name in "be":
        models.change(name, add)

    assert heads < load_file(models.merged("out") / "model.safetensors").keys()
