"""If a terminal cannot show × or →, tables show x and -> instead, and no study fails because of it."""

import codecs
import sys
from typing import TextIO

_PLAIN = {"×": "x", "÷": "/", "−": "-", "–": "-", "—": "-", "→": "->", "√": "sqrt ", "∝": "~", "≤": "<=", "≥": ">=", "²": "^2", "°": " degrees", "μ": "mu",  # noqa: E501
          "µ": "mu", "…": "...", "«": '"', "»": '"', "•": "*", "⌈": "", "⌉": "", "₂": "2", "∞": "inf", "⁸": "^8",
          "─": "-", "━": "-", "│": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+"}  # fmt: skip


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def show_plainly(*streams: TextIO) -> None:
    """Makes streams replace characters that their encoding lacks, instead of ending the program with an error.

    Example:
        >>> import io
        >>> stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        >>> show_plainly(stream)
        >>> print("2 × 3 → ψ", file=stream, flush=True)
        >>> stream.buffer.getvalue()
        b'2 x 3 -> ?\\n'
    """
    codecs.register_error("jaxbatch", _plainly)
    for stream in streams or (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="jaxbatch")
