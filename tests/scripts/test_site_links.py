"""Links out of docs/ lead to the repository on the site, where its address is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import site_links

TEXT = "[configs](../configs), [guide](guide.md), [up](../../README.md#in-ci)"


@pytest.mark.parametrize(
    ("address", "page", "made"),
    [
        (
            "https://h/o/r/",
            "ci.md",
            "[configs](https://h/o/r/blob/HEAD/configs), [guide](guide.md), [up](https://h/o/r/blob/HEAD/README.md#in-ci)",
        ),
        (None, "ci.md", "configs, [guide](guide.md), up"),
        (None, "gpu/gpu_engine.md", "[configs](../configs), [guide](guide.md), up"),
    ],
)
def test_links_out_of_the_pages(address: str | None, page: str, made: str) -> None:
    config = SimpleNamespace(repo_url=address)
    found = site_links.on_page_markdown(TEXT, config=config, page=SimpleNamespace(file=SimpleNamespace(src_uri=page)))
    assert found == made
