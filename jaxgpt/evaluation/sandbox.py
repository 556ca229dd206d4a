"""Sets up a sandbox in this process, and runs a program in it: `programs.py` starts it, as a script of its own.

    python -I -S sandbox.py '[COMMAND, SECONDS, BYTES, VARIABLES]'

It imports nothing but Python's library, so that it starts in milliseconds. Namespaces of the Linux kernel take the
network away, make all of the file system one that can only be read but for an empty folder in memory, and put all that
the program starts in a group that ends with the group's first process. The program then has no privileges, and can get
none. A sandbox that can't be set up ends with the status `FAILED` and says why.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys

FAILED = 125
FOLDER = "/tmp"  # within the sandbox: empty, in memory, and the only place to write to
FOLDER_BYTES = 64 << 20
MOST_PROCESSES = 64
MOST_FILES = 256
NOBODY = 65534
DEVICES = ("null", "zero", "random", "urandom")
HIDDEN = ("/run", "/var/run", "/dev/shm")  # sockets of other programs', which know the network

# Constants of the kernel's headers
NEW_MOUNTS, NEW_NAMES, NEW_TALK, NEW_USER, NEW_PIDS, NEW_NET = 0x20000, 0x4000000, 0x8000000, 1 << 28, 1 << 29, 1 << 30
NO_SETUID, NO_DEVICES, BIND, MOVE, RECURSIVE, PRIVATE = 2, 4, 0x1000, 0x2000, 0x4000, 1 << 18
READ_ONLY, AT_FDCWD, AT_RECURSIVE, MOUNT_SETATTR = 1, -100, 0x8000, 442
DIE_WITH_PARENT, DUMPABLE, DROP_BOUND, NO_NEW_PRIVILEGES = 1, 4, 24, 38
CAPABILITIES_VERSION, MOST_CAPABILITIES = 0x20080522, 64

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """Calls a function of the C library. OSError where it returns a negative number."""
    if getattr(libc, name)(*arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def mount(source, target, kind=None, flags=0, options=None):
    def text(value):
        return None if value is None else value.encode()

    call("mount", text(source), text(target), text(kind), ctypes.c_ulong(flags), text(options))


def change_mounts(path, add=0, remove=0, below=0):
    """Sets and clears attributes of the mount at a path, and with AT_RECURSIVE of all that are below it."""
    attributes = struct.pack("QQQQ", add, remove, 0, 0)
    call("syscall", ctypes.c_long(MOUNT_SETATTR), AT_FDCWD, path.encode(), below, attributes, ctypes.c_size_t(32))


def apart():
    """Makes the namespaces. The user, who is the same as outside, may set up the rest of them."""
    user, group = os.geteuid(), os.getegid()
    if os.getuid() == 0:
        os.setresuid(NOBODY, 0, 0)  # root may have any number of processes, and is whom they are counted for no more
        call("prctl", DUMPABLE, 1, 0, 0, 0)  # or else this process may not write its own maps
    call("unshare", NEW_USER | NEW_MOUNTS | NEW_NET | NEW_PIDS | NEW_TALK | NEW_NAMES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def close_files():
    """Makes the file system one to read, with a folder in memory and with devices that do no harm."""
    mount(None, "/", flags=RECURSIVE | PRIVATE)
    mount("tmpfs", FOLDER, "tmpfs", NO_SETUID | NO_DEVICES, f"size={FOLDER_BYTES},mode=0700")
    devices = [name for name in DEVICES if os.path.exists(f"/dev/{name}")]
    for name in devices:
        open(f"{FOLDER}/{name}", "w").close()
        mount(f"/dev/{name}", f"{FOLDER}/{name}", flags=BIND)
    mount("tmpfs", "/dev", "tmpfs", NO_SETUID, "size=0,mode=0755")
    for path in {os.path.realpath(path) for path in HIDDEN if os.path.isdir(path)}:
        mount("tmpfs", path, "tmpfs", NO_SETUID, "size=0,mode=0755")
    for name in devices:
        open(f"/dev/{name}", "w").close()
        mount(f"{FOLDER}/{name}", f"/dev/{name}", flags=MOVE)
        os.remove(f"{FOLDER}/{name}")
    mount("proc", "/proc", "proc", NO_SETUID | NO_DEVICES)
    change_mounts("/", READ_ONLY | NO_SETUID | NO_DEVICES, below=AT_RECURSIVE)
    change_mounts(FOLDER, remove=READ_ONLY)
    for name in devices:
        change_mounts(f"/dev/{name}", remove=NO_DEVICES)
    os.chdir(FOLDER)


def give_up_privileges():
    """Takes all capabilities from this process and from what it runs, which can't get any others."""
    for capability in range(MOST_CAPABILITIES):
        if libc.prctl(DROP_BOUND, capability, 0, 0, 0) < 0:
            break
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    call("capset", struct.pack("Ii", CAPABILITIES_VERSION, 0), bytes(24))


def limit(seconds, memory):
    whole = max(1, int(seconds + 1))
    for kind, most in (
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NPROC, MOST_PROCESSES),
        (resource.RLIMIT_NOFILE, MOST_FILES),
        (resource.RLIMIT_FSIZE, FOLDER_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def inside(command, seconds, memory, variables):
    """Becomes the program, in the first process of the group."""
    call("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    close_files()
    os.closerange(3, MOST_FILES)
    said = os.dup(2)  # closed when the program begins
    os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
    give_up_privileges()
    limit(seconds, memory)
    try:
        os.execvpe(command[0], command, variables)
    except OSError as error:
        fail(f"{command[0]}: {error.strerror}", said)


def fail(message, descriptor=2):
    """Says why there is no sandbox, and ends the process."""
    os.write(descriptor, message.encode("utf-8", "replace"))
    os._exit(FAILED)


def main():
    """Waits for the program, which ends with all that it has started when its time is over."""
    command, seconds, memory, variables = json.loads(sys.argv[1])
    try:
        apart()
        first = os.fork()
        if first == 0:
            inside(command, seconds, memory, variables)
    except OSError as error:
        fail(str(error.strerror or error))
    signal.signal(signal.SIGALRM, lambda *_: os.kill(first, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _, status = os.waitpid(first, 0)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)


main()
