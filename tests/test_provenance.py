"""Who made this: facts that can be checked."""

import subprocess

import torch
from helpers import ROOT

from llama_lite.provenance import code_revision, package_versions, provenance


def test_versions_are_the_installed_ones():
    assert package_versions()["torch"] == torch.__version__
    assert package_versions(("no-such-package",)) == {}


def test_revision_is_gits():
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert code_revision() is None if head.returncode else code_revision().startswith(head.stdout.strip())


def test_the_record_is_json():
    import json

    assert json.loads(json.dumps(provenance()))["hardware"]["threads"] >= 1
