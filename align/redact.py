"""Secrets of the environment, kept out of whatever is printed."""

from __future__ import annotations

import os
import re
from urllib.parse import quote

MIN_LENGTH = 8
"""Characters of the shortest value that counts as a secret: ``true`` or ``1`` would be replaced all over a text."""

_SECRET = re.compile(r"KEY|TOKEN(?!IZER)|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_PLACE = re.compile(r"(?:PATH|FILE|DIR)$", re.IGNORECASE)  # where a secret lies, which a message may name


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
    """``text`` with ``<NAME>`` for each secret value, also where that is quoted as in a Python literal or a URL."""
    forms = {
        form: name for name, value in secrets().items() for form in (value, repr(value)[1:-1], quote(value, safe=""))
    }
    for form in sorted(forms, key=len, reverse=True):  # a value may be part of a longer one
        text = text.replace(form, f"<{forms[form]}>")
    return text
