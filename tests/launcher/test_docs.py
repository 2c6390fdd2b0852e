"""The pages: every link and anchor resolves, and the messages that docs/troubleshooting.md is searched by are in the code.

The maps for contributors name the files there are.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from launcher.installation import SOURCE_DIR

PAGES = [*SOURCE_DIR.glob("*.md"), *SOURCE_DIR.glob("docs/*.md"), *SOURCE_DIR.glob("tests/**/*.md")]
LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)\"""")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
WHERE = "FILE:LINE: …"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(SOURCE_DIR)))
def test_every_link_resolves(page: Path) -> None:
    links = [first or second for first, second in LINK.findall(CODE.sub("", page.read_text()))]
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def strings(path: Path) -> list[str]:
    """The texts of a module; a value within one becomes a character that is in no message."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    modules = [path for name in ("launcher", "train") for path in (SOURCE_DIR / name).rglob("*.py")]
    texts = "\n".join(text for path in modules for text in strings(path))
    headings = re.findall(r"^### (.+)$", (SOURCE_DIR / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [quote for heading in headings for quote in re.findall(r"`([^`]+)`", heading) if quote != WHERE]
    pieces = [piece.strip(" :,;'=") for quote in quoted for piece in quote.split("…")]
    assert len(pieces) > 60
    assert [piece for piece in pieces if len(piece) > 6 and piece not in texts] == []


ROOMS = [init.parent for name in ("launcher", "train") for init in (SOURCE_DIR / name).rglob("__init__.py")]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(SOURCE_DIR)))
def test_a_rooms_docstring_names_each_of_its_modules(room: Path) -> None:
    map_of_room = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    modules = {path.stem for path in room.glob("*.py")} - {"__init__", "__main__"}
    assert {module for module in modules if not re.search(rf"\b{module}\b", map_of_room)} == set()


def test_contributing_names_files_that_exist() -> None:
    text = (SOURCE_DIR / "CONTRIBUTING.md").read_text().partition("## Where does it belong?")[2]
    named = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|js|yaml|md))`", text)
    folders = [SOURCE_DIR / name for name in ("train", "launcher", "tests", "conf", "docs")]
    files = [f"/{path.relative_to(SOURCE_DIR)}" for folder in folders for path in folder.rglob("*.*")]
    assert len(named) > 40
    assert [name for name in named if not any(file.endswith(f"/{name}") for file in files)] == []
