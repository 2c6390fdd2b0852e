"""What may stand behind a verb, and its help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from train.errors import BadInput

PROGRAM = "python -m launcher"


@dataclass(frozen=True)
class Request:
    """The words behind a verb, and its options."""

    words: list[str]
    json: bool = False
    follow: bool = False
    wait: bool = False

    def places(self, *, names: int = 1) -> tuple[list[str], Path, Path | None]:
        """The words that are names, the root, and the cache if one is given, for verbs that look at what exists.

        Raises:
            BadInput: more than `names` names, another ``key=value`` than root= and cache=, or one of these is empty.
        """
        from train.store.storage import named_folder

        found = {"root": "runs"}
        rest = []
        for word in self.words:
            key, equals, value = word.partition("=")
            if equals and key in {"root", "cache"}:
                found[key] = value
            else:
                rest.append(word)
        _refuse_excess(rest, names)
        root, cache = named_folder("root", found["root"]), found.get("cache")
        return rest, root, None if cache is None else named_folder("cache", cache)


@dataclass(frozen=True)
class Verb:
    """One verb: its function gives the program's exit code. `summary` is its line in the help of the program."""

    function: Callable[[Request], int]
    takes: str
    summary: str
    more: str = ""
    json: bool = False
    follow: bool = False
    wait: bool = False


def parse(name: str, verb: Verb, arguments: list[str]) -> Request:
    """Read what stands behind a verb.

    Raises:
        BadInput: an unknown option.
        SystemExit: ``-h`` printed the verb's help.
    """
    parsed = _parser(name, verb).parse_intermixed_args(arguments)
    return Request(
        parsed.words, getattr(parsed, "json", False), getattr(parsed, "follow", False), getattr(parsed, "wait", False)
    )


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are this project's."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; '{self.prog} -h' lists the options.")


def _parser(name: str, verb: Verb) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"{PROGRAM} {name}".strip(),
        usage=f"{PROGRAM} {' '.join(filter(None, [name, verb.takes]))} [options]",
        description=f"{verb.summary}.",
        epilog=verb.more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar=verb.takes or "key=value", help=argparse.SUPPRESS)
    if verb.json:
        parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    if verb.follow:
        parser.add_argument("-f", "--follow", action="store_true", help="keep printing what is written from now on")
    if verb.wait:
        parser.add_argument("--wait", action="store_true", help="on Slurm: stay until the jobs have ended, then report")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _refuse_excess(words: list[str], names: int) -> None:
    setting = next((word for word in words if "=" in word and names < 2), None)
    if setting is not None:
        raise BadInput(f"{setting!r} has no effect here; this verb takes root= and a name.")
    if len(words) > names:
        raise BadInput(f"{words[names]!r} is one word too many; put quotes around a name or prompt that has spaces.")
