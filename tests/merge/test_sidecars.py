import json

import pytest

from lewis_hub.hub.digests import digests_of
from lewis_hub.hub.source import Source, SourceFile
from lewis_hub.merge.sidecars import SidecarSettings

CONFIG = {
    "model_type": "llama",
    "torch_dtype": "float32",
    "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"},
    "text_config": {"dtype": "float32", "hidden_size": 8},
    "rope_parameters": {"rope_theta": 10000.0},
}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    (folder / "lewis").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "tokenizer_config.json").write_text('{"name": "Grüße"}')
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    for name in ("LICENSE", "modeling_own.py", "README.md", ".gitattributes", "a.safetensors"):
        (folder / name).write_text("x")
    (folder / "lewis" / "lock.json").write_text("{}")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [
        SourceFile(str(path.relative_to(folder)), path.stat().st_size, digest)
        for path, digest in zip(paths, digests_of(paths), strict=True)
    ]
    return Source("base", "model", None, "sha256:", tuple(files), folder)


def test_the_configuration_says_the_dtype_of_the_merge(base, tmp_path):
    output = tmp_path / "out"
    output.mkdir()

    written = SidecarSettings("base", "bfloat16", code=True).write({"base": base}, output)

    assert json.loads((output / "config.json").read_text()) == CONFIG | {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "hidden_size": 8},
    }
    assert written == (
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "modeling_own.py",
        "tokenizer_config.json",
    )
    assert (output / "chat_template.jinja").read_bytes() == b"{{ messages }}\r\n"


def test_code_stays_behind_unless_it_is_allowed(base, tmp_path):
    output = tmp_path / "out"
    output.mkdir()

    written = SidecarSettings("base", None).write({"base": base}, output)

    assert "modeling_own.py" not in written
    config = json.loads((output / "config.json").read_text())
    assert "auto_map" not in config
    assert config["torch_dtype"] == "float32"
