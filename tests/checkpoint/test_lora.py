import json
import math
import pickle
import time

import pytest
import torch
from safetensors.torch import save_file

from lewis_hub.checkpoint.header import read_header
from lewis_hub.checkpoint.lora import FOLD, AdapterConfig, adapt, own_tensors, read_config
from lewis_hub.checkpoint.reader import read_headers
from lewis_hub.errors import AdapterError

WHERE = "me/adapter@abc: adapter_config.json"
DAMAGED = "The file is damaged: use an intact copy."
# what PEFT 0.21 writes when nothing special was asked
PLAIN = {
    "peft_type": "LORA",
    "base_model_name_or_path": "me/base",
    "r": 16,
    "lora_alpha": 32,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.05,
    "layer_replication": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
}


def read(**changes):
    return read_config(WHERE, json.dumps(PLAIN | changes).encode())


def refusal(text):
    with pytest.raises(AdapterError) as caught:
        read_config(WHERE, text)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value)


def test_alpha_is_divided_by_the_rank_or_by_its_root():
    assert read().scale("model.layers.0.self_attn.q_proj") == 2.0
    assert read(use_rslora=True).scale("model.layers.0.self_attn.q_proj") == 8.0


def test_the_first_pattern_that_fits_the_end_of_a_name_counts():
    config = read(
        rank_pattern={"layers.1.mlp.up": 4, "up": 8, r"layers\.\d+\.mlp\.down": 2},
        alpha_pattern={"mlp.up": 6},
    )

    ranks = [config.rank(f"model.layers.{i}.mlp.{m}") for i in (0, 1) for m in ("up", "down")]
    assert ranks == [8, 2, 4, 2]
    assert config.rank("model.layers.0.mlp.sup") == 16
    assert config.scale("model.layers.1.mlp.up") == 6 / 4
    assert config.scale("model.layers.1.mlp.down") == 32 / 2
    rooted = config.model_copy(update={"use_rslora": True})
    assert rooted.scale("model.layers.0.mlp.up") == 6 / math.sqrt(8)


@pytest.mark.parametrize("first", [True, False, "gaussian", "orthogonal", None])
def test_what_leaves_the_base_alone_at_the_start_is_read(first):
    assert read(init_lora_weights=first).r == 16


def test_the_order_that_peft_saves_does_not_count():
    assert read(fan_in_fan_out=True).scale("transformer.h.0.attn.c_attn") == 2.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, f"it is an adapter of type 'IA3'; only LORA is read.\n{FOLD}"),
        (
            {"init_lora_weights": "pissa"},
            "`init_lora_weights` is 'pissa', which changed the base's weights before training.\n"
            "Save it again with peft's `path_initial_model_for_weight_conversion`, which makes an "
            "ordinary LoRA of it.",
        ),
        ({"r": 0}, f"`r` is not what PEFT writes: Input should be greater than 0.\n{DAMAGED}"),
        (
            {"rank_pattern": {"(": 4}},
            "`rank_pattern` is not what PEFT writes: '(' is not a regular expression that RE2 "
            f"knows: missing ): (.\n{FOLD}",
        ),
        (
            {"bias": "some"},
            "`bias` is not what PEFT writes: Input should be 'none', 'all' or 'lora_only'.\n"
            + DAMAGED,
        ),
        *(
            (
                {key: value},
                f"`{key}` is set, and this version does not know how it changes weights.\n{FOLD}",
            )
            for key, value in {
                "layer_replication": [[0, 4], [2, 5]],
                "megatron_config": {"a": 1},
                "eva_config": {"rho": 2},
                "corda_config": {"a": 1},
                "loftq_config": {"loftq_bits": 4},
                "lora_bias": True,
                "trainable_token_indices": [0, 1],
                "target_parameters": ["mlp.experts.gate_up_proj"],
                "ensure_weight_tying": True,
                "use_qalora": True,
                "alora_invocation_tokens": [5],
                "of_a_later_peft": 1,
            }.items()
        ),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(changes, says):
    assert refusal(json.dumps(PLAIN | changes).encode()) == f"{WHERE}: {says}"


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_configuration_is_refused(text):
    assert refusal(text) == f"{WHERE}: it is not a JSON object.\n{DAMAGED}"


Q = "base_model.model.model.layers.0.q"
BASE = {
    "model.embed.weight": torch.zeros(10, 4),
    "model.layers.0.q.weight": torch.zeros(4, 4, dtype=torch.bfloat16),
    "model.layers.0.up.weight": torch.zeros(6, 4, dtype=torch.bfloat16),
    "model.layers.0.up.bias": torch.zeros(6),
    "model.layers.0.norm.weight": torch.zeros(4),
    "model.layers.0.steps": torch.zeros(4, 4, dtype=torch.int64),
    "model.layers.0.packed.weight": torch.zeros(4, 4, dtype=torch.int8),
}
FITTING = {f"{Q}.lora_A.weight": torch.zeros(2, 4), f"{Q}.lora_B.weight": torch.zeros(4, 2)}
EMBED, HEAD = "base_model.model.model.embed.weight", "base_model.model.lm_head.weight"
INTACT = "The file is not what PEFT writes: use an intact copy."
OTHER_BASE = "Name the base that it was trained on as `base_model`."


def headers(folder, name, tensors):
    save_file(tensors, folder / name)
    content = (folder / name).read_bytes()
    return len(content), lambda path, start, stop: content[start:stop]


@pytest.fixture
def put(tmp_path):
    def put(tensors, base=BASE, **config):
        size, read = headers(tmp_path, "model.safetensors", base)
        checkpoint = read_headers("me/base", {"model.safetensors": size}, read, None)
        size, read = headers(tmp_path, "adapter_model.safetensors", tensors)
        stored = read_header("me/adapter", "adapter_model.safetensors", size, read)
        told = AdapterConfig(peft_type="LORA", r=2, lora_alpha=4, **config)
        return adapt("me/adapter", checkpoint, stored, told)

    return put


def test_what_is_changed_is_float32_and_all_else_lies_where_the_base_has_it(put):
    adapter = put(FITTING)

    assert {n: t.dtype for n, t in adapter.tensors.items()} == {
        "model.embed.weight": "F32",
        "model.layers.0.q.weight": "F32",
        "model.layers.0.up.weight": "BF16",
        "model.layers.0.up.bias": "F32",
        "model.layers.0.norm.weight": "F32",
        "model.layers.0.steps": "I64",
        "model.layers.0.packed.weight": "I8",
    }
    changed = [t for t in adapter.tensors.values() if t.adapted]
    assert [(t.name, t.n_bytes, t.adapted.base.dtype) for t in changed] == [
        ("model.layers.0.q.weight", 64, "BF16")
    ]
    assert (adapter.label, adapter.base) == ("me/adapter", "me/base")
    assert [t.name for t in own_tensors(adapter)] == list(FITTING)


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.outer.", ""])
@pytest.mark.parametrize("cut", ["", "model."])
def test_names_find_their_tensors_over_prefixes_that_one_side_leaves_out(put, prefix, cut):
    base = {name.removeprefix(cut): tensor for name, tensor in BASE.items()}
    tensors = {n.replace("base_model.model.", prefix, 1): t for n, t in FITTING.items()}

    changed = [name for name, t in put(tensors, base).tensors.items() if t.adapted]

    assert changed == ["model.layers.0.q.weight".removeprefix(cut)]


def test_a_square_weight_lies_as_the_others_in_the_blocks_do(put):
    others = {
        "base_model.model.model.layers.0.up.lora_A.weight": torch.zeros(2, 6),
        "base_model.model.model.layers.0.up.lora_B.weight": torch.zeros(4, 2),
    }

    plain = {name: tensor for name, tensor in BASE.items() if not name.endswith("up.bias")}

    def transposed(tensors, **config):
        header = put(tensors, plain, **config).tensors["model.layers.0.q.weight"]
        return header.adapted.update.transposed

    assert transposed(FITTING) is False
    assert transposed(FITTING, fan_in_fan_out=True) is False  # as PEFT reads it
    assert transposed(FITTING | others) is True


@pytest.mark.parametrize(("n_values", "is_transposed"), [(6, False), (4, True)])
def test_a_square_weight_lies_as_weights_with_a_bias_do(put, n_values, is_transposed):
    """PEFT saves the order of the module that it came to last: of a head, not of GPT-2's blocks."""
    base = BASE | {"model.layers.0.up.bias": torch.zeros(n_values)}

    for written in (False, True):
        found = put(FITTING, base, fan_in_fan_out=written).tensors["model.layers.0.q.weight"]
        assert found.adapted.update.transposed is is_transposed


def test_each_list_of_blocks_has_its_own_order(put):
    """Such as BERT's and GPT-2's in one encoder-decoder."""
    blocks = {name: tensor for name, tensor in BASE.items() if ".layers." in name}
    base = {
        f"{part}.{name}": tensor.clone()
        for part in ("encoder", "decoder")
        for name, tensor in blocks.items()
    }
    base |= {"bridge.weight": torch.zeros(4, 4), "decoder.model.layers.0.up.bias": torch.zeros(4)}
    square = {"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)}
    modules = ("encoder.model.layers.0.q", "decoder.model.layers.0.q", "bridge")
    tensors = {
        f"base_model.model.{module}.{part}": torch.zeros(shape)
        for module in modules
        for part, shape in square.items()
    }

    found = put(tensors, base).tensors

    flips = [found[f"{module}.weight"].adapted.update.transposed for module in modules]
    assert flips == [False, True, False]


def test_a_square_weight_among_weights_of_both_orders_is_refused(put):
    down = {"down.weight": torch.zeros(4, 6), "down.bias": torch.zeros(6)}
    base = BASE | {f"model.layers.0.{name}": tensor for name, tensor in down.items()}

    with pytest.raises(AdapterError) as caught:
        put(FITTING, base)

    assert (
        "model.layers.0.q.weight is square, and other weights of its blocks are stored both as "
        "(in, out) and as (out, in)."
    ) in str(caught.value)


def test_a_module_that_is_saved_whole_may_have_parts(put):
    base = BASE | {"model.projector.inner.up.weight": torch.zeros(6, 4)}
    whole = {"base_model.model.model.projector.inner.up.weight": torch.ones(6, 4)}

    found = put(FITTING | whole, base, modules_to_save=("projector",)).tensors

    assert found["model.projector.inner.up.weight"].adapted.saved.name in whole
    with pytest.raises(AdapterError, match="`other` was trained whole"):
        put(FITTING | whole, base, modules_to_save=("other",))


def named(module, a, b, **more):
    parts = {"lora_A.weight": a, "lora_B.weight": b} | more
    return {
        f"base_model.model.{module}.{part}": torch.zeros(shape) for part, shape in parts.items()
    }


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (
            named("lm_head", (2, 4), (10, 2)),
            {},
            "`base_model.model.lm_head.lora_A.weight` matches no tensor of the base me/base.\n"
            f"{OTHER_BASE} If that is the one, m{FOLD[1:]}",
        ),
        (
            named("model.layers.0.ups", (2, 4), (10, 2)),
            {},
            "`base_model.model.model.layers.0.ups.lora_A.weight` matches no tensor of the base "
            "me/base (the nearest is model.layers.0.up.weight).\n"
            f"{OTHER_BASE} If that is the one, m{FOLD[1:]}",
        ),
        (
            named("model.layers.0.q", (2, 4), (4, 3)),
            {},
            "`model.layers.0.q` has lora_A of shape [2, 4], lora_B of shape [4, 3] for "
            f"rank 2, which do not fit model.layers.0.q.weight of shape [4, 4].\n{OTHER_BASE}",
        ),
        (
            named("model.layers.0.q", (3, 4), (4, 3)),
            {"rank_pattern": {"v": 3}},
            "`model.layers.0.q` has lora_A of shape [3, 4], lora_B of shape [4, 3] for "
            f"rank 2, which do not fit model.layers.0.q.weight of shape [4, 4].\n{OTHER_BASE}",
        ),
        (
            named("model.layers.0.q", (), (4, 2)),
            {},
            "`model.layers.0.q` has lora_A of shape [], lora_B of shape [4, 2] for "
            f"rank 2, which do not fit model.layers.0.q.weight of shape [4, 4].\n{OTHER_BASE}",
        ),
        (
            named("model.layers.0.norm", (2, 4), (4, 2)),
            {},
            "`base_model.model.model.layers.0.norm.lora_A.weight` changes "
            f"model.layers.0.norm.weight of shape [4], expected a matrix.\n{FOLD}",
        ),
        (
            named("model.layers.0.packed", (2, 4), (4, 2)),
            {},
            "`base_model.model.model.layers.0.packed.lora_A.weight` changes "
            "model.layers.0.packed.weight, which the base stores as I8.\n"
            "Use the base in bfloat16, float16 or float32.",
        ),
        (
            {f"{Q}.lora_A.weight": torch.zeros(2, 4)},
            {},
            f"`model.layers.0.q` has lora_A, expected lora_A, lora_B.\n{INTACT}",
        ),
        (
            FITTING,
            {"use_dora": True},
            "`model.layers.0.q` has lora_A, lora_B, expected lora_A, lora_B, "
            f"lora_magnitude_vector.\n{INTACT}",
        ),
        (
            FITTING | {f"{Q}.lora_magnitude_vector": torch.zeros(4)},
            {},
            "`model.layers.0.q` has lora_A, lora_B, lora_magnitude_vector, expected "
            f"lora_A, lora_B.\n{INTACT}",
        ),
        (
            FITTING | {f"{Q}.lora_B.bias": torch.zeros(4)},
            {},
            f"`{Q}.lora_B.bias` is not a LoRA tensor that this version knows.\n{FOLD}",
        ),
        (
            FITTING | {f"{Q}.lora_A.default.weight": torch.zeros(4)},
            {},
            f"`{Q}.lora_A.default.weight` is not a LoRA tensor that this version knows.\n{FOLD}",
        ),
        (
            FITTING | {f"{Q}.token_adapter": torch.zeros(4)},
            {},
            f"`{Q}.token_adapter` matches no tensor of the base me/base.\n"
            f"{OTHER_BASE} If that is the one, m{FOLD[1:]}",
        ),
        (
            FITTING
            | {
                n.replace(".model.model", ".model"): torch.zeros_like(t) for n, t in FITTING.items()
            },
            {},
            f"`{Q}.lora_A.weight` changes model.layers.0.q.weight a second time.\n{FOLD}",
        ),
        (
            {f"{Q}.weight": torch.zeros(4, 4), f"{Q}.base_layer.weight": torch.zeros(4, 4)},
            {},
            f"`{Q}.base_layer.weight` and `{Q}.weight` are the same tensor.\n{FOLD}",
        ),
        (
            {"base_model.model.model.embed.weight": torch.zeros(12, 4)},
            {"modules_to_save": ["embed"]},
            "`base_model.model.model.embed.weight` has shape [12, 4], model.embed.weight of the "
            "base me/base has [10, 4].\nIf only the vocabulary differs, resize the base to the "
            "adapter's vocabulary with transformers' `model.resize_token_embeddings` and use that "
            "as `base_model`.",
        ),
        (
            FITTING,
            {"modules_to_save": ["embed"]},
            "its configuration says that `embed` was trained whole (modules_to_save), but the file "
            "does not contain it.\nSave the adapter again, or use an intact copy.",
        ),
        (
            {name: tensor.double() for name, tensor in FITTING.items()},
            {},
            f"`{Q}.lora_A.weight` is F64, which this version does not read.\n"
            "Save the adapter in bfloat16, float16 or float32.",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_its_name(put, tensors, config, says):
    with pytest.raises(AdapterError) as caught:
        put(tensors, **config)

    assert str(caught.value) == f"me/adapter: adapter_model.safetensors: {says}"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_head_that_peft_kept_equal_to_the_embeddings_is_theirs(put):
    tied = {"modules_to_save": ["embed", "lm_head"], "ensure_weight_tying": True}
    both = {EMBED: torch.ones(10, 4), HEAD: torch.ones(10, 4)}

    adapted = put(FITTING | both, **tied)

    changed = [name for name, tensor in adapted.tensors.items() if tensor.adapted]
    assert sorted(changed) == ["model.embed.weight", "model.layers.0.q.weight"]
    assert read(**tied).has_head_saved


@pytest.mark.parametrize(
    ("tensors", "is_tied"),
    [
        ({EMBED: torch.ones(10, 4), HEAD: torch.ones(10, 4)}, False),  # trained apart
        ({HEAD: torch.ones(10, 4)}, True),
    ],
)
def test_a_head_of_its_own_for_a_base_without_one_is_refused(put, tensors, is_tied):
    with pytest.raises(AdapterError, match="`base_model.model.lm_head.weight` matches no tensor"):
        put(tensors, modules_to_save=["lm_head"], ensure_weight_tying=is_tied)


def test_peft_names_two_classifiers_of_which_a_model_has_one(put):
    base = BASE | {"score.weight": torch.zeros(3, 4)}
    saved = FITTING | {"base_model.model.score.weight": torch.zeros(3, 4)}

    adapter = put(saved, base, modules_to_save=["classifier", "score"])

    assert adapter.tensors["score.weight"].adapted.saved.name == "base_model.model.score.weight"
    with pytest.raises(AdapterError, match="says that `score` was trained whole"):
        put(FITTING, base, modules_to_save=["classifier", "score"])


def test_modules_that_were_trained_whole_are_looked_up_at_once(put):
    saved = {f"base_model.model.layers.{i}.z.weight": torch.zeros(1) for i in range(1000)}
    listed = [f"layers.{i}.z" for i in range(1000)] * 20 + ["score"] * 20_000

    began = time.process_time()
    with pytest.raises(AdapterError, match="matches no tensor"):
        put(saved, modules_to_save=listed)
    assert time.process_time() - began < 1  # 2 s if each is compared with all


def test_an_adapter_without_tensors_is_refused(put):
    with pytest.raises(AdapterError) as caught:
        put({})

    assert str(caught.value) == "me/adapter: its file contains no tensors.\nUse an intact copy."
