"""Files that grow by lines, after a writer that was killed inside a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.store.storage import append_lines

WHOLE = b'{"step":1}\n'


@pytest.mark.parametrize("whole", [b"", WHOLE, WHOLE * 20_000], ids=["no line", "one line", "many lines"])
@pytest.mark.parametrize("torn_bytes", [0, 1, 1 << 16, (1 << 16) + 1, 200_000])
def test_appending_cuts_off_a_torn_line_of_any_length(tmp_path: Path, whole: bytes, torn_bytes: int) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(whole + b'{"samples":"'.ljust(torn_bytes, b"x")[:torn_bytes])
    append_lines(path, [{"step": 2}])
    assert path.read_bytes() == whole + b'{"step":2}\n'
