"""What the standard output does with characters that its encoding does not have."""

import codecs
import io
import sys


def print_in_any_locale() -> None:
    """From here on they come out as `?`, where Python would raise: `·`, `×` and people's text meet any locale.

    ASCII is taken for UTF-8, as by click: it is what Python is told where nobody has set a locale, and no terminal is
    ASCII. For processes of our own only: the standard output of a notebook is not ours.
    """
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        is_ascii = codecs.lookup(out.encoding).name == "ascii"
        out.reconfigure(encoding="utf-8" if is_ascii else out.encoding, errors="replace")
