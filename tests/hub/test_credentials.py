"""A user and a password in HF_ENDPOINT are used, and never shown."""

import pytest
from huggingface_hub import HfApi

from lewis_hub.errors import SourceError
from lewis_hub.hub.failures import HubRepo, address
from lewis_hub.hub.resolve import resolve_model


@pytest.mark.parametrize(
    ("endpoint", "shown"),
    [
        ("https://me:secret@hub.example", "https://hub.example"),
        ("https://me:sec@ret@hub.example:8/a", "https://hub.example:8/a"),
        ("https://secret@hub.example", "https://hub.example"),
        ("https://hub.example/a@b", "https://hub.example/a@b"),
    ],
)
def test_addresses_are_shown_without_credentials(endpoint, shown):
    api = HfApi(endpoint=endpoint)

    assert address(api) == shown
    assert HubRepo(api, "me/model").url == f"{shown}/me/model"


def test_a_message_shows_no_credentials(no_pauses):
    with pytest.raises(SourceError) as caught:
        resolve_model(HfApi(endpoint="http://me:secret@127.0.0.1:1"), "tests/model")

    assert "http://127.0.0.1:1" in str(caught.value)
    assert "secret" not in str(caught.value)
