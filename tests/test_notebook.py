"""The notebook is what its script writes, and well-formed. CI executes its cells (.ci/run)."""

import ast
import json

from examples.make_notebook import CELLS, NOTEBOOK, notebook


def test_notebook_is_what_the_script_writes():
    assert NOTEBOOK.read_text() == notebook()


def test_cells_are_complete():
    cells = json.loads(notebook())["cells"]
    assert [cell["cell_type"] for cell in cells[:2]] == ["markdown", "code"]
    assert len({cell["id"] for cell in cells}) == len(CELLS)
    for cell in cells:
        assert cell["source"]
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
            assert cell["outputs"] == []
