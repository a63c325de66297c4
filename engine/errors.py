"""One exception for what a user got wrong, and the one place that turns it into a line on stderr."""

import os
import sys
from collections.abc import Callable, Mapping

MANY = 10**12  # steps, blocks, tokens ...: whoever asks for more has made a slip


class UserError(Exception):
    """A mistake that the user can mend; its message is one line that says how."""


def run(main: Callable[[], object]) -> None:
    """Run a script's main(): a UserError, OSError or lack of memory ends in one line and exit code 2, Ctrl-C in 130."""
    try:
        main()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = str(error)
        if not isinstance(error, UserError | OSError):  # an OSError is a file or folder that cannot be read or written
            if not _is_memory(error):
                raise
            message = f"out of memory; lower --batch_size, --block_size or the size of the model ({message[:120]})"
        rank = f"[rank {os.environ.get('RANK')}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"{rank}error: {' '.join(message.splitlines())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def check_ranges(options: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse options below the least or above the most that the ranges give them; nan is neither."""
    for name, (least, most) in ranges.items():
        value = getattr(options, name)
        if not value >= least:
            raise UserError(f"{name} = {value} must be at least {least}")
        if value > most:
            raise UserError(f"{name} = {value} must be at most {most:,}")


def check_memory(n_bytes: int, what: str, way_out: str) -> None:
    """Refuse what this machine cannot hold, before the attempt has filled its memory."""
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if n_bytes > memory:
            raise UserError(f"{what} takes {n_bytes // 10**9:,} GB, this machine has {memory // 10**9:,}; {way_out}")


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out; torch has an exception for that on CUDA alone, elsewhere it is in the words."""
    said = str(error)
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said
