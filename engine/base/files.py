"""Atomic writes, JSON, and locks."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.base.errors import UserError, warn

DATA_ROOT = Path(__file__).resolve().parents[2] / "data"


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file atomically: write(temporary) writes a new one, which is renamed once it is on
    the disk. Whenever the process fails or is killed, the old file or the new one is there.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `path` at the end of the block, once it is on the disk.

    A failure leaves nothing. The next call removes the folder that a killed process left."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        os.replace(temporary, path)  # replaces an empty folder, never one with files
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1))


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    return parse_json(path.read_bytes(), str(path))


def read_json_lines(path: Path) -> list[dict]:
    """The objects in a file with one on each line; none if the file does not exist."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    objects = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            objects.append(parse_json(line, f"{path}, line {number},"))
    return objects


def parse_json(text: bytes, what: str) -> dict:
    """The object in a JSON text; a UserError that names `what` if there is none."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is damaged ({error}); restore it from a copy") from None
    return value


def check_writable(folder: Path, option: str = "out_dir") -> None:
    """Check that the output folder, which may not exist yet, is writable.

    option: the one that names another folder."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{folder} is not writable; give another folder with --{option}")


def sha256_of(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            sha256.update(chunk)
    return sha256.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def exclusive_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock on the file, which is made if needed; UserError(busy) if another process has it.

    The system releases the lock whenever the process ends."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as error:  # a file system without locks
            warn(f"cannot lock {path} ({error}): another process could use this folder, too")
        is_current = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        if not is_current:
            raise UserError(busy)  # the process that held the lock has deleted the file
        yield
