"""What packs do not compute right yet: by architecture and check, why. A gap that is closed fails its test until it is struck here."""

from __future__ import annotations

ALL = ("path", "evaluation", "training", "isolation", "nf4", "checkpointing", "peft", "merge", "generation")

GAPS: dict[str, dict[str, str]] = {
    "gemma3n": dict.fromkeys(
        ALL,
        "a job's judge takes the rounding of correction_coefs' gradients, 2.7e-5, for a difference; plan's does not",
    ),
    "doge-window": {"refusal": "a job's judge in float32 does not see which keys are dropped; plan's does"},
}
