"""Do the tests notice faults? Tries known ones in a copy of what git has, one at a time: first
`git add` your changes.

    python -m tests.mutants              # all
    python -m tests.mutants --only=3,17  # these two

tests/mutants.json has two parts. "mutants" are the faults; the old text of each must occur exactly
once in its file. "tests" are the test files to run, by the path that a faulty file begins with. A
fault is caught if one of them fails, and passes without the fault.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED = 0, 1  # exit codes of pytest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="numbers of mutants, commas between")
    only = parser.parse_args().only
    about = json.loads((ROOT / "tests" / "mutants.json").read_text())
    mutants = dict(enumerate(about["mutants"], 1))
    for mutant in mutants.values():
        mutated(mutant)
    survivors = []
    numbers = [int(number) for number in only.split(",")] if only else list(mutants)
    for number in numbers:
        mutant = mutants[number]
        failed = first_failure(mutant, tests_of(mutant["file"], about["tests"]))
        if not failed:
            survivors.append(number)
        verdict = "caught" if failed else "SURVIVED"
        print(f"{number:2} {verdict:8} {mutant['file']}: {mutant['fault']}")
        print(f"   {failed}", flush=True)
    print(f"{len(numbers) - len(survivors)} of {len(numbers)} caught; survivors: {survivors}")
    sys.exit(bool(survivors))


def mutated(mutant: dict[str, str], root=ROOT) -> str:
    """The text of the file in this folder, with the fault."""
    text = Path(root, mutant["file"]).read_text(encoding="utf-8")
    n_found = text.count(mutant["old"])
    if n_found != 1:
        where = f"{mutant['fault']!r}: {mutant['file']}"
        raise SystemExit(f"{where} has the old text {n_found} times, not once")
    return text.replace(mutant["old"], mutant["new"])


def tests_of(file: str, tests: dict[str, str]) -> list[str]:
    """The arguments of pytest for the first path that `file` begins with."""
    return next(shlex.split(words) for path, words in tests.items() if file.startswith(path))


def first_failure(mutant: dict[str, str], tests: list[str]) -> str:
    """The first test that fails with the fault; empty if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        # all that git has
        subprocess.run(["git", "checkout-index", "-a", f"--prefix={folder}/"], cwd=ROOT, check=True)
        path = Path(folder, mutant["file"])
        correct = path.read_text(encoding="utf-8")
        path.write_text(mutated(mutant, folder), encoding="utf-8")
        failed = failure(folder, tests)
        path.write_text(correct, encoding="utf-8")
        if failed and failure(folder, [failed]):
            raise SystemExit(f"{failed} fails without a fault, too")
    return failed


def failure(folder: str, arguments: list[str]) -> str:
    """The first test that fails in this copy of the repository; empty if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-p", "no:cacheprovider"]
    shared_data = os.environ.get("SHARED_DATA") or str(ROOT.parent / "shared" / "data")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SHARED_DATA": shared_data}
    result = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    if result.returncode == PASSED:
        return ""
    if result.returncode == FAILED:
        for line in result.stdout.splitlines():
            if line.startswith(("FAILED ", "ERROR ")):
                return line.partition(" ")[2].partition(" - ")[0]
    raise SystemExit(f"pytest did not run: {result.stderr}\n{result.stdout[-2000:]}")


if __name__ == "__main__":
    main()
