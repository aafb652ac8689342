"""Signatures: made by us, read by model-signing's own command, and the other way round."""

import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import lewis_hub
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import ExtraMissingError, SignatureError
from lewis_hub.workflow import verify


def write_pair(folder, name, key=None):
    key = key or ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pem").write_bytes(private)
    (folder / f"{name}.pub").write_bytes(public)
    return folder / f"{name}.pem", folder / f"{name}.pub"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("keys"), "mine")


@pytest.fixture(scope="module")
def made(tmp_path_factory, keys):
    folder = tmp_path_factory.mktemp("signed")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"base_model: {zoo_folder() / 'base'}\nmerge_method: task_arithmetic\ndtype: bfloat16\n"
        f"models: [{{model: {zoo_folder() / 'expert-reverse'}}}]\n"
    )
    run("merge", recipe, "--sign", keys[0])
    return folder / "merged"


@pytest.fixture
def merged(made, tmp_path):
    return shutil.copytree(made, tmp_path / "merged")


def run(*words):
    done = CliRunner().invoke(cli, [*map(str, words), "--json"])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, json.loads(done.stdout)


def test_a_signed_merge_holds_under_its_key_alone(merged, keys, tmp_path):
    _, stranger = write_pair(tmp_path, "stranger")

    assert run("verify", merged)[1]["signature"] == "unchecked"
    assert run("verify", merged, "--public-key", keys[1])[1]["signature"] == "holds"
    code, told = run("verify", merged, "--public-key", stranger)
    assert (code, told["signature"]) == (1, "broken")
    assert told["problems"][0].startswith("model.sig: Key mismatch")


def test_model_signing_itself_verifies_it(merged, keys):
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(merged)]
    command += ["--signature", str(merged / "model.sig"), "--public_key", str(keys[1])]

    good = subprocess.run(command, capture_output=True, text=True, check=False)
    (merged / "config.json").write_text("{}")
    bad = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (good.returncode, bad.returncode) == (0, 1), good.stderr
    assert "Hash mismatch for 'config.json'" in bad.stderr + bad.stdout


def test_whoever_forges_the_lock_is_found_by_the_signature(merged, keys):
    lock = merged / "lewis" / "lock.json"
    forged = lewis_hub.merge_models(
        lewis_hub.read_recipe(merged / "lewis" / "recipe.yaml").model_copy(update={"seed": 7}),
        merged.parent / "forged",
    )
    shutil.copyfile(merged / "model.sig", forged.output / "model.sig")

    assert run("verify", forged.output)[0] == 0
    code, told = run("verify", forged.output, "--public-key", keys[1])

    assert code == 1
    assert told["problems"][0].startswith("model.sig: it was made of other files: ")
    assert "lewis/lock.json" in told["problems"][0]
    assert lock.exists()


def test_the_card_and_the_changelog_are_not_signed(merged, keys):
    (merged / "README.md").write_text("# Mine\n")
    (merged / "lewis" / "changelog.json").write_text("{}")

    assert run("verify", merged, "--public-key", keys[1])[0] == 0


def test_costs_and_dates_are_signed_though_no_lock_fixes_them(merged, keys):
    file = merged / "lewis" / "provenance.json"
    told = json.loads(file.read_text())
    ended = told["predicate"]["runDetails"]["metadata"]["finishedOn"]
    file.write_text(file.read_text().replace(f'"finishedOn": "{ended[:4]}', '"finishedOn": "1999'))

    assert run("verify", merged)[0] == 0
    code, told = run("verify", merged, "--public-key", keys[1])
    assert (code, told["signature"]) == (1, "broken")
    assert "lewis/provenance.json" in told["problems"][0]


def test_signing_again_changes_nothing_unless_a_file_or_the_key_is_another(merged, keys, tmp_path):
    before = (merged / "model.sig").read_bytes()

    verify.sign(merged, keys[0])
    same = (merged / "model.sig").read_bytes()
    verify.sign(merged, write_pair(tmp_path, "other")[0])

    assert same == before
    assert (merged / "model.sig").read_bytes() != before


def test_a_key_is_asked_for_and_nothing_is_signed(merged, keys):
    (merged / "model.sig").unlink()

    assert run("verify", merged)[1]["signature"] == "none"
    code, told = run("verify", merged, "--public-key", keys[1])
    assert code == 1
    assert told["problems"] == ["model.sig: it is missing, but a key was given."]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"verificationMaterial": {}}'])
def test_what_is_no_signature_does_not_hold(merged, keys, content):
    (merged / "model.sig").write_bytes(content)

    code, told = run("verify", merged, "--public-key", keys[1])

    assert (code, told["signature"]) == (1, "broken")
    assert told["problems"][0].startswith("model.sig: ")


def test_a_signature_of_very_many_values_is_not_read(merged, keys):
    """900 kB took 2 GB and 34 s, and wrote 281 MB."""
    entries = {"verificationMaterial": {"tlogEntries": [{}] * 20_000}}
    (merged / "model.sig").write_text(json.dumps(entries, separators=(",", ":")))

    code, told = run("verify", merged, "--public-key", keys[1])

    assert code == 1
    assert told["problems"] == [
        "model.sig: it is no signature: it has 40,004 values, the limit is 10,000."
    ]
    entries["verificationMaterial"]["tlogEntries"] = [{}] * 1000
    (merged / "model.sig").write_text(json.dumps(entries))
    (problem,) = run("verify", merged, "--public-key", keys[1])[1]["problems"]
    assert problem.endswith("...")
    assert len(problem) < 600


def test_a_published_merge_is_verified_with_its_signature_and_without_its_weights(
    hub, merged, keys, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    repo = f"{hub.user}/signed"
    (merged / "model.sig").unlink()

    run("push", merged, repo, "--sign", keys[0])
    code, told = run("verify", repo, "--public-key", keys[1])

    assert (code, told["signature"]) == (0, "holds")


def test_an_unsigned_merge_takes_the_signature_of_the_one_before_away(
    hub, merged, keys, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    repo = f"{hub.user}/signed"
    run("push", merged, repo)
    (merged / "model.sig").unlink()

    run("push", merged, repo)

    assert "model.sig" not in hub.api().list_repo_files(repo)


def test_a_key_that_cannot_sign_is_refused_before_any_work(merged, tmp_path):
    (tmp_path / "text.pem").write_text("secret")
    other, _ = write_pair(tmp_path, "ed", ed25519.Ed25519PrivateKey.generate())
    curve, _ = write_pair(tmp_path, "curve", ec.generate_private_key(ec.SECP256K1()))
    for key in (tmp_path / "text.pem", other, curve):
        with pytest.raises(SignatureError) as refused:
            verify.require_key(key)
        assert str(refused.value) == (
            f"{key}: it holds no private key on P-256, P-384 or P-521.\n"
            "Make a pair: `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`, then "
            "`openssl ec -in key.pem -pubout -out key.pub`."
        )


def test_a_key_with_a_password_is_refused(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    locked = serialization.BestAvailableEncryption(b"secret")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    (tmp_path / "locked.pem").write_bytes(pem)

    with pytest.raises(SignatureError) as refused:
        verify.require_key(tmp_path / "locked.pem")

    assert str(refused.value) == (
        f"{tmp_path / 'locked.pem'}: the key has a password.\n"
        "`openssl ec -in KEY -out PLAIN` writes one without."
    )


def test_without_the_extra_the_install_command_is_named(merged, keys, monkeypatch):
    monkeypatch.setattr(verify, "find_spec", lambda name: None)

    with pytest.raises(ExtraMissingError) as raised:
        verify.sign(merged, keys[0])

    assert str(raised.value) == "Signing needs the sign extra: pip install 'lewis-hub[sign]'"
