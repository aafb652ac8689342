"""Files that another run renames or deletes meanwhile."""

import threading

from lewis_hub.files import size_of


def test_a_file_that_vanishes_while_it_is_looked_at_has_a_size_of_0(tmp_path):
    """As a partial file of the cache has when another process completes the download."""
    partial, blob = tmp_path / "blob.partial", tmp_path / "blob"
    blob.write_bytes(b"12345")
    ended = threading.Event()

    def rename():
        while not ended.is_set():
            blob.replace(partial)
            partial.replace(blob)

    other = threading.Thread(target=rename)
    other.start()
    try:
        sizes = {size_of(partial) for _ in range(50_000)}
    finally:
        ended.set()
        other.join()

    assert sizes <= {0, 5}
    assert (size_of(tmp_path / "none"), size_of(blob)) == (0, 5)
