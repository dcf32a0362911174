"""Links and pictures of README and documentation lead to files that are there."""

import re
import subprocess

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


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.name)
def test_pages_begin_with_what_to_install_and_to_type(page):
    if page.name == "flags.md":  # a table
        return
    _, block, rest = page.read_text(encoding="utf-8").split("```", 2)
    assert block.startswith("bash") and "pip install" in block
    title = page.read_text(encoding="utf-8").split("```", 1)[0].strip()
    assert title.startswith("# ") and "\n" not in title and rest.strip()


def test_the_readme_begins_with_what_it_is_and_two_commands():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    vectors, states = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert vectors.startswith("import tjepa\n")
    assert states.startswith("from transformers import AutoModel, AutoTokenizer\n")
    order = ["**", "%", "docs/method.png", "*not yet*", "docs/learning.md", "pip install -e . && tjepa pretrain"]
    order += ['tjepa search "eigenvalues of a matrix"', "## Your own data", "configs/default.yaml", "tjepa adapt"]
    order += ["tjepa classify", "tjepa publish"]
    places = [text.find(words) for words in order]
    assert -1 not in places and places == sorted(places), dict(zip(order, places, strict=True))


def test_nothing_that_ships_names_a_folder_that_outsiders_lack():
    """Only CONTRIBUTING.md, the tests and CI know of the folder beside a developer's clone."""
    tracked = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).split()
    shipped = [name for name in tracked if name != "CONTRIBUTING.md" and not name.startswith(("tests/", ".ci/"))]
    texts = [REPOSITORY / name for name in shipped if not name.endswith(".png")]
    named = re.compile(r"""\.\./shared|["']shared["']|\bshared/""")
    assert [str(path) for path in texts if path.exists() and named.search(path.read_text(encoding="utf-8"))] == []


def test_the_address_is_that_of_the_package():
    assert 'Repository = "https://github.com/t-jepa/t-jepa"' in (REPOSITORY / "pyproject.toml").read_text()
