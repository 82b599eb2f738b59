"""What MkDocs runs on every page: links to files outside of docs/ become their text, for the site has no such pages."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **page: Any) -> str:
    return _OUTSIDE.sub(r"\1", markdown)
