"""Names of models outside of a recipe."""

from __future__ import annotations

import pytest

from lewis_hub.errors import SourceError
from lewis_hub.workflow.resolve import named_inside, resolve_one


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("", "String should have at least 1 character"),
        ("@main", "String should have at least 1 character"),
        ("a/b+c/d+e/f", "a base takes one adapter: list each adapter as an expert"),
    ],
)
def test_what_is_no_name_of_a_model_is_one_message(api, tmp_path, written, problem):
    with pytest.raises(SourceError) as caught:
        resolve_one(written, api)

    assert str(caught.value) == (
        f"'{written}': {problem}.\nWrite owner/name, owner/name@revision or the path of a folder."
    )
    with pytest.raises(SourceError, match=problem):
        named_inside([written], tmp_path)
