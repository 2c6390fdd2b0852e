"""Journals and other ``.jsonl`` files as a test reads them: plain objects, whatever the models say."""

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a line that is just being written, and a missing file, count as nothing."""
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
