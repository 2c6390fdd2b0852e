"""What packs do not compute right yet: by architecture and check, why. A gap that is closed fails its test until it is struck here."""

GAPS: dict[str, dict[str, str]] = {
    "phi3-longrope-crossing": {"generation": "keys in the cache keep the rotation of the sequence when it was shorter"},
}
