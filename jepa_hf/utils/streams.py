"""Output on streams that cannot encode all characters."""

import codecs
import sys

# Characters of progress and tables, and what stands for them; every other one is escaped.
_PLAIN = {"·": "-", "×": "x", "±": "+-", "→": "->", "–": "-", "…": "..."}


def _to_plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    plain = (_PLAIN.get(character, ascii(character)[1:-1]) for character in characters)
    return "".join(plain), error.end


codecs.register_error("jepa_hf_plain", _to_plain)


def print_all_characters() -> None:
    """Have `print` replace what the encoding of stdout or stderr lacks, as in the locale C, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        # A notebook's streams, or those of a test, take everything.
        if hasattr(stream, "reconfigure") and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="jepa_hf_plain")
