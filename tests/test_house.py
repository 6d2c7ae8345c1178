"""The house stands: what a line may hold, who may import whom, one name one thing, the size."""
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIX = ("model.py", "data.py", "train.py", "sample.py", "generate_data.py", "eval.py")
FOLDERS = ("parts", "extras", "toy")
FILES = [*SIX, *(f"{folder}/{path.name}" for folder in FOLDERS
                 for path in sorted((ROOT / folder).glob("*.py")) if path.name != "__init__.py")]
MAY_IMPORT = {"model": set(), "data": {"model"}, "train": {"model", "data"},
              "sample": {"model", "data"}, "generate_data": set(), "eval": {"sample"}}
SIZE_CLAIM = r"(the six files|`parts/`|`extras/`|`toy/`), ([\d,]+) lines"
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
         tokenize.ENDMARKER)


def read_file(name):
    return (ROOT / name).read_text(encoding="utf-8")


def nodes_and_lines(name):
    """How many nodes of the syntax tree, and lines of code without comments and docstrings."""
    text = read_file(name)
    tree = ast.parse(text)
    documented = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, *DEFINITIONS))]
    docstrings = [n.body[0] for n in documented if ast.get_docstring(n) is not None]
    left_out = {id(node) for docstring in docstrings for node in ast.walk(docstring)}
    nodes = [n for n in ast.walk(tree) if id(n) not in left_out
             and not isinstance(n, (ast.Load, ast.Store, ast.Del, ast.Module))]
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in BLANK:
            lines.update(range(token.start[0], token.end[0] + 1))
    for docstring in docstrings:
        lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return len(nodes), len(lines)


def imports_of(name):
    """The first names of all that a file imports, also within its functions."""
    for node in ast.walk(ast.parse(read_file(name))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def size_claims():
    """(place, number of lines) as README claims them, e.g. "the six files, 1,800 lines"."""
    found = re.findall(SIZE_CLAIM, read_file("README.md"))
    return [(place.strip("`/"), int(number.replace(",", ""))) for place, number in found]


def size_of(place):
    names = SIX if place == "the six files" else [f for f in FILES if f.startswith(f"{place}/")]
    return sum(len(read_file(name).splitlines()) for name in names)


@pytest.mark.parametrize("name", FILES)
def test_a_line_holds_what_a_reader_takes_in(name):
    """At most 8.5 nodes a code line, 100 columns, functions of at most 60 lines."""
    nodes, lines = nodes_and_lines(name)
    assert nodes <= 8.5 * lines, f"{name}: {nodes / lines:.1f} nodes a code line; write it looser"
    wide = [i for i, line in enumerate(read_file(name).splitlines(), 1) if len(line) > 100]
    assert not wide, f"{name}: lines {wide} are wider than 100 columns"
    for node in ast.walk(ast.parse(read_file(name))):
        if isinstance(node, DEFINITIONS[:2]):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{name}: {node.name} has {length} lines; say it in two functions"


def test_the_six_files_are_looser_still():
    """The files that are read beside the paper have 8.0 nodes a code line at most."""
    nodes, lines = (sum(column) for column in zip(*map(nodes_and_lines, SIX), strict=True))
    assert nodes <= 8.0 * lines, f"the six files: {nodes / lines:.2f} nodes a code line"


@pytest.mark.parametrize("name", FILES)
def test_no_arrow_points_upward(name):
    """parts/ imports only parts/; the six import nothing of extras/ or toy/, and no circle."""
    ours = set(imports_of(name)) & {*FOLDERS, *MAY_IMPORT}
    if name.startswith("parts/"):
        assert ours <= {"parts"}, f"{name} is a leaf, but imports {ours - {'parts'}}"
    elif name in SIX:
        allowed = MAY_IMPORT[name[:-3]] | {"parts"}
        assert ours <= allowed, f"{name} may import {sorted(allowed)}, not {ours - allowed}"


@pytest.mark.parametrize("module", ["generate_data", "eval", "extras.academic", "parts.files",
                                    "parts.records", "parts.client"])
def test_what_needs_no_torch_starts_without_it(module):
    """Writing data and scoring answers run on any machine, at once."""
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert done.returncode == 0, f"{module} imports torch, or cannot be imported"


def test_one_name_is_one_thing():
    """Who searches for a name finds one; `main` and `Config` alone belong to every command."""
    owners = Counter(node.name for name in FILES for node in ast.parse(read_file(name)).body
                     if isinstance(node, DEFINITIONS))
    twice = [name for name, n in owners.items() if n > 1 and name not in ("main", "Config")]
    assert not twice, f"several things are called {twice}"


def test_readme_is_short_and_says_how_large_the_project_is():
    """README, at most 240 lines; the sizes in it are true to a twentieth."""
    assert len(read_file("README.md").splitlines()) <= 240
    claims = size_claims()
    assert [place for place, _ in claims] == ["the six files", *FOLDERS]
    for place, claimed in claims:
        assert abs(claimed - size_of(place)) <= 0.05 * size_of(place), \
            f"{place}: {size_of(place)} lines; python tests/test_docs.py writes it into README"
