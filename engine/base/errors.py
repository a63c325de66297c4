"""One exception for a user's mistakes, and the one place that turns it into a line on stderr."""

import io
import os
import sys
from collections.abc import Callable

# what CUDA and a CPU's allocator say; torch has an exception of its own for CUDA alone
NO_MEMORY = ("out of memory", "can't allocate memory")
# what gloo, NCCL and the store say when the process at the other end is gone
LOST_PEER = (
    "onnection closed by peer",
    "onnection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)


class UserError(Exception):
    """A mistake that the user can correct; the message is one line that says how."""

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback (IPython calls this method)."""
        return [f"error: {self}"]


class Diverged(UserError):
    """Training has failed; a study continues with its other runs."""

    exit_code = 3


class Interrupted(KeyboardInterrupt):
    """A signal asked the training to end, and all processes have agreed to."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


def run_main(main: Callable[[], object]) -> None:
    """Run a script's main() and end the process. A UserError, OSError or lack of memory is one line
    and exit code 2, a diverged training 3, a signal 128 + its number.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # characters that the terminal lacks are printed as escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        _exit(0)
    except BrokenPipeError:  # `| head` has seen enough; flushing at the end must not fail
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
        if _has_peers() and any(words in text for words in LOST_PEER):
            _print_error(f"error: lost another process ({reason}); its own message says why")
            sys.exit(1)
        raise


def warn(message: str) -> None:
    """Print a warning, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


def _has_peers() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _exit(code: int) -> None:
    """End. One process of several does so at once: gloo's threads may abort an interpreter that
    shuts down (seen once in some hundred runs).
    """
    if _has_peers():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _print_error(message: str) -> None:
    rank = f"[rank {os.environ.get('RANK', 0)}] " if _has_peers() else ""
    print(rank + " ".join(message.splitlines()), file=sys.stderr)
