"""Linux namespaces, mounts and capabilities through libc; Python 3.11 has no ``os.unshare``.

Everything here acts on the calling process and must run before it has a second thread:
unshare(2) of a user namespace fails in a process with threads, and other namespaces would
change for one thread only.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

# linux/sched.h
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
# linux/mount.h
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_MNT_DETACH = 2
# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
# linux/sockios.h, linux/if.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
# linux/capability.h
CAP_DAC_OVERRIDE = 1
_CAP_SETPCAP = 8
_CAP_SYS_ADMIN = 21
CAP_SETFCAP = 31
_CAP_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    result = _libc.mount(
        source.encode(),
        os.fsencode(target),
        kind.encode(),
        ctypes.c_ulong(flags),
        data.encode(),
    )
    _check(result, f"mount {kind} on {target}")


def effective_capabilities() -> int:
    """The capabilities that this process may use, as a bit set."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def unshare(*, process_ids: bool, network: bool = True) -> None:
    """Leaves the host's mounts; with ``network`` its network, with ``process_ids`` the next child its ids.

    A process without CAP_SYS_ADMIN gets a user namespace first, in which its own user and group
    keep their numbers: files that it makes look the same from both sides.

    Raises:
        OSError: The host doesn't grant it.
    """
    flags = _CLONE_NEWNS | (_CLONE_NEWPID if process_ids else 0)
    flags |= _CLONE_NEWNET if network else 0
    privileged = effective_capabilities() >> _CAP_SYS_ADMIN & 1
    uid, gid = os.geteuid(), os.getegid()
    if not privileged:
        flags |= _CLONE_NEWUSER
    _check(_libc.unshare(flags), "unshare")
    if not privileged:
        # user_namespaces(7): gid_map is writable to us only once setgroups is denied.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    # Otherwise what we mount would appear on the host too, where "/" is shared (systemd).
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)


def loopback_up() -> None:
    """Sets the interface ``lo`` of a new network namespace up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def cover(folder: str) -> None:
    """Lays an empty, read-only file system over a folder, so that nobody in here can read it."""
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount("farflung-hidden", folder, "tmpfs", flags, "size=4k,mode=0555")


def private_folder(folder: str, size_bytes: int) -> None:
    """Mounts memory on a folder: it vanishes with the namespace, however that ends."""
    _mount("farflung", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size_bytes},mode=0700")


def uncover(folder: str) -> None:
    """Unmounts what :func:`private_folder` mounted."""
    _check(_libc.umount2(os.fsencode(folder), _MNT_DETACH), f"unmount {folder}")


def mount_proc() -> None:
    """Shows this process-id namespace in /proc; psutil and Ray look their own ids up there.

    Raises:
        OSError: Refused where a container runtime masks parts of the host's /proc.
    """
    _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)


def drop_capabilities(keep: Iterable[int] = ()) -> None:
    """Gives up every capability except ``keep``, for good and for all descendants.

    Without it a root in the namespace could unmount what hides the keys. A new user namespace is
    no way around: mounts that come from a more privileged one are locked there
    (mount_namespaces(7)).
    """
    held = effective_capabilities()
    kept = sum(1 << capability for capability in keep)
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if held >> _CAP_SETPCAP & 1:
        for capability in range(64):
            if not kept >> capability & 1 and _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
                break  # EINVAL: beyond the last capability of this kernel
    remaining = held & kept
    low, high = remaining & 0xFFFFFFFF, remaining >> 32
    header = struct.pack("Ii", _CAP_VERSION_3, 0)
    data = struct.pack("6I", low, low, 0, high, high, 0)
    _check(_libc.capset(header, data), "capset")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def die_with_parent() -> None:
    """SIGKILL when the parent *thread* ends: call it only where that is the main thread."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "pdeathsig")


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent has died."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
