"""The demo: what its tabs say, bad input, the Space that it writes, and that Space in a real browser."""

import json
import re
import runpy
import shutil
import socket
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path

import encoder_folders
import numpy as np
import pytest
import torch
import yaml

from encoder_families import make_encoder
from helpers import REPOSITORY, make_texts, make_tiny_config
from tjepa import TJEPAForPreTraining, cli
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.data_collator_tjepa import MASKING_PRESETS, DataCollatorForTJEPA, MaskingStrategy
from tjepa.tools import demo as demo_tool
from tjepa.tools.demo import HIDDEN, LEFT_OUT, NEXT_HIDDEN, Demo, describe_strategy, name_strategies
from tjepa.tools.fill import Gapped, guess_tokens
from tjepa.tools.lookup import label_tokens, owners_of_tokens, split_into_words
from tjepa.tools.search import SearchIndex, open_index
from tjepa.training.model_folder import STRATEGIES_FILE


TEXT = "The fox sees a red hen, and the hen runs home before the night falls."
OWN_STRATEGY = MaskingStrategy(4, max_target_mask_ratio=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with a tiny model and what must not leave it, and beside it texts."""
    root = tmp_path_factory.mktemp("demo")
    tokenizer = train_tokenizer([*make_texts(40), TEXT] * 2, vocab_size=300, model_max_length=48)
    torch.manual_seed(0)
    model = TJEPAForPreTraining(
        make_tiny_config(vocab_size=300, max_position_embeddings=48, token_prediction_weight=1.0)
    )
    model.save_pretrained(root / "run")
    tokenizer.save_pretrained(root / "run")
    strategy = '[{"target_block_size_mean": 4, "max_target_mask_ratio": 0.5}]'
    (root / "run" / "masking_strategies.json").write_text(strategy)
    (root / "run" / "run.json").write_text("{}")
    (root / "texts.txt").write_text("\n".join([text[:80] for text in make_texts(30, seed=1)]) + "\n")
    return root


@pytest.fixture(scope="module")
def demo(folder):
    return Demo(str(folder / "run"), str(folder / "texts.txt"))


def text_of(page: str) -> str:
    return " ".join(re.sub("<[^>]+>", " ", page).split())


def place(demo: Demo, word: str) -> int:
    return [piece for piece, _ in demo.words(TEXT)[0]].index(word)


# ---- what is hidden ----


def test_what_is_hidden_is_what_the_collator_hides(demo):
    ids = [token for token, _ in demo.read(TEXT)[0]]
    for seed in (0, 3):
        batch = DataCollatorForTJEPA([OWN_STRATEGY], seed)([{"input_ids": ids, "document_index": 0, "epoch": 0}])
        pieces = [piece for _, piece in demo.read(TEXT)[0]]
        expected = "".join(pieces[slot] for slot in sorted(batch["label_indices"].tolist()))
        spans, counts = demo.hide(TEXT, OWN_STRATEGY, seed)
        assert "".join(piece for piece, _ in spans) == TEXT
        assert "".join(piece for piece, kind in spans if kind) == expected
        num_hidden, num_blocks = len(batch["label_indices"]), int(batch["prediction_block_ids"].max())
        assert counts.startswith(f"{len(ids)} tokens: {len(ids) - num_hidden} are the context")
        assert f"{num_hidden} are hidden" in counts and f"in {num_blocks} blocks." in counts
    assert {kind for _, kind in spans} == {None, HIDDEN, NEXT_HIDDEN}
    assert demo.hide(TEXT, OWN_STRATEGY, 0) != demo.hide(TEXT, OWN_STRATEGY, 3)


def test_what_is_neither_hidden_nor_context_is_shown(demo):
    strategy = MaskingStrategy(None, max_target_mask_ratio=0.25, max_context_ratio=0.25)
    spans, counts = demo.hide(TEXT, strategy, 10**30)
    assert {kind for _, kind in spans} == {None, HIDDEN, LEFT_OUT} and "left out" in counts and "in 1 block," in counts


def test_the_runs_own_strategies_come_first(demo):
    (first, strategy), *others = demo.strategies.items()
    assert first == "blocks of 4 tokens, 50% hidden (this run's)" and strategy == OWN_STRATEGY
    num_presets = sum(map(len, MASKING_PRESETS.values()))
    assert len(others) == num_presets - 1 and OWN_STRATEGY not in dict(others).values()
    strategy = MaskingStrategy(2.5, 1.0, max_target_mask_start_ratio=0.5, max_context_ratio=0.3)
    words = "blocks of 2.5 tokens on average, 25% hidden, from 50% of the text on, 30% kept as context"
    assert describe_strategy(strategy) == words


def test_strategies_that_are_described_alike_can_both_be_chosen(tmp_path):
    strategies = [{"target_block_size_mean": 4}, {"target_block_size_mean": 4, "target_block_num": 1}]
    (tmp_path / STRATEGIES_FILE).write_text(json.dumps(strategies))
    assert list(name_strategies(str(tmp_path)).values())[:2] == [MaskingStrategy.from_dict(of) for of in strategies]


# ---- what it expects ----


def test_words_cover_the_text_and_tokens_find_theirs():
    text = "Don't  (ever)\n🦊 stop."
    words = split_into_words(text)
    assert "".join(piece for piece, _ in words) == text
    assert [piece for piece, is_word in words if is_word] == ["Don't", "(", "ever", ")", "🦊", "stop", "."]
    tokens = ["Do", "n't", " ", " (", "ever)", "\n", "🦊", "", "", " st", "op."]
    owners = ["".join(words[owner][0] for owner in [owner]) for owner in owners_of_tokens(tokens, words)]
    assert owners == ["Don't", "Don't", "  ", "(", "ever", "\n", "🦊", "🦊", "🦊", "stop", "stop"]


def test_the_guesses_are_those_of_the_hidden_tokens(demo):
    hidden = {place(demo, "red"), place(demo, "home")}
    page = demo.expect(TEXT, hidden)
    tokens, _ = demo.read(TEXT)
    is_hidden = torch.tensor([piece.strip() in ("red", "home") for _, piece in tokens])
    assert is_hidden.sum() == 2  # each a token of its own
    gapped = Gapped(torch.tensor([token for token, _ in tokens]), is_hidden)
    found = [float(share) for share in re.findall(r"([\d.]+)%</span>", page)]
    expected = [guess.probability for place in guess_tokens(demo.model, demo.tokenizer, gapped, 5) for guess in place]
    assert found == pytest.approx([100 * share for share in expected], abs=0.06)
    assert re.findall(r"<h3[^>]*>(\w+)", page) == ["red", "home"]
    nearest = [demo.lookup.nearest(states, demo_tool.NUM_NEAREST) for states in demo.model.predict_states(*gapped)]
    scores = [float(score) for score in re.findall(r'score">(-?[\d.]+)</span>', page)]
    assert scores == pytest.approx([hit["score"] for hits in nearest for hit in hits], abs=0.006)
    assert demo.expect(TEXT, hidden) == page != demo.expect(TEXT, {place(demo, "red"), place(demo, "falls")})


def test_the_nearest_words_are_those_whose_labels_are_nearest(demo):
    """A prediction that is as far from the mean prediction as a word's label from the mean label finds that word."""
    lookup = demo.lookup
    words, at, _ = lookup.words[7]
    hits = lookup.nearest(lookup.vectors[7] + lookup.mean_prediction, 3)
    assert hits[0]["score"] == pytest.approx(1.0, abs=1e-5) and hits[0]["word"] == words[at][0]
    assert hits[0]["before"].removeprefix("…") in "".join(word for word, _ in words[:at])
    assert len({hit["before"] + hit["word"] + hit["behind"] for hit in hits}) == 3
    assert [hit["score"] for hit in hits] == sorted([hit["score"] for hit in hits], reverse=True)


@pytest.mark.parametrize("kind", ["own", "bert"])
def test_labels_are_what_pretraining_predicts(kind, make_model):
    model = make_model() if kind == "own" else TJEPAForPreTraining.from_encoder(make_encoder("bert"))
    ids = np.random.default_rng(0).integers(5, 17, size=(3, 12))
    batch = DataCollatorForTJEPA([OWN_STRATEGY])(
        [{"input_ids": row, "document_index": index, "epoch": 0} for index, row in enumerate(ids)]
    )
    with torch.no_grad():
        expected = model.eval()(**batch).labels
    labels = label_tokens(model, ids.tolist())  # the collator's documents, equally long, keep their order, too
    torch.testing.assert_close(labels[batch["label_indices"]], expected, atol=1e-5, rtol=1e-4)


def test_an_encoder_of_transformers_without_a_token_head(tmp_path):
    folder = encoder_folders.make_folder(tmp_path / "bert")
    TJEPAForPreTraining.from_encoder(make_encoder("bert")).save_pretrained(folder / "pretraining")
    encoder_folders.make_tokenizer().save_pretrained(folder / "pretraining")
    (tmp_path / "texts.txt").write_text("the fox runs home\na red hen falls\nnight falls before the fox\n")
    demo = Demo(str(folder), str(tmp_path / "texts.txt"))
    page = demo.expect("the fox sees a red hen", {2})
    assert "no token head" in page and page.count("<mark>") == 3 and "%" not in page
    assert "the fox runs home" in demo.search("fox", None, 2, False)
    assert demo.hide("the fox sees a red hen", OWN_STRATEGY, 0)[1].startswith("6 tokens: 3 are the context")


# ---- search ----


def test_search_in_the_demos_texts_and_in_a_file(demo, folder, tmp_path, monkeypatch):
    hits = open_index(str(folder / "run"), str(folder / "texts.txt")).search("red fox", 3)
    page = demo.search("red fox", None, 3, False)
    assert [hit.text.strip() for hit in hits] == [text.strip() for text in re.findall(r"</span> ([^<]+)</li>", page)]
    (tmp_path / "mine.txt").write_text("a red fox\nthe blue night\n")
    page = text_of(demo.search("a red fox", str(tmp_path / "mine.txt"), 1, True))
    assert "By the encoder" in page and "By words (TF-IDF)" in page and page.count("a red fox") == 2
    assert not (folder / "run" / "search_index" / "mine.txt.safetensors").exists()
    monkeypatch.setattr(demo_tool, "MAX_FILE_TEXTS", 1)
    (tmp_path / "more.txt").write_text("a red fox\nthe blue night\n")
    with pytest.raises(ValueError, match="has 2 texts, and 1 at most"):
        demo.search("red fox", str(tmp_path / "more.txt"), 1, True)
    (tmp_path / "other.jsonl").write_text('{"body": "a red fox"}')
    with pytest.raises(ValueError) as error:  # of which a visitor sees no flag and no folder
        demo.search("red fox", str(tmp_path / "other.jsonl"), 1, True)
    assert str(error.value) == "'other.jsonl' has no column 'text'; it has ['body']."


# ---- bad input ----


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "Type "), (" \n", "Type "), ("\u200b", "Type "), ("\ud800", "invalid unicode")],
)
def test_what_is_no_text_is_told(text, message, demo):
    calls = [lambda: demo.hide(text, OWN_STRATEGY, 0), lambda: demo.expect(text, {0})]
    for call in [*calls, lambda: demo.search(text, None, 3, True)]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "text",
    ["fox " * 25_000, "x" * 100_000, "🦊🦊 🐔", "الثعلب يركض إلى البيت", "<script>alert(1)</script> & fox"],
)
def test_any_text_gets_an_answer(text, demo):
    spans, counts = demo.hide(text, OWN_STRATEGY, 0)
    assert text.startswith("".join(piece for piece, _ in spans)) and any(kind for _, kind in spans)
    assert ("Only the first 48 tokens" in counts) == (len(text) == 100_000)
    words, _ = demo.words(text)
    if len(words) > 1:
        page = demo.expect(text, {0})
        assert "As nearest words" in page and "<script" not in page
    else:
        with pytest.raises(ValueError, match="All of the text is hidden"):
            demo.expect(text, {0})
    assert "By the encoder" in demo.search(text, None, 3, True)


def test_which_words_may_be_hidden(demo):
    with pytest.raises(ValueError, match="Choose a word to hide"):
        demo.expect(TEXT, set())
    with pytest.raises(ValueError, match="17 words are hidden; choose 12 at most"):
        demo.expect(TEXT, set(range(100)))


# ---- the command and the Space ----


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tjepa", *map(str, arguments)])
    cli.main()


@pytest.mark.parametrize(
    ("arguments", "without", "message"),
    [
        (["demo", "RUN"], "gradio", "pip install 'tjepa[demo]'"),
        (["demo", "./missing"], None, "FOLDER ./missing: there is no such file or folder"),
        (["demo", "RUN", "--file", "missing.txt"], None, "--file: no file 'missing.txt'"),
        (["demo", "RUN", "--export", "ROOT"], None, "is there already"),
        (["demo", "a/name", "--export", "new"], None, "a/name is not a folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, without, message, folder, monkeypatch, capsys):
    if without is None:
        pytest.importorskip("gradio")
    else:
        monkeypatch.setitem(sys.modules, without, None)
    names = {"RUN": folder / "run", "ROOT": folder}
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *[names.get(argument, argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and lines[-1].startswith("tjepa demo: error: ") and message in lines[-1]


@pytest.fixture(scope="module")
def space(folder):
    pytest.importorskip("gradio")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, "demo", folder / "run", "--file", folder / "texts.txt", "--export", folder / "space")
    return folder / "space"


def test_the_command_serves_the_newest_run(monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    served = []
    monkeypatch.setattr(demo_tool, "launch", lambda *args: served.append(args))
    monkeypatch.setattr(demo_tool, "find_newest_run", lambda: Path("runs/newest"))
    run(monkeypatch, "demo", "--file", "texts.csv", "--text_column_name", "body")
    run(monkeypatch, "demo", "runs/quickstart")
    assert served == [("runs/newest", "texts.csv", "body"), ("runs/quickstart", None, None)]


def test_what_the_command_says_to_type_can_be_copied(monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.setattr(demo_tool, "export", lambda *args: None)
    run(monkeypatch, "demo", "runs/quickstart", "--export", "spaces/my début")
    assert "hf upload you/my-d-but 'spaces/my début' --repo-type space" in capsys.readouterr().out


def test_the_space_holds_what_it_needs_and_nothing_of_the_run(space, folder):
    _, header, _ = (space / "README.md").read_text().split("---\n")
    header = yaml.safe_load(header)
    gradio_version = import_module("gradio").__version__
    assert header["sdk"] == "gradio" and header["sdk_version"] == gradio_version and header["title"] == "run"
    assert (space / header["app_file"]).is_file()
    needs = (space / "requirements.txt").read_text().splitlines()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert needs == [*project["dependencies"], f"gradio=={gradio_version}"]
    there = {path.relative_to(space).as_posix() for path in space.rglob("*") if path.is_file()}
    assert "model/model.safetensors" in there and "model/masking_strategies.json" in there
    assert "model/search_index/texts.jsonl.safetensors" in there and "tjepa/tools/demo.html" in there
    assert not [path for path in there if path.endswith("run.json") or path.startswith(("tjepa/tests", "tjepa/docs"))]
    code = {path.relative_to(REPOSITORY) for path in REPOSITORY.glob("*.py")}
    code |= {path.relative_to(REPOSITORY) for room in demo_tool.ROOMS for path in (REPOSITORY / room).rglob("*.py")}
    assert {
        Path(path).relative_to("tjepa") for path in there if path.startswith("tjepa/") and path[-3:] == ".py"
    } == code
    assert (space / "texts.jsonl").read_text().count("\n") == 30


def test_the_spaces_app_starts_the_demo_with_what_lies_in_it(space, demo, monkeypatch):
    monkeypatch.chdir(space)
    started = []
    monkeypatch.setattr(demo_tool, "launch", lambda *args, **options: started.append((args, options)))
    runpy.run_path("app.py")
    ((args, options),) = started
    assert options == {"title": "run"}
    monkeypatch.setattr(SearchIndex, "build", None)  # the index is there already
    again = Demo(*args)
    assert again.search("red fox", None, 3, True) == demo.search("red fox", None, 3, True)
    assert again.expect(TEXT, {0}) == demo.expect(TEXT, {0}) and again.strategies == demo.strategies


# ---- in the browser ----


@pytest.fixture(scope="module")
def address(folder):
    gradio = pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"server_port": port, "prevent_thread_lock": True, "quiet": True}
    yield demo_tool.launch(str(folder / "run"), str(folder / "texts.txt"), **options)
    gradio.close_all()


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None or shutil.which("chromedriver") is None:
        pytest.skip("needs a browser: chromium and chromedriver are not on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()


class Page:
    """The demo in a browser, as somebody uses it."""

    def __init__(self, browser, address: str, width: int):
        self.browser = browser
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(address)

    def wait(self, condition):
        for _ in range(100):
            try:
                if found := condition():
                    return found
            except Exception as error:  # what was found is gone again while the page is drawn
                if type(error).__module__.partition(".")[0] != "selenium":
                    raise
            time.sleep(0.2)
        raise AssertionError(self.browser.find_element("css selector", "body").text)

    def find(self, selector: str):
        return self.wait(
            lambda: [one for one in self.browser.find_elements("css selector", selector) if one.is_displayed()]
        )

    def open(self, tab: str):
        self.wait(lambda: [one for one in self.find("[role=tab]") if one.text == tab])[0].click()

    def type(self, field: str, text: str, *keys: str):
        from selenium.webdriver.common.keys import Keys

        (box,) = [box for box in self.find("textarea, input") if box.accessible_name.startswith(field)]
        box.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE)
        self.browser.execute_cdp_cmd("Input.insertText", {"text": text})  # emoji, too, and at once
        box.send_keys(*keys)

    def text(self, selector: str) -> str:
        return self.find(selector)[0].get_property("textContent").strip()


@pytest.mark.parametrize("width", [1366, 390])
def test_every_tab_in_the_browser(width, browser, address, tmp_path):
    page = Page(browser, address, width)
    # what is hidden
    page.wait(lambda: "tokens:" in page.text("#counts"))
    page.type("Text", TEXT)
    before = page.wait(lambda: "beforethenight" in page.text("#spans").replace(" ", "") and page.text("#counts"))
    page.type("number input for Share hidden", "")
    page.wait(lambda: "must be a number" in page.text("#counts"))
    page.type("number input for Share hidden", "0.1")
    page.wait(lambda: page.text("#counts") != before and "in 1 block" in page.text("#counts"))
    page.type("Text", "")
    page.wait(lambda: page.text("#counts").startswith("Type a text"))
    browser.save_screenshot(str(tmp_path / "hidden.png"))
    # what it expects
    page.open("What it expects")
    page.type("Text", TEXT)
    page.wait(lambda: "Click words to hide" in page.text("#expected"))
    next(one for one in page.find("#words [role=button]") if one.text == "red").click()
    page.wait(lambda: re.search(r"red\s*As words.*[\d.]+%.*As nearest", page.text("#expected"), re.DOTALL))
    next(one for one in page.find("#words [role=button]") if one.text == "home").click()
    page.wait(lambda: len(page.find("#expected h3")) == 2)
    next(one for one in page.find("#words [role=button]") if one.text == "red").click()
    page.wait(lambda: [one.text for one in page.find("#expected h3")] == ["home"])
    assert len(page.find("#expected mark")) == demo_tool.NUM_NEAREST
    browser.save_screenshot(str(tmp_path / "expects.png"))
    # search
    page.open("Search")
    text = "🦊 الثعلب"
    for query, answer in (("red fox", "By the encoder"), ("", "Type what to search for"), (text, "By words")):
        page.type("Search", query, "\n")
        page.wait(lambda answer=answer: answer in page.text("#found"))
    browser.save_screenshot(str(tmp_path / "search.png"))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
