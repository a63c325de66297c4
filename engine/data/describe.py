"""Say what a data folder holds, and check it: hashes, sizes and ids of all its files.

    python -m engine.data.describe data/wikitext

Folders come from anywhere. Control characters in file names and text are printed as escapes.
"""

import json
import sys

from tqdm import tqdm

from engine.base.errors import UserError, run_main
from engine.base.files import sha256_of
from engine.data.formats import printable
from engine.data.shards import splits_in
from engine.data.tokenizer import load_tokenizer, read_meta
from engine.data.tokens import CHUNK, TokenFile, dataset_folder

EXCERPT = 80  # tokens
LONGEST = 400  # characters


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("give one data folder: python -m engine.data.describe data/wikitext")
    folder = dataset_folder(sys.argv[1])
    names = (read_meta(folder) or {}).get("splits") or splits_in(folder)
    if not names:
        raise UserError(f"{folder} holds no token files")
    files = {name: TokenFile(folder, name) for name in names}
    meta = next(iter(files.values())).meta or {"tokenizer": {"kind": "gpt2"}, "vocab_size": 50257}
    kind = str(meta["tokenizer"].get("kind", "none"))
    say(f"{folder}: {', '.join(names)}; tokenizer {kind} of {meta['vocab_size']:,} ids")
    if source := meta.get("source"):
        say(f"from {source if isinstance(source, str) else json.dumps(source)}"[:500])
    tokenizer = None if kind == "none" else load_tokenizer(folder)
    n_bad = sum(describe(name, file, tokenizer) for name, file in files.items())
    if n_bad:
        sys.exit(2)


def describe(name: str, file: TokenFile, tokenizer) -> int:
    """Print what a split holds and how it begins; the number of its bad files."""
    about = (file.meta or {}).get("splits", {}).get(name, {})
    say(f"{name}: {len(file):,} tokens of {file.dtype.name} in {len(file.shards):,} files")
    for key in ("documents", "bytes"):
        if isinstance(about.get(key), int):
            say(f"  {about[key]:,} {key}, {about[key] / len(file):.4g} per token")
    problems = check_files(name, file)
    for problem in problems:
        say(f"  damaged: {problem}")
    if not problems:
        has_hashes = all(shard.sha256 for shard in file.shards)
        say("  good: the hashes are right" if has_hashes else "  good, but there are no hashes")
    ids = file.shards[0].map()[:EXCERPT].tolist()
    if tokenizer is None or max(ids) >= tokenizer.vocab_size:
        say(f"  ids: {' '.join(map(str, ids[: EXCERPT // 2]))} ...")
    else:
        say(f"  text: {tokenizer.decode(ids)[:LONGEST]} ...")
    return len(problems)


def check_files(name: str, file: TokenFile) -> list[str]:
    """Read all files of a split; what is wrong with each bad one."""
    problems = []
    n_bytes = sum(shard.size for shard in file.shards)
    progress = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}
    with tqdm(total=n_bytes, desc=printable(name), **progress) as bar:
        for shard, end in zip(file.shards, file.ends.tolist(), strict=True):
            try:
                if shard.sha256 not in (None, sha256_of(shard.path)):
                    raise UserError(f"{shard.path} has another sha256 than meta.json says")
                for begin in range(end - len(shard), end, CHUNK):
                    file[begin : min(begin + CHUNK, end)]
            except UserError as error:
                problems.append(str(error))
            bar.update(shard.size)
    return problems


def say(line: str) -> None:
    """Print one line, with an escape for whatever is not printable or not in the terminal's
    encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    print(printable(line).encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    run_main(main)
