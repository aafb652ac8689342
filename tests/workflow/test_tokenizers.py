"""Models with different vocabularies, from the recipe to a merge that transformers loads."""

import json
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lewis_hub
from lewis_hub.errors import CheckFailedError, RecipeError
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.recipe.schema import CHAT_TEMPLATES
from lewis_hub.workflow.resources import Execution

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEMPLATE = "{% for m in messages %}NAME {{ m['content'] }}{% endfor %}"
MERGES = {
    "base": [("h", "e"), ("l", "l"), ("he", "ll")],
    "x": [("h", "e"), ("l", "l"), ("ll", "o"), ("Ġ", "w")],
    "y": [("w", "o"), ("h", "e"), ("l", "l"), ("he", "y")],
}
ADDED = {
    "base": ["<|end|>", "<|pad|>"],
    "x": ["<|end|>", "<|im_start|>"],
    "y": ["<|im_start|>", "<|end|>", AddedToken("<tool>", normalized=False)],
}
N_ROWS = {"base": 300, "x": 264, "y": 280}  # padded, exact or nearly so


def tokenizer(name):
    letters = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if name == "y":
        letters[1:] = reversed(letters[1:])
    words = [*letters, *("".join(pair) for pair in MERGES[name])]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, MERGES[name]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<|end|>")
    for token in ADDED[name]:
        fast.add_tokens([token], special_tokens=isinstance(token, str))
    fast.chat_template = TEMPLATE.replace("NAME", name)
    return fast


def llama(folder, n_rows, seed, ids, *, tied=False):
    config = LlamaConfig(
        vocab_size=n_rows,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=ids[0],
        eos_token_id=ids[1],
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


class Models:
    def __init__(self, root):
        self.root, self.tokenizers, self.tensors = root, {}, {}

    def write(self, name, made=None, n_rows=None, **more):
        folder = self.root / name
        made = made or tokenizer(name)
        ids = made.convert_tokens_to_ids(["<s>", "<|end|>"])
        llama(folder, n_rows or N_ROWS[name], len(self.tensors), ids, **more)
        made.save_pretrained(folder)
        self.tokenizers[name] = made
        self.tensors[name] = load_file(folder / "model.safetensors")

    def recipe(self, more="", method="ties", names=("x", "y")):
        listed = "".join(f"  - model: {self.root}/{name}\n" for name in names)
        text = f"base_model: {self.root}/base\nmodels:\n{listed}merge_method: {method}\n"
        return parse_recipe(text + more.replace("ROOT", str(self.root)), "recipe.yaml")

    def stack(self, more="", method="ties", names=("base", "x", "y")):
        """The same merge as `recipe`, each block a slice of its own."""
        sources = "".join(
            f"      - {{model: {self.root}/{name}, layer_range: [RANGE]}}\n" for name in names
        )
        slices = "".join(
            "  - sources:\n" + sources.replace("RANGE", one) for one in ("0, 1", "1, 2")
        )
        text = f"base_model: {self.root}/base\nslices:\n{slices}merge_method: {method}\n"
        return parse_recipe(text + more.replace("ROOT", str(self.root)), "recipe.yaml")

    def merge(self, recipe, output="out", **more):
        lewis_hub.merge_models(recipe, self.root / output, Execution(**more) if more else None)
        return self.root / output


@pytest.fixture
def zoo(tmp_path, hub):
    made = Models(tmp_path)
    for name in MERGES:
        made.write(name)
    return made


def rows_by_token(zoo, name):
    """token -> its row, in each source whose vocabulary has it."""
    rows = defaultdict(dict)
    for source, one in zoo.tokenizers.items():
        for token, i in one.get_vocab().items():
            if i < len(zoo.tensors[source][name]):
                rows[token][source] = zoo.tensors[source][name][i].float()
    return rows


def naive(rows, weight):
    """The rule in words, for `task_arithmetic` of x and y."""
    having = list(rows.values())
    start = rows.get("base", torch.stack(having).double().mean(dim=0).float())
    moves = [weight * (rows[source] - start) for source in ("x", "y") if source in rows]
    return start + sum(moves, torch.zeros_like(start))


ARITHMETIC = "parameters: {weight: 0.5}\ndtype: float32\n"


@pytest.mark.parametrize("source", ["base", "union", "ROOT/x", "ROOT/y"])
def test_the_merge_reloads_and_encodes_every_token_to_the_right_row(zoo, source):
    recipe = zoo.recipe(f"{ARITHMETIC}tokenizer_source: {source}\n", "task_arithmetic")
    output = zoo.merge(recipe)

    loaded, model = (
        AutoTokenizer.from_pretrained(output),
        AutoModelForCausalLM.from_pretrained(output),
    )
    vocabulary = loaded.get_vocab()
    named = source.rpartition("/")[2]
    if source == "union":
        everything = set().union(*(one.get_vocab() for one in zoo.tokenizers.values()))
        assert set(vocabulary) == everything
        assert zoo.tokenizers["base"].get_vocab().items() <= vocabulary.items()
    else:
        assert vocabulary == zoo.tokenizers[named].get_vocab()
    for tensor in (EMBEDDING, HEAD):
        expected, found = rows_by_token(zoo, tensor), model.state_dict()[tensor]
        for token in vocabulary:
            (i,) = loaded.convert_tokens_to_ids([token])
            assert torch.allclose(found[i], naive(expected[token], 0.5), rtol=0, atol=1e-6), token
    added = [token for token in vocabulary if token.startswith("<") and token.endswith(">")]
    assert all(
        loaded(token, add_special_tokens=False).input_ids == [vocabulary[token]] for token in added
    )
    assert loaded.decode(loaded("hello <|end|> hey wow").input_ids) == "hello <|end|> hey wow"


def test_tokens_that_only_a_configuration_adds_are_compared_too(zoo):
    zoo.write("twin", tokenizer("base"), N_ROWS["base"])
    n_tokens = len(tokenizer("base"))
    for name, token in (("base", "<img>"), ("twin", "<tool>")):
        file = zoo.root / name / "tokenizer_config.json"
        added = {str(n_tokens): {"content": token, "special": True}}
        told = json.loads(file.read_text()) | {"added_tokens_decoder": added}
        file.write_text(json.dumps(told))

    with pytest.raises(CheckFailedError) as raised:
        zoo.merge(zoo.recipe(names=("twin",)))

    named = f"id {n_tokens} is '<tool>' in {zoo.root}/twin and '<img>' in {zoo.root}/base"
    assert named in str(raised.value)


@pytest.mark.parametrize(
    ("source", "n_rows", "eos"),
    [("base", 300, "base"), ("union", 300, "base"), ("ROOT/y", 280, "y")],
)
def test_the_configuration_follows_the_tokenizer(zoo, source, n_rows, eos):
    output = zoo.merge(zoo.recipe(f"tokenizer_source: {source}\n"))

    config = json.loads((output / "config.json").read_text())
    generation = json.loads((output / "generation_config.json").read_text())
    end = zoo.tokenizers[eos].convert_tokens_to_ids("<|end|>")
    assert config["vocab_size"] == n_rows
    assert config["eos_token_id"] == generation["eos_token_id"] == end
    assert AutoTokenizer.from_pretrained(output).eos_token_id == end
    assert {
        len(t) for n, t in load_file(output / "model.safetensors").items() if n in (EMBEDDING, HEAD)
    } == {n_rows}


def told(zoo, name, file, **values):
    path = zoo.root / name / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_end_of_a_text_is_that_of_the_tokenizer_s_model_though_all_tokens_are_the_same(zoo):
    zoo.write(
        "chat", tokenizer("base"), N_ROWS["base"]
    )  # as an Instruct model has its base's tokens
    chat = zoo.tokenizers["chat"]
    end, start = chat.convert_tokens_to_ids(["<|end|>", "<s>"])
    told(zoo, "chat", "tokenizer_config.json", eos_token="<s>")
    told(zoo, "chat", "config.json", eos_token_id=start)
    told(zoo, "chat", "generation_config.json", eos_token_id=[start, end])

    output = zoo.merge(zoo.recipe("tokenizer_source: ROOT/chat\n", names=("chat",)))

    config = json.loads((output / "config.json").read_text())
    generation = json.loads((output / "generation_config.json").read_text())
    assert AutoTokenizer.from_pretrained(output).eos_token_id == start
    assert (config["eos_token_id"], generation["eos_token_id"]) == (start, [start, end])
    assert config["vocab_size"] == N_ROWS["base"]


def test_other_ids_of_the_configuration_follow_their_tokens(zoo):
    ids = {name: made.get_vocab() for name, made in zoo.tokenizers.items()}
    for name in ("base", "y"):
        told(zoo, name, "config.json", image_token_id=ids["base"]["a"])
    told(zoo, "base", "generation_config.json", forced_eos_token_id=[ids["base"]["b"]])

    output = zoo.merge(zoo.recipe("tokenizer_source: ROOT/y\n"))

    config = json.loads((output / "config.json").read_text())
    generation = json.loads((output / "generation_config.json").read_text())
    assert ids["y"]["a"] != ids["base"]["a"]
    assert config["image_token_id"] == ids["y"]["a"]
    assert generation["forced_eos_token_id"] == [ids["y"]["b"]]


def test_a_tokenizer_without_a_token_of_the_configuration_is_refused(zoo):
    lacking = set(zoo.tokenizers["base"].get_vocab()) - set(zoo.tokenizers["y"].get_vocab())
    token = min(lacking)
    number = zoo.tokenizers["base"].get_vocab()[token]
    told(zoo, "base", "config.json", image_token_id=number)

    (found,) = lewis_hub.check(zoo.recipe("tokenizer_source: ROOT/y\n")).problems

    assert f"image_token_id: it is token {number}, which the tokenizer of" in found


def test_a_tokenizer_with_another_padding_is_refused_if_positions_are_counted_from_it(zoo):
    for name, padding in (("base", 1), ("x", 1), ("y", 2)):
        file = zoo.root / name / "config.json"
        told = {"model_type": "roberta", "pad_token_id": padding}
        file.write_text(json.dumps(json.loads(file.read_text()) | told))

    found = lewis_hub.check(zoo.recipe("tokenizer_source: ROOT/y\n")).problems

    assert any("the id of its padding, 1, which would be 2" in one for one in found)


@pytest.mark.parametrize(
    ("source", "kept"),
    [("base", {"tekken.json"}), ("union", set()), ("ROOT/y", {"tokenizer_own.model"})],
)
def test_the_vocabulary_of_another_library_is_that_of_the_tokenizer(zoo, source, kept):
    (zoo.root / "base" / "tekken.json").write_text("{}")  # transformers prefers it
    (zoo.root / "y" / "tokenizer_own.model").write_text("own")

    output = zoo.merge(zoo.recipe(f"tokenizer_source: {source}\n"))

    found = {file.name for file in output.iterdir()} & {"tekken.json", "tokenizer_own.model"}
    assert found == kept


def test_the_bytes_are_the_same_on_every_runner_and_shard_size(zoo):
    recipe = zoo.recipe("parameters: {density: 0.4}\ntokenizer_source: union\n", "dare_ties")
    runs = [
        zoo.merge(recipe, str(i), runner=r)
        for i, r in enumerate(("inline", "threads:2", "threads:3"))
    ]
    small = zoo.merge(recipe, "small", runner="threads:2", max_shard_bytes=10_000)

    first, *others = ((run / "model.safetensors").read_bytes() for run in runs)
    assert all(other == first for other in others)
    whole = load_file(runs[0] / "model.safetensors")
    parts = [load_file(path) for path in sorted(small.glob("*.safetensors"))]
    assert len(parts) == 3
    assert all(torch.equal(whole[name], tensor) for part in parts for name, tensor in part.items())


def test_rows_may_be_padded_and_tokens_given_embeddings(zoo):
    output = zoo.merge(
        zoo.recipe(
            ARITHMETIC
            + """tokenizer:
  source: union
  pad_to_multiple_of: 128
  tokens:
    <new>: {source: {kind: model_token, model: ROOT/x, token: he}}
    <zero>: {source: {kind: zero}}
    he: {source: ROOT/y, force: true}
    <tool>: {source: ROOT/y}
    <|im_start|>: {source: {kind: model_token, model: ROOT/base, token_id: 3}}
""",
            "task_arithmetic",
        )
    )

    loaded, rows = AutoTokenizer.from_pretrained(output), load_file(output / "model.safetensors")
    table, own = rows[EMBEDDING], zoo.tensors

    def row(source, token):
        i = zoo.tokenizers[source].convert_tokens_to_ids(token)
        return own[source][EMBEDDING][i].float()

    def found(token):
        return table[loaded.convert_tokens_to_ids(token)]

    assert table.shape[0] == 384
    assert torch.equal(found("<new>"), row("x", "he"))
    assert found("<zero>").tolist() == [0.0] * 16
    assert torch.equal(found("he"), row("y", "he"))
    assert torch.equal(found("<tool>"), row("y", "<tool>"))
    start = own["base"][EMBEDDING][3].float()
    moved = [0.5 * (row(source, "<|im_start|>") - start) for source in ("x", "y")]
    assert torch.allclose(found("<|im_start|>"), start + moved[0] + moved[1], rtol=0, atol=1e-6)
    padding = own["base"][EMBEDDING].float()
    assert torch.equal(table[299], padding[299])
    assert loaded("<new>", add_special_tokens=False).input_ids == [loaded.get_vocab()["<new>"]]


def test_tokenizers_that_differ_are_refused_where_nothing_is_asked(zoo):
    x, y = lewis_hub.check(zoo.recipe()).problems

    assert "id 259 is 'llo' in" in x
    assert "x and 'hell' in" in x
    assert "Set `tokenizer_source`: with `base` the merge has the base's tokens, with `union`" in x
    assert y.startswith("id 1 is ")
    with pytest.raises(CheckFailedError):
        zoo.merge(zoo.recipe())


def padded(zoo, name, extra, n_rows):
    made = tokenizer("base")
    made.add_tokens(extra, special_tokens=True)
    zoo.write(name, made, n_rows)


@pytest.mark.parametrize("n_rows", [262, 263, 320])
def test_rows_beyond_the_tokens_are_padding_and_the_base_s_stay(zoo, n_rows):
    padded(zoo, "p", ["<|im_start|>"][: n_rows - 262], n_rows)
    recipe = zoo.recipe(ARITHMETIC, "task_arithmetic", ["p"])

    told = lewis_hub.check(recipe)
    merged = load_file(zoo.merge(recipe) / "model.safetensors")

    assert told.problems == ()
    assert len(told.notes) == (n_rows > 262)
    for name in (EMBEDDING, HEAD):
        base, expert = (zoo.tensors[source][name].float() for source in ("base", "p"))
        shared = min(len(base), len(expert))
        assert merged[name].shape == base.shape
        assert torch.equal(merged[name][shared:], base[shared:])
        middle = base[:shared] + 0.5 * (expert[:shared] - base[:shared])
        assert torch.allclose(merged[name][:shared], middle, rtol=0, atol=1e-6)
    assert AutoModelForCausalLM.from_pretrained(zoo.root / "out").config.vocab_size == 300


def test_a_note_tells_what_the_base_s_tokenizer_does_not_know(zoo):
    padded(zoo, "p", ["<|im_start|>"], 270)

    (note,) = lewis_hub.check(zoo.recipe(names=["p"])).notes

    assert "p has the token '<|im_start|>', which the base's tokenizer lacks" in note
    assert "`tokenizer_source: union` would keep them" in note


def test_rows_that_nothing_explains_are_refused(zoo):
    padded(zoo, "p", [], 270)
    (zoo.root / "p" / "tokenizer.json").unlink()

    (problem,) = lewis_hub.check(zoo.recipe(names=["p"])).problems
    (asked,) = lewis_hub.check(zoo.recipe("tokenizer_source: base\n", names=["p"])).problems

    assert "has a vocabulary of 270 rows" in problem
    assert "p: it has no tokenizer.json, so the tokens of its rows are unknown" in asked


def test_tokenizers_that_cannot_be_united_are_refused(zoo):
    made = Tokenizer(models.WordLevel({"<s>": 0, "<|end|>": 1, "word": 2}, "<s>"))
    zoo.write("p", PreTrainedTokenizerFast(tokenizer_object=made), 8)

    (problem,) = lewis_hub.check(zoo.recipe("tokenizer_source: union\n", names=["p"])).problems

    assert "its tokenizer (WordLevel, plain letters) cannot be united with that of" in problem
    assert (
        "(BPE, bytes as letters): 1 of its tokens, such as 'word', could never occur in a text."
        in problem
    )


@pytest.mark.parametrize(
    ("embedding", "says"),
    [
        ("{source: ROOT/x}", "x has no row for '<new>'"),
        ("{source: {kind: model_token, model: ROOT/x, token: nope}}", "x has no row for 'nope'"),
        (
            "{source: {kind: model_token, model: ROOT/x, token_id: 264}}",
            "x has no row 264: it has 264",
        ),
    ],
)
def test_a_token_without_a_row_is_refused(zoo, embedding, says):
    asked = f"tokenizer: {{source: base, tokens: {{<new>: {embedding}}}}}\n"

    (problem,) = lewis_hub.check(zoo.recipe(asked)).problems

    assert says in problem
    assert problem.startswith("tokenizer.tokens.<new>: ")


def calibrated(zoo, text):
    (zoo.root / "data.jsonl").write_text(json.dumps({"text": text}) + "\n")
    data = '{dataset: ROOT/data.jsonl, text: "{text}", max_tokens: 64}'
    guide = f"guide: {{name: GUIDE, calibration: {data}}}\n"
    return f"tokenizer_source: union\n{guide}"


@pytest.mark.parametrize("guide", ["lewis", "lewis_reference"])
def test_a_guide_gives_each_model_its_own_id_of_every_token(zoo, guide):
    """y has the bytes in another order: with its rows in the base's order it is the same model."""
    from lewis_hub.tokenizer import read_vocabulary

    ids = [
        read_vocabulary(name, {"tokenizer.json": (zoo.root / name / "tokenizer.json").read_bytes()})
        for name in ("base", "y")
    ]
    sorted_y = dict(zoo.tensors["y"])
    for name in (EMBEDDING, HEAD):
        rows = torch.zeros_like(zoo.tensors["base"][name])
        for token, row in ids[0].ids.items():
            if token in ids[1].ids:
                rows[row] = zoo.tensors["y"][name][ids[1].ids[token]]
        sorted_y[name] = rows
    zoo.write("twin", zoo.tokenizers["base"], 300)
    save_file(sorted_y, zoo.root / "twin" / "model.safetensors", {"format": "pt"})
    more = calibrated(zoo, "say: hey, world <|end|> 42").replace("GUIDE", guide)

    found = [
        lewis_hub.calibrate(zoo.recipe(more, names=(name,)), zoo.root / f"out-{name}").profile
        for name in ("y", "twin")
    ]

    one, two = (profile.sources for profile in found)
    assert one[1].modules == pytest.approx(two[1].modules, rel=1e-6)
    assert one[0].modules == two[0].modules
    assert one[1].n_tokens == one[0].n_tokens


def test_a_text_with_a_token_that_a_model_lacks_is_refused_before_weights_are_read(zoo):
    more = calibrated(zoo, "hello<|pad|>").replace("GUIDE", "lewis")

    notes = lewis_hub.check(zoo.recipe(more)).notes
    with pytest.raises(lewis_hub.LewisHubError) as caught:
        zoo.merge(zoo.recipe(more))

    root = zoo.root
    assert notes[-1] == (
        f"{root}/y lacks the tokens 'hell', '<|pad|>' of {root}/base, whose tokenizer cuts the "
        "calibration texts. A text with such a token is refused."
    )
    assert str(caught.value) == (
        f"calibration texts, cut by the tokenizer of {root}/base: {root}/x has no token 'hell' and "
        "1 more.\nAll models need the same tokens: choose other texts, use guide `uniform`, or "
        "remove this model."
    )
    uniform = more.replace("lewis", "uniform")
    assert lewis_hub.check(zoo.recipe(uniform)).problems == ()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("", "base"),
        ("chat_template: auto\n", "base"),
        ("chat_template: auto\ntokenizer_source: ROOT/y\n", "y"),
        ("chat_template: ROOT/x\ntokenizer_source: union\n", "x"),
        ("chat_template: ROOT/x\n", "x"),
        ("chat_template: \"{{ messages[0]['content'] }} {# mine #}\"\n", ""),
    ],
)
def test_the_chat_template_is_that_of_the_tokenizer_a_model_or_the_recipe(zoo, asked, says):
    more = "" if "tokenizer_source" in asked else "tokenizer_source: base\n"
    output = zoo.merge(zoo.recipe(asked + more))

    loaded = AutoTokenizer.from_pretrained(output)

    told = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert told == f"{says} hi".lstrip() + (" " if not says else "")


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
]
SPELT = {  # as each format's own models were trained on it; <s> and <|end|> are this tokenizer's
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
    "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\n2 + 2? [/INST] 4<|end|>[INST] Sure? [/INST]",
    "alpaca": "<s>Be brief.\n\n### Instruction:\n2 + 2?\n\n### Response:\n4<|end|>\n\n"
    "### Instruction:\nSure?\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]2 + 2?\n[|assistant|]4[|endofturn|]\n"
    "[|user|]Sure?\n[|assistant|]",
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_template_that_comes_along_spells_its_format(zoo, name):
    output = zoo.merge(zoo.recipe(f"chat_template: {name}\ntokenizer_source: base\n"))

    loaded = AutoTokenizer.from_pretrained(output)

    told = loaded.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert told == SPELT[name]


def test_a_template_may_lie_in_the_configuration_and_is_taken_out_of_it(zoo):
    for name in ("base", "x"):
        folder = zoo.root / name
        config = json.loads((folder / "tokenizer_config.json").read_text())
        text = (folder / "chat_template.jinja").read_text()
        named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": text}]
        config["chat_template"] = named if name == "x" else text
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "chat_template.jinja").unlink()

    output = zoo.merge(zoo.recipe("chat_template: ROOT/x\ntokenizer_source: base\n"))

    assert "chat_template" not in json.loads((output / "tokenizer_config.json").read_text())
    assert (output / "chat_template.jinja").read_text() == TEMPLATE.replace("NAME", "x")


def test_a_model_without_a_template_cannot_give_one(zoo):
    (zoo.root / "x" / "chat_template.jinja").unlink()

    (problem,) = lewis_hub.check(
        zoo.recipe("chat_template: ROOT/x\ntokenizer_source: base\n")
    ).problems

    assert "x has no chat template" in problem


def test_the_pinned_recipe_makes_the_same_merge(zoo):
    recipe = zoo.recipe("tokenizer: {source: ROOT/x, tokens: {<new>: {source: ROOT/y}}}\n")
    with pytest.raises(CheckFailedError, match="y has no row for '<new>'"):
        zoo.merge(recipe)
    recipe = zoo.recipe(
        "tokenizer: {source: ROOT/x, tokens: {<tool>: {source: ROOT/y, force: true}}}\n"
        "chat_template: ROOT/y\n"
    )
    first = zoo.merge(recipe)

    again = zoo.merge(lewis_hub.read_recipe(first / "lewis" / "recipe.yaml"), "again")

    for name in ("model.safetensors", "tokenizer.json", "config.json", "lewis/lock.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_mergekit_is_told_the_same(zoo):
    output = zoo.merge(zoo.recipe("tokenizer_source: union\n"))

    assert "tokenizer_source: union\n" in (output / "mergekit_config.yml").read_text()


def test_a_model_without_a_tokenizer_cannot_give_one(zoo):
    padded(zoo, "p", [], 300)
    (zoo.root / "p" / "tokenizer.json").unlink()

    (problem,) = lewis_hub.check(zoo.recipe("tokenizer_source: ROOT/p\n", names=["p"])).problems

    assert "p: it has no tokenizer.json.\nName a model that has one" in problem


def test_an_adapter_has_the_vocabulary_of_its_base(zoo):
    folder, shapes = zoo.root / "lora", {"lora_A": (2, 16), "lora_B": (16, 2)}
    folder.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    parts = {f"{module}.{part}.weight": torch.ones(shape) for part, shape in shapes.items()}
    save_file(parts, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    asked = f"{ARITHMETIC}tokenizer_source: union\n"

    merged = load_file(
        zoo.merge(zoo.recipe(asked, "task_arithmetic", ["lora", "x"])) / "model.safetensors"
    )
    alone = load_file(
        zoo.merge(zoo.recipe(asked, "task_arithmetic", ["x"]), "alone") / "model.safetensors"
    )

    changed = [name for name in merged if not torch.equal(merged[name], alone[name])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(merged[changed[0]], alone[changed[0]] + 0.5 * 2, rtol=0, atol=1e-5)


def test_a_model_that_is_not_listed_is_refused_on_reading(zoo):
    with pytest.raises(RecipeError, match="is not one of the models"):
        zoo.recipe("tokenizer_source: ROOT/z\n")
