"""The project as shipped: the wheel's files, the version, the README's commands, the imports."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("checkpoints", "pallas_kernels", "slora_jax")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

README_COMMANDS = (
    "python3 -m venv .venv && .venv/bin/pip install -e '.[demo]'"
    " && .venv/bin/python examples/quickstart.py",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test,oracle]'"
    " && .venv/bin/python -m pytest",
)


def source_files() -> set[str]:
    """Every file of the three packages, but for caches and hidden files."""
    paths = (p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.is_file())
    relative = (p.relative_to(ROOT) for p in paths)
    return {
        p.as_posix()
        for p in relative
        if not any(part == "__pycache__" or part.startswith(".") for part in p.parts)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built offline from a copy: a build in the tree would leave files there."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "--wheel-dir", out, copy], check=True)
    (path,) = out.iterdir()
    return zipfile.ZipFile(path)


def test_wheel_holds_exactly_the_source_tree(wheel):
    metadata = f"slora_jax-{PROJECT['version']}.dist-info/"
    names = set(wheel.namelist())
    assert {n for n in names if not n.startswith(metadata)} == source_files()
    assert {n.removeprefix(metadata) for n in names if n.startswith(metadata)} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "top_level.txt",
        "licenses/LICENSE",
    }


def test_git_ignores_no_source_file():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--", *PACKAGES]
    ignored = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert source_files().isdisjoint(ignored.stdout.splitlines())


def test_one_version_everywhere():
    import slora_jax

    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"] == slora_jax.__version__


@pytest.mark.parametrize("command", README_COMMANDS)
def test_readme_command(command):
    assert command in (ROOT / "README.md").read_text().splitlines()
    extras = re.search(r"\.\[([^]]+)\]", command)
    assert extras is not None
    assert set(extras[1].split(",")) <= PROJECT["optional-dependencies"].keys()
    assert all((ROOT / path).exists() for path in re.findall(r"examples/\S+", command))


def test_import_pulls_in_no_reader_and_no_oracle():
    unwanted = ("checkpoints", "torch", "transformers", "peft", "gguf", "huggingface_hub")
    code = f"import sys, slora_jax; print([m for m in {unwanted} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]"
