"""Say what a data folder holds, and check it: hashes, sizes and ids of all its files.

    python -m engine.data.describe data/wikitext

Folders come from anywhere: control characters in file names and text are printed as escapes.
"""

import sys

from tqdm import tqdm

from engine.base.errors import UserError, run_main
from engine.base.files import sha256_of
from engine.data.shards import splits_in
from engine.data.sources import printable
from engine.data.tokenizer import load_tokenizer, read_meta
from engine.data.tokens import CHUNK, TokenFile, dataset_folder

EXCERPT = 80  # tokens


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("give one data folder: python -m engine.data.describe data/wikitext")
    folder = dataset_folder(sys.argv[1])
    splits = (read_meta(folder) or {}).get("splits") or splits_in(folder)
    if not splits:
        raise UserError(f"{folder} holds no token files")
    files = [TokenFile(folder, split) for split in splits]
    meta = files[0].meta or {"tokenizer": {"kind": "gpt2"}}
    kind = meta["tokenizer"].get("kind", "none")
    say(f"{folder}: {', '.join(splits)}; tokenizer {kind} of {files[0].vocab_size:,} ids")
    say(f"source: {meta.get('source', 'unknown')}"[:500])
    tokenizer = None if kind == "none" else load_tokenizer(folder)
    n_damaged = sum(describe(file, tokenizer) for file in files)
    if n_damaged:
        sys.exit(2)


def describe(file: TokenFile, tokenizer) -> int:
    """Print what a split holds and how it begins. Returns the number of its damaged files."""
    split = file.path.stem
    say(f"{split}: {len(file):,} tokens of {file.dtype.name} in {len(file.shards):,} files")
    about = (file.meta or {}).get("splits", {}).get(split, {})
    say(f"  documents: {about.get('documents', '?')}, bytes of text: {about.get('bytes', '?')}")
    problems = check_files(file)
    for problem in problems:
        say(f"  damaged: {problem}")
    if not problems:
        has_hashes = all(shard.sha256 for shard in file.shards)
        say("  good: the hashes are right" if has_hashes else "  good, but there are no hashes")
    ids = file.shards[0].map()[:EXCERPT].tolist()
    if tokenizer and max(ids) < tokenizer.vocab_size:
        say(f"  text: {tokenizer.decode(ids)[: 5 * EXCERPT]} ...")
    else:
        say(f"  ids: {' '.join(map(str, ids[: EXCERPT // 2]))} ...")
    return len(problems)


def check_files(file: TokenFile) -> list[str]:
    """Read all files of a split; what is wrong with each damaged one."""
    problems = []
    shards = list(zip(file.shards, file.ends.tolist(), strict=True))
    for shard, end in tqdm(shards, leave=False, disable=None):
        try:
            if shard.sha256 not in (None, sha256_of(shard.path)):
                raise UserError(f"{shard.path} has another sha256 than meta.json says")
            for begin in range(end - len(shard), end, CHUNK):
                file[begin : min(begin + CHUNK, end)]  # refuses ids outside the vocabulary
        except UserError as error:
            problems.append(str(error))
    return problems


def say(line: str) -> None:
    """Print one line, with escapes for what the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(printable(line).encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    run_main(main)
