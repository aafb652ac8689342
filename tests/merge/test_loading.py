"""What a merge leaves loads where users load it."""

import pytest
import torch


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", [40_000, 10**9])
def test_a_merged_llama_loads_in_transformers(zoo, transformers, tied, shard):
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
    sources = []
    for i, label in enumerate(("base", "x", "y")):
        torch.manual_seed(i)
        llama = transformers.LlamaForCausalLM(config).bfloat16()
        llama.save_pretrained(zoo.root / "saved" / label)
        checkpoint = zoo.open(zoo.root / "saved" / label)
        state = {name: llama.state_dict()[name].clone() for name in checkpoint.tensors}
        sources.append(zoo.source(label, state, {"density": 0.5} if i else {}))
    merged = zoo.merge(zoo.settings("ties", sources[0], sources[1:]), shard=shard)
    config.save_pretrained(merged.folder)

    loaded, info = transformers.LlamaForCausalLM.from_pretrained(
        merged.folder, output_loading_info=True
    )

    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.bfloat16
    assert ("lm_head.weight" in merged.tensors) is not tied
    defined = zoo.by_definition(merged.plan)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in defined.items())
    if shard < 10**9:
        loaded.save_pretrained(zoo.root / "again", max_shard_size=shard)
        assert merged.index["metadata"] == {
            "total_parameters": loaded.num_parameters(),
            "total_size": 2 * loaded.num_parameters(),
        }
