"""Look at what is untrusted in a process of its own, which may not take long or much memory."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from crow.errors import CrowError

T = TypeVar("T")

SECONDS = 20
MEMORY = 2**30
"""Bytes, beside what the process holds when it starts."""


def limited(work: Callable[[], T]) -> T:
    """What `work` returns, from a fork of this process; where a system has no fork, from this process, without limits.

    Raises:
        CrowError: what `work` raised, if it was one.
        RuntimeError: what else it raised, or how it went beyond its limits.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return work()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_tell, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            raise RuntimeError(f"to look at it takes more than {SECONDS} s")
        succeeded, outcome = ours.recv()
    except EOFError:
        raise RuntimeError("to look at it takes too much memory, or crashes") from None
    finally:
        process.kill()
        process.join()
    if not succeeded:
        raise outcome
    return outcome  # type: ignore[no-any-return]


def _tell(parent: Connection, work: Callable[[], T]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which reaches the parent too, and that ends this one
    _limit()
    if deepspeed := sys.modules.get("transformers.integrations.deepspeed"):
        deepspeed.unset_hf_deepspeed_config()  # under ZeRO-3 a model would be made with the other processes, which wait
    try:
        outcome: tuple[bool, T | Exception] = (True, work())
    except CrowError as error:
        outcome = (False, error)
    except MemoryError:
        outcome = (False, RuntimeError("to look at it takes too much memory"))
    except BaseException as error:  # a panic of tokenizers is no Exception; it need not survive the way through a pipe
        outcome = (False, RuntimeError(str(error) or type(error).__name__))
    parent.send(outcome)


def _limit() -> None:
    import resource  # here, since Windows has none

    with suppress(OSError, ValueError):  # a lower one is there already
        # For when the parent is gone, which else is first to end this one, and says why; a fork's count begins at 0
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 1))
    with suppress(OSError, ValueError):  # macOS neither tells nor limits
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
