"""
docs/walk.md and docs/walk.ipynb, from toy/walk.py and what it prints.

    python -m toy.pages [folder]        the folder is docs, if none is named

toy/walk.py is plain Python with cells (`# %%`), which many editors run one by one. Here each cell
is run once, in order, and its output is put under it: in a page to read, and in a notebook to run.
"""
import contextlib
import io
import sys
from pathlib import Path

from parts.files import run_main, write_json, write_text

MARKDOWN = "# %% [markdown]\n"
CODE = "# %%\n"
START = """\
import os

if not os.path.exists("model.py"):
    os.chdir("..")        # from docs/ to the root, where the code is"""


def cells_of(source):
    """[(is_text, lines as one string), ...] of a script with cells."""
    cells = []
    for part in source.replace(MARKDOWN, CODE + MARKDOWN).split(CODE)[1:]:
        if part.startswith(MARKDOWN):
            lines = part.removeprefix(MARKDOWN).strip().split("\n")
            cells.append((True, "\n".join(line[2:] for line in lines)))
        elif part.strip():
            cells.append((False, part.strip()))
    return cells


def output_of(code, names):
    """What a cell prints, run with these names, to which it adds its own."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "toy/walk.py", "exec"), names)
    return printed.getvalue().rstrip("\n")


def notebook_cell(is_text, source, output=""):
    """A cell as nbformat 4.4 has it."""
    cell = {"metadata": {}, "source": source.splitlines(keepends=True)}
    if is_text:
        return {"cell_type": "markdown"} | cell
    outputs = []
    if output:
        text = (output + "\n").splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    return {"cell_type": "code", "execution_count": None, "outputs": outputs} | cell


def make_pages(source):
    """(the page's text, the notebook as a dict)"""
    names = {"__name__": "walk"}
    page = ["<!-- made by python -m toy.pages from toy/walk.py -->"]
    notebook = [notebook_cell(False, START)]
    for is_text, cell in cells_of(source):
        output = "" if is_text else output_of(cell, names)
        notebook.append(notebook_cell(is_text, cell, output))
        page.append(cell if is_text else f"```python\n{cell}\n```")
        if output:
            page.append(f"```\n{output}\n```")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return "\n\n".join(page) + "\n", {
        "nbformat": 4, "nbformat_minor": 4, "metadata": {"kernelspec": kernel}, "cells": notebook}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    folder = Path(argv[0] if argv else "docs")
    page, notebook = make_pages(Path(__file__).with_name("walk.py").read_text())
    write_text(folder / "walk.md", page)
    write_json(folder / "walk.ipynb", notebook)


if __name__ == "__main__":
    run_main(main)
