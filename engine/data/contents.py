"""What a data folder holds, in lines to read: python -m engine.data.tokens FOLDER prints them.

Folders come from anywhere. Whatever is in them is shown with its control characters written out, so that no file can
move the cursor, colour or hide what stands on the screen.
"""

import json
import sys

import numpy as np
from tqdm import tqdm

from engine.base.errors import UserError
from engine.data.formats import printable

EXCERPT = 80  # tokens
LONGEST = 400  # characters


def describe(where: str, files: dict, known_by: str, tokenizer) -> bool:
    """Print it, and read all of it; whether all is good. files: the splits' TokenFiles; known_by: what names the
    tokenizer; tokenizer: None where text cannot be had from ids."""
    first = next(iter(files.values()))
    meta = first.meta or {"tokenizer": {"kind": "gpt2"}}
    kind, source = meta["tokenizer"].get("kind", "none"), meta.get("source")
    tokenizes = f"tokenizer {shown(str(kind))} of {first.vocab_size:,} ids ({known_by})"
    print(f"{shown(where)}: {', '.join(map(shown, files))}; {tokenizes}")
    if source:
        print(f"from {shown(source if isinstance(source, str) else json.dumps(source))[:500]}")
    return all(
        [_split(name, file, tokenizer) for name, file in files.items()]
    )  # a list: those behind a bad one too


def _split(name: str, file, tokenizer) -> bool:
    about = (file.meta or {}).get("splits", {}).get(name, {})
    documents, n_bytes = (
        n if isinstance(n := about.get(key), int) else 0 for key in ("documents", "bytes")
    )
    shards = file.row.shards
    has = [f"{len(shards):,} file{'s' * (len(shards) > 1)}"]
    has += [f"{documents:,} documents"] * bool(documents) + [
        f"{len(file):,} tokens of {file.dtype.name}"
    ]
    has += [f"{n_bytes:,} bytes of text, {n_bytes / len(file):.2f} a token"] * bool(n_bytes)
    print(f"{shown(name)}: {', '.join(has)}")
    bad = _damaged(name, file)
    said = (
        "good: as meta.json says"
        if shards[0].sha256
        else "good: ids inside the vocabulary; no hash to hold against"
    )
    print("\n".join(f"  damaged: {shown(reason)}" for reason in bad) or f"  {said}")
    ids = file.row.rows(np.zeros(1, int), min(len(file), EXCERPT))[0]
    if tokenizer is None or int(ids.max()) >= tokenizer.vocab_size:
        print(f"  ids: {' '.join(map(str, ids[: EXCERPT // 2].tolist()))} ...")
    else:
        print(f"  text: {shown(tokenizer.decode(ids.tolist())[:LONGEST])} ...")
    return not bad


def _damaged(name: str, file) -> list[str]:
    """What is wrong with each bad file of the split; all are read from end to end, whoever has read them before."""
    bad, shards = [], file.row.shards
    show = {
        "desc": shown(name),
        "unit": "B",
        "unit_scale": True,
        "leave": False,
        "disable": not sys.stderr.isatty(),
    }
    with tqdm(total=sum(shard.size for shard in shards), **show) as bar:
        for k, shard in enumerate(shards):
            try:
                file.row.scan(k, recall=False)
                file.check_shards([k])
            except UserError as error:
                bad.append(str(error))
            bar.update(shard.size)
    return bad


def shown(text: str) -> str:
    """The text on one line, with an escape for whatever is not to be seen or does not go through the terminal."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)
