"""The documentation against the code: links lead somewhere, Python blocks parse, names exist."""

import ast
import re
from pathlib import Path

import pytest

import slora_jax

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    p
    for pattern in ("*.md", "*/*.md", "*/*/*.md")
    for p in ROOT.glob(pattern)
    if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
)

document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=[p.relative_to(ROOT).as_posix() for p in DOCUMENTS]
)


@document
def test_relative_links_lead_to_files(path):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert not missing


@document
def test_python_blocks_parse_and_import_public_names(path):
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "slora_jax":
                assert {alias.name for alias in node.names} <= set(slora_jax.__all__)
