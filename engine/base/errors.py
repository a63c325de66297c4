"""The exception for a user's mistakes, and the function that prints it as one line on stderr."""

import io
import os
import sys
from collections.abc import Callable

# in the messages of CUDA and of the CPU's allocator; torch has an exception only for CUDA
NO_MEMORY = ("out of memory", "can't allocate memory")


class UserError(Exception):
    """A mistake that the user can correct. The message is one line that says how."""

    exit_code = 2

    def _render_traceback_(self):
        """The lines that a notebook shows instead of a traceback; IPython calls this."""
        return [f"error: {self}"]


class Diverged(UserError):
    """Training diverged. A study continues with its other runs."""

    exit_code = 3


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end, and all processes agreed."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


def run_main(main: Callable[[], object]) -> None:
    """Run a script's main() and exit.

    A UserError, an OSError or a lack of memory prints one line and exits with 2, a diverged run
    with 3, a signal with 128 + its number.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # characters that the terminal lacks are printed as escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        _exit(0)
    except BrokenPipeError:  # `| head` has ended; flushing stdout at exit must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as after SIGPIPE
    except (UserError, OSError) as error:
        _print_error(f"error: {error}")
        sys.exit(getattr(error, "exit_code", 2))
    except Interrupted as interrupt:
        _exit(128 + interrupt.signum)
    except KeyboardInterrupt:
        _print_error("interrupted")
        _exit(130)
    except (MemoryError, RuntimeError) as error:
        text = str(error) or type(error).__name__
        reason = text.splitlines()[0][-120:]
        if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
            advice = "lower --batch_size, --block_size or the size of the model"
            _print_error(f"error: out of memory ({reason}); {advice}")
            sys.exit(2)
        raise


def warn(message: str) -> None:
    """Print a warning, on the main process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


def _has_peers():
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _exit(code):
    """Exit. With several processes exit at once: gloo's threads may abort an interpreter that shuts
    down (seen once in some hundred runs).
    """
    if _has_peers():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _print_error(message):
    rank = f"[rank {os.environ.get('RANK', 0)}] " if _has_peers() else ""
    print(rank + " ".join(message.splitlines()), file=sys.stderr)
