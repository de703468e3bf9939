"""A hook of mkdocs: links out of docs/ lead to the repository, where its address is known (REPO_URL), else nowhere."""

from __future__ import annotations

import re
from typing import Any

_OUTWARD = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)([^)\s]+)\)")


def on_page_markdown(markdown: str, *, config: Any, page: Any, **_: Any) -> str:
    """Of ``[text](../path)``, written for who reads the files, a link to the path in the repository, or the text."""
    inside = page.file.src_uri.count("/")

    def there(found: re.Match[str]) -> str:
        text, up, path = found.groups()
        if len(up) // 3 <= inside:  # to another page of the site
            return found[0]
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path})" if config.repo_url else text

    return _OUTWARD.sub(there, markdown)
