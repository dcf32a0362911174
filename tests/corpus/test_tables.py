"""Tables as text, csv and tsv, in the shapes that people have: which rows there are, and what costs one."""

import csv

import pandas
import pytest
from test_files import TEXTS, both, dropped_of, texts_of

from tjepa.corpus import files
from tjepa.corpus.documents import load_splits
from tjepa.corpus.files import load_files
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.downstream.arguments import TextArguments


pytestmark = pytest.mark.usefixtures("own_cache")


def test_nothing_in_a_csv_file_is_guessed(tmp_path):
    """Names that pandas takes for a missing value, leading zeros, and a word far below numbers."""
    classes = ["None", "NA", "nan", "007", "1e5", "", "true"]
    numbers = [str(number % 3) for number in range(12_000)]
    labels = [*classes, *numbers, "unknown"]
    lines = [f"text {row},{label}" for row, label in enumerate(labels)]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    expected = [label or None for label in labels]
    assert load_files("--train_file", str(folder / "train.csv"))["label"][:] == expected
    args = TextArguments(dataset_name=str(folder))
    assert load_splits(args, ("train", "validation", "test"))["train"]["label"][:] == expected
    assert texts_of(folder / "train.csv")[:2] == ["text 0", "text 1"]


@both
def test_a_byte_order_mark_in_a_csv_file(tmp_path, streaming):
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbf" + "text,title\ncafé at night,x\n".encode())
    assert texts_of(tmp_path / "train.csv", streaming) == ["café at night"]


def test_csv_fields_of_several_lines_and_rows_of_too_many_fields(tmp_path):
    tokenizer = train_tokenizer(TEXTS, vocab_size=300, model_max_length=64)
    lines = ["title,text", 'a,"the fox\nsees ""a"" hen"', "b,the fox, and a hen", "", "c"]
    (tmp_path / "train.csv").write_bytes("\r\n".join(lines).encode())
    assert texts_of(tmp_path / "train.csv") == ['the fox\nsees "a" hen', None, None]
    assert dropped_of(tmp_path / "train.csv", tokenizer) == (1, {"unreadable": 1, "null": 1})
    with pytest.raises(ValueError, match="row 2 of .*train.csv cannot be read.*more fields than the first line"):
        load_files("--train_file", str(tmp_path / "train.csv"))


@both
@pytest.mark.parametrize(
    ("num_rows", "damaged"), [(100, [20, 70]), (60, [20]), (21, [20]), (30, [20, 21]), (40, [20, 25, 39])]
)
def test_a_lone_quote_in_a_csv_file_costs_its_own_row(tmp_path, streaming, num_rows, damaged):
    """Not those behind it, up to the next quote or to the end."""
    rows = [f"{quote}text {n},{n % 2}" for n in range(num_rows) for quote in ['"' if n in damaged else ""]]
    last = ['"on two\nlines",0', 'the "end",1']
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows, *last]))
    expected = [None if n in damaged else f"text {n}" for n in range(num_rows)]
    assert texts_of(tmp_path / "train.csv", streaming) == [*expected, "on two\nlines", 'the "end"']
    with pytest.raises(ValueError, match="row 21 of .* or a quote in it is not closed"):
        load_files("--train_file", str(tmp_path / "train.csv"))
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows]))  # also in the last row
    assert texts_of(tmp_path / "train.csv", streaming) == expected


@pytest.mark.parametrize(
    "text",
    [
        '"One line.\nHe said "hi" there."',
        '"two\nlines" ',
        '"a b\nc \\"d\\" e"',
        '"one\ntwo\nthree ""x"" four"',
        'a "b',
    ],
)
def test_quotes_that_are_closed_after_all(tmp_path, text):
    (tmp_path / "train.csv").write_text(f"text,label\na,0\n{text},1\nb,2\n")
    before, own, behind = texts_of(tmp_path / "train.csv")
    assert (before, behind) == ("a", "b") and own.replace('"', "").strip() == text.replace('"', "").strip()
    assert load_files("--train_file", str(tmp_path / "train.csv"))["label"][:] == ["0", "1", "2"]


def test_a_text_that_is_cut_off_in_a_csv_file_is_one_unreadable_row(tmp_path):
    (tmp_path / "train.csv").write_text('text,label\na red fox,0\n"on\nthree\nlines')
    assert texts_of(tmp_path / "train.csv") == ["a red fox", None]


def noted(lines, read: list):
    for line in lines:
        read.append(line)
        yield line


def test_quotes_that_are_never_closed_take_no_time_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINES_READ_ANEW", 1000)
    (tmp_path / "train.csv").write_text("text,label\na,0\n" + '6" pipe,"17\n' * 500)
    read, reader = [], csv.reader
    monkeypatch.setattr(csv, "reader", lambda lines, **options: reader(noted(lines, read), **options))
    assert texts_of(tmp_path / "train.csv") == ["a", *[None] * 500]
    assert len(read) < 5000


@pytest.mark.parametrize(
    ("name", "header", "message"),
    [
        ("train.csv", "text,label,text", "train.csv has two columns 'text'"),
        ("train.csv", '"text,label', "train.csv begins with a quote that is not closed"),
        ("train.csv", "text;label", "begins with 'text;label', where ';' separates .* in a csv file commas"),
        ("train.tsv", "text,label", "begins with 'text,label', where ',' separates .* tsv file tabs"),
    ],
)
def test_a_first_line_that_names_no_columns(tmp_path, name, header, message):
    (tmp_path / name).write_text(f"{header}\na,b,c\n")
    with pytest.raises(ValueError, match=message):
        texts_of(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_files("--train_file", str(tmp_path / name))


@both
@pytest.mark.parametrize(("name", "content"), [("a.csv", "\n\ntext,label\nx,1\n"), ("a.tsv", "\ntext\tlabel\nx\t1\n")])
def test_blank_lines_before_the_names_of_the_columns(tmp_path, streaming, name, content):
    (tmp_path / name).write_text(content)
    assert texts_of(tmp_path / name, streaming) == ["x"]
    if not streaming:
        assert load_files("--train_file", str(tmp_path / name))["label"][:] == ["1"]


@both
def test_a_first_line_that_does_for_the_column_that_is_asked_for(tmp_path, streaming):
    (tmp_path / "a.csv").write_text("text,id,id\na,1,2\n")
    assert texts_of(tmp_path / "a.csv", streaming) == ["a"]
    (tmp_path / "a.tsv").write_text("Text, in English\na\n")
    assert texts_of(tmp_path / "a.tsv", streaming, text_column_name="Text, in English") == ["a"]


def test_columns_in_place_of_rows(tmp_path):
    pandas.DataFrame({"text": TEXTS}).to_json(tmp_path / "train.json")
    with pytest.raises(ValueError, match="train.json holds columns in place of rows: .*orient='records'"):
        texts_of(tmp_path / "train.json")
    pandas.DataFrame({"text": TEXTS}).to_json(tmp_path / "train.json", orient="records")
    assert texts_of(tmp_path / "train.json") == TEXTS


@both
def test_lines_are_of_the_column_that_is_asked_for(tmp_path, streaming):
    (tmp_path / "train.txt").write_text("a\nb\n")
    assert texts_of(tmp_path / "train.txt", streaming, text_column_name="content") == ["a", "b"]


def test_tsv_files(tmp_path):
    """As shared tasks have them, quotes and all, and as pandas writes them."""
    lines = ["text\tlabel", 'He said "no\tNone', '"Quoted"\t007', '"a ""b"" c"\t', "\tx"]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    expected = ['He said "no', '"Quoted"', 'a "b" c', None]
    assert texts_of(tmp_path / "train.tsv") == texts_of(tmp_path / "train.tsv", True) == expected
    assert load_files("--train_file", str(tmp_path / "train.tsv"))["label"][:] == ["None", "007", None, "x"]


@pytest.mark.parametrize(
    "columns", [["text", "label"], ["label", "text"], ["text", "note"], ["note", "text", "label"]]
)
def test_tsv_fields_of_several_lines(tmp_path, columns):
    """As pandas writes them, which puts quotes around a field with a line break, and doubles those in it."""
    texts = ["one\ntwo", 'a\n\n"b"\nc', '"whole"\n', '\n"', "plain", '"', '"a" b', 'x\r\n"y', '""\n""', 'b "c"']
    rows = {"text": texts, "label": [*"0123456789"], "note": texts[::-1]}
    rows = {column: rows[column] for column in columns}
    pandas.DataFrame(rows).to_csv(tmp_path / "train.tsv", sep="\t", index=False)
    loaded = load_files("--train_file", str(tmp_path / "train.tsv"))
    assert {column: loaded[column][:] for column in columns} == rows
    assert texts_of(tmp_path / "train.tsv") == texts_of(tmp_path / "train.tsv", True) == texts


@pytest.mark.parametrize("order", [1, -1])
def test_a_lone_quote_in_a_tsv_file_is_text(tmp_path, order):
    """As of a quotation that goes on in the next sentence."""
    texts = ['" I went there .', "and left .", 'and slept . "', '"', '"', 'x"', '"y', '""', '"""', "end", '"open']
    lines = ["\t".join([text, f'"{row}'][::order]) for row, text in enumerate(texts)]
    (tmp_path / "train.tsv").write_text("\n".join(["\t".join(["text", "label"][::order]), *lines]) + "\n")
    assert texts_of(tmp_path / "train.tsv") == texts
    (tmp_path / "one.tsv").write_text("\n".join(["text", *texts]) + "\n")
    assert texts_of(tmp_path / "one.tsv") == texts
