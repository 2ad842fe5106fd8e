"""How glibc's malloc is to work in a process that makes and drops large arrays with every call or step."""

from __future__ import annotations

import os
from typing import Any

#: The setting, for a process that is still to start. Without it the kernel would take megabytes back and give them
#: anew, page by page; and where a walk through page tables is slow, as on virtual machines, reading and writing would
#: wait for pages of 4 KiB. What is kept is what the largest call took. Other systems ignore it.
MALLOC = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}={value}"
        for name, value in (("hugetlb", 1), ("mmap_threshold", 32 << 20), ("trim_threshold", 1 << 30))
    )
}


def with_malloc() -> dict[str, Any]:
    """The runtime environment of a Ray actor that is to have the setting.

    Empty where this process has one, the user's own maybe: its actors get that. An environment of its own takes a
    process of its own, not one of those that Ray has ready.
    """
    return {} if MALLOC.keys() <= os.environ.keys() else {"env_vars": dict(MALLOC)}
