"""Print what a data folder holds, and check the hashes, sizes and ids of all its files.

python -m engine.data.describe data/wikitext
"""

import sys

from tqdm import tqdm

from engine.base.errors import UserError, run_main
from engine.base.files import sha256_of
from engine.data.shards import splits_in
from engine.data.tokenizer import read_meta
from engine.data.tokens import CHUNK, TokenFile, dataset_folder


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("give one data folder: python -m engine.data.describe data/wikitext")
    folder = dataset_folder(sys.argv[1])
    splits = (read_meta(folder) or {}).get("splits") or splits_in(folder)
    if not splits:
        raise UserError(f"{folder} holds no token files")
    for split in splits:
        file = TokenFile(folder, split)
        n_files = len(file.shards)
        print(
            f"{split}: {len(file):,} tokens of {file.dtype.name} in {n_files:,} files; "
            f"vocabulary of {file.vocab_size:,} ids"
        )
        check_files(file)
    print("all files are good")


def check_files(file: TokenFile) -> None:
    """Read all files of a split, and refuse a damaged one."""
    for shard in tqdm(file.shards, leave=False, disable=None):
        if shard.sha256 not in (None, sha256_of(shard.path)):
            raise UserError(f"the sha256 of {shard.path} is not the one in meta.json")
    for position in range(0, len(file), CHUNK):
        file[position : position + CHUNK]  # refuses ids outside the vocabulary


if __name__ == "__main__":
    run_main(main)
