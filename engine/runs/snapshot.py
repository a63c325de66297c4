"""The code that a run ran, kept in its folder: code.zip, the repository's Python and the config files given to it; and
what config.json tells of the starts."""

import contextlib
import itertools
import json
import shlex
import sys
import zipfile
import zlib
from collections.abc import Collection, Container, Iterable
from pathlib import Path

from engine.base.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
CODE = (
    "*.py",
    "heads/*.py",
    "engine/*.py",
    "engine/*/*.py",
    "study/*.py",
    "augmentation/*.py",
    "data/*/prepare.py",
)
# what zipfile raises at bytes that are no archive: the two at the end at flags and methods that it does not know
DAMAGED = (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError)
GIVEN = (
    "config/",
    "given/",
)  # where config files lie in the archive; they are no code: their options are compared


def command() -> str:
    """The command line, its script without the folder that it lies in."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def starts(out_dir: Path) -> list[dict]:
    """What config.json tells of each start of the run so far; [] where there is none, or no whole one. One of before
    starts were kept has the newest alone, and no step."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        written = json.loads((out_dir / "config.json").read_text())
        known = (
            written.get("starts", [written.get("environment")])
            if isinstance(written, dict)
            else None
        )
        return (
            [start for start in known if isinstance(start, dict)] if isinstance(known, list) else []
        )
    return []


def save_code(
    out_dir: Path, step: int, config_files: Iterable[Path], last: str = "code.zip"
) -> tuple[str, str]:
    """Keep the code as code.zip, or that of a run which goes on at step > 0, where no archive has it yet, beside as
    code_<step>.zip. last: the archive of the start before. Returns the archive's name, and a line on how the code
    differs from that of the last start, "" where it does not or nobody knows."""
    code = {str(path.relative_to(ROOT)): path for pattern in CODE for path in ROOT.glob(pattern)}
    now = {name: path.read_bytes() for name, path in code.items()}
    known = {path: _code_in(path) for path in (sorted(out_dir.glob("code*.zip")) if step else [])}
    path, changed = next((path for path, there in known.items() if there == now), None), []
    if before := known.get(out_dir / last):
        changed = sorted(
            name for name in now.keys() | before.keys() if now.get(name) != before.get(name)
        )
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    line = (
        f"the code has changed since the last start: {', '.join(changed[:3])}{more}"
        if changed
        else ""
    )
    if not path:
        path = out_dir / (
            _free_name(f"code_{step:08d}.zip", {path.name for path in known})
            if step
            else "code.zip"
        )
        atomic_write(
            path, lambda temporary: _write(temporary, code | _configs(config_files, code.values()))
        )
        line += f"; kept as {path.name}" if line else ""
    return path.name, line


def _configs(given: Iterable[Path], code: Collection[Path]) -> dict[str, Path]:
    """The config files, wherever they lie, what they import from beside them, and those of ours that they import."""
    given = [Path(path).resolve() for path in given]
    folders = {ROOT / "config", *(path.parent for path in given)}
    files = [getattr(module, "__dict__", {}).get("__file__") for module in sys.modules.values()]
    imported = [Path(file).resolve() for file in files if isinstance(file, str)]
    found = {}
    for path in dict.fromkeys([*given, *(path for path in imported if path.parent in folders)]):
        if path.is_file() and path not in code:
            ours = path.is_relative_to(ROOT / "config")
            found[
                str(path.relative_to(ROOT)) if ours else _free_name(f"given/{path.name}", found)
            ] = path
    return found


def _free_name(name: str, taken: Container[str]) -> str:
    """The name, with _2, _3 ... before its suffix where it is taken."""
    stem, suffix = name.rsplit(".", 1)
    names = (f"{stem}_{i}.{suffix}" for i in itertools.count(2))
    return name if name not in taken else next(name for name in names if name not in taken)


def _write(temporary: Path, files: dict[str, Path]) -> None:
    """The same bytes for the same files, whenever it is written."""
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name), files[name].read_bytes(), zipfile.ZIP_DEFLATED)


def _code_in(path: Path) -> dict[str, bytes]:
    """The code in an archive, by name; {} where there is none, or no whole one."""
    with contextlib.suppress(*DAMAGED), zipfile.ZipFile(path) as archive:
        return {
            name: archive.read(name) for name in archive.namelist() if not name.startswith(GIVEN)
        }
    return {}
