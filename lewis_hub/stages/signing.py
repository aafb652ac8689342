"""Sign: a merged folder's files under one key, as model-signing does, and whether they still are.

The signature is `model.sig`, a Sigstore bundle over the sha256 of every file, so `model_signing
verify key` reads it without this program. The card and the changelog are not signed: they change
when a merge is pushed, and its owner may go on writing them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lewis_hub.errors import ExtraMissingError, SignatureError
from lewis_hub.files import sha256_of
from lewis_hub.hub.change import SIGNATURE
from lewis_hub.report.changelog import FILE as CHANGELOG
from lewis_hub.report.lock import FILE as LOCK

if TYPE_CHECKING:
    from model_signing.hashing import Config

UNSIGNED = ("README.md", CHANGELOG, SIGNATURE)
# model-signing's words, inside the representation of a list: quotes may be escaped there
MISMATCHED = re.compile(r"Hash mismatch for \\*'(.+?)\\*':")
MAKE = (
    "Make a pair: `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`, then"
    " `openssl ec -in key.pem -pubout -out key.pub`."
)


def sign(folder: Path, private_key: Path) -> None:
    """Write `model.sig`; one that holds under the same key stays, so that nothing changes.

    Args:
        folder: a finished merge.
        private_key: PEM file of an elliptic curve key (P-256, P-384 or P-521), not encrypted.

    Raises:
        SignatureError: the key cannot be used.
        ExtraMissingError: model-signing is not installed.
    """
    signer, public_half = _signer(private_key)
    found = {path: sha256_of(folder / path) for path in _files(folder)}
    if (folder / SIGNATURE).exists():
        with TemporaryDirectory() as scratch:
            public = Path(scratch) / "public.pem"
            public.write_bytes(public_half)
            if problem_with((folder / SIGNATURE).read_bytes(), found, public) is None:
                return
    signer.set_hashing_config(_known(found))
    new = folder / f".{SIGNATURE}.new"
    signer.sign(folder, new)
    new.replace(folder / SIGNATURE)


def require_key(private_key: Path) -> None:
    """Refuse, before any work, a key that cannot sign.

    Raises:
        SignatureError: the key cannot be used.
        ExtraMissingError: model-signing is not installed.
    """
    _signer(private_key)


def problem_with(signature: bytes, found: Mapping[str, str], public_key: Path) -> str | None:
    """Why a signature does not hold; None where it does.

    Args:
        signature: the content of `model.sig`.
        found: path -> sha256 of the files as they are. Others than those that were signed are
            not looked at.
        public_key: PEM file.

    Raises:
        SignatureError: the key cannot be used.
        ExtraMissingError: model-signing is not installed.
    """
    _require_installed()
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    try:
        check = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise _unusable(public_key, "public", error) from error
    check.set_hashing_config(_known(found)).set_ignore_unsigned_files(True)
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / SIGNATURE
        file.write_bytes(signature)
        try:
            check.verify(PurePosixPath(), file)
        except InvalidSignature:
            return "it was made with another key, or changed"
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            told = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            files = dict.fromkeys(MISMATCHED.findall(told))
            return f"it was made of other files: {', '.join(files)}" if files else told
    return None


def _signer(private_key: Path) -> tuple[Any, bytes]:
    """What signs with a key, and the public half of it."""
    _require_installed()
    from cryptography.hazmat.primitives import serialization
    from model_signing import signing

    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=private_key)
        key = serialization.load_pem_private_key(private_key.read_bytes(), None)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise _unusable(private_key, "private", error) from error
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return signer, public


def _known(found: Mapping[str, str]) -> Config:
    """Hashes that are known already, in the place of model-signing's reading of a folder."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    told = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
    how = manifest.SerializationType.from_args(told | {"ignore_paths": sorted(UNSIGNED)})

    class Known(hashing.Config):  # type: ignore[misc]
        def hash(
            self, model_path: Any, *, files_to_hash: Iterable[Any] | None = None
        ) -> manifest.Manifest:
            wanted = found if files_to_hash is None else {str(path) for path in files_to_hash}
            if LOCK not in wanted:
                raise ValueError(f"it does not cover {LOCK}")
            items = [
                how.new_item(path, Digest("sha256", bytes.fromhex(found[path])))
                for path in sorted(found)
                if path in wanted
            ]
            return manifest.Manifest(Path(model_path).name or "model", items, how)

    return Known()


def _files(folder: Path) -> Iterable[str]:
    for path in sorted(folder.rglob("*")):
        part = path.relative_to(folder)
        hidden = any(piece.startswith(".") for piece in part.parts)
        if path.is_file() and not hidden and part.as_posix() not in UNSIGNED:
            yield part.as_posix()


def _require_installed() -> None:
    if find_spec("model_signing") is None:
        raise ExtraMissingError("Signing", "sign")


def _unusable(key: Path, half: str, error: Exception) -> SignatureError:
    if isinstance(error, OSError):
        return SignatureError(str(key), f"it cannot be read ({error.strerror})", MAKE)
    if "encrypted" in str(error):
        plain = "`openssl ec -in KEY -out PLAIN` writes one without."
        return SignatureError(str(key), "the key has a password", plain)
    return SignatureError(str(key), f"it holds no {half} key on P-256, P-384 or P-521", MAKE)
