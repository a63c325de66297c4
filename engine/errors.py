"""One exception for what a user got wrong, and the one place that turns it into a line on stderr."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can mend; its message is one line that says how."""


def run(main: Callable[[], object]) -> None:
    """Run a script's main(): a UserError or OSError ends in one line and exit code 2, Ctrl-C in exit code 130."""
    try:
        main()
    except UserError as error:
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"{rank}error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a file or folder that cannot be read or written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
