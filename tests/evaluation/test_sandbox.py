"""What hostile programs can't do in the sandbox; each is run for real, and skipped where bubblewrap is missing."""

import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pwd import getpwall

import pytest

from crow.errors import CrowError, UsageError
from crow.evaluation.sandbox import Limits, run_python

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
QUICK = Limits(seconds=2)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("code", "verdict", "output"),
    [
        ("print('hello')", "passed", "hello\n"),
        ("import json, math, re, collections; assert math.gcd(6, 4) == 2", "passed", ""),
        ("open('/tmp/x', 'w').write('1'); print(open('/tmp/x').read())", "passed", "1\n"),
        ("print('é 好')", "passed", "é 好\n"),
        ("import subprocess; subprocess.run(['sh', '-c', 'echo a | cat'], check=True)", "passed", "a\n"),
        ("from concurrent.futures import ThreadPoolExecutor as P; print(*P(4).map(abs, [-1, -2]))", "passed", "1 2\n"),
        ("open('/dev/null', 'w').write('1'); print(len(open('/dev/urandom', 'rb').read(8)))", "passed", "8\n"),
        ("assert 1 == 2", "failed", "AssertionError"),
        ("def f(:", "failed", "SyntaxError"),
        ("raise SystemExit(3)", "failed", ""),
        ("import os; os._exit(1)", "failed", ""),
    ],
)
def test_programs_end_as_they_would(code: str, verdict: str, output: str) -> None:
    outcome = run_python(code, QUICK)
    assert outcome.verdict == verdict, outcome
    assert output in outcome.output


@needs_bubblewrap
@pytest.mark.parametrize(
    "code",
    [
        "print('bwrap: no permissions')",
        "import os; os.ftruncate(1, 0); os.lseek(1, 0, 0); print('bwrap: no permissions')",
        "import os; os.closerange(3, 64); print('bwrap: no permissions')",
    ],
)
def test_no_output_is_taken_for_a_failure_of_the_sandbox(code: str) -> None:
    outcome = run_python(f"{code}\nraise SystemExit(1)", QUICK)
    assert (outcome.verdict, outcome.output) == ("failed", "bwrap: no permissions\n")


@needs_bubblewrap
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, time; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "import os\nif os.fork(): os._exit(0)\nos.setsid()\nwhile True: pass",
    ],
)
def test_no_program_runs_on(code: str) -> None:
    started = time.monotonic()
    run_python(code, Limits(seconds=1))
    assert time.monotonic() - started < 8
    while running := [p for p in Path("/proc").glob("[0-9]*/cmdline") if _PROGRAM.search(_read(p))]:
        assert time.monotonic() - started < 12, running  # killed, it takes the kernel a moment to bury
        time.sleep(0.05)


_PROGRAM = re.compile(rb"/python/bin/python3|^python3\0-I\0-\0")  # in the sandbox's process, and in its program's


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@needs_bubblewrap
def test_an_endless_loop_is_told_as_one() -> None:
    assert run_python("while True: pass", Limits(seconds=1)).verdict == "timeout"


FORK_BOMB = """
import os, time
made = 0
try:
    for _ in range(1000):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        made += 1
except BlockingIOError:
    print("made", made)
"""


@needs_bubblewrap
def test_a_fork_bomb_is_stopped() -> None:
    outcome = run_python(FORK_BOMB, Limits(seconds=3, processes=8))
    assert int(outcome.output.split()[1]) < 8


THREADS = """
import threading
together = threading.Barrier(10)
threads = [threading.Thread(target=together.wait) for _ in range(10)]
for thread in threads: thread.start()
import time; time.sleep(1)
"""


@needs_bubblewrap
def test_programs_beside_each_other_take_no_processes_from_one_another() -> None:
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda code: run_python(code, Limits(seconds=10)), [THREADS] * 4))
    assert [outcome.verdict for outcome in outcomes] == ["passed"] * 4, outcomes


@needs_bubblewrap
def test_forks_that_never_stop_do_not_hang_the_run() -> None:
    started = time.monotonic()
    run_python("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", Limits(seconds=1, processes=8))
    assert time.monotonic() - started < 8


@needs_bubblewrap
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("x = bytearray(20 * 2**30)", "MemoryError"),
        ("open('/usr/x', 'w')", "Read-only file system"),
        ("open('/x', 'w')", "Read-only file system"),
        ("open('/dev/x', 'w')", "Read-only file system"),
        ("open('/dev/shm/x', 'w')", "Read-only file system"),
        ("import os; os.remove('/python/bin/python3')", "Read-only file system"),
        ("open('/etc/passwd').read()", "No such file"),
        ("import os; os.listdir(os.path.expanduser('~root'))", "No such file"),
        ("import os; os.listdir('/home')", "No such file"),
        ("import os; os.environ['SECRET']", "KeyError"),
        ("import socket; socket.create_connection(('1.1.1.1', 53), 2)", "Network is unreachable"),
        ("import socket; socket.create_connection(('127.0.0.1', PORT), 2)", "Connection refused"),
        ("import os; os.setuid(0)", "Errno"),  # which, depends on whether root is anyone there
        (
            "import subprocess; subprocess.run(['mount', '-t', 'tmpfs', 'x', '/tmp'], check=True)",
            "non-zero exit status",
        ),
        ("import resource; resource.setrlimit(resource.RLIMIT_NPROC, (10**5, 10**5))", "not allowed to raise"),
    ],
)
def test_what_is_out_of_reach_fails(code: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    with socket.create_server(("127.0.0.1", 0)) as outside:
        outcome = run_python(code.replace("PORT", str(outside.getsockname()[1])), QUICK)
    assert (outcome.verdict, error in outcome.output) == ("failed", True), outcome


LIBC = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *given):
    if getattr(libc, name)(*given) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
"""


@needs_bubblewrap
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("call('shmget', 0, ctypes.c_size_t(2**20), 0o1600)", "Operation not permitted"),
        ("call('semget', 0, 32000, 0o1600)", "Operation not permitted"),
        ("call('msgget', 0, 0o1600)", "Operation not permitted"),
        ("os.memfd_create('x')", "Operation not permitted"),
        ("call('syscall', 447, 0)  # memfd_secret", "Operation not permitted"),
        ("call('syscall', 425, 1, ctypes.create_string_buffer(120))  # io_uring_setup", "Operation not permitted"),
        ("call('unshare', CLONE_NEWUSER)", "Operation not permitted"),
        (
            "libc.unshare(CLONE_NEWUSER | CLONE_NEWNS)\ncall('mount', b'x', b'/tmp', b'tmpfs', 0, None)",
            "Operation not permitted",
        ),
        (
            "stack = ctypes.create_string_buffer(2**16)\ntop = ctypes.c_void_p(ctypes.addressof(stack) + 2**16)\n"
            "call('clone', ctypes.CFUNCTYPE(ctypes.c_int)(int), top, CLONE_NEWUSER | signal.SIGCHLD, None)",
            "Operation not permitted",
        ),
        ("call('syscall', 435, None, 0)  # clone3", "Function not implemented"),
    ],
)
def test_calls_that_hold_memory_uncounted_or_give_rights_are_denied(code: str, error: str) -> None:
    outcome = run_python(LIBC + code, QUICK)
    assert (outcome.verdict, error in outcome.output) == ("failed", True), outcome


X32 = f"{LIBC}libc.syscall(0x40000000 + 29)"
I386 = """
import ctypes, mmap
getpid = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
getpid.write(bytes.fromhex("53 b814000000 cd80 5b c3"))
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(getpid)))()
"""


@needs_bubblewrap
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have one way to call")
@pytest.mark.parametrize("code", [X32, I386])
def test_a_call_by_the_numbers_of_another_interface_kills(code: str) -> None:
    assert run_python(code, QUICK).exit_status == 128 + signal.SIGSYS


FORKS_THAT_HOLD = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        held = bytearray(60 * 2**20)
        break
time.sleep(60)
"""


@needs_bubblewrap
def test_what_all_processes_hold_is_bounded_too() -> None:
    outcome = run_python(FORKS_THAT_HOLD, Limits(seconds=20, memory=128 * 2**20))
    assert (outcome.verdict, "MemoryError" in outcome.output) == ("failed", True), outcome


@needs_bubblewrap
def test_the_homes_and_secrets_of_the_caller_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    (tmp_path / "secret").write_text("swordfish")
    seen = run_python(
        f"import os\nprint(dict(os.environ), os.path.exists({str(tmp_path / 'secret')!r}), os.getuid(), os.getpid())\n"
        "print([p for p in os.listdir('/proc') if p.isdigit()])\n"
        "if os.access('/proc/1/environ', os.R_OK): print(open('/proc/1/environ').read())",
        QUICK,
    )
    assert seen.verdict == "passed", seen
    assert "swordfish" not in seen.output
    _, found, user, _ = seen.output.splitlines()[0].rsplit(" ", 3)
    assert (found, int(user) in {known.pw_uid for known in getpwall() if known.pw_name != "nobody"}) == ("False", False)
    assert len(seen.output.splitlines()[1].split(",")) <= 3


@needs_bubblewrap
def test_a_flood_of_output_is_cut_off() -> None:
    outcome = run_python("while True: print('x' * 1000)", Limits(seconds=5, output=10_000))
    assert outcome.verdict == "failed"
    assert len(outcome.output) <= 10_000


@needs_bubblewrap
def test_a_program_that_kills_all_it_can_kills_itself_alone() -> None:
    victim = subprocess.Popen(["sleep", "60"])
    try:
        code = "import os, signal\nfor p in (os.getppid(), 1, -1):\n    os.kill(p, signal.SIGKILL)\n"
        run_python(code + f"os.kill({os.getpid()}, signal.SIGKILL)", QUICK)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@needs_bubblewrap
def test_process_1_has_the_limits_of_the_program() -> None:
    limits = [run_python(f"print(open('/proc/{process}/limits').read())", QUICK).output for process in ("1", "self")]
    assert "Max processes" in limits[0]
    assert limits[0] == limits[1]


@pytest.fixture
def bubblewrap_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def fails_after(command: str) -> None:
        stand_in = tmp_path / "bwrap"
        stand_in.write_text(f"#!/bin/sh\n{command}\nexit 1\n")
        stand_in.chmod(0o755)
        monkeypatch.setattr("crow.evaluation.sandbox.BUBBLEWRAP", str(stand_in))

    return fails_after


def test_bubblewrap_itself_is_given_no_environment(
    bubblewrap_that: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    bubblewrap_that("echo secret: ${SECRET-none}")
    with pytest.raises(CrowError, match="secret: none"):
        run_python("print(1)")


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crow.evaluation.sandbox.BUBBLEWRAP", "no-such-bwrap")
    with pytest.raises(UsageError, match="apt install bubblewrap"):
        run_python("print(1)")


@needs_bubblewrap
def test_on_a_machine_that_there_is_no_filter_for_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UsageError, match="x86_64 and aarch64, not for riscv64"):
        run_python("print(1)")


def test_a_sandbox_that_cannot_be_made_is_an_error(bubblewrap_that: Callable[[str], None]) -> None:
    bubblewrap_that("echo 'bwrap: No permissions to create new namespace' >&2")
    with pytest.raises(CrowError, match="No permissions to create new namespace"):
        run_python("print(1)")
