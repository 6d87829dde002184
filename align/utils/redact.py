"""Secrets, kept out of whatever is printed: values of the environment, and passwords in URLs and headers."""

from __future__ import annotations

import io
import json
import os
import re
from typing import TextIO
from urllib.parse import quote

MIN_LENGTH = 8
"""Characters of the shortest value that counts as a secret: ``true`` or ``1`` would be replaced all over a text."""

_SECRET = re.compile(
    r"KEY|TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|PWD|AUTH(?!OR(?!IZ))|CREDENTIAL|COOKIE|SESSION|DSN", re.IGNORECASE
)
_PLACE = re.compile(r"(?:PATH|FILE|DIR|SOCK|^(?:OLD)?PWD)$", re.IGNORECASE)  # where a secret lies: it may be named
_PATTERNS = (
    # scheme://user:password@host; the password may hold @, and no / ? #, which would begin another part of the URL
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/?#:@'\"]*):(?!<\w+>@)[^\s/?#'\"]+@", re.IGNORECASE), r"\1:<password>@"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)(?!<\w+>@)[^\s/?#:@'\"]{20,}@", re.IGNORECASE), r"\1<token>@"),
    (
        re.compile(
            r"([?&][\w.-]*(?:key|token|secret|passw|pwd|auth|signature|credential)[\w.-]*=)(?!<)[^\s&#'\"]+",
            re.IGNORECASE,
        ),
        r"\1<secret>",
    ),
    (re.compile(r"\b(Bearer|Basic) +[\w.~+/=-]{12,}"), r"\1 <token>"),
)


def secrets() -> dict[str, str]:
    """Names and values of the environment variables whose name says that they hold a secret, as ``HF_TOKEN`` does.

    Names of places (``RAY_AUTH_TOKEN_PATH``) and of tokenizers are left out, and values of fewer than `MIN_LENGTH`
    characters.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if _SECRET.search(name) and not _PLACE.search(name) and len(value) >= MIN_LENGTH
    }


def redact(text: str) -> str:
    """``text`` with ``<NAME>`` for each secret value of the environment, also where that is quoted as in a Python
    literal or a URL, and with ``<password>`` for those in URLs."""
    forms = {
        form: name
        for name, value in secrets().items()
        for form in (value, repr(value)[1:-1], json.dumps(value)[1:-1], quote(value, safe=""))
    }
    for form in sorted(forms, key=len, reverse=True):  # a value may be part of a longer one
        text = text.replace(form, f"<{forms[form]}>")
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


class RedactedStream(io.TextIOBase):
    """A stream that writes to another one, line by line, what `redact` leaves."""

    def __init__(self, stream: TextIO):
        self._stream, self._begun = stream, ""

    def write(self, text: str) -> int:
        """See `io.TextIOBase`. A line that has no end yet waits for it, or for `flush`."""
        lines, newline, rest = (self._begun + text).rpartition("\n")
        self._begun = rest
        if newline:
            self._stream.write(redact(lines) + newline)
        return len(text)

    def flush(self) -> None:
        """Write the line that has no end yet."""
        begun, self._begun = self._begun, ""
        self._stream.write(redact(begun))
        self._stream.flush()

    def fileno(self) -> int:
        """Of the other stream."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the other stream."""
        return self._stream.encoding
