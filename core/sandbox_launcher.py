"""Started by `sandbox` as a script of its own: takes away what a program must not have, then becomes that program.

    python -I -S sandbox_launcher.py SETTINGS_JSON

In this order, each one that the system permits: fresh user, mount, network, process and IPC namespaces with every
mount read-only and an empty scratch folder in memory; Landlock (Linux 5.13: no writing but to the scratch folder);
resource limits; a seccomp filter. Settings and the name of what was not permitted go through the file descriptor
`status`. Standard library only; nothing here is imported by the rest of dwindle.

The filter (Linux, x86-64 and 64-bit Arm) answers these system calls with "not permitted", for root as well, whose
processes no resource limit counts: new processes (threads are allowed), sockets, io_uring (a way around the filter),
signals to and tracing of processes.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

__all__ = ["main"]

_CLONE_THREAD = 0x10000
_NAMESPACES = 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000
"""CLONE_NEWUSER, NEWNS, NEWNET, NEWPID, NEWIPC."""
_SYSTEM_CALLS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "x86_64": (0xC000003E, 56, (
        57, 58,  # fork, vfork
        41, 425,  # socket, io_uring_setup
        62, 200, 234, 424, 101, 310, 311,  # kill, tkill, tgkill, pidfd_send_signal, ptrace, process_vm_readv, writev
    )),
    "aarch64": (0xC00000B7, 220, (198, 425, 129, 130, 131, 424, 117, 270, 271)),
}  # fmt: skip
"""AUDIT_ARCH, clone and the refused ones, by the numbers of Linux's system-call tables."""
_CLONE3 = 435
_WRITES = (1 << 1) | sum(1 << bit for bit in range(4, 13))
"""Landlock's rights of its first version: write files; remove and make entries of every kind."""
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result


def _write(path: str, text: str) -> None:
    with open(path, "w") as handle:
        handle.write(text)


def _enter_namespaces(scratch: str, scratch_bytes: int) -> None:
    """Leave network, file system and processes of the machine; raises OSError where that is not permitted."""
    uid, gid = os.getuid(), os.getgid()
    _checked(_libc.unshare(_NAMESPACES), "unshare")
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")
    read_only = struct.pack("=QQQQ", 1, 0, 1 << 18, 0)  # MOUNT_ATTR_RDONLY, propagation MS_PRIVATE
    _checked(_libc.syscall(442, -100, b"/", 0x8000, read_only, len(read_only)), "mount_setattr")
    size = f"size={scratch_bytes},mode=700".encode()
    _checked(_libc.mount(b"tmpfs", scratch.encode(), b"tmpfs", 2 | 4, size), "mount")


def _restrict_writes(scratch: str) -> None:
    """Allow writing below `scratch` and to /dev/null only (Landlock)."""
    version = _checked(_libc.syscall(444, None, 0, 1), "landlock")
    rights = _WRITES | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    rules = _checked(_libc.syscall(444, struct.pack("=Q", rights), 8, 0), "landlock_create_ruleset")
    for path, allowed in ((scratch, rights), ("/dev/null", 1 << 1)):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _checked(_libc.syscall(445, rules, 1, struct.pack("=Qi", allowed, place), 0), "landlock_add_rule")
        os.close(place)
    _no_new_privileges()
    _checked(_libc.syscall(446, rules, 0), "landlock_restrict_self")
    os.close(rules)


def _no_new_privileges() -> None:
    _checked(_libc.prctl(38, 1, 0, 0, 0), "no_new_privs")


def _filter_system_calls() -> None:
    """Refuse processes, sockets and signals (seccomp); raises OSError or KeyError where there is no filter."""
    architecture, clone, refused = _SYSTEM_CALLS[platform.machine()]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38, 0x80000000

    def when(kind: int, value: int, then: int) -> list[tuple[int, int, int, int]]:
        return [(kind, 0, 1, value), (answer, 0, 0, then)]

    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program += when(at_least, 0x40000000, refuse)  # x32
    program += when(equal, _CLONE3, absent)  # its flags lie in memory: the C library then takes clone
    for number in refused:
        program += when(equal, number, refuse)
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, _CLONE_THREAD), (answer, 0, 0, refuse)]
    program += [(answer, 0, 0, allow)]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    held = ctypes.create_string_buffer(code, len(code))
    _no_new_privileges()
    _checked(_libc.prctl(22, 2, struct.pack("@HP", len(program), ctypes.addressof(held)), 0, 0), "seccomp")


def _limit(name: str, value: int) -> None:
    kind = getattr(resource, name)
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _attempt(what: str, missing: list[str], function: Any, *arguments: Any) -> bool:
    try:
        function(*arguments)
    except (OSError, KeyError, AttributeError, ValueError) as error:
        missing.append(f"{what} ({error})")
        return False
    return True


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _libc.prctl(1, signal.SIGKILL, 0, 0, 0)


def _wait(child: int) -> None:
    """Reap until `child` ends, then end with its exit code, or 128 + the signal that ended it."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _confine(settings: dict[str, Any]) -> list[str]:
    """Apply every limit to this process; return which ones the system does not have."""
    missing: list[str] = list(settings["missing"])
    os.chdir(settings["scratch"])
    if sys.platform == "linux":
        _attempt("Landlock", missing, _restrict_writes, settings["scratch"])
    for name, value in settings["limits"].items():
        _attempt(name, missing, _limit, name, value)
    if sys.platform == "linux":
        filtered = _attempt("seccomp", missing, _filter_system_calls)
    else:
        filtered = False
    if not filtered:
        _attempt("RLIMIT_NPROC", missing, _limit, "RLIMIT_NPROC", 1)
    return missing


def main() -> None:
    """Read the settings, confine this process and run the command in its place."""
    settings = json.loads(sys.argv[1])
    _die_with_parent()
    if settings["namespaces"]:
        _enter_namespaces(settings["scratch"], settings["scratch_bytes"])
        for _ in range(2):  # the first child is process 1 of the namespace: when it ends, so do all others
            child = os.fork()
            if child:
                _wait(child)
            _die_with_parent()
    missing = _confine(settings)
    os.write(settings["status"], json.dumps(missing).encode())
    os.close(settings["status"])
    os.execve(settings["command"][0], settings["command"], {})  # noqa: S606  (no shell is what is wanted)


if __name__ == "__main__":
    main()
