"""What all sources of text are turned into."""

import dataclasses

UNKNOWN_LANGUAGE = "und"  # ISO 639's "undetermined"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, where it is from, and its language (`und` when nobody says)."""

    text: str
    source: str
    language: str
