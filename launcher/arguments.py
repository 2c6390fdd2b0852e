"""What may stand behind a verb, and its help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from train.errors import BadInput

PROGRAM = "python -m launcher"

OPTIONS = {"-h", "--help", "--json", "-f", "--follow", "--wait", "--debug"}
# Options of Hydra and other launchers, and what to type here.
FOREIGN_OPTIONS = {
    **dict.fromkeys(("-m", "--multirun"), "Leave it out: several values of a key make a sweep, as in lora.r=8,16"),
    **dict.fromkeys(
        ("-c", "--cfg", "--info", "-i", "--resolve"),
        f"'{PROGRAM} keys' prints every key with its default, and '{PROGRAM} plan ...' what would be trained",
    ),
    **dict.fromkeys(
        ("-cn", "--config-name", "-cp", "--config-path", "-cd", "--config-dir"),
        "Choose a file of a group instead, as in sweep=rank for conf/sweep/rank.yaml",
    ),
    **dict.fromkeys(
        ("--config", "--config-file", "--yaml"),
        "Choose a file of a group, as in sweep=rank, or give single values, as in lora.r=8",
    ),
    **dict.fromkeys(("-p", "--package", "-r", "--run", "-sc", "--shell-completion"), "Leave it out"),
    **dict.fromkeys(
        ("-n", "--dry-run", "--dryrun"), f"'{PROGRAM} plan ...' shows what would be trained and changes nothing"
    ),
    **dict.fromkeys(("-v", "--verbose"), "--debug shows the traceback of an error"),
    "--hydra-help": f"'{PROGRAM} -h' explains the program",
}


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
    refuse_foreign_options(arguments)
    parsed = _parser(name, verb).parse_intermixed_args(arguments)
    return Request(
        parsed.words, getattr(parsed, "json", False), getattr(parsed, "follow", False), getattr(parsed, "wait", False)
    )


def refuse_foreign_options(arguments: list[str]) -> None:
    """Answer options of other tools, such as ``-m`` and ``--lr 1e-4``, with what to type here.

    Raises:
        BadInput: there is one.
    """
    for i, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if not word.startswith("-") or name in OPTIONS:
            continue
        if name in FOREIGN_OPTIONS:
            raise BadInput(f"{name} is not an option here. {FOREIGN_OPTIONS[name]}.")
        following = next(iter(arguments[i + 1 : i + 2]), "")
        is_flag = not following or "=" in following or following.startswith("--")
        _refuse_option_for_key(name, value if equals else "true" if is_flag else following)


def _refuse_option_for_key(name: str, value: str) -> None:
    """Refuse ``--lr 1e-4`` where a key of the configuration is meant."""
    from launcher.compose.suggestions import nearest_key, suggestion

    if name.startswith("--") and nearest_key(name) is not None:
        raise BadInput(f"{name} is not an option; settings are key=value{suggestion(name, value)}")


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
