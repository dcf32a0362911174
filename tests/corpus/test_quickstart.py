"""The default corpus, on two small packages made here: real files, real metadata, found through `sys.path`."""

import itertools
import multiprocessing
import shutil
import signal
import sys

import pytest

from tjepa.corpus import quickstart
from tjepa.corpus.quickstart import PACKAGES, docstrings_of_file, load_quickstart_documents


def long_text(subject: str) -> str:
    """A docstring body that is long enough, dedented, and unlike that of any other subject."""
    return "\n".join([f"About {subject}.", "", *(f"    {subject}, indented line {i}." for i in range(12)), "The end."])


def as_docstring(text: str, indent: str) -> str:
    return f'{indent}"""' + text.replace("\n", "\n" + indent) + f'\n{indent}"""\n'


def write_package(site_folder, name: str, num_modules: int, version: str = "1.0") -> None:
    package = site_folder / name
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    for i in range(num_modules):
        body = f"class Thing:\n{as_docstring(long_text(f'{name} class {i}'), '    ')}"
        body += f"    def act(self):\n{as_docstring(long_text(f'{name} method {i}'), ' ' * 8)}"
        (package / f"module_{i}.py").write_text(as_docstring(long_text("both packages"), "") + body)
    for old in site_folder.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    info = site_folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def site_folder(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    write_package(folder, "quickalpha", num_modules=30)
    write_package(folder, "quickbeta", num_modules=20)
    (folder / "quickbeta" / "tests").mkdir()
    (folder / "quickbeta" / "tests" / "test_beta.py").write_text(as_docstring(long_text("a test"), ""))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(quickstart, "PACKAGES", ("quickalpha", "quickbeta", "quickabsent"))
    return folder


def rows(documents) -> list[tuple[str, str, int]]:
    return [(split, row["text"], row["label"]) for split in documents for row in documents[split]]


def test_docstrings_of_file_finds_every_definition_and_cleans_it(tmp_path):
    names = ["module", "class", "method", "nested", "under if", "under except", "async"]
    text = {name: long_text(name) for name in names}
    source = as_docstring(text["module"], "")
    source += "class A:\n" + as_docstring(text["class"], "    ")
    source += "    def f(self):\n" + as_docstring(text["method"], " " * 8)
    source += "        def g():\n" + as_docstring(text["nested"], " " * 12)
    source += "if A:\n    def h():\n" + as_docstring(text["under if"], " " * 8)
    source += "try:\n    pass\nexcept OSError:\n    def k():\n" + as_docstring(text["under except"], " " * 8)
    source += "async def m():\n" + as_docstring(text["async"], "    ")
    source += 'def short():\n    """Too short."""\n'
    source += 'not_a_docstring = """' + "x" * 300 + '"""\n'
    path = tmp_path / "module.py"
    path.write_text(source)
    assert docstrings_of_file(path) == [text[name] for name in names]


@pytest.mark.parametrize("content", [b'"""{{ template }}', b'"""a\x00b"""', b'"""\xff\xfe"""', b"", b"def broken(:"])
def test_files_that_are_not_python_have_no_docstrings(tmp_path, content):
    (tmp_path / "module.py").write_bytes(content)
    assert docstrings_of_file(tmp_path / "module.py") == []


def test_a_lone_surrogate_becomes_valid_text(tmp_path):
    (tmp_path / "module.py").write_text('"""' + "x" * 300 + '\\ud800"""\n')
    assert docstrings_of_file(tmp_path / "module.py") == ["x" * 300]


def test_every_docstring_once_with_its_package_as_label(site_folder, tmp_path):
    documents = load_quickstart_documents(str(tmp_path / "cache"))
    assert documents["train"].column_names == ["text", "label"]
    assert documents["train"].features["label"].names == ["quickalpha", "quickbeta", "quickabsent"]
    expected = {
        (long_text(f"{name} {kind} {i}"), label)
        for label, (name, num_modules) in enumerate([("quickalpha", 30), ("quickbeta", 20)])
        for kind in ("class", "method")
        for i in range(num_modules)
    }
    found = [(text, label) for _, text, label in rows(documents)]
    shared = [text for text, _ in found if text == long_text("both packages")]
    assert len(shared) == 1  # in 50 files, kept once
    assert sorted(row for row in found if row[0] not in shared) == sorted(expected)
    assert not {"quickalpha", "quickbeta"} & set(sys.modules)  # read, not imported


def test_no_module_is_on_both_sides_and_both_sides_have_some(site_folder, tmp_path):
    documents = load_quickstart_documents(str(tmp_path / "cache"))
    sides = {split: set(documents[split]["text"]) for split in documents}
    assert sides["train"] and sides["validation"]
    assert len(sides["train"]) > len(sides["validation"])
    for name, num_modules in (("quickalpha", 30), ("quickbeta", 20)):
        for i in range(num_modules):
            pair = {long_text(f"{name} class {i}"), long_text(f"{name} method {i}")}
            assert pair <= sides["train"] or pair <= sides["validation"]


def test_the_result_depends_on_nothing_but_the_files(site_folder, tmp_path, monkeypatch):
    first = rows(load_quickstart_documents(str(tmp_path / "one")))
    monkeypatch.setattr(quickstart, "FILES_PER_PROCESS", 20)
    monkeypatch.setattr(quickstart, "available_cores", lambda: 2)
    moved = tmp_path / "moved"
    shutil.copytree(site_folder, moved)
    monkeypatch.syspath_prepend(str(moved))
    assert rows(load_quickstart_documents(str(tmp_path / "two"))) == first


def test_the_cache_is_used_until_a_version_changes(site_folder, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first = load_quickstart_documents(cache)
    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "read_docstrings", lambda: pytest.fail("read again"))
        again = load_quickstart_documents(cache)
    assert again["train"]._fingerprint == first["train"]._fingerprint  # so tokenized text is found again
    write_package(site_folder, "quickbeta", num_modules=25, version="1.1")
    assert sum(load_quickstart_documents(cache).num_rows.values()) == sum(first.num_rows.values()) + 10


def test_an_interrupted_build_leaves_no_cache(site_folder, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    whole = load_quickstart_documents(str(tmp_path / "other")).num_rows

    read = quickstart.read_docstrings

    def interrupted():
        yield from itertools.islice(read(), 5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quickstart, "read_docstrings", interrupted)
        load_quickstart_documents(cache)
    assert load_quickstart_documents(cache).num_rows == whole


def test_what_cannot_be_read_is_skipped(site_folder, tmp_path):
    """A folder named like a module, a link that leads nowhere, and nesting that the parser refuses."""
    first = rows(load_quickstart_documents(str(tmp_path / "first")))
    package = site_folder / "quickalpha"
    (package / "folder.py").mkdir()
    (package / "dangling.py").symlink_to(package / "nowhere.py")
    (package / "deep.py").write_text('"""' + "x" * 300 + '"""\nx = ' + "(" * 5000 + ")" * 5000)
    (package / "deeper.py").write_text('"""' + "x" * 300 + '"""\nx = ' + "-" * 100_000 + "1")
    assert docstrings_of_file(package / "folder.py") == docstrings_of_file(package / "dangling.py") == []
    assert docstrings_of_file(package / "deep.py") == docstrings_of_file(package / "deeper.py") == []
    assert rows(load_quickstart_documents(str(tmp_path / "second"))) == first


def test_no_package_at_all_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "PACKAGES", ("quickabsent",))
    with pytest.raises(ValueError, match="quickabsent.*pip"):
        load_quickstart_documents(str(tmp_path / "cache"))


def test_workers_end_while_training_answers_signals(site_folder, monkeypatch):
    """
    The handler of `StopOnSignalCallback` is inherited by forked workers, which then survive a SIGTERM: with
    multiprocessing.Pool, which sends one, this waits for ever, mostly before the 200th time.
    """
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        reading = quickstart.read_docstrings()
        next(reading)
        reading.close()
        assert multiprocessing.active_children() == []
        monkeypatch.setattr(quickstart, "PACKAGES", ("quickabsent",))
        for _ in range(200):
            with pytest.raises(ValueError, match="quickabsent"):
                next(quickstart.read_docstrings())
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_real_packages_are_found():
    labels = {label for _, _, label, _ in quickstart._source_files()}
    assert labels == set(range(len(PACKAGES)))
