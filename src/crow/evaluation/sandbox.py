"""Run code that a model wrote where it can do no harm: in a bubblewrap sandbox, or not at all."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import psutil

from crow.errors import CrowError, UsageError
from crow.evaluation.seccomp import MACHINES, seccomp_filter

BUBBLEWRAP = "bwrap"

Verdict = Literal["passed", "failed", "timeout"]


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: int = 10
    """Of wall time, and for each process of CPU time."""
    memory: int = 512 * 2**20
    """Bytes of address space for each process, of what all hold together, and of all files in /tmp, in memory too."""
    processes: int = 16
    """Processes and threads, in all."""
    output: int = 64 * 2**10
    """Bytes that any file may grow to, standard output and error together too."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `passed` if it came to its end, with exit status 0."""

    verdict: Verdict
    exit_status: int | None
    output: str
    """Standard output and error together."""


def check_sandbox() -> None:
    """Raise `UsageError` where bubblewrap is missing, or a filter for the machine: there is no running without them."""
    if shutil.which(BUBBLEWRAP) is None:
        raise UsageError(
            "running a model's code needs bubblewrap, which is not installed: apt install bubblewrap (or your system's "
            "package of that name)"
        )
    if platform.machine() not in MACHINES:
        raise UsageError(
            f"running a model's code needs a filter of system calls, which there is for {' and '.join(MACHINES)}, not "
            f"for {platform.machine()}: run it on one of those"
        )


def run_python(code: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program that has nothing but the standard library.

    It sees `/usr` and Python, both read-only, an empty `/tmp` of its own, no network, no environment, no home folder
    and no process but its own; and it runs without any rights, also where the caller is root.

    Raises:
        UsageError: bubblewrap is missing, or a filter for the machine.
        CrowError: bubblewrap cannot make a sandbox on this machine.
    """
    check_sandbox()
    limits = limits or Limits()
    with ExitStack() as files:
        output, program, begun, denied = (files.enter_context(tempfile.TemporaryFile()) for _ in range(4))
        program.write(code.encode("utf-8", "surrogatepass"))
        program.seek(0)
        denied.write(seccomp_filter(platform.machine()))
        denied.seek(0)
        told = asdict(limits) | {"begun": begun.fileno(), "uid": _UIDS.start + next(_NUMBERS) % len(_UIDS)}
        process = subprocess.Popen(
            [*_sandbox(limits, denied.fileno()), "/python/bin/python3", "-I", "-c", _PRELUDE, repr(told)],
            executable=shutil.which(BUBBLEWRAP),
            env={},  # the program may read that of bubblewrap, its process 1, which --clearenv leaves as it was
            stdin=program,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[begun.fileno(), denied.fileno()],
            start_new_session=True,
        )
        status, held, ends = None, 0, time.monotonic() + limits.seconds + _STARTUP_SECONDS
        try:
            while status is None and held <= limits.memory:
                try:
                    status = process.wait(_WATCH_SECONDS)
                except subprocess.TimeoutExpired:
                    if time.monotonic() > ends:
                        break
                    held = _held(process.pid)
        finally:
            with suppress(ProcessLookupError):  # the sandbox's first process goes with it, and all others with that
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read(limits.output).decode("utf-8", "replace")
        if status is not None and not os.fstat(begun.fileno()).st_size:
            said = text.rstrip().rpartition("\n")[2] or f"{BUBBLEWRAP} ended with {status}"
            raise CrowError(f"cannot make a sandbox here: {said}; are user namespaces allowed?")
    if held > limits.memory:
        return Outcome("failed", None, f"{text}\nMemoryError: more than {limits.memory} bytes in all processes\n")
    if status is None or status == _OUT_OF_TIME:
        return Outcome("timeout", None, text)
    return Outcome("passed" if status == 0 else "failed", status, text)


_STARTUP_SECONDS = 2
_WATCH_SECONDS = 0.1
_OUT_OF_TIME = 128 + signal.SIGXCPU
_UIDS = range(61184, 65520)
"""Users that root's sandboxes are in turn, as the kernel counts the processes of a user over all sandboxes. They are
those that systemd gives to services, which last no longer; containers have them too."""
_NUMBERS = count(os.getpid())


def _sandbox(limits: Limits, denied: int) -> list[str]:
    root = os.geteuid() == 0
    system = [part for path in ("/lib", "/lib64", "/lib32", "/bin") for part in _same_place(Path(path))]
    rights = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else ["--unshare-user", "--uid", "65534"]
    return [
        *(BUBBLEWRAP, "--die-with-parent", "--new-session", "--clearenv", "--seccomp", str(denied)),
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--cap-drop", "ALL", *rights),
        *("--ro-bind", "/usr", "/usr", *system, "--ro-bind", sys.base_prefix, "/python"),
        *("--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"),
        *("--size", str(limits.memory), "--perms", "1777", "--tmpfs", "/tmp"),
        *("--remount-ro", "/", "--chdir", "/tmp"),
    ]


def _same_place(path: Path) -> list[str]:
    """A folder of the system as it is outside: on most systems a link into /usr."""
    if path.is_symlink():
        return ["--symlink", os.readlink(path), str(path)]
    return ["--ro-bind", str(path), str(path)] if path.is_dir() else []


def _held(pid: int) -> int:
    """Bytes of memory that a process and all that came of it hold; what some share counts for each."""
    held = 0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                held += one.memory_info().rss
    return held


# Sets the limits from inside, where no one else's processes count, also of process 1, bubblewrap's, whose memory a
# program of the same user can write to; gives up what is left of root's rights, says that it has begun where the
# program can say nothing, and becomes the program, so that nothing of this stays in its way.
_PRELUDE = """
import ast, os, resource, sys
limits = ast.literal_eval(sys.argv[1])
def limit(what, soft, hard=None):
    for process in (0, 1):
        resource.prlimit(process, what, (soft, hard or soft))
limit(resource.RLIMIT_AS, limits["memory"])
limit(resource.RLIMIT_FSIZE, limits["output"])
limit(resource.RLIMIT_NPROC, limits["processes"])
limit(resource.RLIMIT_CPU, limits["seconds"], limits["seconds"] + 1)  # a signal first, which tells why
limit(resource.RLIMIT_NOFILE, 64)
limit(resource.RLIMIT_CORE, 0)
if os.getuid() == 0:
    os.setgroups([]); os.setgid(limits["uid"]); os.setuid(limits["uid"])
os.write(limits["begun"], b"1"); os.close(limits["begun"])
os.execv("/python/bin/python3", ["python3", "-I", "-"])
"""
