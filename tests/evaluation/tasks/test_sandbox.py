"""The sandbox, attacked: forged verdicts, ways out, ways to wear the machine out; each with namespaces and without.

Where `protections()` claims something, the attack must fail. Where it does not, only what every machine gives is asked
for.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama_lite.evaluation.tasks import sandbox
from llama_lite.evaluation.tasks.embedded import humaneval_items

BASE = {"own process", "empty environment", "limits"}
EVERYTHING = BASE | {
    *(
        "memory limit",
        "process limit",
        "no network",
        "no other processes",
        "read-only files",
        "home hidden",
        "no capabilities",
        "not root",
    )
}
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.fixture(params=[True, False], ids=["namespaces", "without"])
def claimed(request, monkeypatch) -> set[str]:
    """What `protections()` claims, in both ways that a run can go."""
    monkeypatch.setattr(sandbox, "ISOLATE", request.param and sandbox.LINUX)
    return set(sandbox.protections())


def attack(code: str, timeout: float = 3.0) -> str:
    """What the code printed; it must have come to its end."""
    found = sandbox.run(code, timeout=timeout)
    assert found.passed, found
    return found.output


def named(word: str) -> list[str]:
    """Processes of this machine that call themselves `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [path.parent.name] if path.read_text().strip() == word else []
    return found


# ---- verdicts ----


@pytest.mark.parametrize(
    "code, reason",
    [
        ("x = 1", "passed"),
        ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("def f(:", "failed: SyntaxError: invalid syntax (program, line 1)"),
        ("input()", "failed: EOFError: EOF when reading a line"),
        ("raise SystemExit(0)", "failed: SystemExit: 0"),
        ("import os; os._exit(0)", "left before its end, exit status 0"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by signal 11"),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "timed out"),
        ("def f(n): return f(n + 1)\nf(0)", "failed: RecursionError: maximum recursion depth exceeded"),
        ("x = [0]\nwhile True: x += x", "out of memory"),
        ("from itertools import count\nlen(list(map(str, count())))", "out of memory"),
    ],
)
def test_each_end_is_told(code, reason, claimed):
    if reason == "out of memory" and "memory limit" not in claimed:
        pytest.skip("no memory limit here: protections() says so")
    found = sandbox.run(code, timeout=1.0 if reason == "timed out" else 60.0)
    assert found.reason == reason and found.passed == (reason == "passed"), found


def test_checks_run_beside_the_code(claimed):
    code = "calls = []\ndef f(x, *, more=1):\n    calls.append(x)\n    return x + more\ndef count(): return len(calls)"
    assert sandbox.run(code, "assert f(2) == 3 and f(2, more=5) == 7 and count() == 2").passed
    assert sandbox.run(code, "assert f(2) == 4").reason == "failed: AssertionError"
    assert sandbox.run(code, "f('a')").reason == 'failed: TypeError: can only concatenate str (not "int") to str'
    assert sandbox.run(code, "g(1)").reason == "failed: NameError: name 'g' is not defined"
    assert sandbox.run(code, "raise SystemExit(0)").reason == "failed: SystemExit: 0"
    assert sandbox.run("import time\ndef f(): time.sleep(9)", "f()", timeout=0.5).reason == "timed out"
    assert sandbox.run("def f(): yield 1", "while True: pass", timeout=0.5).reason == "timed out"
    assert sandbox.run("import os\ndef f(): os._exit(0)", "f()").reason == "left before its end, exit status 0"


def test_values_cross_as_what_they_are_equal_to():
    """Both ways, and types that models return where a test expects a plain one."""
    checks = """
value = [None, True, 1, -2.5, 10**40, "é\\ud800\\n", b"\\x00", (1, [2]), {"a": {1, 2}, (1, 2): None}, frozenset({3}), float("inf"), []]
assert same(value) == value and [type(item) for item in same(value)] == [type(item) for item in value]
assert same(float("nan")) != same(float("nan")) and same(True) is True and same(None) is None
assert counted() == {"a": 2} and keys() == {"a"} and named() == (1, 2) and half() == 0.5 and same(1) == 1
assert generated() != [1, 2] and list(generated()) == [1, 2]
assert thing() != thing() and thing() is not None and not isinstance(thing(), (int, str, list))
"""
    code = """
import collections, fractions
def same(x): return x
def counted(): return collections.Counter("aa")
def keys(): return {"a": 1}.keys()
def named(): return collections.namedtuple("P", "x y")(1, 2)
def half(): return fractions.Fraction(1, 2)
def generated(): yield from (1, 2)
def thing(): return object()
"""
    assert sandbox.run(code, checks) == sandbox.Verdict(True, "passed")


def test_humaneval():
    """Every eighth problem, and those whose tests use other functions of the prompt; right, wrong, and with checks
    apart.
    """
    items = [item for number, item in enumerate(humaneval_items()) if number % 8 == 0 or number in (33, 38, 50)]
    right = [f"{item['prompt']}{item['canonical_solution']}" for item in items]
    wrong = [f"{item['prompt']}    return None\n" for item in items]
    checks = [f"{item['test']}\ncheck({item['entry_point']})\n" for item in items]
    with ThreadPoolExecutor(2) as pool:
        assert [verdict.reason for verdict in pool.map(sandbox.run, right, checks)] == ["passed"] * len(items)
        assert not any(verdict.passed for verdict in pool.map(sandbox.run, wrong, checks))
    assert all(sandbox.run(f"{code}\n{test}").passed for code, test in zip(right, checks, strict=True))


# ---- forged verdicts: f is wrong, the check knows ----

WRONG, CHECK = "def f(x): return 0\n", "assert f(2) == 3"
EVERY_FD = "import os\nfor fd in range(64):\n    try: {}\n    except OSError: pass\n"
BLIND = {
    "sys.exit": "import sys; sys.exit(0)",
    "exit": "exit()",
    "os._exit": "import os; os._exit(0)",
    "printed": "print('passed')\nprint('\"passed\"', flush=True)\nimport os; os._exit(0)",
    "at exit": "import atexit, os\natexit.register(lambda: os._exit(0))\nraise SystemExit(0)",
    "written everywhere": EVERY_FD.format("os.write(fd, b'\"passed\"\\n[null, true]\\n[null, null]\\n')"),
    "echoed": (
        "import os\nfor fd in range(64): os.set_blocking(fd, False) if os.path.exists(f'/dev/fd/{fd}') else None\n"
        + EVERY_FD.format(
            "text = os.read(fd, 99)\n        for other in range(3, 64):\n            if other != fd: os.write(other,"
            " text)"
        )
        + "os._exit(0)"
    ),
    "closed": "import os; os.closerange(0, 64); os._exit(0)",
    "a file": (
        "for name in ('verdict', 'result', 'report', 'passed'): open(name, 'w').write('passed')\nraise SystemExit"
    ),
    "another program": "import os; os.execv('/bin/true', ['true'])",
    "from a thread": "import os, threading, time\nthreading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(5)",
    "a fork goes on": "import os\nif os.fork(): os._exit(0)",
    "the supervisor killed": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos._exit(0)",
    "its own alarm": (
        "import os, signal\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\nsignal.setitimer(signal.ITIMER_REAL,"
        " 0.01)\nwhile True: pass"
    ),
    "no excepthook": "import sys\nsys.excepthook = sys.unraisablehook = lambda *_: None\nraise SystemExit(0)",
    "no assertions": (
        "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {'__new__': lambda *_: exit(0)})"
    ),
}
# These know sandbox.py, and work from inside the interpreter that runs the code.
SEEING = {
    "equal to all": "class E(int):\n    __eq__ = lambda *_: True\n    __ne__ = __hash__ = None\ndef f(x): return E()",
    "equal to all, no int": (
        "class E:\n    def __eq__(self, other): return True\n    def __getattr__(self, name): return self\ndef f(x):"
        " return E()"
    ),
    "jump over the assertion": (
        "import sys\ndef jump(frame, *_):\n    frame.f_trace_lines = False\n    return None\nsys.settrace(jump)"
    ),
    "frames": (
        """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        if 'answers' in frame.f_locals:
            frame.f_locals['answers'].write('"passed"\\n')
            frame.f_locals['answers'].flush()
        frame = frame.f_back
"""
    ),
    "says that it is done, and more": (
        """
import sys
frame = sys._getframe()
while not {'questions', 'answers'} <= set(frame.f_locals): frame = frame.f_back
word, out = frame.f_locals['questions'].readline().strip(), frame.f_locals['answers']
for line in (f'[null, {word}]', '"passed"', '[null, true]', '[null, {"foreign": {"dict": [["__eq__", 1]]}}]'): out.write(line + '\\n')
out.flush()
"""
    ),
    "its globals": "import __main__\n__main__._describe = __main__._pack = lambda *_: 'passed'\n__main__.Raised = int",
    "garbage collector": (
        "import gc\nfor thing in gc.get_objects():\n    if isinstance(thing, dict) and 'checks' in thing:"
        " thing['checks'] = ''"
    ),
    "patched builtins": (
        "import builtins, json\nbuiltins.exec = builtins.compile = builtins.eval = lambda *a, **k: None\njson.dumps ="
        " lambda *_: '\"passed\"'"
    ),
    "defines the check": "def check(candidate): pass\ndef exec(*_): pass\nf.__eq__ = lambda *_: True",
    "not a number": "def f(x): return float('nan')",
    "raises what means passed": "def f(x): raise type('passed', (Exception,), {'__str__': lambda _: ''})()",
    "an endless line": (
        "import sys\ndef f(x):\n    frame = sys._getframe(1)\n    while 'answers' not in frame.f_locals: frame ="
        " frame.f_back\n    while True: frame.f_locals['answers'].write('[' * 10**6)"
    ),
    "traces the checks": LIBC
    + """
def children():
    try: return [int(pid) for pid in open(f'/proc/{os.getppid()}/task/{os.getppid()}/children').read().split()] + [os.getppid()]
    except OSError: return [1, 2, 3]
def f(x):
    for pid in set(children()) - {os.getpid()}:
        buffer = ctypes.create_string_buffer(8)
        where = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
        print('ESCAPED ' * (libc.ptrace(16, pid, 0, 0) == 0 or libc.process_vm_readv(pid, where, 1, where, 1, 0) > 0))
        for path in [f'/proc/{pid}/mem', *(f'/proc/{pid}/fd/{n}' for n in range(12))]:
            try: open(path, 'r+b').close()
            except OSError: continue
            print('ESCAPED', path)
""",
    "kills the checks": "import os\ndef f(x):\n    os.kill(os.getpid() + 1, 9)",
}


@pytest.mark.parametrize("way", [*BLIND, *SEEING])
def test_no_verdict_is_forged(way, claimed):
    found = sandbox.run(WRONG + {**BLIND, **SEEING}[way], CHECK, timeout=1.5)
    assert not found.passed and "ESCAPED" not in found.output, found


@pytest.mark.parametrize("way", BLIND)
def test_code_that_does_not_know_the_sandbox_forges_nothing_without_checks_apart(way, claimed):
    found = sandbox.run(f"{WRONG}{BLIND[way]}\n{CHECK}", timeout=1.5)
    assert not found.passed, found


def test_code_that_knows_the_sandbox_can_forge_without_checks_apart():
    """What the module says of itself; should this fail, say something better there."""
    code = SEEING["says that it is done, and more"] + "import time; time.sleep(9)"
    assert sandbox.run(code).passed and not sandbox.run(code, CHECK).passed


# ---- what it can see ----


def test_protections_are_known(claimed):
    assert BASE <= claimed <= EVERYTHING
    if (
        sandbox.ISOLATE
        and subprocess.run(
            ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--mount", "true"]
        ).returncode
        == 0
    ):
        assert claimed >= EVERYTHING - {"process limit", "not root"}  # those also need a user to become


def test_environment_arguments_and_descriptors_hold_nothing(claimed, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONSTARTUP", "hf_secret")
    code = """
import gc, os, sys
assert sys.flags.isolated and sys.flags.ignore_environment
descriptors = []
for fd in range(64):
    try: descriptors.append(os.fstat(fd).st_mode)
    except OSError: pass
assert len(descriptors) == 5, descriptors
seen = [repr(os.environ), repr(sys.argv)]
for name in ('environ', 'cmdline'):
    for pid in ('self', os.getppid()):
        try: seen.append(open(f'/proc/{pid}/{name}').read())
        except OSError: pass
seen += [repr(thing) for thing in gc.get_objects() if isinstance(thing, (dict, list, tuple)) and len(thing) < 100]
assert '_'.join(['hf', 'secret']) not in ''.join(seen), 'ESCAPED'
try: import llama_lite
except ImportError: pass
else: raise AssertionError('the caller\\'s folder can be imported')
print(sorted(os.environ))
"""
    assert eval(attack(code)) == sorted([*sandbox.ENVIRONMENT, "HOME", "TMPDIR"])


def test_home_cannot_be_read(claimed):
    with tempfile.TemporaryDirectory(dir=Path.home(), prefix=".sandbox-test-") as folder:
        os.chmod(folder, 0o755)
        token = Path(folder, "token")
        token.write_text("hf_secret")
        seen = attack(
            f"import os\ntry: print(open({str(token)!r}).read())\nexcept OSError as error:"
            " print(error)\nprint(os.path.expanduser('~'))"
        )
        assert not seen.endswith(f"{Path.home()}\n")
        if "home hidden" in claimed:
            assert "hf_secret" not in seen and "No such file" in seen


def test_no_network(claimed):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind(("127.0.0.1", 0))
        code = f"""
import os, socket
tries = [
    lambda: socket.create_connection({server.getsockname()!r}, 1).send(b'x'),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', {datagrams.getsockname()!r}),
    lambda: socket.create_connection(('1.1.1.1', 53), 1),
    lambda: socket.socket(40, socket.SOCK_STREAM),
    lambda: os.execvp('sh', ['sh', '-c', 'exec 3<>/dev/tcp/127.0.0.1/{server.getsockname()[1]}']) if os.fork() == 0 else os.wait(),
]
for number, one in enumerate(tries[:4]):
    try: one()
    except OSError: continue
    print('ESCAPED', number)
"""
        seen = attack(code)
        if "no network" in claimed:
            assert seen == ""
            server.settimeout(0.1)
            datagrams.settimeout(0.1)
            for wait in (server.accept, lambda: datagrams.recv(1)):
                with pytest.raises(TimeoutError):
                    wait()


def test_a_socket_pair_still_works(claimed):
    """asyncio needs one."""
    assert attack("import asyncio\nasync def f(): return 1\nprint(asyncio.run(f()))") == "1\n"


def test_other_processes_are_out_of_reach(claimed):
    """Not to be seen, signalled, traced or read: neither a process of the same user, nor the caller, nor the
    supervisor.
    """
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={"SECRET": "hf_secret"}
    ) as victim:
        code = f"""
{LIBC}
import signal
for name in ('environ', 'mem', 'maps', 'fd/0', 'root/etc/hostname'):
    try: print('ESCAPED', open(f'/proc/{victim.pid}/{{name}}').read(10))
    except OSError: pass
buffer = ctypes.create_string_buffer(8)
where = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
if libc.ptrace(16, {victim.pid}, 0, 0) == 0: print('ESCAPED ptrace')
if libc.process_vm_readv({victim.pid}, where, 1, where, 1, 0) > 0: print('ESCAPED process_vm_readv')
try: os.kill({victim.pid}, signal.SIGTERM)
except OSError: pass
else: print('ESCAPED kill')
"""
        seen = attack(code)
        if "no other processes" in claimed:
            assert seen == "" and victim.poll() is None
            everything = "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass\nos.kill(os.getppid(), 9)"
            assert (
                not sandbox.run(everything, timeout=1.0).reason.startswith("the supervisor") and victim.poll() is None
            )
        victim.kill()


# ---- what it can change ----

REMOUNT = """
def attempts():
    for path in (%r, '/usr', '/', sys.prefix):
        for flags in (32, 32 | 4096, 32 | 4096 | 2 | 4, 4096, 1 << 18 | 16384):
            libc.mount(b'none', path.encode(), None, ctypes.c_ulong(flags), None)
    for path in ('/', '/usr', '/tmp', '/root', '/home'): libc.umount2(path.encode(), 2)
    libc.mount(b'proc', b'/tmp', b'proc', 0, None)
attempts()
if os.fork() == 0:
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x20000) == 0:
        print('ESCAPED into a user namespace', flush=True)
        for name, text in (('setgroups', 'deny'), ('uid_map', f'0 {uid} 1'), ('gid_map', f'0 {gid} 1')):
            try: open(f'/proc/self/{name}', 'w').write(text)
            except OSError: pass
        attempts()
        change()
    os._exit(0)
os.wait()
for number in (0, 1, 1000):
    for become in (os.setuid, os.setgid, os.seteuid):
        try: become(number)
        except OSError: pass
attempts()
"""


def test_nothing_outside_the_scratch_folder_can_be_written(claimed):
    """Files of the caller, Python's own, the system's; also after every remount, in user namespaces too."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        target = Path(folder, "file")
        target.write_text("as it was")
        os.chmod(target, 0o666)
        places = [
            str(target),
            f"{folder}/new",
            f"{Path(sandbox.__file__).parent}/.sandbox-test",
            "/var/tmp/.sandbox-test",
            "/dev/shm/.sandbox-test",
        ]
        change = f"""
{LIBC}
import sys
def change():
    for path in {places} + [f'{{p}}/.sandbox-test' for p in (sys.prefix, sys.base_prefix, '/usr', '/etc', '/')]:
        try: open(path, 'w').write('changed')
        except OSError: continue
        print('ESCAPED', path, flush=True)
        if path.endswith('-test'): os.unlink(path)
change()
"""
        seen = attack(change + (REMOUNT % folder + "change()\n" if "read-only files" in claimed else ""), timeout=10)
        if "read-only files" in claimed:
            assert "ESCAPED" not in seen, seen
            assert target.read_text() == "as it was" and sorted(os.listdir(folder)) == ["file"]
        if "no capabilities" in claimed:
            assert (
                attack(
                    f"{LIBC}sets = ctypes.create_string_buffer(24)\nlibc.capget({sandbox.CAPABILITIES!r},"
                    " sets)\nprint(any(sets.raw))"
                )
                == "False\n"
            )
            mine = "/tmp" if "read-only files" in claimed else "."
            code = (
                f"{LIBC}os.mkdir('m')\nprint(libc.mount(b'tmpfs', b'{mine}/m', b'tmpfs', 0, None),"
                " libc.unshare(0x20000))"
            )
            assert attack(code) == "-1 -1\n"


def test_the_scratch_folder_goes(claimed, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    os.chmod(tmp_path, 0o755)
    code = (
        "import os\nopen('a', 'w').write('x')\nos.makedirs('b/c')\nopen('b/c/d', 'w')\nprint(sorted(os.listdir('.')))"
    )
    assert attack(code).startswith("['a', 'b'")  # where Python lies in /tmp its folder is there, too
    assert not sandbox.run("import os\nopen('a', 'w').write('x')\nwhile True: pass", timeout=0.5).passed
    assert list(tmp_path.iterdir()) == []


# ---- what it can use up ----


def test_memory_files_and_output_are_bounded(claimed):
    hog = (
        "import os\nfor _ in range(4):\n    if os.fork() == 0:\n        x = [bytearray(10**8) for _ in range(9)]\n     "
        "   print('ESCAPED', flush=True)\n        os._exit(0)\nfor _ in range(4): os.wait()"
    )
    if "memory limit" in claimed:
        assert "ESCAPED" not in sandbox.run(hog, timeout=10).output
    file = (
        "try:\n    with open('big', 'wb') as file:\n        for _ in range(40): file.write(bytes(2**20))\nexcept"
        " OSError as error: print(error.errno)"
    )
    assert attack(file, 10) == "27\n"
    if "read-only files" in claimed:
        assert (
            "No space left"
            in sandbox.run("for n in range(9): open(str(n), 'wb').write(bytes(15 * 2**20))", timeout=10).reason
        )
        assert "No space left" in sandbox.run("for n in range(9999): open(str(n), 'wb')", timeout=10).reason
    honest = sandbox.run("for n in range(300_000): print('a line of text')\nprint('end')", timeout=20)
    assert honest.passed and len(honest.output) <= sandbox.KEPT and honest.output.endswith("end\n")
    assert sandbox.run("while True: print('x' * 10**6)", timeout=1.0).reason == "timed out"


FORK = {
    "os.fork": "os.fork()",
    "ctypes": "libc.fork()",
    "system call": "libc.syscall({'x86_64': 57}.get(os.uname().machine, 57))",
}


@pytest.mark.parametrize("how", FORK)
def test_a_fork_bomb_is_held(how, claimed):
    """Where it is not claimed, forty forks stand for it: they must all be gone."""
    word = f"bomb{os.getpid()}"
    rename = f"{LIBC}libc.prctl(15, b'{word}', 0, 0, 0)\n"
    if "process limit" in claimed:
        start = time.monotonic()
        found = sandbox.run(f"{rename}while True:\n    try: {FORK[how]}\n    except OSError: pass", timeout=1.0)
        assert not found.passed and time.monotonic() - start < 300
        few = (
            f"{rename}made = 0\ntry:\n    while made < 100:\n        if {FORK[how]} == 0: os._exit(0) if libc.pause()"
            " else 0\n        made += 1\nexcept OSError: pass\nprint(made)"
        )
        if how == "os.fork":
            assert int(attack(few)) < sandbox.LIMITS["NPROC"]
    else:
        sandbox.run(f"{rename}for _ in range(40):\n    if os.fork() == 0: libc.pause()", timeout=5.0)
    assert named(word) == []


@pytest.mark.parametrize("ends", ["", "while True: pass", "os._exit(0)"])
def test_nothing_is_left_running(ends, claimed):
    """Daemons of its own session, orphans, with signals ignored."""
    word = f"left{os.getpid()}"
    code = f"""
{LIBC}
import signal
libc.prctl(15, b'{word}', 0, 0, 0)
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, 32):
                try: signal.signal(number, signal.SIG_IGN)
                except OSError: pass
            while True: libc.pause()
        os._exit(0)
{ends}
"""
    assert sandbox.run(code, timeout=1.0 if ends else 60.0).passed == (ends == "")
    assert named(word) == []


def test_the_caller_survives(claimed):
    """Signals to the parent, to the group, to the session: the caller lives, and so does the next run."""
    code = (
        "import os, signal\nfor target in (os.getppid(), 0):\n    for number in (1, 2, 15, 9): (os.kill if target else"
        " os.killpg)(target, number)"
    )
    assert not sandbox.run(code, timeout=1.0).passed
    assert sandbox.run("x = 1").passed


# ---- the machine ----


def test_it_says_when_it_does_not_start(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "nothing.py"))
    with pytest.raises(RuntimeError, match=r"the sandbox did not start.*nothing\.py"):
        sandbox.run("x = 1")


@pytest.mark.parametrize("isolate", [True, False])
def test_an_ordinary_user_and_root(isolate):
    """As whoever runs the tests is not: started by root, as an ordinary user and as a root whose Python all can
    read.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can become others; that an ordinary user can is what all other tests showed")
    python = next(
        (
            p
            for p in (sys.executable, "/usr/bin/python3")
            if p and all(d.stat().st_mode & 1 for d in Path(p).resolve().parents)
        ),
        None,
    )
    if python is None:
        pytest.skip("no Python that everybody can read")
    program = f"""
import os, sandbox
sandbox.ISOLATE = {isolate}
assert sandbox.run("def f(x): return x + 1", "assert f(2) == 3").passed
assert not sandbox.run("def f(x): return x", "assert f(2) == 3").passed
print(*sandbox.protections(), sep=",", end="")
"""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copy(sandbox.__file__, folder)
        for user in (0, 61183):
            environment = {"HOME": "/root" if user == 0 else folder, "PATH": os.environ["PATH"]}
            done = subprocess.run(
                [python, "-B", "-c", program],
                cwd=folder,
                user=user,
                group=user,
                extra_groups=[],
                env=environment,
                capture_output=True,
            )
            assert done.returncode == 0, done.stderr.decode()
            found = set(done.stdout.decode().split(","))
            assert found >= BASE | {"memory limit", "process limit", "no network", "no capabilities", "not root"}
            if isolate and sandbox._namespaces_work(True):
                assert found == EVERYTHING
