"""A snapshot holds the moment at which it was taken, and is written as safetensors itself would write it."""

import errno
import fcntl
import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from llama_lite import digests
from llama_lite.checkpoint import tensor_files
from llama_lite.checkpoint.background import BackgroundWriter
from llama_lite.checkpoint.snapshot import Snapshot, live_storages


@pytest.mark.parametrize("chunk", [64, 4096, 2**22])  # of several to a tensor, of several tensors, of the whole file
def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(tensor_files, "CHUNK", chunk)
    tensors = {
        f"{name}.{dtype}": torch.arange(size).to(dtype).reshape(shape)
        for name, size, shape in (("b", 42, (2, 3, 7)), ("a", 6, (6,)), ("naïve|step", 1, ()))
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64, torch.float16)
    }
    tensors["transposed"] = torch.arange(12.0).reshape(3, 4).T
    metadata = {"param_groups": '[{"lr": 0.1, "params": ["naïve/\\n"]}]'}
    taken = Snapshot(False)
    taken.add(tmp_path / "ours", tensors.items(), metadata, None)
    written = taken.write()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert written == {tmp_path / "ours": digests.blake3(tmp_path / "theirs")}


@pytest.mark.parametrize("file_system", ["as it is", "refuses to open", "refuses to write"])
def test_a_file_is_written_past_the_cache_where_the_file_system_allows_it(tmp_path, monkeypatch, file_system):
    direct, cached = [], []
    os_open, write = os.open, tensor_files.write_chunk

    def refuses(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os_open(path, flags, *mode)

    def write_chunk(file, chunk):
        write(file, chunk)
        (direct if fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DIRECT else cached).append(len(chunk))

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "CHUNK", 1000 if file_system == "refuses to write" else 4096)
        patch.setattr(tensor_files, "write_chunk", write_chunk)
        if file_system == "refuses to open":
            patch.setattr(os, "open", refuses)
        taken = Snapshot(False)
        taken.add(tmp_path / "ours", [("one", torch.arange(5000.0))], {}, None)
        taken.write()
    save_file({"one": torch.arange(5000.0)}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sum(direct) + sum(cached) == (tmp_path / "ours").stat().st_size > 20_000
    if file_system == "as it is" and takes_direct_writes(tmp_path):
        assert direct == [4096] * 4 and len(cached) == 1  # the end of a file is no whole block
    else:
        assert not direct


def takes_direct_writes(folder) -> bool:
    try:
        os.close(os.open(folder / "direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_a_snapshot_is_of_its_moment_and_fills_its_buffers_again(tmp_path):
    live, fresh = torch.zeros(1000), torch.full((10,), 7.0)
    taken = Snapshot(False)
    places = []
    for step in (1.0, 2.0):
        live.fill_(step)
        taken.begin()
        taken.add(
            tmp_path / "file", {"live": live, "view": live[:3], "fresh": fresh}.items(), {}, live_storages([live])
        )
        live.fill_(-1)  # as the next training step does, before it is written
        taken.write()
        found = snapshot_of(tmp_path / "file")
        assert found["live"].eq(step).all() and found["view"].eq(step).all() and found["fresh"].eq(7).all()
        places.append({key: buffer.data_ptr() for key, buffer in taken.buffers.items()})
    assert places[0] == places[1] and places[0].keys() == {("file", "live"), ("file", "view")}
    assert taken.buffer_bytes == 4 * 1003


def test_a_snapshot_that_training_waits_for_copies_nothing_of_host_memory(tmp_path):
    live = torch.zeros(1000)
    taken = Snapshot(False)
    taken.begin(waits=True)
    taken.add(tmp_path / "file", {"live": live, "turned": live.view(10, 100).T}.items(), {}, live_storages([live]))
    assert taken.buffer_bytes == 4 * 1000  # of the one that does not lie in order
    live.fill_(3)
    taken.write()
    found = snapshot_of(tmp_path / "file")
    assert found["live"].eq(3).all() and found["turned"].eq(0).all()
    taken.begin()
    taken.add(tmp_path / "file", {"live": live}.items(), {}, live_storages([live]))
    assert taken.buffer_bytes == 4 * 2000


def snapshot_of(path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("kind", ["tied", "adapter"])
def test_what_a_model_saves_is_captured_and_nothing_that_it_goes_on_to_change_is_shared(base, tmp_path, kind):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=kind == "tied")
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    model.save_pretrained(tmp_path / "theirs")
    taken = Snapshot(False)
    with taken.capture(live_storages([*model.parameters(), *model.buffers()])):
        model.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0)
    assert not list((tmp_path / "ours").glob("*.safetensors")), "written by save_pretrained, and not by the thread"
    taken.write()
    names = [path.name for path in (tmp_path / "theirs").iterdir()]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_a_thread_does_its_jobs_in_order_and_none_after_a_failure():
    writer, gate, done = BackgroundWriter(), threading.Event(), []
    assert not writer.busy
    writer.join()
    writer.submit(gate.wait)
    writer.submit(done.append, 1)
    assert writer.busy and not done
    gate.set()
    writer.join()
    assert done == [1] and not writer.busy and writer.failure is None
    writer.submit(lambda: 1 / 0)
    writer.submit(done.append, 2)
    writer.join()
    assert done == [1] and not writer.busy and isinstance(writer.failure, ZeroDivisionError)


def test_memory_is_bounded_by_the_cgroups_that_a_process_is_in(tmp_path, monkeypatch):
    from llama_lite.machine import host_memory

    job = tmp_path / "slurm/job"
    job.mkdir(parents=True)
    monkeypatch.setattr(host_memory, "cgroup_folders", lambda controller: {job, tmp_path})
    free = host_memory.available_memory()
    assert free > 2**25
    for name, text in {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 600\nfile 90"}.items():
        (job / name).write_text(f"{text}\n")
    assert host_memory.available_memory() == 390
    (job / "memory.max").write_text("max\n")
    assert host_memory.available_memory() > 2**25
