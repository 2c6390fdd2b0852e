"""What packs do not compute right yet: by architecture and check, why. A gap that is closed fails its test until it is struck here."""

GAPS: dict[str, dict[str, str]] = {}
