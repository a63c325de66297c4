"""Files that are whole or not there, and folders with one writer."""

import contextlib
import glob
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.base.errors import UserError, warn

DATA_ROOT = Path(__file__).resolve().parents[2] / "data"


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Have write(temporary) make the file beside, flush it to the disk, and give it its name: whoever is killed at any
    instant leaves the old file or the new one. A failure leaves the old one and nothing else."""
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
    """A folder beside, which takes the name `path` once the block is done and all is on the disk: whoever is killed
    before leaves nothing there. A failure leaves nothing at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left in path.parent.glob(
        f".{glob.escape(path.name)}.*.tmp"
    ):  # by one that was killed an hour ago or earlier
        if left.stat().st_mtime < time.time() - 3600:
            shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        os.replace(temporary, path)  # over an empty folder, never over files
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush(path.parent)


def write_json(path: Path, value: object) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1)))


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    return parse_json(path.read_bytes(), str(path))


def read_json_lines(path: Path) -> list[dict]:
    """The objects in a file with one on each line; none where there is no file."""
    lines = enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1)
    return [parse_json(line, f"{path}, line {i},") for i, line in lines if line.strip()]


def parse_json(text: bytes, what: str) -> dict:
    """The object in a JSON text; a UserError that says `what` is damaged where there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{what} is damaged ({error}); mend it, or copy it from its run again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"{what} is damaged (it has no object); mend it, or copy it from its run again"
        )
    return value


def check_writable(folder: Path) -> None:
    """Refuse a folder, there or not yet, that will take no files, before the work whose results go there."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written to; copy the run, or name another folder")


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def exclusive_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock on the file, which is made if need be; where another process holds it, raise UserError(busy).

    The system lets go of it with the process, however that ends."""
    with open(path, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except (
            ImportError,
            OSError,
        ) as error:  # Windows; cluster file systems that are mounted without locks
            warn(
                f"cannot lock {path} ({error}); nothing stops a second process from using this folder"
            )
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            raise UserError(busy)  # whoever held it has removed it meanwhile
        yield
