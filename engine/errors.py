"""One exception for what a user got wrong, and the one place that turns it into a line on stderr."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can mend; its message is one line that says how."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the training to end, and all processes have agreed to."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


def run(main: Callable[[], object]) -> None:
    """Run a script's main(): a UserError or OSError ends in one line and exit code 2, a signal in 128 + its number."""
    try:
        main()
    except (UserError, OSError) as error:  # OSError: a file or folder that cannot be read or written
        sys.exit(_say(f"error: {error}", 2))
    except KeyboardInterrupt as interrupt:
        sys.exit(128 + interrupt.signum if isinstance(interrupt, Interrupted) else _say("interrupted", 130))
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not any(word in str(error) for word in LOST):
            raise
        sys.exit(
            _say(f"error: lost another process ({str(error).splitlines()[0][-120:]}); its own message says why", 1)
        )


def warn(message: str) -> None:
    """Say it once, however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


# what gloo, NCCL and the store say when the process at the other end is gone
LOST = (
    "onnection closed by peer",
    "onnection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)


def _say(message: str, code: int) -> int:
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(rank + message, file=sys.stderr)
    return code
