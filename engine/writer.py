"""Documents in, token files out: the one place that writes them. engine/tokens.py reads them and says what they are."""

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from engine.errors import UserError
from engine.files import write_json
from engine.tokenizer import Tokenizer


def write_dataset(folder: str | Path, splits: Mapping[str, Iterable[str]], tokenizer: Tokenizer) -> dict:
    """Write each split's documents to <folder>/<split>.bin and describe them in meta.json; returns that description.

    All is written beside first, so that a failure leaves the folder as it was. Then meta.json comes before the token
    files: whoever is killed in between leaves counts that do not match, which TokenFile refuses.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    try:
        described = {
            name: _write_split(folder / f"{name}.tmp", docs, tokenizer, dtype) for name, docs in splits.items()
        }
    except BaseException:
        for split in splits:
            (folder / f"{split}.tmp").unlink(missing_ok=True)
        raise
    meta = {
        "tokenizer": tokenizer.describe(),
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        "splits": described,
    }
    write_json(folder / "meta.json", meta)
    tokenizer.save(folder)
    for split in described:
        os.replace(folder / f"{split}.tmp", folder / f"{split}.bin")
    for split in {"train", "val", "test"} - set(described):  # of an earlier preparation, with other ids
        (folder / f"{split}.bin").unlink(missing_ok=True)
    return meta


def _write_split(path: Path, documents: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype) -> dict:
    started, n_tokens, n_bytes, n_documents, sha256 = time.perf_counter(), 0, 0, 0, hashlib.sha256()
    with open(path, "wb") as file:
        for document in documents:
            if not document:
                continue
            ids = tokenizer.encode(document).astype(dtype)
            if n_documents:  # end-of-text stands between documents, so one document alone has none
                if tokenizer.eot is None:
                    raise UserError("several documents need a tokenizer with an end-of-text token")
                ids = np.concatenate([np.array([tokenizer.eot], dtype), ids])
            file.write(data := ids.tobytes())
            sha256.update(data)
            n_documents, n_tokens, n_bytes = n_documents + 1, n_tokens + len(ids), n_bytes + len(document.encode())
        file.flush()
        os.fsync(file.fileno())
    if not n_tokens:
        raise UserError(f"there is no text for the {path.stem} split; give more text or another --val_fraction")
    seconds = time.perf_counter() - started
    print(f"{path.stem}.bin: {n_documents:,} documents, {n_bytes:,} bytes, {n_tokens:,} tokens in {seconds:.1f} s")
    return {"documents": n_documents, "tokens": n_tokens, "bytes": n_bytes, "sha256": sha256.hexdigest()}
