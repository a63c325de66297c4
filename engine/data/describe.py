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
    listed = (read_meta(folder) or {}).get("splits", ())
    splits = sorted({*splits_in(folder), *listed})
    if not splits:
        raise UserError(f"{folder} holds no token files")
    n_damaged = 0
    for split in splits:
        file = TokenFile(folder, split)
        n_files = len(file.shards)
        print(
            f"{split}: {len(file):,} tokens of {file.dtype.name} in {n_files:,} files; "
            f"vocabulary of {file.vocab_size:,} ids"
        )
        problems = check_files(file)
        for problem in problems:
            print(f"  damaged: {problem}")
        n_damaged += len(problems)
    if n_damaged:
        sys.exit(2)
    print("all files are good")


def check_files(file: TokenFile) -> list[str]:
    """Read all files of a split; returns a line for each damaged one."""
    problems = []
    begin = 0
    for shard in tqdm(file.shards, leave=False, disable=None):
        end = begin + len(shard)
        try:
            if shard.sha256 not in (None, sha256_of(shard.path)):
                raise UserError(f"the sha256 of {shard.path} is not the one in meta.json")
            for position in range(begin, end, CHUNK):
                file[position : min(position + CHUNK, end)]  # refuses ids outside the vocabulary
        except UserError as error:
            problems.append(str(error))
        begin = end
    return problems


if __name__ == "__main__":
    run_main(main)
