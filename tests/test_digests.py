"""Files are verified by the digest that their record names: BLAKE3 today, SHA-256 in what earlier versions wrote."""

import hashlib

import pytest
from helpers import flip

from llama_lite import digests
from llama_lite.checkpoint import store, verify
from llama_lite.checkpoint.identity import IDENTITY
from llama_lite.data import shards
from llama_lite.evaluation.store import Store
from llama_lite.files import write_json

# of the BLAKE3 specification's test vectors: input bytes count 0 to 250 and begin again
VECTORS = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
}


@pytest.mark.parametrize("length", VECTORS)
def test_digests_are_the_standards(tmp_path, length):
    content = bytes(i % 251 for i in range(length))
    (tmp_path / "file").write_bytes(content)
    assert digests.blake3(tmp_path / "file") == VECTORS[length]
    assert digests.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert digests.sha256(tmp_path / "file", 100) == hashlib.sha256(content[:100]).hexdigest()


@pytest.mark.parametrize("algorithm", digests.ALGORITHMS)
def test_a_checkpoint_is_verified_by_the_digest_that_its_manifest_names(tmp_path, algorithm):
    staging = store.staging_folder(tmp_path, 3)
    (staging / "model.safetensors").write_bytes(bytes(3_000_000))
    files = store.flush_and_hash(staging)
    assert files == {"model.safetensors": digests.file_record(staging / "model.safetensors")}
    assert files["model.safetensors"].keys() == {"size", "blake3"}
    if algorithm == "sha256":  # as earlier versions wrote it
        files = {"model.safetensors": {"size": 3_000_000, "sha256": hashlib.sha256(bytes(3_000_000)).hexdigest()}}
    record = {"tokens": 0, "identity": {kind: {} for kind in IDENTITY}, "files": files}
    checkpoint = store.commit_checkpoint(staging, tmp_path, 3, record)
    assert verify.find_corruption(checkpoint) == []
    flip(checkpoint / "model.safetensors", 0.9)
    assert verify.find_corruption(checkpoint) == ["model.safetensors was altered"]


def test_a_manifest_without_a_known_digest_verifies_nothing(tmp_path):
    files = {"a": {"size": 1, "md5": "0" * 64}}
    assert not verify.is_well_formed_files(files)
    assert verify.is_well_formed_files({"a": {"size": 1, "blake3": "0" * 64}})
    assert not verify.is_well_formed_files({"a": {"size": 1, "blake3": "0" * 64}}, ("sha256",)), (
        "the Hub compares sha256"
    )


@pytest.mark.parametrize("algorithm", digests.ALGORITHMS)
def test_the_same_tokens_have_the_same_fingerprint_whichever_digest_verifies_them(tmp_path, algorithm):
    writer = shards.ShardWriter(tmp_path, 512, 100, 10, None)
    writer._append(shards.np.arange(10, dtype=shards.np.uint16))
    writer._flush()
    (shard,) = writer.splits["validation"]
    assert set(digests.ALGORITHMS) < shard.keys()
    kept = {key: value for key, value in shard.items() if key in (algorithm, "sha256") or key not in digests.ALGORITHMS}
    manifest = {"format": shards.FORMAT, "dtype": "uint16", "tokenizer": {}, "splits": {"train": {"shards": [kept]}}}
    content = {"dtype": "uint16", "tokenizer": {}, "shards": {"train": [[10, shard["sha256"]]]}}
    expected = hashlib.sha256(shards.json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert shards.fingerprint(manifest) == expected
    assert shards.damaged_shards(tmp_path, manifest, True) == []
    flip(tmp_path / shard["name"], 1.0)
    problem = f"{shard['name']} was altered (its {algorithm} does not match the manifest)"
    assert shards.damaged_shards(tmp_path, manifest, True) == [problem]


def test_results_of_both_kinds_are_kept_and_altered_samples_are_not(tmp_path, capsys):
    store = Store(tmp_path)
    store.save("new", {"key": "new"}, [{"a": 1}])
    store.save("old", {"key": "old"}, [{"a": 1}])
    samples = tmp_path / "samples/old.jsonl"
    older = {"key": "old", "samples": {"size": samples.stat().st_size, "sha256": digests.sha256(samples)}}
    write_json(tmp_path / "results/old.json", {**older, "digest": digests.digest_of(older)})
    assert store.result("new")["samples"].keys() == {"size", "blake3"} and store.result("old")
    for key in ("new", "old"):
        flip(tmp_path / f"samples/{key}.jsonl", 0.3)
        assert store.result(key) is None and f"results/{key}: its samples were altered" in capsys.readouterr().out
