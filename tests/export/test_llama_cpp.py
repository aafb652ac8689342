"""llama.cpp itself reads the files: its logits and tokens are those of transformers.

It needs the package xllamacpp, which contains llama.cpp.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from exported_models import CASES, TEXT, build, write

IDS = [1, 5, 300, 40, 77, 123, 9, 200, 33, 64, 250, 31]
PROGRAM = """
import json, os, sys, urllib.request
import xllamacpp
file, ids, text = sys.argv[1], *map(json.loads, sys.argv[2:])
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel = file, 128, 1
settings.warmup, settings.port, settings.cpuparams.n_threads = False, 0, 1
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(settings)  # it ends when nothing refers to it
address = server.listening_address

def ask(path, document):
    body = json.dumps(document).encode()
    asked = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(asked, timeout=60))

tokens = ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
chat = ask("/apply-template", {"messages": [{"role": "user", "content": "hi"}]})["prompt"]
for seed in range(50):  # a sampled part of a letter has no probabilities
    sampling = {"prompt": ids, "n_predict": 1, "n_probs": 416, "cache_prompt": False, "seed": seed}
    found = ask("/completion", sampling).get("completion_probabilities")
    if found:
        break
logprobs = {one["id"]: one["logprob"] for one in found[0]["top_logprobs"]}
print(json.dumps({"tokens": tokens, "chat": chat, "logprobs": logprobs}), flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_and_tokenizes_as_transformers_does(case, tmp_path):
    pytest.importorskip("xllamacpp")
    folder = build(case, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)

    words = [sys.executable, "-c", PROGRAM, str(write(folder, "gguf:f16"))]
    words += [json.dumps(IDS), json.dumps(TEXT)]
    done = subprocess.run(words, capture_output=True, check=True, timeout=120)
    found = json.loads(done.stdout.splitlines()[-1])

    logprobs = torch.tensor([found["logprobs"][str(i)] for i in range(416)])
    assert (logprobs - expected).abs().max() < 0.02 * (expected.max() - expected.min())
    assert found["tokens"] == tokenizer.encode(TEXT)
    assert found["chat"] == "<|user|>hi"
