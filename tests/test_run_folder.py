"""Records that survive a crash, one owner of a folder, and how each end is told."""

import errno
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import forking
import pytest
from helpers import ROOT

from llama_lite import distributed, errors, exit, files, formatting, run_folder
from llama_lite.distributed import launcher_problem
from llama_lite.errors import Interrupted, Refusal, Unhealthy, end_of, no_space
from llama_lite.files import FolderLock, append_jsonl, read_json, read_jsonl, write_json
from llama_lite.processes import worker_pool
from llama_lite.run_folder import RunFolder


def test_a_cut_last_line_is_skipped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_jsonl(tmp_path / "log.jsonl") == [{"a": 1}, {"a": 2}]
    assert read_jsonl(tmp_path / "none.jsonl") == [] and read_json(tmp_path / "none.json") is None


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"b": 1})
    monkeypatch.setattr(
        "llama_lite.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError):
        write_json(tmp_path / "a.json", {"b": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}


@pytest.mark.parametrize(
    "error, status, code",
    [
        (None, "finished", 0),
        (Refusal("no"), "refused", 2),
        (Unhealthy("nan"), "unhealthy", 3),
        (Interrupted("stop"), "interrupted", 75),
        (KeyboardInterrupt(), "interrupted", 75),
    ],
)
def test_each_end_is_told(tmp_path, error, status, code):
    try:
        with RunFolder(tmp_path / "run") as run:
            run.step = 7
            if error:
                raise error
    except type(error or KeyError()):
        pass
    assert read_json(tmp_path / "run/status.json") == {
        "status": status,
        "code": code,
        "step": 7,
        "reason": end_of(error) if error else "",
    }
    assert read_jsonl(tmp_path / "run/events.jsonl")[-1]["event"] == status


REFUSES = """
import sys, time
from llama_lite import exit
from llama_lite.errors import Refusal

exit.FIRST_WORD = float(sys.argv[1])

def main():
    time.sleep(float(sys.argv[2]) * (exit.RANK == 0))
    raise Refusal("no text")

exit.exit_with_status(main)
"""


@pytest.mark.parametrize("first_word, late, said", [(30, 1, "refused: no text"), (0, 5, "rank 1, refused: no text")])
def test_of_several_processes_the_first_says_why_or_the_one_that_knows(tmp_path, first_word, late, said):
    (tmp_path / "refuses.py").write_text(REFUSES)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "refuses.py"),
    ]
    done = subprocess.run(
        [*launch, str(first_word), str(late)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1 and re.findall(".*refused: .*", done.stderr) == [said], done.stderr


def test_ctrl_c_is_one_line_and_status_75_where_no_handler_is_set(monkeypatch, capsys, tmp_path):
    """An evaluation, or a small command: it used to be a traceback and status 1."""

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setenv(exit.STATUS_FILE, str(tmp_path / "status"))
    with pytest.raises(SystemExit) as end:
        exit.exit_with_status(interrupted)
    assert end.value.code == 75 and (tmp_path / "status").read_text() == "75\n"
    said = capsys.readouterr().err.strip()
    assert said == "interrupted: Ctrl-C; what is finished is kept. Run the same command again."


SLEEPS = """
import multiprocessing, os, signal, sys, time
from llama_lite.exit import exit_with_status

def main():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    print(child.pid, flush=True)
    try:
        child.join()
        print("child", child.exitcode, flush=True)
        time.sleep(600)
    finally:
        print("cleaned up", flush=True)

exit_with_status(main)
"""


def test_sigterm_is_one_line_and_status_75_where_no_handler_is_set():
    """An evaluation under a scheduler: it used to end without a line. Forks end as they did, without a traceback."""
    command = [sys.executable, "-c", SLEEPS]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        try:
            os.kill(int(process.stdout.readline()), signal.SIGTERM)
            assert process.stdout.readline() == f"child {-signal.SIGTERM}\n"
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert (process.returncode, out) == (75, "cleaned up\n")
    assert err.strip() == "interrupted: SIGTERM; what is finished is kept. Run the same command again."


KILLS_AT_ONCE = """
import os, signal, time
from llama_lite.exit import exit_with_status

def main():
    for _ in range(50):
        if (child := os.fork()) == 0:
            time.sleep(20)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM

exit_with_status(main)
"""


def test_a_fork_that_has_just_begun_ends_on_sigterm():
    """Python drops a signal with a handler that reaches a fork before its first line: a worker lived on."""
    assert subprocess.run([sys.executable, "-c", KILLS_AT_ONCE], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "code, status, said",
    [
        ("import transformers.no_such", 1, "Traceback"),
        ("raise ModuleNotFoundError('x', name='my_module')", 1, "Traceback"),
        ("raise ModuleNotFoundError('x', name='trl')", 2, "\nrefused: the package trl is not installed for"),
    ],
)
def test_a_missing_package_is_said_with_the_way_to_it(code, status, said):
    """Where the environment is not active."""
    script = f"from llama_lite.exit import exit_with_status\ndef main():\n    {code}\nexit_with_status(main)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == status and ended.stderr.startswith(said)
    assert ("source .venv/bin/activate" in ended.stderr) == (status == 2)


def test_an_output_that_nobody_reads_is_no_traceback():
    script = "from llama_lite.exit import exit_with_status\nexit_with_status(lambda: [print(flush=True) for _ in range(10**6)])"
    with subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True, cwd=ROOT) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


def test_a_crash_leaves_the_last_status(tmp_path):
    with RunFolder(tmp_path / "run"):
        pass
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run"):
        raise ZeroDivisionError
    assert read_json(tmp_path / "run/status.json")["status"] == "finished"


def test_only_the_first_rank_replaces_the_status_of_a_refused_command(tmp_path, monkeypatch):
    for event in ("started", "finished", "refused"):
        append_jsonl(tmp_path / "events.jsonl", {"event": event, "step": 4})
    write_json(tmp_path / "status.json", {"status": "refused"})
    with monkeypatch.context() as patch:  # on another rank, which gets what the first one has found
        patch.setattr(run_folder, "run_on_main", lambda function, *args: True)
        assert RunFolder(tmp_path).is_finished()
    assert read_json(tmp_path / "status.json") == {"status": "refused"}
    assert RunFolder(tmp_path).is_finished()
    assert read_json(tmp_path / "status.json") == {"status": "finished", "code": 0, "step": 4, "reason": ""}


def test_folders_of_others_are_refused(pretrain, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(Refusal, match="holds files, but is not the folder of a pretraining run"):
        pretrain(tmp_path / "photos")
    (tmp_path / "sft").mkdir()
    write_json(tmp_path / "sft" / "run.json", {"kind": "sft"})
    with pytest.raises(Refusal, match=r"belongs to a run of another kind \(sft, this is pretrain\)"):
        pretrain(tmp_path / "sft")


def test_a_run_with_another_model_is_refused_as_another_run(pretrain, whole_run, tmp_path):
    import shutil

    shutil.copytree(whole_run, tmp_path / "run")
    with pytest.raises(Refusal, match=r"not the run of the checkpoint at step 12:(.|\n)*seed +1337 -> 5"):
        pretrain(tmp_path / "run", seed=5)


def test_resume_never_and_must_in_a_run(pretrain, whole_run, tmp_path):
    import shutil

    shutil.copytree(whole_run, tmp_path / "run")
    with pytest.raises(Refusal, match=r"never: .* holds 2 checkpoint\(s\), the newest at step 12"):
        pretrain(tmp_path / "run", resume_from_checkpoint="never")
    with pytest.raises(Refusal, match=r"must: .* holds no verified checkpoint"):
        pretrain(tmp_path / "other", resume_from_checkpoint="must")


def _send(size):
    return bytes(size)


@pytest.mark.parametrize("turn", range(5))
def test_a_pool_that_is_left_while_results_come_in_ends(turn):
    """Workers are ended half-way through sending; nobody waits for the other half."""
    with pytest.raises(KeyboardInterrupt), worker_pool(2, int) as pool:
        jobs = [pool.submit(_send, 20_000_000) for _ in range(8)]
        jobs[turn % 2].result()
        raise KeyboardInterrupt


def test_the_time_used_counts_from_the_start_of_the_launcher(tmp_path):
    """`python -u` as well: what Python is told before the script is not taken for the script."""
    own = "time.time() - psutil.Process().create_time()"
    code = (
        "import psutil, time; from llama_lite.processes import seconds_since_start; print(seconds_since_start() -"
        f" ({own}))"
    )
    (tmp_path / "script.py").write_text(code)
    launcher = "import subprocess, sys, time; time.sleep(1); subprocess.run([sys.executable, '-u', sys.argv[1]])"
    command = [sys.executable, "-c", launcher, str(tmp_path / "script.py")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) >= 0.9


# ---- the environment ----

WHOLE = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
ONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "environ",
    [{}, WHOLE, ONE, {"RANK": "0"}, {"WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "4"}, {"MASTER_ADDR": "127.0.0.1"}],
)
def test_variables_of_a_launcher_that_go_together(environ):
    assert launcher_problem(environ) is None and distributed._launched(environ) == (
        int(environ.get("RANK", 0)),
        int(environ.get("WORLD_SIZE", 1)),
        int(environ.get("LOCAL_WORLD_SIZE", 1)),
    )


def test_printed_commands_start_a_script_as_this_one_was_started():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    arguments = _validate_launch_command(launch_command_parser().parse_args(["--num_processes", "1", "x.py"]))[0]
    of_accelerate = prepare_simple_launcher_cmd_env(arguments)[1]
    for environ, command in (({}, "python"), (of_accelerate, "accelerate launch"), (WHOLE, "accelerate launch")):
        assert distributed._launch_command(environ) == command


@pytest.mark.parametrize(
    "environ, told",
    [
        ({"RANK": "1"}, "contradicts itself: RANK=1, no WORLD_SIZE, no LOCAL_RANK"),
        ({**WHOLE, "RANK": "4"}, "contradicts itself: RANK=4, WORLD_SIZE=4"),
        (
            {**WHOLE, "LOCAL_RANK": "2", "RANK": "2"},
            "contradicts itself: RANK=2, WORLD_SIZE=4, LOCAL_RANK=2, LOCAL_WORLD_SIZE=2",
        ),
        ({**WHOLE, "RANK": "0"}, "contradicts itself: RANK=0, WORLD_SIZE=4, LOCAL_RANK=1"),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "8"}, "contradicts itself"),
        ({"WORLD_SIZE": "0"}, "contradicts itself"),
        ({"RANK": ""}, "says RANK='', which is not a number"),
        ({"WORLD_SIZE": "-1"}, "says WORLD_SIZE='-1', which is not a number"),
        ({"SLURM_STEP_NUM_TASKS": ""}, "says SLURM_STEP_NUM_TASKS='', which is not a number"),
        ({"LOCAL_RANK": "0"}, "lacks RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_variables_of_a_launcher_that_contradict_each_other(environ, told):
    names = " ".join(name for name in distributed.LAUNCHER_VARIABLES if name in environ)
    assert told in launcher_problem(environ) and f"(`unset {names}`)" in launcher_problem(environ)
    assert distributed._launched(environ) == (0, 1, 1)  # so that it is said


def test_a_left_over_rank_is_refused_at_once_and_said(monkeypatch, capsys):
    """It used to print nothing, train, and end in IndexError."""
    monkeypatch.setenv("RANK", "1")
    done = []
    with pytest.raises(SystemExit) as end:
        exit.exit_with_status(lambda: done.append(1))
    assert end.value.code == 2 and not done
    assert capsys.readouterr().err.startswith("\nrefused: the environment contradicts itself: RANK=1, no WORLD_SIZE")


@pytest.mark.parametrize(
    "environment, why",
    [
        ({"PYTHONOPTIMIZE": "2"}, "Python runs without docstrings (-OO or PYTHONOPTIMIZE=2)"),
        ({"PYTHONPATH": "{folder}"}, "{folder}/datasets.py is found in place of the package datasets"),
    ],
)
def test_what_keeps_libraries_from_being_imported_is_said(environment, why, tmp_path):
    (tmp_path / "datasets.py").write_text("raise RuntimeError('mine')")
    environment = {name: value.format(folder=tmp_path) for name, value in environment.items()}
    ended = subprocess.run(
        [sys.executable, "-c", "from llama_lite.exit import exit_with_status; exit_with_status(lambda: 1 / 0)"],
        **{"capture_output": True, "text": True, "cwd": ROOT, "env": {**os.environ, **environment}},
    )
    assert ended.returncode == 2 and f"refused: {why.format(folder=tmp_path)}" in ended.stderr


def test_a_terminal_without_a_character_shows_another(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    with pytest.raises(SystemExit) as end:
        exit.exit_with_status(lambda: distributed.print_main("café → 🙂"))
    assert end.value.code == 0 and raw.getvalue() == "café ? ?\n".encode("latin-1")


def test_a_stream_shows_what_it_can():
    for encoding, shown in (("ascii", b"caf? ?"), ("utf-8", "café →".encode())):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding)
        exit.show_any_text(stream)
        print("café →", end="", file=stream, flush=True)
        assert raw.getvalue() == shown
    exit.show_any_text(io.StringIO())  # as a notebook's


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", no_locks)
    with RunFolder(tmp_path / "run"):
        pass
    assert (
        f"WARNING   {tmp_path / 'run'} is on a file system without locks (No locks available)"
        in capsys.readouterr().out
    )
    assert read_json(tmp_path / "run" / "status.json")["status"] == "finished"
    owner = {"host": socket.gethostname(), "state": "running", "pid": os.getppid()}  # another process, which lives
    (tmp_path / "run/.lock").write_text(json.dumps(owner))
    with pytest.raises(Refusal, match=f"is in use by process {os.getppid()} on this machine.*remove"):
        FolderLock(tmp_path / "run", "write to").acquire()
    for ended in ({"state": "ended"}, {"pid": 2**30}, {"host": "another"}):
        (tmp_path / "run/.lock").write_text(json.dumps({**owner, **ended}))
        lock = FolderLock(tmp_path / "run", "write to")
        lock.acquire()
        lock.release()

    def held(*_):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(files.fcntl, "lockf", held)
    with pytest.raises(Refusal, match="is in use by process"):
        FolderLock(tmp_path / "run", "write to", patience=0.0).acquire()


def _enter_as_rank(rank: int, rendezvous: Path, folder: Path, answer: Path) -> None:
    """In a forked process: write what rank `rank` of two says of a run folder into a file."""
    import torch.distributed as dist

    distributed.RANK = run_folder.RANK = rank
    distributed.WORLD_SIZE = run_folder.WORLD_SIZE = 2
    run_folder.SHARED_AFTER = 1.0
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        with RunFolder(folder):
            answer.write_text("entered")
    except Refusal as refusal:
        answer.write_text(str(refusal))
    dist.barrier()


def test_a_folder_that_not_all_ranks_see_is_refused_on_all_of_them(tmp_path):
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(forking.LOADED)
    said = {}
    for second in ("here", "there"):  # the folder under that path on the second node
        (tmp_path / second).mkdir(exist_ok=True)
        answers = [tmp_path / f"{second}-{rank}" for rank in range(2)]
        folders = [tmp_path / "here", tmp_path / second]
        arguments = [(rank, tmp_path / f"rendezvous-{second}", folders[rank], answers[rank]) for rank in range(2)]
        ranks = [forks.Process(target=_enter_as_rank, args=given) for given in arguments]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
        said[second] = [answer.read_text() for answer in answers]
    assert said["here"] == ["entered", "entered"]
    assert said["there"][0] == said["there"][1] and "rank 1 on" in said["there"][0]
    assert "does not see the files that rank 0 on" in said["there"][0]
    assert not list(tmp_path.glob("*/.shared-*"))


@pytest.mark.parametrize("where", ["fsync", "open"])
def test_a_file_system_that_flushes_no_folders_is_told_once(tmp_path, monkeypatch, capsys, where):
    monkeypatch.setattr(distributed, "_printed", set())
    fsync, opens = os.fsync, os.open

    def no_folders(handle):
        if os.fstat(handle).st_mode & 0o40000:
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    def no_open(path, *arguments, **more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opens(path, *arguments, **more)

    monkeypatch.setattr(files.os, *{"fsync": ("fsync", no_folders), "open": ("open", no_open)}[where])
    for value in (1, 2):
        write_json(tmp_path / "a.json", value)
    monkeypatch.undo()
    assert read_json(tmp_path / "a.json") == 2
    assert capsys.readouterr().out.count("WARNING   the file system of") == 1


# ---- full disks ----


@pytest.mark.parametrize(
    "count, told",
    [
        (0, "0 bytes"),
        (300, "300 bytes"),
        (2_000, "2.0 KiB"),
        (700_000, "0.7 MiB"),
        (5_000_000, "4.8 MiB"),
        (2**29, "0.50 GiB"),
        (3 * 2**40, "3.00 TiB"),
    ],
)
def test_sizes_have_a_unit_that_fits(count, told):
    assert formatting.size(count) == told


def _raised(cause: Exception) -> Exception:
    try:
        raise RuntimeError("saving failed") from cause
    except RuntimeError as error:
        return error


FULL = [
    OSError(errno.ENOSPC, "No space left on device", "FOLDER/x"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError("16384 requested and 0 written"),  # numpy's tofile
    Exception("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors, tokenizers
    RuntimeError(
        "[enforce fail at inline_container.cc:778] . PytorchStreamWriter failed writing file data/0: file write failed"
    ),
    _raised(OSError(errno.ENOSPC, "No space left on device")),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_refused_with_its_sizes_whatever_library_met_it(tmp_path, monkeypatch, capsys, error):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=4096, total=2**30))
    if getattr(error, "filename", None):
        error.filename = str(tmp_path / "x")

    def main():
        with RunFolder(tmp_path / "run"):
            raise error

    with pytest.raises(SystemExit) as end:
        exit.exit_with_status(main)
    place = tmp_path if getattr(error, "filename", None) else tmp_path / "run"
    told = f"no space left on the disk of {place}: 4.0 KiB of 1.00 GiB are free. Make room"
    assert end.value.code == 2 and f"refused: {told}" in capsys.readouterr().err
    reason = run_folder.redact(errors.end_of(error, tmp_path / "run"))
    assert read_json(tmp_path / "run" / "status.json") == {"status": "refused", "code": 2, "step": 0, "reason": reason}


def test_a_disk_without_inodes_is_told_from_a_full_one(tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(
        os,
        "statvfs",
        lambda place: SimpleNamespace(f_files=12, f_favail=0, f_bavail=9, f_bfree=9, f_blocks=10, f_frsize=4096),
    )
    told = errors.no_space(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x")))
    assert told.startswith(f"no file can be made on the disk of {tmp_path}: all of its 12 inodes are in use")


def test_other_errors_are_no_full_disks(tmp_path):
    for error in (
        OSError(errno.EIO, "Input/output error"),
        ValueError("3 requested and 0 written"),
        KeyError("x"),
        None,
    ):
        assert no_space(error) is None
    with pytest.raises(
        Refusal,
        match=rf"no space for the next checkpoint in {tmp_path}: it takes \d+\.\d\d TiB and .* are free\. Make room",
    ):
        files.need_space(tmp_path, 2**60, "the next checkpoint", "Make room.")


def test_a_write_to_a_full_disk_names_the_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        files.append_jsonl(tmp_path / "log.jsonl", {"a": 1})
    assert error.value.filename == str(tmp_path / "log.jsonl") and str(tmp_path) in no_space(error.value)


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    """A full disk or a power cut leaves part of a line. The next one used to be lost with it, and the card to end in a
    traceback, which also kept every revision from being published.
    """
    from model_card.records import _jsonl

    path = tmp_path / "events.jsonl"
    for record in ({"event": "started"}, {"event": "saved"}):
        append_jsonl(path, record)
    path.write_bytes(path.read_bytes()[:-5])
    append_jsonl(path, {"event": "resumed"})
    assert read_jsonl(path) == _jsonl(path) == [{"event": "started"}, {"event": "resumed"}]
    path.write_text('{"event": "sav{"event": "resumed"}\n[1]\n{"event": "saved"}\n')
    assert _jsonl(path) == [{"event": "saved"}]
