"""Links and pictures of README and documentation lead to files that are there."""

import re

import pytest

from helpers import REPOSITORY


ADDRESSES = ("https://github.com/t-jepa/t-jepa/blob/main/", "https://raw.githubusercontent.com/t-jepa/t-jepa/main/")
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    ours = [REPOSITORY / link.removeprefix(address) for link in links for address in ADDRESSES if address in link]
    relative = [page.parent / link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert page.name != "README.md" or (ours and not relative)  # relative links are dead on PyPI
    assert [path for path in ours + relative if not path.exists()] == []


def test_the_address_is_that_of_the_package():
    assert 'Repository = "https://github.com/t-jepa/t-jepa"' in (REPOSITORY / "pyproject.toml").read_text()
