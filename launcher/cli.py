"""``python -m launcher [VERB] [key=value …]``: finds the verb, runs it, and turns errors into a paragraph and an exit code.

Exit codes: 0; 2 for a mistake of the user; 1 for anything that failed; 130 after Ctrl-C. Light: a verb imports what it needs.
"""

from __future__ import annotations

import sys
import textwrap
import tomllib
from importlib.metadata import PackageNotFoundError, version

from launcher import verbs
from launcher.arguments import PROGRAM, Verb, parse
from launcher.compose.foreign_words import refuse_foreign_options, unknown_verb
from launcher.installation import SOURCE_DIR, conf_folders, find_groups
from train.errors import BadInput, LorapackError

OVERRIDES = "[key=value ...]"

VERBS = {
    "": Verb(
        verbs.train,
        OVERRIDES,
        "Compose a sweep, plan it, train what is missing, compare all",
        """examples:
  python -m launcher sweep=rank
  python -m launcher sweep=rank model=llama2_7b data=alpaca
  python -m launcher 'sweep.grid={lora.r:[8,16],train.learning_rate:[1e-4,3e-4]}'

Ctrl-C saves a checkpoint; the same command continues from it.""",
        json=True,
        wait=True,
    ),
    "plan": Verb(
        verbs.plan,
        OVERRIDES,
        "Show what would be trained, in which packs, and change nothing",
        "example:\n  python -m launcher plan sweep=rank_alpha train.max_steps=200",
        json=True,
    ),
    "stage": Verb(
        verbs.stage,
        OVERRIDES,
        "Fetch the model and tokenize the data into the cache, and train nothing",
        "example:\n  python -m launcher stage model=llama2_7b data=alpaca cache=/shared/cache",
        json=True,
    ),
    "status": Verb(
        verbs.status,
        "[SWEEP] [root=DIR]",
        "Show where every run is: state, step, loss, speed, how it last ended",
        json=True,
    ),
    "list": Verb(verbs.list_sweeps, "[root=DIR]", "List the sweeps below the root", json=True),
    "logs": Verb(verbs.logs, "[RUN] [root=DIR]", "Print what the jobs of a run wrote", json=True, follow=True),
    "cancel": Verb(
        verbs.cancel, "[SWEEP or RUN] [root=DIR]", "Stop runs in training; each saves a checkpoint first", json=True
    ),
    "resume": Verb(
        verbs.resume,
        "[SWEEP] [root=DIR]",
        "Train what is unfinished in a sweep, failed runs too, packed afresh",
        "It uses the configurations that are frozen in the sweep's folder.",
        json=True,
        wait=True,
    ),
    "report": Verb(
        verbs.report, "[SWEEP] [root=DIR]", "Rank the finished runs; write report.html and plots/*.png", json=True
    ),
    "keys": Verb(
        verbs.keys,
        "[SECTION or KEY]",
        "Print every key of the configuration: type, default and meaning",
        """examples:
  python -m launcher keys lora     # one section, as a table
  python -m launcher keys lora.r   # one key
Without a name it prints docs/configuration.md.""",
        json=True,
    ),
    "doctor": Verb(
        verbs.doctor,
        "[write=NAME] [root=DIR] [cache=DIR]",
        "Check what this cluster and this machine will do with a sweep",
        "example:\n  python -m launcher doctor write=site   # describes the cluster for cluster=site",
        json=True,
    ),
    "sync": Verb(
        verbs.sync,
        "[SWEEP] [root=DIR]",
        "Send the journals of a sweep to Weights & Biases; safe to repeat",
        "It continues where W&B stopped, also while a job is still training. The API key is read as the jobs read it.",
        json=True,
    ),
    "dashboard": Verb(
        verbs.dashboard,
        "[SWEEP] [root=DIR]",
        "Build a W&B workspace that compares the runs of a sweep; print its address",
        "It needs the extra lorapack[dashboard] and an API key. Running it again updates the same workspace.",
        json=True,
    ),
    "merge": Verb(
        verbs.merge,
        "[RUN] [root=DIR] [cache=DIR]",
        "Merge a run's adapter into its base, as an ordinary model folder",
        json=True,
    ),
    "chat": Verb(
        verbs.chat,
        '[RUN] ["PROMPT"] [root=DIR] [cache=DIR]',
        "Talk to the model that a run tuned, on the CPU",
        'example:\n  python -m launcher chat r16 "Convert 3 km to metres."',
        json=True,
    ),
}


def main(arguments: list[str]) -> int:
    """Run the program; the exit code."""
    debug = "--debug" in arguments
    try:
        return _dispatch(arguments)
    except LorapackError as exc:
        if debug:
            raise
        return _say_error(str(exc), exc.exit_code)
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as head, has seen enough.
        sys.stderr.close()
        return 0
    except Exception as exc:
        if debug:
            raise
        return _say_error(f"{type(exc).__name__}: {exc}. This is a bug in lorapack; --debug shows where.", 1)


def _dispatch(arguments: list[str]) -> int:
    """Split off the verb and run it; without one, ``-h`` is the help of the program."""
    if arguments in (["-h"], ["--help"], ["help"]):
        print(program_help())
        return 0
    if arguments in (["--version"], ["-V"], ["version"]):
        print(f"lorapack {program_version()}")
        return 0
    refuse_foreign_options(arguments)
    first = next((word for word in arguments if not word.startswith("-")), "")
    is_override = "=" in first or first.startswith("~")
    name = "" if is_override else first
    if name not in VERBS:
        raise BadInput(unknown_verb(name, arguments, list(filter(None, VERBS))))
    rest = list(arguments)
    if name:
        rest.remove(name)
    verb = VERBS[name]
    return verb.function(parse(name, verb, rest))


def program_help() -> str:
    """The table of verbs, the choices of each group, and examples."""
    verbs_table = "\n".join(f"  {name or '(none)':<10} {verb.summary}" for name, verb in VERBS.items())
    return f"""usage: {PROGRAM} [VERB] [key=value ...]

LoRA and QLoRA hyper-parameter sweeps, trained together over one copy of the base model.

verbs:
{verbs_table}

'{PROGRAM} VERB -h' explains a verb. A SWEEP or RUN is a name, a unique part of one, or nothing for the newest.
--json prints one JSON document and nothing else; --debug shows tracebacks; --version prints the version.

choices (every other key can be given too, as in lora.r=32; '{PROGRAM} keys' lists them):
{_choices()}

Your own files add choices: ./conf/model/mine.yaml is model=mine. A file of yours wins over a shipped one of the same name.

examples:
  {PROGRAM} sweep=rank                        four LoRA ranks on a small model, on this machine
  {PROGRAM} plan sweep=rank model=llama2_7b   what that would take
  {PROGRAM} lora.r=8,16 train.max_steps=100   a sweep without a file
  {PROGRAM} status                            the newest sweep"""


def program_version() -> str:
    """The version of the installed package, or of the checkout that this is run from.

    Raises:
        BadInput: neither says it.
    """
    checkout = SOURCE_DIR / "pyproject.toml"
    if checkout.exists():
        return str(tomllib.loads(checkout.read_text())["project"]["version"])
    try:
        return version("lorapack")
    except PackageNotFoundError as exc:
        raise BadInput(f"{SOURCE_DIR} has no version; install it with 'pip install .'.") from exc


def _choices() -> str:
    """The groups of the configuration, each with its options in lines of at most 110 columns."""
    groups = find_groups(conf_folders())
    # A line may end after any bar.
    lines = [
        textwrap.fill(f"{group}={'| '.join(options)}", 110, initial_indent="  ", subsequent_indent="    ")
        for group, options in groups.items()
    ]
    return "\n".join(lines).replace("| ", "|")


def _say_error(message: str, exit_code: int) -> int:
    paragraph = " ".join(message.split())
    print(textwrap.fill(f"error: {paragraph}", 110, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    return exit_code
