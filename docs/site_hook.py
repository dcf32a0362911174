"""What the site shows otherwise than the docstrings write it: types without backticks and emphasis marks."""

import re


def on_page_content(html: str, **kwargs) -> str:
    return re.sub(r"<code>(`[^<]*)</code>", lambda match: f"<code>{re.sub('[`*]', '', match[1])}</code>", html)
