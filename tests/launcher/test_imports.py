"""The login node's side of the house starts light: no module of it imports what belongs to a GPU node."""

import subprocess
import sys
from pathlib import Path

import launcher

HEAVY = {"torch", "transformers", "datasets", "wandb", "peft", "bitsandbytes"}


def test_no_launcher_module_imports_anything_heavy() -> None:
    root = Path(launcher.__file__).parent
    files = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")]
    imports = "; ".join(f"import {'.'.join(file.parts)}" for file in files if not file.name.startswith("__"))
    assert len(files) > 30
    script = f"{imports}; import sys; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == ""
