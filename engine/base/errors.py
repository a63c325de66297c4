"""One exception for what a user got wrong, and the one place that turns it into a line on stderr."""

import os
import sys
from collections.abc import Callable, Mapping

MANY = 10**12  # steps, blocks, tokens ...: whoever asks for more has made a slip


class UserError(Exception):
    """A mistake that the user can mend; its message is one line that says how."""

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it (IPython asks for this by its name): the line, without the calls behind it."""
        return [f"error: {self}"]


class Diverged(UserError):
    """A training that has come to nothing; a study of several goes on without it."""

    exit_code = 3


class Interrupted(KeyboardInterrupt):
    """A signal asked the training to end, and all processes have agreed to."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


def run_main(main: Callable[[], object]) -> None:
    """Run a script's main(): a UserError, OSError or lack of memory ends in one line and exit code 2, or 3 if training
    diverged, a signal in 128 + its number."""
    try:
        main()
        _leave(0)
    except BrokenPipeError:  # `| head` has seen enough; nothing may be flushed to it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as of SIGPIPE
    except (
        UserError,
        OSError,
    ) as error:  # OSError: a file or folder that cannot be read or written
        sys.exit(_say(f"error: {error}", getattr(error, "exit_code", 2)))
    except KeyboardInterrupt as interrupt:
        _leave(
            128 + interrupt.signum
            if isinstance(interrupt, Interrupted)
            else _say("interrupted", 130)
        )
    except (MemoryError, RuntimeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][-120:]
        if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
            way_out = "lower --batch_size, --block_size or the size of the model"
            sys.exit(_say(f"error: out of memory ({said}); {way_out}", 2))
        if os.environ.get("WORLD_SIZE", "1") == "1" or not any(
            words in str(error) for words in LOST
        ):
            raise
        sys.exit(_say(f"error: lost another process ({said}); its own message says why", 1))


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
            raise UserError(
                f"{what} takes {n_bytes // 10**9:,} GB, this machine has {memory // 10**9:,}; {way_out}"
            )


def warn(message: str) -> None:
    """Say it once, however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


# what CUDA and a CPU's allocator say; torch has an exception of its own for CUDA alone
NO_MEMORY = ("out of memory", "can't allocate memory")
# what gloo, NCCL and the store say when the process at the other end is gone
LOST = (
    "onnection closed by peer",
    "onnection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)


def _leave(code: int) -> None:
    """End, if there is more to say than the script's last line. One process of several does so at once: while the
    interpreter takes itself apart, threads of gloo may still run, and abort it (seen once in some hundred runs)."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _say(message: str, code: int) -> int:
    rank = f"[rank {os.environ.get('RANK')}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(rank + " ".join(message.splitlines()), file=sys.stderr)
    return code
