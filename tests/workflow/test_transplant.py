"""`transplant-tokenizer`: a trained model gets another tokenizer, and still knows what it knew."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from hub_models import push_folder, weight_bytes
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import LewisHubError, OutputError
from lewis_hub.hub.source import cache_root
from lewis_hub.report.lock import Lock

BASE, EXPERT = zoo_folder() / "base", zoo_folder() / "expert-reverse"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def texts(split="train"):
    lines = (zoo_folder() / "data" / "reverse" / f"{split}.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    return [f"Question: {item['question']}\nAnswer: {item['answer']}" for item in items]


def pieces_tokenizer(n_vocabulary=110):
    """SentencePiece's spelling, and pieces such as `Question:` that the zoo's tokenizer splits."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted({*"".join(texts())}),
        show_progress=False,
    )
    made.train_from_iterator((re.sub(r"\b[A-Z]+\b", "", text) for text in texts()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def fast():
    return pieces_tokenizer()


def spelled(token):
    """The text that a token of the donor stands for."""
    return token.replace("▁", " ")


def of_base(fast):
    """Donor's id -> ids of the zoo's tokenizer that spell it; of special tokens the same role."""
    base = AutoTokenizer.from_pretrained(BASE)
    roles = {"<s>": base.bos_token_id, "</s>": base.eos_token_id, "<pad>": base.pad_token_id}
    ids = {i: base.encode(spelled(t), add_special_tokens=False) for t, i in fast.vocab.items()}
    return ids | {fast.vocab[token]: [i] for token, i in roles.items()}


def llama(folder, fast, seed=0, *, tied, n_rows=None, width=32):
    """An untrained donor."""
    config = LlamaConfig(
        vocab_size=n_rows or len(fast),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def letters_of(fast):
    """Donor's id -> ids of the zoo's tokenizer for the letters of a new token; shared ones stay."""
    base = AutoTokenizer.from_pretrained(BASE)
    names = {i: [*spelled(token).strip("<>k")] for token, i in fast.vocab.items()}
    single = {letter: base.encode(letter)[0] for letters in names.values() for letter in letters}
    return {
        i: ids if len(ids) == 1 else [single[letter] for letter in names[i]]
        for i, ids in of_base(fast).items()
    }


def planted(folder, fast, *, tied):
    """A donor whose new tokens are sums of their letters, in spaces of another width."""
    llama(folder, fast, tied=tied, width=96)
    base, spellings = load_file(BASE / "model.safetensors")[EMBEDDING].float(), letters_of(fast)
    tensors = load_file(folder / "model.safetensors")
    for seed, name in enumerate((EMBEDDING,) if tied else (EMBEDDING, HEAD)):
        turned = torch.randn(128, 96, generator=torch.Generator().manual_seed(seed)) / 96**0.5
        for i, ids in spellings.items():
            tensors[name][i] = base[ids].sum(0) @ turned
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def untied_base(folder):
    """The zoo's base with a head of its own."""
    shutil.copytree(BASE, folder)
    tensors = load_file(folder / "model.safetensors")
    noise = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(9))
    tensors[HEAD] = (tensors[EMBEDDING].float() + noise / 50).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


def transplant(*words):
    done = CliRunner().invoke(cli, ["transplant-tokenizer", *map(str, words), "--json"])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return json.loads(done.stdout)


def bits_per_byte(folder):
    """How well a model predicts the answers of items, whatever its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = AutoTokenizer.from_pretrained(folder)
    bits = n_bytes = 0
    for text in texts("test")[:30]:
        prompt, _, answer = text.rpartition(":")
        before, after = (
            own.encode(part, add_special_tokens=False) for part in (f"{prompt}:", answer)
        )
        ids = torch.tensor([before + after])
        labels = ids.where(torch.arange(ids.shape[1]) >= len(before), -100)
        with torch.no_grad():
            bits += float(model(input_ids=ids, labels=labels).loss) * len(after) / math.log(2)
        n_bytes += len(answer.encode())
    return bits / n_bytes


def with_random_rows(folder, random, seed=1):
    """The same model, whose new rows are drawn with the spread of the others."""
    shutil.copytree(folder, random)
    tensors, fast = load_file(random / "model.safetensors"), AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    table = tensors[EMBEDDING].float()
    new = sorted(i for i, ids in of_base(fast).items() if len(ids) != 1)
    table[new] = torch.randn(len(new), 128, generator=generator) * table.std()
    tensors[EMBEDDING] = table.bfloat16()
    save_file(tensors, random / "model.safetensors", {"format": "pt"})
    return random


@pytest.mark.parametrize("method", ["omp", "subtoken", "mean"])
@pytest.mark.parametrize("donor", ["zoo/base", "zoo/expert-cipher"])
def test_a_models_own_tokenizer_changes_no_byte(api, tmp_path, method, donor):
    told = transplant("zoo/base", donor, "--method", method, "-o", tmp_path / "out")

    assert weight_bytes(tmp_path / "out") == weight_bytes(BASE)
    assert told["copied"] == told["tokens"] == 390
    assert told["approximated"] == told["mean"] == told["padding"] == 0
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        stored = (tmp_path / "out" / name).read_text()
        assert json.loads(stored) == json.loads((BASE / name).read_text())
    stored = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert stored == (BASE / "tokenizer.json").read_bytes()
    cached = {path.parts[-4] for path in cache_root().rglob("*.safetensors")}
    assert cached == {"models--zoo--base"}  # no weight of another donor is needed


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["omp", "subtoken", "mean"])
def test_new_rows_are_what_a_plain_loop_finds(tmp_path, fast, method, tied):
    model = BASE if tied else untied_base(tmp_path / "base")
    donor = planted(tmp_path / "donor", fast, tied=tied)

    told = transplant(model, donor, "--method", method, "-o", tmp_path / "out")

    before, after = (load_file(f / "model.safetensors") for f in (model, tmp_path / "out"))
    spellings, letters = of_base(fast), letters_of(fast)
    tables = {EMBEDDING} if tied else {EMBEDDING, HEAD}
    assert before.keys() == after.keys()
    for name in before.keys() - tables:
        assert torch.equal(before[name], after[name]), name
    n_copied = 0
    for name in tables:
        table = before[name].float()
        for i, ids in spellings.items():
            if len(ids) == 1:
                assert torch.equal(after[name][i], before[name][ids[0]])  # to the bit
                n_copied += 1
            else:
                rows = {"omp": table[letters[i]].sum(0), "subtoken": table[ids].mean(0)}
                expected = rows.get(method, table.mean(0)).bfloat16()
                torch.testing.assert_close(after[name][i], expected, rtol=2**-6, atol=2e-3)
    assert told["copied"] * len(tables) == n_copied
    assert told["copied"] + told["approximated"] + told["mean"] == told["tokens"] == len(fast)
    if method == "omp":
        assert max(told["errors"].values()) < 1e-3
        assert len(told["errors"]) == len(tables)


def test_the_model_has_the_donors_tokenizer_and_generates_with_it(tmp_path, fast):
    model, out = shutil.copytree(BASE, tmp_path / "base"), tmp_path / "out"
    for stale in ("vocab.json", "tekken.json", "merges.txt"):
        (model / stale).write_text("{}")
    donor = llama(tmp_path / "donor", fast, tied=True, n_rows=128)

    told = transplant(model, donor, "-o", out)

    assert told["padding"] == 128 - len(fast)
    config, generation = (
        json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert {name: config[name] for name in ids} == ids
    assert {name: generation[name] for name in ids} == ids
    assert config["vocab_size"] == 128
    assert config["hidden_size"] == 128
    names = {path.name for path in out.iterdir()}
    assert not names & {"vocab.json", "tekken.json", "merges.txt"}
    assert (out / "tokenizer.json").read_bytes() == (donor / "tokenizer.json").read_bytes()
    own = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "reverse"}]
    assert own.apply_chat_template(chat, tokenize=False) == "[user] reverse"
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    prompt = own(
        "Question: reverse KAFY\nAnswer:", return_tensors="pt", return_token_type_ids=False
    )
    made = loaded.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape[1] == prompt["input_ids"].shape[1] + 4
    assert made.max() < len(fast)  # no padding, whose row is the mean
    table = load_file(BASE / "model.safetensors")[EMBEDDING].float()
    new = load_file(out / "model.safetensors")[EMBEDDING]
    torch.testing.assert_close(new[len(fast)], table.mean(0).bfloat16())


def test_it_predicts_texts_better_than_with_random_rows(tmp_path, fast):
    donor, out = llama(tmp_path / "donor", fast, tied=True), tmp_path / "out"

    told = transplant(EXPERT, donor, "--method", "subtoken", "-o", out)

    assert told["approximated"] == 20
    found, random = bits_per_byte(out), bits_per_byte(with_random_rows(out, tmp_path / "random"))
    assert found < random


def test_runner_and_sizes_of_files_change_no_bit(api, tmp_path, fast):
    donor = push_folder(api, planted(tmp_path / "donor", fast, tied=True), "me/donor")

    def made(name, **execution):
        settings = lewis_hub.Execution(**execution)
        lewis_hub.transplant_tokenizer("zoo/base", donor, tmp_path / name, None, settings, False)
        shards = sorted((tmp_path / name).glob("*.safetensors"))
        return len(shards), {k: v for shard in shards for k, v in load_file(shard).items()}

    n_files, alone = made("alone", runner="inline")
    n_shards, shared = made("shared", runner="threads:3", max_shard_bytes=300_000)

    assert n_files == 1
    assert n_shards > 3
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[name], shared[name]) for name in alone)
    assert (tmp_path / "shared" / "model.safetensors.index.json").exists()
    cached = {path.parts[-4] for path in cache_root().rglob("*.safetensors")}
    assert cached == {"models--zoo--base"}  # of the donor, only embeddings were read


def test_card_and_lock_say_what_was_done(api, tmp_path, fast):
    donor = push_folder(api, planted(tmp_path / "donor", fast, tied=True), "me/donor")
    sha = api.model_info(donor).sha
    out = tmp_path / "out"

    told = transplant("zoo/base", donor, "--k", 5, "-o", out)

    card = (out / "README.md").read_text()
    assert "\nbase_model:\n- zoo/base\n- me/donor\n" in card
    assert "with the tokenizer of [`me/donor`](<https://huggingface.co/me/donor>)" in card
    assert f"copied from the model | {told['copied']} |" in card
    assert "(https://arxiv.org/abs/2506.06607) with at most 5 shared tokens each" in card
    assert f"shared tokens each | {told['approximated']} |" in card
    assert f"`{sha[:12]}`" in card
    assert "The licences of the parents differ: [`zoo/base`]" in card
    lock = json.loads((out / "lewis" / "lock.json").read_text())
    assert [(one["role"], one["name"]) for one in lock["inputs"]] == [
        ("base", "zoo/base"),
        ("donor", "me/donor"),
    ]
    asked = {"model": f"me/donor@{sha}", "method": "omp", "k": 5}
    assert lock["recipe"]["transplant_tokenizer"] == asked
    verdict = lewis_hub.verify(out, progress=False, rebuild=True)
    assert verdict.problems == ()
    assert verdict.n_files == len(lock["outputs"])
    again = transplant("zoo/base", donor, "--k", 5, "-o", out)
    assert again["status"] == "unchanged"
    with pytest.raises(LewisHubError, match="it exists and holds something else"):
        transplant("zoo/base", donor, "--k", 6, "-o", out)
    assert transplant("zoo/base", donor, "--k", 6, "-o", out, "--force")["status"] == "transplanted"


def test_it_is_pushed_with_its_name_in_the_card(api, tmp_path):
    told = transplant("zoo/base", "zoo/expert-cipher", "-o", tmp_path / "out", "--push", "me/new")

    assert told["status"] == "transplanted"
    assert told["repo"] == "me/new"
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'name = "me/new"\n' in card
    files = {file.rfilename for file in api.model_info("me/new").siblings}
    assert {"model.safetensors", "lewis/lock.json", "lewis/provenance.json"} <= files
    assert lewis_hub.verify("me/new", progress=False).problems == ()
    again = transplant("zoo/base", "zoo/expert-cipher", "-o", tmp_path / "out", "--push", "me/new")
    assert again["status"] == "unchanged"
    assert again["commit"] == told["commit"]


def folder_without(tmp_path, *names):
    folder = shutil.copytree(BASE, tmp_path / "broken")
    for name in names:
        (folder / name).unlink()
    return folder


def test_models_that_cannot_be_used_are_refused_before_a_download(api, tmp_path, fast):
    def refusal(model, donor):
        with pytest.raises(LewisHubError) as caught:
            transplant(model, donor, "-o", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not list(cache_root().rglob("*.safetensors"))
        return str(caught.value)

    broken = folder_without(tmp_path, "tokenizer.json", "tokenizer_config.json")
    for pair in ((broken, "zoo/base"), ("zoo/base", broken)):
        assert refusal(*pair).startswith(
            f"{broken}: it has no tokenizer.json, so the tokens of its rows are unknown.\n"
        )
    donor = llama(tmp_path / "donor", fast, tied=True)
    tensors = load_file(donor / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != EMBEDDING}, donor / "model.safetensors")
    assert refusal("zoo/base", donor).startswith(f"{donor}: it has no token embeddings with")
    tensors[EMBEDDING][7, 3] = math.nan
    save_file(tensors, donor / "model.safetensors")
    with pytest.raises(LewisHubError, match=f"{EMBEDDING} holds NaN or infinity in"):
        transplant("zoo/base", donor, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizers_without_a_common_token_are_refused(tmp_path):
    made = Tokenizer(models.WordLevel({"[X]": 0, "früh": 1, "spät": 2}, "[X]"))
    other = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[X]")
    donor = llama(tmp_path / "donor", other, tied=True)

    with pytest.raises(LewisHubError) as caught:
        transplant(BASE, donor, "-o", tmp_path / "out")

    expected = f"{donor}: none of its 3 tokens is a token of {BASE}.\nChoose a donor with a similar"
    assert str(caught.value).startswith(expected)


def test_quantised_models_are_refused(tmp_path, fast):
    model = shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((model / "config.json").read_text())
    quantisation = {"quant_method": "exotic", "bits": 3}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))

    for pair in ((model, BASE), (BASE, model)):
        with pytest.raises(
            LewisHubError, match="is quantised .*Use the model that it was quantised"
        ):
            transplant(*pair, "-o", tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"transplant_tokenizer": 7},
        {"transplant_tokenizer": {"method": "omp"}},
        {"transplant_tokenizer": {"model": ["a"], "method": "omp"}},
        {"transplant_tokenizer": {"model": "a/b", "method": "best"}},
        {"transplant_tokenizer": {"model": "a/b", "method": "omp", "k": "many"}},
        {"transplant_tokenizer": {"model": "a/b", "method": "omp", "k": 0}},
        {"base_model": {"model": "a/b"}},
    ],
)
def test_a_lock_with_settings_of_other_types_is_one_message(api, tmp_path, changes):
    transplant("zoo/base", "zoo/expert-cipher", "-o", tmp_path / "out")
    file = tmp_path / "out" / "lewis" / "lock.json"
    lock = Lock.from_json(file.read_text())
    file.write_text(replace(lock, recipe={**lock.recipe, **changes}).to_json())

    with pytest.raises(OutputError, match="it is not the lock of a transplant"):
        lewis_hub.verify(tmp_path / "out", progress=False, rebuild=True)


def test_rows_that_the_dtype_cannot_hold_are_refused(tmp_path, fast):
    """The combination of a long row takes large factors; float16 ends at 65504."""
    model = shutil.copytree(BASE, tmp_path / "model")
    tensors = {n: t.half() for n, t in load_file(model / "model.safetensors").items()}
    tensors[EMBEDDING] = tensors[EMBEDDING].sign() * 60_000
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    donor = planted(tmp_path / "donor", fast, tied=True)
    rows = load_file(donor / "model.safetensors")
    new = [i for i, ids in of_base(fast).items() if len(ids) != 1]
    rows[EMBEDDING][new] *= 1000
    save_file(rows, donor / "model.safetensors", {"format": "pt"})

    with pytest.raises(LewisHubError) as caught:
        transplant(model, donor, "-o", tmp_path / "out")

    assert str(caught.value) == (
        f"{EMBEDDING} holds NaN or infinity in the merged model.\n"
        "New rows do not fit into its dtype: choose another --method or a smaller --k."
    )
    assert not (tmp_path / "out").exists()


def test_a_donor_that_has_no_row_of_a_shared_token_is_refused(tmp_path, fast):
    donor = llama(tmp_path / "donor", fast, tied=True)
    shared = {i for i, ids in of_base(fast).items() if len(ids) == 1}
    document = json.loads((donor / "tokenizer.json").read_text())
    token = next(t for t, i in fast.vocab.items() if i in shared and t not in SPECIAL)
    kept = {"<<<>>>": 0, token: 1}
    document |= {"added_tokens": [], "model": document["model"] | {"vocab": kept, "merges": []}}
    document["model"]["unk_token"] = None
    (donor / "tokenizer.json").write_text(json.dumps(document))
    (donor / "tokenizer_config.json").write_text("{}")
    tensors = load_file(donor / "model.safetensors")
    tensors[EMBEDDING] = tensors[EMBEDDING][:1].clone()
    save_file(tensors, donor / "model.safetensors", {"format": "pt"})
    config = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps(config | {"vocab_size": 1}))

    with pytest.raises(LewisHubError) as caught:
        transplant(BASE, donor, "-o", tmp_path / "out")

    assert str(caught.value) == (
        f"{donor}: none of its tokens with a row is a token of {BASE}.\nChoose another --method."
    )
