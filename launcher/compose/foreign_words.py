"""Options and first words of other tools on the command line, and what to type here.

Light: every command passes through here, so Hydra and pydantic are imported only where a key has to be found.
"""

from __future__ import annotations

import difflib
import shlex

from launcher.arguments import PROGRAM
from train.errors import BadInput

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
# First words of other tools, and what to type here.
SETTINGS_FILE = "settings come from a file of a group, such as sweep=mine for conf/sweep/mine.yaml"
FOREIGN_VERBS = {
    **dict.fromkeys(
        ("train", "run", "start", "launch", "fit", "finetune", "sft", "submit"),
        f"training needs no verb: '{PROGRAM} sweep=rank'",
    ),
    **dict.fromkeys(("stop", "kill", "scancel"), "write 'cancel'"),
    **dict.fromkeys(("eval", "evaluate", "test", "compare"), "runs are evaluated while they train; write 'report'"),
    **dict.fromkeys(("export", "merge_lora"), "write 'merge'"),
    **dict.fromkeys(("generate", "infer", "inference", "predict", "ask"), "write 'chat'"),
    **dict.fromkeys(("log", "tail"), "write 'logs'"),
    **dict.fromkeys(("ls", "sweeps", "runs"), "write 'list'"),
    **dict.fromkeys(("download", "fetch", "prepare"), "write 'stage'"),
    **dict.fromkeys(("config", "params", "parameters"), "write 'keys'"),
    **dict.fromkeys(("squeue", "show", "watch"), "write 'status'"),
}


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
    from launcher.compose.suggestions import nearest_key, other_way, suggestion

    if name.startswith("--") and (nearest_key(name) is not None or other_way(name) is not None):
        raise BadInput(f"{name} is not an option; settings are key=value{suggestion(name, value)}")


def unknown_verb(name: str, arguments: list[str], verbs: list[str]) -> str:
    """What the first word may have meant: a key and its value, another tool's verb, or a verb with a slip in it."""
    from launcher.compose.checks import joined_words
    from launcher.compose.suggestions import suggestion

    rest = arguments[arguments.index(name) + 1 :]
    joined = joined_words(name, [word for word in rest if not word.startswith("-")])
    near = difflib.get_close_matches(name, verbs, n=1)
    if name in FOREIGN_VERBS:
        hint = f"; {FOREIGN_VERBS[name]}."
    elif name.endswith((".yaml", ".yml")):
        hint = f"; {SETTINGS_FILE}."
    elif near:
        hint = f"; did you mean {near[0]!r}?"
    elif joined is not None:
        hint = f"; a key and its value are one word: write {shlex.quote(joined)}."
    else:
        hint = suggestion(name, "...")
    return f"unknown verb {name!r}{hint} Verbs are {', '.join(verbs)}; settings look like lora.r=8."
