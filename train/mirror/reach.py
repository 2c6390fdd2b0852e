"""Whether W&B can be used from here: looks for the key and makes one request with a deadline, before W&B's client is imported.

The key is read where it is needed and is never written: not to files, logs, command lines or configurations.
"""

from __future__ import annotations

import base64
import configparser
import http.client
import importlib.util
import json
import netrc
import os
import queue
import stat
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from train.errors import BadInput

PROBE_SECONDS = 3.0
PUBLIC_SERVER = "https://api.wandb.ai"
VIEWER = "query Viewer { viewer { id entity username } }"


@dataclass(frozen=True)
class Reach:
    """A W&B server.

    Attributes:
        server: its address.
        trouble: why it cannot be used now; None if it can.
        entity: the key's own user or team.
        key: the API key; left out of the object's text.
    """

    server: str
    trouble: str | None
    entity: str | None = None
    key: str | None = field(default=None, repr=False)


def look_for_server(key_file: str | None, seconds: float = PROBE_SECONDS) -> Reach:
    """Look for a key and ask the server who it belongs to. It takes at most `seconds`, whatever the network does.

    Raises:
        BadInput: the key's file is missing, or others may read it.
    """
    server = server_url()
    key = find_key(server, key_file)
    if key is None:
        return Reach(server, "no API key found in WANDB_API_KEY, tracking.key_file or ~/.netrc")
    answers: queue.SimpleQueue[Reach] = queue.SimpleQueue()
    # In a thread, since the lookup of a host's name ignores every time-out.
    threading.Thread(target=lambda: answers.put(_ask(server, key, seconds)), daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return Reach(server, f"{server} did not answer within {seconds:g} s", key=key)


def refuse_missing_key(mode: str, key_file: str | None) -> None:
    """Reject before submission what no job could do: go online without a key, or read a key file that is missing or unsafe.

    Raises:
        BadInput: see `find_key`; or `mode` is online and there is no key here.
    """
    if mode == "online" or (mode == "auto" and key_file is not None):
        found = find_key(server_url(), key_file)
        if found is None:
            raise BadInput(
                f"tracking.mode=online needs an API key for {server_url()}; run 'wandb login', which stores one in ~/.netrc, "
                "or set tracking.key_file to a file that holds one, or set tracking.mode=auto."
            )


def client_trouble() -> str | None:
    """Why W&B's client cannot be used in this environment, without importing it; None if it can."""
    if importlib.util.find_spec("wandb") is not None:
        return None
    return f"the package wandb is missing in {sys.prefix} (pip install wandb)"


def server_url() -> str:
    """The server that W&B's own client would use: WANDB_BASE_URL, else its settings file, else the public one."""
    if os.environ.get("WANDB_BASE_URL"):
        return os.environ["WANDB_BASE_URL"].rstrip("/")
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(default_section="default", interpolation=None)
    settings.read(folder / "settings")
    return settings.defaults().get("base_url", PUBLIC_SERVER).rstrip("/")


def find_key(server: str, key_file: str | None) -> str | None:
    """The API key for `server`: from WANDB_API_KEY, else from a file that only its owner can read, else from netrc.

    Raises:
        BadInput: the file is missing, empty, or others may read it.
    """
    if os.environ.get("WANDB_API_KEY"):
        return os.environ["WANDB_API_KEY"]
    if key_file is not None:
        return _key_in(Path(key_file).expanduser())
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        entry = netrc.netrc(path).authenticators(urllib.parse.urlsplit(server).hostname or "")
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return None
    return entry[2] if entry else None


def _key_in(path: Path) -> str:
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise BadInput(f"tracking.key_file={path} can be read by others; run 'chmod 600 {path}'.")
        key = path.read_text().strip()
    except OSError as exc:
        raise BadInput(
            f"tracking.key_file={path} cannot be read: {exc.strerror}; set it to the file that holds the key."
        ) from exc
    if not key:
        raise BadInput(f"tracking.key_file={path} is empty; put the W&B API key there.")
    return key


def _ask(server: str, key: str, seconds: float) -> Reach:
    """Ask the server's GraphQL interface who the key belongs to, as W&B's client does. The user of basic authentication is "api"."""
    authorization = base64.b64encode(f"api:{key}".encode()).decode()
    request = urllib.request.Request(
        f"{server}/graphql",
        data=json.dumps({"query": VIEWER}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Basic {authorization}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            viewer = json.load(answer)["data"]["viewer"]
    except urllib.error.HTTPError as exc:
        problem = "rejects the key" if exc.code in (401, 403) else "answers with an error"
        return Reach(server, f"{server} {problem} ({exc.code})", key=key)
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as exc:
        return Reach(server, f"{server} cannot be reached ({getattr(exc, 'reason', exc)})", key=key)
    # Some servers answer 200 with a null viewer to a key that they do not know.
    if viewer is None:
        return Reach(server, f"{server} does not know the key", key=key)
    return Reach(server, None, entity=viewer["entity"], key=key)
