"""A model to try out in the browser: what is hidden of a text, what the predictor expects there, and a search.

    tjepa demo runs/quickstart
    tjepa demo runs/quickstart --export my-space

Notable: each tab is a method of `Demo`, from what was typed to what is shown; only `build_app` knows of Gradio. A
prediction has no words of its own. It is shown as words by the token head, where there is one, and as the words of
other texts of which the target encoder says nearly the same: those are the labels that pretraining compares with.
"""

import argparse
import json
import logging
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, wraps
from importlib.metadata import requires
from pathlib import Path

import jinja2
import numpy as np
import torch

from ..corpus.atomic_writes import holds_something, replacing_folder
from ..corpus.command_line import PACKAGE, start
from ..corpus.faults import DROP_REASONS, EMPTY, find_fault
from ..corpus.paths import find_newest_run
from ..corpus.strategies import load_masking_strategies
from ..corpus.tokenizers import longest_input, text_reader
from ..data_collator_tjepa import MASKING_PRESETS, MaskingStrategy, draw_views, hash_keys
from ..training.model_folder import STRATEGIES_FILE, pretraining_folder
from ..training.publishing import published_files
from ..training.setup import hide_what_loading_says
from .fill import Gapped, guess_tokens, load_for_filling, tokens_around
from .lookup import Lookup, owners_of_tokens, split_into_tokens, split_into_words
from .report import group_pieces, token_kinds
from .search import SearchIndex, WordIndex, add_text_flags, index_path, load_passages, open_index


HIDDEN, NEXT_HIDDEN, LEFT_OUT = "hidden", "hidden, the next block", "left out of the context"
COLOURS = {HIDDEN: "#2a6f97", NEXT_HIDDEN: "#7fb7d6", LEFT_OUT: "#b5b5b5"}
MAX_TOKENS = 256  # of a text that is shown, if the model could read more
MAX_HIDDEN_WORDS = 12  # that are guessed at once
NUM_GUESSES, NUM_NEAREST = 5, 3
MAX_FILE_TEXTS = 20_000  # of a file that is searched in the browser
TEXTS_FILE = "texts.jsonl"  # of a Space
ROOMS = ("corpus", "training", "downstream", "tools", "configs")  # of the package
EXAMPLE = "Return the eigenvalues of a symmetric matrix, each repeated according to its multiplicity."


# ---- texts and words ----


def check_text(text: str | None, what: str) -> str:
    """
    Raises:
        ValueError: if nothing was typed, or it is not text.
    """
    if fault := find_fault(text or ""):
        raise ValueError(f"Type {what}." if fault == EMPTY else f"This cannot be read: {DROP_REASONS[fault]}.")
    return text


# ---- the three tabs ----


class Demo:
    """
    What the tabs do, without a browser.

    Args:
        name: the folder of a run's model, or its name on the Hub.
        file, text_column_name: the texts to search, as for `load_passages`.

    Raises:
        FileNotFoundError, ValueError: as `load_for_filling` and `open_index`.
    """

    def __init__(self, name: str, file: str | None = None, text_column_name: str | None = None):
        self.model, self.tokenizer = load_for_filling(name, "FOLDER")
        self.reader, self.around = text_reader(self.tokenizer), tokens_around(self.model, self.tokenizer)
        longest = min(longest_input(self.tokenizer, self.model), MAX_TOKENS)
        self.max_length = longest - sum(map(len, self.around))
        self.strategies = name_strategies(name)
        self.index = open_index(name, file, text_column_name)
        self.lookup = Lookup(self.model, self.tokenizer, self.index.passages)
        self.index_file = lru_cache(maxsize=4)(self._index_file)
        self.parts = jinja2.Template(
            Path(__file__).with_name("demo.html").read_text(encoding="utf-8"), autoescape=True
        ).module

    def read(self, text: str) -> tuple[list[tuple[int, str]], str]:
        """The tokens of a text, ids and pieces, and a sentence on what was not read of it."""
        check_text(text, "a text of two words or more")
        tokens = split_into_tokens(text, self.reader, self.max_length)
        if len(tokens) < 2:
            raise ValueError("This text is a single token: nothing is left to predict it from. Type more.")
        num_chars = sum(len(piece) for _, piece in tokens)
        is_cut = num_chars < len(text.rstrip())
        cut = f" Only the first {len(tokens)} tokens of the text are read: it has {len(text):,} characters."
        return tokens, cut if is_cut else ""

    def hide(self, text: str, strategy: MaskingStrategy, seed: int) -> tuple[list[tuple[str, str | None]], str]:
        """*What is hidden*: the pieces of a text, each with its part in a view, and how much of it is what."""
        tokens, cut = self.read(text)
        ids, pieces = zip(*tokens, strict=True)
        views = draw_views([np.array(ids)], hash_keys(seed % 2**63, np.zeros(1, np.int64), 0), [strategy])
        kinds = token_kinds(views, 0, len(ids))
        names = {"": None, "a": HIDDEN, "b": NEXT_HIDDEN, "dropped": LEFT_OUT}
        spans = [(piece, names[kind]) for kind, piece in group_pieces(kinds, pieces)]
        num_hidden, num_blocks = len(views.slot_token), len(np.unique(views.slot_block))
        num_context = len(views.context_token)
        rest = len(ids) - num_context - num_hidden
        counts = (
            f"{len(ids)} tokens: {num_context} are the context ({num_context / len(ids):.0%}), {num_hidden} are "
            f"hidden ({num_hidden / len(ids):.0%}) in {num_blocks} block{'s' * (num_blocks > 1)}"
        )
        return spans, f"{counts}{f', {rest} are left out' if rest else ''}.{cut}"

    def words(self, text: str) -> tuple[list[tuple[str, bool]], str]:
        """The words that may be hidden, and what stands between them, as `split_into_words`."""
        tokens, cut = self.read(text)
        words = split_into_words("".join(piece for _, piece in tokens))
        return words, cut

    def expect(self, text: str, hidden: set[int]) -> str:
        """
        *What it expects* in place of words.

        Args:
            hidden: their indices into `words`.
        """
        tokens, _ = self.read(text)
        ids, pieces = zip(*tokens, strict=True)
        words = split_into_words("".join(pieces))
        owners = owners_of_tokens(pieces, words)
        hidden = sorted(hidden.intersection(owners))
        if not hidden:
            raise ValueError("Choose a word to hide: click it.")
        if len(hidden) > MAX_HIDDEN_WORDS:
            raise ValueError(f"{len(hidden)} words are hidden; choose {MAX_HIDDEN_WORDS} at most.")
        before, behind = self.around
        is_hidden = [owner in hidden for owner in owners]
        if all(is_hidden):
            raise ValueError("All of the text is hidden: leave something from which the rest can be guessed.")
        gapped = Gapped(
            torch.tensor([*before, *ids, *behind]),
            torch.tensor([False] * len(before) + is_hidden + [False] * len(behind)),
        )
        guesses = [[]] * sum(is_hidden)
        if self.model.token_head is not None:
            guesses = guess_tokens(self.model, self.tokenizer, gapped, NUM_GUESSES)
        predictions = self.model.predict_states(*(part.to(self.model.device) for part in gapped))
        slots = [index for index, is_one in enumerate(is_hidden) if is_one]
        shown = []
        for word in hidden:
            mine = [place for place, index in enumerate(slots) if owners[index] == word]
            shown.append(
                {
                    "text": words[word][0],
                    "tokens": [{"text": pieces[slots[place]].strip(), "guesses": guesses[place]} for place in mine],
                    "nearest": self.lookup.nearest(predictions[mine[0]], NUM_NEAREST),
                }
            )
        return str(self.parts.expected(shown, self.model.token_head is not None))

    def search(self, query: str, file: str | None, num_results: int, with_words: bool) -> str:
        """*Search* in the texts that the demo was started with, or in a file's."""
        check_text(query, "what to search for")
        index, words = self.index_file(file)
        columns = [("By the encoder", index.search(query, num_results))]
        if with_words:
            columns.append(("By words (TF-IDF)", words.search(query, num_results)))
        return str(self.parts.found(columns))

    def _index_file(self, file: str | None) -> tuple[SearchIndex, WordIndex]:
        if file is None:
            return self.index, WordIndex(self.index.passages)
        try:
            passages = load_passages(file)
        except ValueError as error:  # to a visitor, who knows neither the server's folders nor flags
            said = str(error).replace("--file ", "").replace(file, Path(file).name)
            raise ValueError(re.split(r" (?:Pass )?--text_column_name", said)[0]) from error
        if len(passages) > MAX_FILE_TEXTS:
            raise ValueError(
                f"The file has {len(passages):,} texts, and {MAX_FILE_TEXTS:,} at most are read here. "
                "`tjepa search --file` takes any number."
            )
        return SearchIndex.build(self.index.embedder, passages), WordIndex(passages)


def name_strategies(name: str) -> dict[str, MaskingStrategy]:
    """The masking strategies that may be chosen, the run's own first, by what they do."""
    path = Path(pretraining_folder(name)) / STRATEGIES_FILE
    own = load_masking_strategies(path) if path.is_file() else []
    named = {}
    for origin, strategies in {"this run's": own, **MASKING_PRESETS}.items():
        for strategy in strategies if origin == "this run's" else [s for s in strategies if s not in own]:
            what = f"{describe_strategy(strategy)} ({origin})"
            named[what if what not in named else f"{what}: {strategy.name}"] = strategy
    return named


def describe_strategy(strategy: MaskingStrategy) -> str:
    length, share = strategy.target_block_size_mean, f"{strategy.max_target_mask_ratio:.0%} hidden"
    if length is None:
        what = "one block"
    elif length == 1:
        what = "single tokens"
    else:
        what = f"blocks of {length:g} tokens" + (" on average" if strategy.target_block_size_std else "")
    start, kept = strategy.max_target_mask_start_ratio, strategy.max_context_ratio
    more = [f"from {start:.0%} of the text on"] * (start > 0) + [f"{kept:.0%} kept as context"] * (kept < 1)
    return ", ".join([what, share, *more])


# ---- the page ----


def answering(function: Callable[..., str]) -> Callable[..., str]:
    """The function, which says what is wrong in place of its answer, where that is an error of the user's."""

    @wraps(function)
    def answer(demo: Demo, *args) -> str:
        try:
            return function(demo, *args)
        except (ValueError, OSError) as error:
            return str(demo.parts.note(str(error)))

    return answer


def import_gradio():
    """
    Raises:
        ImportError: with the way to install it.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"The demo needs Gradio ({error}): pip install 'tjepa[demo]'") from error
    return gradio


def build_app(demo: Demo, title: str):
    """The page, a `gradio.Blocks`."""
    gradio = import_gradio()
    expect, search = answering(Demo.expect), answering(Demo.search)

    def choose(name):
        s = demo.strategies[name]
        whole = s.target_block_size_mean is None
        return [
            s.max_target_mask_ratio,
            0 if whole else s.target_block_size_mean,
            s.max_target_mask_start_ratio,
            s.max_context_ratio,
        ]

    def hide(text, name, seed, share, length, start, kept):
        try:
            whole = {"target_block_size_mean": None, "target_block_size_std": None}
            strategy = replace(
                demo.strategies[name],
                max_target_mask_ratio=share,
                max_target_mask_start_ratio=start,
                max_context_ratio=kept,
                **({"target_block_size_mean": length} if length else whole),
            )
            return demo.hide(text, strategy, int(seed or 0))
        except ValueError as error:
            return [], str(error)

    def show_words(text):
        try:
            words, cut = demo.words(text)
        except ValueError as error:
            return [], set(), str(demo.parts.note(str(error)))
        spans = [(piece, None) for piece, _ in words]
        return spans, set(), str(demo.parts.note(f"Click words to hide them, and again to show them.{cut}"))

    def toggle(text, hidden, event: gradio.SelectData):
        words, _ = demo.words(text)
        if words[event.index][1]:
            hidden = hidden ^ {event.index}
        spans = [(piece, HIDDEN if index in hidden else None) for index, (piece, _) in enumerate(words)]
        return spans, hidden, expect(demo, text, hidden)

    latest = {"show_progress": "hidden", "trigger_mode": "always_last"}
    with gradio.Blocks(title=f"T-JEPA: {title}", analytics_enabled=False) as app:
        gradio.Markdown(
            f"# {title}\nA text encoder that learned by predicting its own representations of hidden words."
        )
        with gradio.Tab("What is hidden"):
            text = gradio.Textbox(EXAMPLE, label="Text", lines=3, max_lines=8)
            with gradio.Row():
                name = gradio.Dropdown(
                    list(demo.strategies), label="Masking strategy", scale=3, min_width=280, elem_id="strategy"
                )
                seed = gradio.Number(0, label="Seed", precision=0, min_width=100)
            first = choose(next(iter(demo.strategies)))
            longest = max(64, *(choose(name)[1] for name in demo.strategies))
            with gradio.Row():
                share = gradio.Slider(0.01, 1, first[0], step=0.01, label="Share hidden", min_width=220)
                length = gradio.Slider(0, longest, first[1], step=1, label="Tokens in a block (0: all)", min_width=220)
                start = gradio.Slider(0, 0.99, first[2], step=0.01, label="Blocks begin after", min_width=220)
                kept = gradio.Slider(0.01, 1, first[3], step=0.01, label="Context keeps at most", min_width=220)
            for slider in (share, length, start, kept):  # what is typed beside them and out of range is answered below
                slider.preprocess = lambda value: value
            spans = gradio.HighlightedText(
                label="Hidden and context", color_map=COLOURS, show_legend=True, interactive=False, elem_id="spans"
            )
            counts = gradio.Markdown(elem_id="counts")
            settings = [text, name, seed, share, length, start, kept]
            name.input(choose, name, [share, length, start, kept], show_progress="hidden")
            gradio.on([app.load, *(setting.change for setting in settings)], hide, settings, [spans, counts], **latest)
        with gradio.Tab("What it expects"):
            text = gradio.Textbox(EXAMPLE, label="Text", lines=3, max_lines=8)
            words = gradio.HighlightedText(
                label="Click the words to hide",
                color_map=COLOURS,
                show_inline_category=False,
                interactive=False,
                elem_id="words",
            )
            hidden, answer = gradio.State(set()), gradio.HTML(elem_id="expected")
            shown = [words, hidden, answer]
            gradio.on([app.load, text.change], show_words, text, shown, **latest)
            words.select(toggle, [text, hidden], shown, show_progress="hidden", trigger_mode="multiple")
        with gradio.Tab("Search"):
            query = gradio.Textbox(
                label=f"Search {len(demo.index.texts):,} texts",
                placeholder="eigenvalues of a matrix",
                submit_btn="Search",
            )
            with gradio.Accordion("Your own texts, and more", open=False):
                file = gradio.File(
                    label="A text file with a text in each line, or jsonl, csv or parquet with a column text",
                    height=140,
                )
                number = gradio.Slider(1, 20, 5, step=1, label="Answers")
                with_words = gradio.Checkbox(True, label="Beside it what counting words finds (TF-IDF)")
            found = gradio.HTML(elem_id="found")

            def find(query, file, num_results, with_words):
                return search(demo, query, file, num_results, with_words)

            gradio.on(
                [query.submit, file.change, number.change, with_words.change],
                find,
                [query, file, number, with_words],
                found,
                trigger_mode="always_last",
                api_name="search",
            )
    return app


def launch(
    name: str, file: str | None = None, text_column_name: str | None = None, title: str | None = None, **options
) -> str:
    """
    Serves the page until it is interrupted, unless `prevent_thread_lock` is among the options.

    Args:
        name, file, text_column_name: as for `Demo`.
        title: of the page. Default: the name.
        options: of `gradio.Blocks.launch`.

    Returns:
        the address; `GRADIO_SERVER_PORT` decides about the port, else it is the first free one from 7860 on.
    """
    gradio = import_gradio()
    demo = Demo(name, file, text_column_name)
    theme = gradio.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app = build_app(demo, title or (Path(name).resolve().name if Path(name).is_dir() else name))
    options = {"max_file_size": "50mb", "footer_links": ["gradio"], **options}
    return app.launch(theme=theme, css=str(demo.parts.style()), **options)[1]


# ---- a Space ----


APP = """from tjepa.tools.demo import launch


launch("model", "{texts}", title={title!r})
"""
CARD = """---
title: {title}
emoji: 🔍
colorFrom: blue
colorTo: indigo
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
pinned: false
---

A text encoder of T-JEPA to try out: what pretraining hides of a text, what the predictor expects there, and a search.
Written by `tjepa demo FOLDER --export SPACE_FOLDER`. To start it here:

    pip install -r requirements.txt
    python app.py
"""


def export(name: str, space: Path, file: str | None = None, text_column_name: str | None = None) -> None:
    """
    Writes the demo as a folder that a Space of the Hub starts from: the model, the texts and their index, and a copy
    of this package, so that it runs with the code that it was made with.

    Args:
        name, file, text_column_name: as for `Demo`; a folder.

    Raises:
        FileExistsError: if `space` is there, unless it is an empty folder.
        ValueError: if `name` is not a folder.
    """
    gradio_version, folder = import_gradio().__version__, Path(name)
    if not folder.is_dir():
        raise ValueError(f"{name} is not a folder; --export copies the model of one.")
    if holds_something(space):
        raise FileExistsError(f"--export {space} is there already; name a new folder, or an empty one.")
    demo, title = Demo(name, file, text_column_name), folder.resolve().name
    with replacing_folder(space) as new:
        for pattern in [*published_files(demo.tokenizer, name), STRATEGIES_FILE]:
            for path in folder.glob(pattern):
                (new / "model" / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, new / "model" / path.relative_to(folder))
        demo.index.save(index_path(new / "model", TEXTS_FILE))
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in demo.index.passages)
        (new / TEXTS_FILE).write_text("".join(lines), encoding="utf-8")
        for room in ROOMS:
            shutil.copytree(PACKAGE / room, new / "tjepa" / room, ignore=shutil.ignore_patterns("__pycache__"))
        for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("LICENSE")]:
            shutil.copy(path, new / "tjepa" / path.name)
        (new / "requirements.txt").write_text("\n".join([*list_dependencies(), f"gradio=={gradio_version}", ""]))
        (new / "app.py").write_text(APP.format(texts=TEXTS_FILE, title=title))
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        card = CARD.format(title=json.dumps(title), gradio=gradio_version, python=python)
        (new / "README.md").write_text(card, encoding="utf-8")


def list_dependencies() -> list[str]:
    """Of this package: what a clone says today, which may have been installed long ago, else what was installed."""
    if (PACKAGE / "pyproject.toml").is_file():
        return tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return [line for line in requires("tjepa") or () if "extra ==" not in line]


# ---- the command ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("folder", nargs="?", help="of a run's model; default: the newest under runs/")
    add_text_flags(parser)
    parser.add_argument(
        "--export", metavar="SPACE_FOLDER", type=Path, help="write a Space of the Hub rather than start the demo"
    )
    args = parser.parse_args()
    import_gradio()
    logging.basicConfig(format="%(message)s")
    hide_what_loading_says()
    name = args.folder or str(find_newest_run())
    if args.export is None:
        launch(name, args.file, args.text_column_name)
        return
    export(name, args.export, args.file, args.text_column_name)
    repository = re.sub(r"[^A-Za-z0-9._-]+", "-", args.export.name)  # the Hub takes nothing else
    print(
        f"Wrote {args.export}. Try it with `pip install -r requirements.txt && python app.py` in that folder, and put "
        f"it on the Hub: hf upload you/{repository} {shlex.quote(str(args.export))} --repo-type space"
    )


if __name__ == "__main__":
    start(main)
