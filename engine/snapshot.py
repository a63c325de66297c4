"""The code that a run ran, kept in its folder: code.zip, the repository's Python and the config files given to it."""

import contextlib
import shlex
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from engine.files import replace

ROOT = Path(__file__).resolve().parents[1]
CODE = ("*.py", "engine/*.py", "augmentation/*.py", "data/*/prepare.py")
GIVEN = ("config/", "given/")  # where config files lie in the archive; they are no code: their options are compared


def command() -> str:
    """The command line, its script without the folder that it lies in."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def save_code(out_dir: Path, step: int, config_files: Iterable[Path]) -> str:
    """Write code.zip; what a run that goes on at step > 0 has otherwise is kept beside, as code_<step>.zip. Returns a
    line on how the code differs from that of the beginning, "" where it does not or nobody knows."""
    code = {str(path.relative_to(ROOT)): path for pattern in CODE for path in ROOT.glob(pattern)}
    first, newer = out_dir / "code.zip", out_dir / f"code_{step:08d}.zip"
    path, changed = (newer if step else first), []
    if step:
        now = {name: path.read_bytes() for name, path in code.items()}
        if now in [_code_in(saved) for saved in out_dir.glob("code_*.zip")]:
            path = None
        before = _code_in(first)
        changed = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
        path = path if changed else None
        changed = changed if before else []
    if path:
        replace(path, lambda temporary: _write(temporary, code | _configs(config_files)))
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    kept = f"; kept as {path.name}" if path else ""
    return f"the code has changed since the run began: {', '.join(changed[:3])}{more}{kept}" if changed else ""


def _configs(given: Iterable[Path]) -> dict[str, Path]:
    """The config files, wherever they lie, and those of ours that they import."""
    imported = [getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith("config.")]
    found = {}
    for path in [Path(path).resolve() for path in (*given, *filter(None, imported)) if Path(path).is_file()]:
        ours = path.is_relative_to(ROOT / "config")
        found[str(path.relative_to(ROOT)) if ours else f"given/{path.name}"] = path
    return found


def _write(temporary: Path, files: dict[str, Path]) -> None:
    """The same bytes for the same files, whenever it is written."""
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name), files[name].read_bytes(), zipfile.ZIP_DEFLATED)


def _code_in(path: Path) -> dict[str, bytes]:
    """The code in an archive, by name; {} where there is none, or no whole one."""
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.startswith(GIVEN)}
    return {}
