"""The login node's side of the house starts light: no module of it imports what belongs to a GPU node."""

import subprocess
import sys
from pathlib import Path

import launcher

HEAVY = {"torch", "transformers", "datasets", "wandb", "peft", "bitsandbytes"}


def test_no_launcher_module_imports_anything_heavy() -> None:
    modules = sorted(path.stem for path in Path(launcher.__file__).parent.glob("*.py") if path.stem != "__main__")
    imports = "; ".join(f"import launcher.{name}" for name in modules if name != "__init__")
    script = f"{imports}; import sys; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == ""
