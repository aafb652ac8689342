"""Files sent to the Hub ahead of the commit that they will be part of, and then deleted here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO, cast

from huggingface_hub import CommitOperationAdd
from huggingface_hub.lfs import UploadInfo

from lewis_hub.hub.commit import preupload
from lewis_hub.hub.failures import Asked
from lewis_hub.hub.target import Landing

SAMPLE_BYTES = 512  # the Hub looks at a file's beginning to tell how it is kept


def send(asked: Asked, landing: Landing, file: Path, sha256: str) -> CommitOperationAdd:
    """Bring a file of weights to the repo's large-file storage; the commit still has to name it.

    What the storage has is not sent again.

    Args:
        asked: of the repo, which exists.
        landing: of the commit that will name it.
        file: its name is its path in the repo.
        sha256: 64 hex digits, as it was computed when the file was written.

    Raises:
        PublishError: it cannot be sent, or the repo keeps weights as text.
    """
    addition = CommitOperationAdd(file.name, file)
    addition.upload_info.sha256 = bytes.fromhex(sha256)
    preupload(asked, [addition], landing)
    _require_large(asked, addition)
    return addition


def recall(
    asked: Asked, landing: Landing, name: str, n_bytes: int, sha256: str
) -> CommitOperationAdd | None:
    """A file that was sent before and is no longer here; None where the storage has it no more.

    Args:
        asked: of the repo, which exists.
        landing: of the commit that will name it.
        name: its path in the repo.
        n_bytes: its size.
        sha256: 64 hex digits.

    Raises:
        PublishError: the Hub cannot be asked.
    """
    addition = CommitOperationAdd(name, b"")
    addition.path_or_fileobj = cast("BinaryIO", _Gone())
    addition.upload_info = UploadInfo(n_bytes, bytes(SAMPLE_BYTES), bytes.fromhex(sha256))
    try:
        preupload(asked, [addition], landing)
    except RuntimeError as error:  # how huggingface_hub wraps what goes wrong in an upload
        if not isinstance(error.__cause__, _GoneError):
            raise
        return None
    _require_large(asked, addition)
    return addition


def _require_large(asked: Asked, addition: CommitOperationAdd) -> None:
    if not addition._is_uploaded:  # nothing public tells it
        problem = f"it keeps `{addition.path_in_repo}` as a text and not as a large file"
        remedy = "Let its .gitattributes say `*.safetensors filter=lfs`, then run again."
        raise asked.failed(problem, remedy)


class _GoneError(Exception):
    """The storage asks for bytes that are no longer here."""


class _Gone(io.BufferedIOBase):
    """Stands for a file that is no longer here: it may be named, not read."""

    def tell(self) -> int:
        """Where reading would begin."""
        raise _GoneError
