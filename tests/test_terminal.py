"""Printing where the terminal's encoding is not UTF-8."""

import io
import sys

import pytest

from engine.base.errors import UserError, run_main


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_character_that_the_terminal_lacks_ends_no_script(encoding, fails, monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def main():
        print("中文 prepared")
        if fails:
            raise UserError("数据 is missing")

    code = 0
    try:
        run_main(main)
    except SystemExit as exit_:
        code = exit_.code
    for stream in streams.values():
        stream.flush()
    output, error = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
    assert "prepared" in output and code == 2 * fails
    assert ("missing" in error) == fails
