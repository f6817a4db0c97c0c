"""The process in which a model's code runs. Started as a file with ``python -I``: nothing of postgrad is in it.

One JSON object comes in on stdin: ``code``, ``tests``, ``word`` (comes before every line that is written back, so
that what the code prints is not taken for a result) and limits. For each test that passes its number goes out.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

# Linux numbers of system calls: processes, threads and programs; network; signals to others; other processes' memory
# and the kernel's own programs; and the changes to files that Landlock does not see.
DENIED = {
    "x86_64": (
        0xC000003E,
        (56, 57, 58, 435, 59, 322, 41, 53, 62, 129, 200, 234, 297, 424, 101, 310, 311, 425, 321, 298),
        (76, 90, 92, 94, 260, 268, 452),
    ),
    "aarch64": (
        0xC00000B7,
        (220, 435, 221, 281, 198, 199, 129, 138, 130, 131, 240, 424, 117, 270, 271, 425, 280, 241),
        (45, 53, 54, 452),
    ),
}
LOAD, JUMP_EQUAL, JUMP_FROM, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050001  # the latter with EPERM
X32 = 0x40000000
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF, PATH_BENEATH, VERSION = 444, 445, 446, 1, 1
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3


def limit(job: dict[str, Any]) -> None:
    """Bound time, memory, files and processes of this process, for good."""
    for kind, most in (
        (resource.RLIMIT_CPU, job["seconds"]),
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_FSIZE, job["file_size"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError):  # macOS knows no bound of the address space
            continue


def keep_to_folder(libc: ctypes.CDLL, folder: str | None) -> None:
    """Let only ``folder`` be written, and it and Python's own folders be read (Landlock, Linux 5.13)."""
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION)
    if version < 1:
        return
    everything = (1 << {1: 13, 2: 14}.get(version, 15)) - 1  # a bit for each right; the second and third added one
    attributes = ctypes.create_string_buffer(struct.pack("=Q", everything))
    ruleset = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(8), 0)
    system = ("/usr", "/lib", "/lib64", "/dev/null", "/dev/urandom", "/etc/ld.so.cache", "/etc/localtime")
    rights = dict.fromkeys((sys.prefix, sys.base_prefix, *system), READ_FILE | READ_FOLDER)
    if folder is not None:
        rights[folder] = everything
    for path, access in rights.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = access if os.path.isdir(path) else access & READ_FILE
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, place))
        libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0)
        os.close(place)
    libc.syscall(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def deny_calls(libc: ctypes.CDLL) -> None:
    """Refuse new processes, threads, programs, sockets and signals (Linux, seccomp)."""
    if platform.machine() not in DENIED:
        return
    machine, calls, changes = DENIED[platform.machine()]
    numbers = calls + changes
    # (operation, jump if true, jump if false, operand); a jump counts the instructions it skips.
    steps = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 0, len(numbers) + 3, machine), (LOAD, 0, 0, 0)]
    steps += [(JUMP_FROM, len(numbers) + 1, 0, X32)]
    steps += [(JUMP_EQUAL, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    pointer = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(program)))
    libc.prctl(SET_SECCOMP, FILTER, pointer, 0, 0)


def give_up_rights(folder: str | None) -> None:
    """Whatever the kernel offers of the two: files (but those in ``folder``) and system calls."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0:
        keep_to_folder(libc, folder)
        deny_calls(libc)


def main() -> None:
    """Read the job, give up rights, run the code and its tests."""
    job = json.loads(sys.stdin.buffer.read())
    results = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    limit(job)
    give_up_rights(os.getcwd())
    word, tests = job.pop("word"), job.pop("tests")
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(job.pop("code"), "<answer>", "exec"), space)
    for number, test in enumerate(tests):
        try:
            exec(compile(test, f"<test {number + 1}>", "exec"), space)
        except BaseException:  # sys.exit() too is a failure of this test alone
            continue
        results.write(f"{word} {number}\n")


if __name__ == "__main__":
    main()
