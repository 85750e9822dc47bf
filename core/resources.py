"""What this machine has left, held against what a long step will need: refused before the work, not killed in it.

Memory available is the least of what the system reports as available, what the control group of a container still
allows, and `--max-memory` less what the process holds already. What is needed is stated as an arithmetic of its parts,
so that a refusal says what to change.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from dwindle.errors import DoesNotFit

__all__ = [
    "available_memory_bytes",
    "held_bytes",
    "is_out_of_memory",
    "limit_memory",
    "memory_limit_bytes",
    "require_memory",
]

_log = logging.getLogger("dwindle")
_CGROUP = Path("/sys/fs/cgroup")
_limit: list[int] = []


def limit_memory(most_bytes: int | None) -> None:
    """Hold this process to `most_bytes` of held memory in what is refused beforehand; None lifts the limit."""
    _limit[:] = [] if most_bytes is None else [most_bytes]


def memory_limit_bytes() -> int | None:
    """Return the limit that was set, if any."""
    return _limit[0] if _limit else None


def held_bytes(process_id: int) -> int:
    """Return the bytes a process holds that the system cannot take back; 0 if there is no such process.

    Raises nothing: where the system does not tell mapped files apart, they count as held.
    """
    try:
        with open(f"/proc/{process_id}/statm", encoding="ascii") as file:
            _, resident, of_files, *_ = map(int, file.read().split())
        return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        import psutil

        try:
            return int(psutil.Process(process_id).memory_info().rss)
        except psutil.Error:
            return 0


def available_memory_bytes() -> int:
    """Return the bytes that this process may still take without the system swapping or killing it."""
    import psutil

    left = [int(psutil.virtual_memory().available)]
    with suppress(OSError, ValueError):  # no control group, or "max"
        most = int((_CGROUP / "memory.max").read_text())
        left.append(max(0, most - int((_CGROUP / "memory.current").read_text())))
    if _limit:
        left.append(max(0, _limit[0] - held_bytes(os.getpid())))
    return min(left)


def require_memory(what: str, parts: Mapping[str, int], remedy: str) -> None:
    """Raise DoesNotFit with the arithmetic if the sum of `parts` (name -> bytes) is more than is available."""
    needed, left = sum(parts.values()), available_memory_bytes()
    if needed > left:
        told = " + ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items())
        bound = "" if not _limit else f" under --max-memory {_gigabytes(_limit[0])}"
        raise DoesNotFit(
            f"{what}: about {_gigabytes(needed)} of memory are needed ({told}), {_gigabytes(left)} are left{bound}. "
            + remedy
        )
    if needed > 0.8 * left:
        _log.warning("%s: about %s of memory are needed, %s are left.", what, _gigabytes(needed), _gigabytes(left))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the CPU or on a GPU.

    >>> is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    True
    """
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
