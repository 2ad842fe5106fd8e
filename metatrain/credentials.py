"""Secrets inside URLs: refused wherever a URL comes in, since URLs are written into logs, manifests and dumps.

Stores take their credentials from the environment or from files of their own; nothing of these is ever written.
"""

from __future__ import annotations

import re

#: What to do instead.
REMEDY = (
    "Give credentials by the environment or the store's own file (AWS_ACCESS_KEY_ID, ~/.aws/credentials, "
    "GOOGLE_APPLICATION_CREDENTIALS, ~/.netrc, …), and the URL without them."
)

# user:password@ behind ://. A port is no password; a password may hold a slash.
_PASSWORD = re.compile(r"(://[^/\s@:]*):(?!\d+(?:/|$))[^\s@]+@")
_PARAMETER = re.compile(r"(?<=[?&;])([^=&;#\s]+)=([^&;#\s]*)")
_EXACTLY = frozenset({"sig", "key", "auth", "pwd", "sas"})
_PARTS = ("token", "secret", "password", "passwd", "signature", "credential", "apikey", "accesskey", "accountkey")


def holds_credential(text: str) -> bool:
    """Whether a text is a URL with a password, a key or a token in it."""
    return redacted(text) != text


def redacted(text: str) -> str:
    """The text with the secrets of its URLs left out."""
    if "://" not in text:
        return text
    return _PARAMETER.sub(_without_value, _PASSWORD.sub(r"\1:…@", text))


def _without_value(match: re.Match[str]) -> str:
    name = re.sub(r"[^a-z]", "", match[1].lower())
    secret = match[2] and (name in _EXACTLY or any(part in name for part in _PARTS))
    return f"{match[1]}=…" if secret else match[0]
