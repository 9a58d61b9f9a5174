"""The text inside the installed packages: its files, their order, and where they are."""

import functools
import hashlib
import importlib.util
import os
import sysconfig
from importlib.metadata import version

DOCUMENTED_PACKAGES = (
    "transformers scipy torch sympy sklearn pandas networkx numpy nltk matplotlib huggingface_hub trl datasets peft"
    " accelerate"
).split()

DISTRIBUTIONS = {"sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub"}
FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}

# ending of files, folders that are skipped
INSTALLED = {"installed-docs": (".py", FOREIGN_FOLDERS | {"test", "tests"}), "installed-files": ("", FOREIGN_FOLDERS)}


def installed_files(dataset: str) -> tuple[list[str], dict[str, str]]:
    """([`package/file`] of the documented packages in a fixed pseudo-random order, {package: version}). dataset: one of
    INSTALLED.

    The order is that of a hash of the name, so that the validation slice is a sample of all packages.
    """
    ending, skipped = INSTALLED[dataset]
    files, versions = [], {}
    for package in ("python", *DOCUMENTED_PACKAGES):
        root = package_root(package)
        if root is None:
            continue
        versions[package] = (
            sysconfig.get_python_version() if package == "python" else version(DISTRIBUTIONS.get(package, package))
        )
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - skipped)
            inner = os.path.relpath(folder, root)
            files += [os.path.normpath(os.path.join(package, inner, name)) for name in names if name.endswith(ending)]
    files.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    return files, versions


@functools.cache
def package_root(package: str) -> str | None:
    """The folder of an installed package, `python` for the standard library; None where it is not installed."""
    if package == "python":
        return sysconfig.get_paths()["stdlib"]
    spec = importlib.util.find_spec(package)
    return spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None
