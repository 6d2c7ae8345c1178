"""README and docs/ keep their promises: tables are the code's tags, commands parse, links lead.

`python tests/test_docs.py` writes the generated parts anew.
"""
import ast
import importlib
import io
import re
import shlex
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from test_house import DEFINITIONS, FILES, SIZE_CLAIM, read_file, size_of  # noqa: E402

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(f"runs/{path.name}" for path in (ROOT / "runs").glob("*.sh"))

# Every equation, table, figure and section that the code cites: what it is, and its one home.
PAPER = [
    ("Eq. (1)", "H_v = W Z_v", "model.py", "LLaVA.encode_images"),
    ("Eq. (2)", "the picture before or after the first question", "data.py", "arrange"),
    ("Eq. (3)", "the likelihood of the answers alone", "model.py", "LLaVA.forward"),
    ("Fig. 1", "the network", "model.py", ""),
    ("Sec. 3; Table 1", "instruction data from captions and boxes", "generate_data.py", ""),
    ("Sec. 4.1", "the architecture", "model.py", ""),
    ("Sec. 4.2", "the two stages of training", "train.py", ""),
    ("Table 2", "the text of a conversation", "parts/templates.py", "Template"),
    ("Sec. 5; Sec. 5.1", "chat, and LLaVA-Bench by a judge", "eval.py", ""),
    ("Table 4", "LLaVA-Bench (COCO), and the ablation of the data", "eval.py", "TABLE_4"),
    ("Table 5", "LLaVA-Bench (In-the-Wild)", "eval.py", "TABLE_5"),
    ("Sec. 5.2", "ScienceQA", "eval.py", ""),
    ("Table 7", "ScienceQA by subject, context and grade", "eval.py", "TABLE_7"),
    ("Table 8", "ablations of the design", "train.py", "Config"),
]
DISSERTATION = [
    ("Ch. 2; Table 2.6", "REACT: CLIP customised by retrieval", "extras/react.py", ""),
    ("Eq. 2.1; Eq. 2.2; Eq. 2.3", "queries, and what is near them", "extras/retrieve.py", ""),
    ("Eq. 2.4; Eq. 2.5; Eq. 2.6", "the loss and its positives", "extras/react.py", "react_loss"),
    ("Fig. 2.3", "gated blocks in a locked tower", "parts/gated.py", "GatedBlock"),
    ("Table 2.2; Table 2.3; Table 2.5", "REACT beside CLIP", "extras/react_eval.py", ""),
    ("Sec. 4.3", "LLaVA-1.5, step by step", "train.py", ""),
    ("Sec. 4.4; Table 4.3; Table 4.4", "the benchmarks", "extras/benchmarks.py", ""),
    ("Sec. 4.5", "less data", "train.py", "Config"),
    ("Sec. 4.7", "LLaVA-NeXT: tiles", "parts/tiles.py", ""),
]
PAPER_TAG = r"(?<!Diss\. )\b(Eq\. \(\d\)|(?:Table|Fig\.) \d+(?!\d|\.\d)|Sec\. \d(?:\.\d)?)"
DISS_TAG = r"Diss\. ((?:Ch\.|Eq\.|Fig\.|Table|Sec\.) \d+(?:\.\d+)?)"
TABLE_ROW = r"\n\s*\n|\n(?=\s*\S+ {2,}\S)"     # where a docstring starts anew
GENERATED = [("README.md", "paper-to-code"), ("README.md", "dissertation-to-code"),
             ("docs/differences.md", "OFFICIAL"), ("docs/differences.md", "OURS"),
             ("docs/course.md", "COURSE")]

# -------------------------------------------------------------------------------------------------
# Tags: where they stand, and what they say


def place_finder(name):
    """A function from a line number of a file to the dotted name of the definition around it."""
    spans = []

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            targets = [child] if isinstance(child, DEFINITIONS) else []
            if isinstance(child, ast.Assign):
                targets = child.targets
            elif isinstance(child, ast.AnnAssign):
                targets = [child.target]
            for target in targets:
                dotted = f"{prefix}.{getattr(target, 'name', getattr(target, 'id', ''))}".strip(".")
                spans.append((child.lineno, child.end_lineno, dotted))
                if isinstance(child, DEFINITIONS):
                    visit(child, dotted)

    visit(ast.parse(read_file(name)), "")

    def place(row):
        return max((span for span in spans if span[0] <= row <= span[1]), default=(0, 0, ""))[2]
    return place


def cited_at(name, pattern):
    """{tag: the dotted names of the definitions whose lines carry it}; "" stands for the file."""
    place, found = place_finder(name), {}
    for row, line in enumerate(read_file(name).splitlines(), 1):
        for first, last in re.findall(r"Diss\. Eqs\. 2\.(\d)(?:-|, | and )2\.(\d)", line):
            line += "".join(f" Diss. Eq. 2.{i}" for i in range(int(first), int(last) + 1))
        for tag in re.findall(pattern, line):
            found.setdefault(tag, set()).add(place(row))
    return found


def table_of_homes(homes, prefix=""):
    """Markdown: what a text says, and the one place in the code that says it."""
    rows = ["| in the text | what | in the code |", "| --- | --- | --- |"]
    for tags, what, name, definition in homes:
        where = f"[{name}]({name})" + (f" `{definition}`" if definition else "")
        rows.append(f"| {prefix}{tags.replace('; ', ', ')} | {what} | {where} |")
    return "\n".join(rows) + "\n"


def comment_blocks(name):
    """[row, text, code] of each comment with its further lines, and of each docstring paragraph.

    A comment that stands alone speaks of the row behind it; one behind code comes with that code.
    """
    text, blocks, last = read_file(name), [], None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, column = token.start
        code = token.line[:column].strip()
        words = token.string.lstrip("#").strip()
        if last == (row - 1, column) and not code:
            begun = blocks.pop()
            row_of = begun[0] if begun[2] else row + 1
            blocks.append([row_of, f"{begun[1]} {words}", begun[2]])
        else:
            blocks.append([row if code else row + 1, words, code])
        last = (row, column)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, *DEFINITIONS)) and ast.get_docstring(node) is not None:
            row = node.body[0].lineno
            for paragraph in re.split(TABLE_ROW, node.body[0].value.value):
                sentences = re.sub(r"(?<=\.) [^.]*[^.:)]$", "", " ".join(paragraph.split()))
                blocks.append([row, sentences, ""])
    return sorted(blocks)


def tagged(name):
    """(kind, place, text) of every OFFICIAL:, OURS: and COURSE: of a file.

    What stands before a tag in its sentence, or the code before a comment, is part of the text.
    """
    place = place_finder(name)
    for row, text, code in comment_blocks(name):
        before, *parts = re.split(r"\b(OFFICIAL|OURS|COURSE): ", text)
        for kind, says in zip(parts[::2], parts[1::2], strict=True):
            begun = re.split(r"(?<=[.:]) ", before)[-1].strip(" (;,")
            begun = f"{begun}: " if re.search(r"\w", begun) and begun[-1] not in ".:" else ""
            snippet = f"`{code}` " if code else ""
            says = re.split(r"(?<=\.) (?:Raises|Returns) ", says)[0].strip(" (;,")
            if says.count(")") > says.count("("):
                says = says.rstrip(")")
            says = (snippet + begun + says).replace("|", "\\|").replace("<", "&lt;")
            yield kind, place(row), says


def table_of_tags(kind):
    """Markdown: what stands behind a tag, file by file in reading order."""
    rows = ["| in the code | what it says |", "| --- | --- |"]
    for name in FILES:
        for found, where, says in tagged(name):
            if found == kind:
                at = f"[{name}](../{name})" + (f" `{where}`" if where else "")
                rows.append(f"| {at} | {says} |")
    return "\n".join(rows) + "\n"


# -------------------------------------------------------------------------------------------------
# Generated parts of the pages


def generated(part):
    """A part of a page as the tags of the code have it now."""
    if part == "paper-to-code":
        return table_of_homes(PAPER)
    if part == "dissertation-to-code":
        return table_of_homes(DISSERTATION, "Diss. ")
    return table_of_tags(part)


def split_page(page, part):
    """A page before a generated part, the part, and what follows."""
    begin, end = f"<!-- {part}: begin -->\n", f"<!-- {part}: end -->"
    before, rest = read_file(page).split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after


@pytest.mark.parametrize("page, part", GENERATED)
def test_the_tables_are_generated_from_the_tags(page, part):
    """What the pages say of the code is what the code says of itself."""
    assert split_page(page, part)[1] == generated(part), \
        "the tags have changed: python tests/test_docs.py writes the page anew"


@pytest.mark.parametrize("homes, pattern", [(PAPER, PAPER_TAG), (DISSERTATION, DISS_TAG)])
def test_every_tag_has_one_home_that_carries_it(homes, pattern):
    """A reader with the text open finds each equation, table and section in one hop."""
    home_of = {tag: row[2:] for row in homes for tag in row[0].split("; ")}
    for name in FILES:
        homeless = cited_at(name, pattern).keys() - home_of.keys()
        assert not homeless, f"{name} cites {sorted(homeless)}, which the tables above do not know"
    for tag, (name, definition) in home_of.items():
        at = cited_at(name, pattern).get(tag, set())
        at_home = [where for where in at if f"{where}.".startswith(f"{definition}.")]
        assert at_home or at and not definition, \
            f"{name} {definition} is the home of {tag}, but {sorted(at)} carry the tag"


# -------------------------------------------------------------------------------------------------
# Commands


COMMAND = r"[^#]*?\b(?:python|torchrun)(?: --\S+)* (?:-m ([\w.]+)|(\w+)\.py)\b(.*)"
FURTHER_FLAGS = r'"\$\{@:\d\}"|"\$@"|"\$\{\w+\[@\]\}"|\$\{\w+:\+.*?\}'


def commands_of(page):
    """The commands in a page's bash blocks, or in a script, as (module, its arguments)."""
    text = read_file(page)
    if page.endswith(".md"):
        text = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    text = text.replace("\\\n", " ")
    if page.endswith(".sh"):
        text = with_values(text)
    for line in text.splitlines():
        found = re.match(COMMAND, line)
        module = (found[1] or found[2]) if found else ""
        if module and module not in ("pip", "pytest"):
            yield module, shlex.split(cut_at_operator(found[3]), comments=True)


def with_values(text):
    """A shell script with 1 for each variable, and with a recipe or a row that there is."""
    text = re.sub(r'--recipe "?\$\{?[\w:.-]+\}?"?', "--recipe toy", text)
    text = re.sub(r'--train "\$1"', "--train full", text)
    text = re.sub(r'--template "\$3"', "--template vicuna_v1", text)
    text = re.sub(r'--numbers "\$\{@:2\}"', "", text)
    text = re.sub(FURTHER_FLAGS, "", text)
    return re.sub(r"\$\{.*?\}|\$\w+", "1", text)


def cut_at_operator(line):
    """A command without the pipe, redirection or command behind it."""
    return re.split(r"\s(?:\||>|2>|&|&&|;)\s|;\s|\s&$|\)\"", line)[0]


def parse(module, argv):
    """A command line, as the module itself reads it; ValueError or SystemExit if it does not."""
    from parts.files import parse_command, typed_flags
    module = importlib.import_module(module)
    if hasattr(module, "COMMANDS"):
        parse_command(module.COMMANDS, argv)
    elif hasattr(module, "open_data"):
        module.check.parse_args(argv)
    elif hasattr(module, "resolve"):
        module.resolve(argv)
    elif not hasattr(module, "Config"):
        assert all(word.isdigit() for word in argv), "a seed at most"
    else:
        typed_flags(module.Config, argv, module.__doc__)


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS])
def test_every_command_parses(page):
    """A reader copies these lines; a renamed flag would stop them half way."""
    for module, argv in commands_of(page):
        try:
            parse(module, argv)
        except (ValueError, SystemExit) as error:
            raise AssertionError(f"{page}: {module} {shlex.join(argv)}: {error}") from error


def test_every_program_is_shown():
    """What no page shows, nobody finds."""
    shown = {module for page in [*PAGES, *SCRIPTS] for module, _ in commands_of(page)}
    programs = {name[:-3].replace("/", ".") for name in FILES if "__main__" in read_file(name)}
    assert not programs - shown, f"no page shows a command of {sorted(programs - shown)}"


# -------------------------------------------------------------------------------------------------
# Links, and where the project was written


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    """Links and pictures lead to files of the repository, and to headings that are there."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", read_file(page)):
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}, which is not there"
        if heading:
            titles = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
            names = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in names, f"{page} links to {target}; the headings are {names}"


@pytest.mark.parametrize("page", [name for name in PAGES if name != "README.md"])
def test_readme_leads_to_every_page(page):
    """README is where a reader starts."""
    assert f"({page})" in read_file("README.md"), f"README does not link to {page}"


def test_nothing_speaks_of_the_machine_that_it_was_written_on():
    """The project stands alone: no absolute path of somebody's machine."""
    prompts = [path.relative_to(ROOT) for path in (ROOT / "prompts").rglob("*.txt")]
    for name in [*FILES, *PAGES, *SCRIPTS, *prompts, "pyproject.toml", ".ci/run"]:
        found = re.search(r"/(work|home|tmp|root)/\w+", read_file(name))
        assert not found, f"{name} names {found.group()}"


def write_generated():
    """Write the generated parts of the pages, and the sizes in README, anew."""
    for page, part in GENERATED:
        before, _, after = split_page(page, part)
        (ROOT / page).write_text(before + generated(part) + after, encoding="utf-8")
    sized = re.sub(SIZE_CLAIM, lambda m: f"{m[1]}, {size_of(m[1].strip('`/')):,} lines",
                   read_file("README.md"))
    (ROOT / "README.md").write_text(sized, encoding="utf-8")


if __name__ == "__main__":
    write_generated()
