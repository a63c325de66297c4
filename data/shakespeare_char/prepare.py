"""Tiny Shakespeare by characters, nanoGPT's split and ids: 65 characters, 1,003,854 / 111,540 tokens, a second or two.

python data/shakespeare_char/prepare.py                         # fetches input.txt, 1.1 MB
python data/shakespeare_char/prepare.py --source=input.txt      # or takes yours
"""

import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.config import load_config
from engine.corpus import check_sha256, read_text
from engine.errors import UserError, run
from engine.tokenizer import CharTokenizer
from engine.tokens import write_dataset

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Options:
    source: str = ""  # a local input.txt; empty: fetch it
    folder: str = str(Path(__file__).resolve().parent)  # where train.bin, val.bin and meta.json go


def fetch(path: Path) -> None:
    """input.txt from karpathy's char-rnn, unless it is here from an earlier run."""
    if path.is_file():
        return
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            data = check_sha256(response.read(), SHA256, URL)
    except OSError as error:
        raise UserError(f"cannot fetch {URL} ({error}); give a local copy with --source=PATH") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def main() -> None:
    options, _ = load_config(Options, sys.argv[1:])
    path = Path(options.source or Path(options.folder, "input.txt"))
    if not options.source:
        fetch(path)
    text = read_text(path)
    check_sha256(text.encode(), SHA256, f"{path} (for a text of your own use data/text/prepare.py)")
    cut = int(0.9 * len(text))
    write_dataset(options.folder, {"train": [text[:cut]], "val": [text[cut:]]}, CharTokenizer.train([text]))


if __name__ == "__main__":
    run(main)
