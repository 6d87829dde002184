"""Secrets are removed from all output, and run folders must be private.

Secrets are values of environment variables, and passwords and tokens in URLs and headers.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

from align.errors import ConfigError

MIN_LENGTH = 8
"""Length of the shortest value that counts as a secret: ``true`` or ``1`` would be replaced everywhere."""

_SECRET = re.compile(
    r"KEY|TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|PWD|AUTH(?!OR(?!IZ))|CREDENTIAL|COOKIE|SESSION|DSN", re.IGNORECASE
)
_PLACE = re.compile(r"(?:PATH|FILE|DIR|SOCK|^(?:OLD)?PWD)$", re.IGNORECASE)  # the path of a secret may be shown
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
    """Environment variables whose name suggests a secret, such as ``HF_TOKEN``.

    Excludes names of paths (``RAY_AUTH_TOKEN_PATH``) and of tokenizers, and values shorter than `MIN_LENGTH`.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if _SECRET.search(name) and not _PLACE.search(name) and len(value) >= MIN_LENGTH
    }


def redact(text: str) -> str:
    """``text`` with ``<NAME>`` for each secret of the environment, also if it is quoted as in a Python literal or a
    URL, and with ``<password>`` for passwords in URLs."""
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
    """A stream that passes redacted text to another stream, line by line."""

    def __init__(self, stream: TextIO):
        self._stream, self._begun = stream, ""

    def write(self, text: str) -> int:
        """Write complete lines; an incomplete line waits for its end or for `flush`."""
        lines, newline, rest = (self._begun + text).rpartition("\n")
        self._begun = rest
        if newline:
            self._stream.write(redact(lines) + newline)
        return len(text)

    def flush(self) -> None:
        """Write the incomplete line."""
        begun, self._begun = self._begun, ""
        self._stream.write(redact(begun))
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def require_private(folder: Path) -> None:
    """Refuse a run folder that other users can write to: a run resumes from its content.

    Raises `ConfigError` if the folder, or the target of a link, belongs to another user or is writable for its group
    or for all. A folder that does not exist passes.
    """
    try:
        status = folder.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{error.strerror}", where=f"{folder}", remedy="choose another run.dir") from error
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}",
            where=f"{folder}",
            remedy="choose another run.dir, or let its owner run this",
        )
    if others := status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        who = "everybody" if others & stat.S_IWOTH else "its group"
        raise ConfigError(
            f"{who} may write to it (mode {status.st_mode & 0o777:o})",
            where=f"{folder}",
            remedy=f"check that all files in it are yours, then chmod go-w {folder}",
        )
