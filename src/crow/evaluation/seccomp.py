"""The system calls that a program in the sandbox is denied, as the filter that `bwrap --seccomp` takes.

Denied is what holds memory that no limit counts (System V's shared memory, semaphores and message queues, files in
memory that lie in no folder, io_uring), and what gives a program rights (user namespaces, and mounting in them).

Sources: seccomp(2) and the kernel's documentation, userspace-api/seccomp_filter, for the filter and what it must check
first; the kernel's headers audit.h, bpf_common.h, sched.h, seccomp.h and unistd.h for the numbers; bwrap(1) for how it
is handed over.
"""

import errno
import struct

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Those that there is a filter for, as `platform.machine` calls them, and as a filter sees them."""

_DENIED = {  # each machine's number of the call, in the order of MACHINES
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "io_uring_setup": (425, 425),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "fsopen": (430, 430),
}
_CLONE = (56, 220)
_CLONE3 = 435
_NEW_USER_NAMESPACE = 0x10000000
_X32 = 0x40000000  # added to the number of a call by x86_64's other way to call, which has numbers of its own

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CALL, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16  # where they lie in what a filter is shown
_KILL, _ERROR, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000


def seccomp_filter(machine: str) -> bytes:
    """The filter for a machine, in classic BPF, each step: its operation, how many to skip if so and if not, its value.

    `clone3` is said not to exist, as a filter can't see its flags: C libraries then call `clone`.
    """
    column = list(MACHINES).index(machine)
    denied = [numbers[column] for numbers in _DENIED.values()]
    steps = [
        (_LOAD, 0, 0, _MACHINE),
        (_IF_EQUAL, 1, 0, MACHINES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _CALL),
        (_IF_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
        (_IF_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        *(step for call in denied for step in ((_IF_EQUAL, 0, 1, call), (_RETURN, 0, 0, _ERROR | errno.EPERM))),
        (_IF_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_IF_ANY_BIT, 0, 1, _NEW_USER_NAMESPACE),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
