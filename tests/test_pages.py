"""docs/walk.md, the notebook and the drawings are what the code makes today."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT as root
from PIL import Image

from toy import figures, pages

ROOT = Path(root)
NUMBER = re.compile(r"-?\d+\.\d+")


def test_the_walk_prints_what_the_page_says(tmp_path):
    """docs/walk.md and docs/walk.ipynb: the same words, and the same numbers up to rounding."""
    pages.main([str(tmp_path)])
    for name in ("walk.md", "walk.ipynb"):
        made = (tmp_path / name).read_text()
        kept = (ROOT / "docs" / name).read_text()
        assert NUMBER.sub("#", made) == NUMBER.sub("#", kept), f"run python -m toy.pages: {name}"
        numbers = [[float(x) for x in NUMBER.findall(text)] for text in (made, kept)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.02), f"run python -m toy.pages: {name}"


@pytest.mark.slow
def test_the_notebook_runs_from_its_own_folder(tmp_path):
    """Its cells, one after the other, in a fresh process; they import the code and copy none."""
    notebook = json.loads((ROOT / "docs/walk.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(re.search(r"^(def|class) ", cell, re.MULTILINE) for cell in cells)
    script = tmp_path / "cells.py"
    script.write_text("import sys\nsys.path.insert(0, '')\n" + "\n\n".join(cells))
    done = subprocess.run([sys.executable, script], cwd=ROOT / "docs", capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    wanted = ["".join(output["text"]) for cell in notebook["cells"] if "outputs" in cell
              for output in cell["outputs"]]
    assert NUMBER.sub("#", done.stdout) == NUMBER.sub("#", "".join(wanted))


@pytest.mark.slow
def test_the_drawings_are_made(tmp_path):
    """python -m toy.figures draws on a light card, with words and several colours."""
    figures.main([str(tmp_path)])
    for name in ("splice.png", "stages.png"):
        with Image.open(tmp_path / name) as made, Image.open(ROOT / "docs" / name) as kept:
            assert made.size == kept.size, f"run python -m toy.figures: {name}"
            assert min(made.convert("L").getpixel((0, 0)), 255) > 240, "the card is not light"
