"""What the site shows otherwise than docstrings write it: types and names without backticks, emphasis and brackets."""

import re


def on_page_content(html: str, **kwargs) -> str:
    html = re.sub(r"<code>(`[^<]*)</code>", lambda match: f"<code>{re.sub('[`*]', '', match[1])}</code>", html)
    return re.sub(r"\[<code>~?([\w.]+)</code>\]", r"<code>\1</code>", html)
