"""The README keeps its promises: its table is the code's tags, its commands parse, its links lead somewhere.

`python tests/test_readme.py` writes the table anew.
"""
import ast
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BEGIN, END = "<!-- paper-to-code: begin -->\n", "<!-- paper-to-code: end -->"
TAG = re.compile(r"(?<!Diss\. )(Eq\. \(\d+\)|Table \d+|Fig\. \d+|Sec\. \d+(?:\.\d+)?)")
SAYS = {"Eq. (1)": "H_v = W Z_v", "Eq. (2)": "the image's place in the first turn", "Eq. (3)": "the answer-only likelihood",
        "Fig. 1": "the network", "Sec. 3": "instruction data from captions and boxes", "Sec. 4.1": "architecture",
        "Sec. 4.2": "training", "Sec. 5.1": "multimodal chat, LLaVA-Bench", "Sec. 5.2": "ScienceQA",
        "Table 1": "one example of the three response types",
        "Table 2": "the input sequence", "Table 4": "LLaVA-Bench (COCO)", "Table 5": "LLaVA-Bench (In-the-Wild)",
        "Table 7": "ScienceQA by subject, context and grade", "Table 8": "ablations"}


def paper_to_code():
    """Markdown: what the paper says, where, and the definitions whose lines carry its tag."""
    places = {}
    for path in sorted(ROOT.glob("*.py")):
        source = path.read_text()
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        for number, line in enumerate(source.splitlines(), 1):
            for tag in TAG.findall(line):
                around = sorted((n for n in nodes if n.lineno <= number <= n.end_lineno), key=lambda n: n.lineno)
                name = ".".join(n.name for n in around)
                entry = f"`{path.name}`" + (f" `{name}`" if name else "")
                places.setdefault(tag, dict.fromkeys([]))[entry] = None
    order = sorted(places, key=lambda tag: (re.sub(r"[\d.()]", "", tag), [int(n) for n in re.findall(r"\d+", tag)]))
    rows = [f"| {tag} | {SAYS.get(tag, '')} | {', '.join(places[tag])} |" for tag in order]
    return "\n".join(["| in the paper | what | in the code |", "| --- | --- | --- |", *rows]) + "\n"


def readme():
    return (ROOT / "README.md").read_text()


def commands():
    """The lines of the README's bash blocks, continuation lines joined, comments cut."""
    blocks = re.findall(r"```bash\n(.*?)```", readme(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_the_paper_to_code_table_is_generated_from_the_tags():
    """Design: README's table comes from the tags in the code."""
    table = readme().split(BEGIN)[1].split(END)[0]
    assert table == paper_to_code(), "the tags have changed: python tests/test_readme.py writes the table anew"


def test_every_tag_is_explained():
    """A tag that this file cannot explain is a typo, or a part of the paper that the table should name."""
    tags = {row.split(" | ")[0].strip("| ") for row in paper_to_code().splitlines()[2:]}
    assert tags <= SAYS.keys(), f"no explanation of {sorted(tags - SAYS.keys())}"


def parsers():
    """Each script's own reading of its command line."""
    import academic
    import convert
    import data
    import eval as eval_py
    import generate_data
    import react
    import sample
    import serve
    import toy
    import toy_pretrain
    import train
    from records import typed_flags
    return {"train.py": train.resolve, "data.py": data.arguments, "generate_data.py": generate_data.arguments,
            "toy.py": toy.arguments, "toy_pretrain.py": toy_pretrain.arguments, "eval.py": eval_py.arguments,
            "academic.py": academic.arguments, "convert.py": convert.arguments,
            "react.py": react.arguments,
            "sample.py": lambda argv: typed_flags(sample.Config, argv, "", sample.CHOICES),
            "serve.py": lambda argv: typed_flags(serve.Config, argv, "", sample.CHOICES)}


def test_every_command_of_the_readme_parses():
    """A reader copies these lines; a renamed flag would stop them."""
    read, seen = parsers(), set()
    for words in commands():
        scripts = [w for w in words if w.endswith(".py")]
        if scripts:
            read[scripts[0]](words[words.index(scripts[0]) + 1:])
            seen.add(scripts[0])
        elif words[0] == "bash":
            assert (ROOT / words[1]).is_file(), f"{words}: no such script"
    assert seen >= read.keys() - {"toy.py", "toy_pretrain.py"}, f"the README shows no command of {read.keys() - seen}"


def test_the_commands_of_the_run_scripts_parse():
    """A script in runs/ is the way to a table; a renamed flag would end it half way."""
    read, seen = parsers(), set()
    open_ended = re.compile(r'(--numbers )?"\$\{@:\d\}"|"\$@"|\$\{RULE:.*?\}|"\$\{MINUTES.*|[&|>].*')   # more flags, or none
    for path in (ROOT / "runs").glob("*.sh"):
        for line in path.read_text().replace("\\\n", " ").splitlines():
            if found := re.search(r"^[^#]*\b(?:python|torchrun \S+) (\w+\.py) (.*)", line):
                rest = re.sub(r'--recipe "?\$\{?[\w:.-]+\}?"?', "--recipe toy", open_ended.sub("", found[2]))
                rest = rest.replace('--train "$1"', "--train full")
                words = shlex.split(re.sub(r"\$\w+|\$\{.*?\}", "1", rest), comments=True)
                read[found[1]](words)
                seen.add(" ".join([found[1], *(w for w in words[:2] if not w.startswith("-"))]))
    assert seen >= {"eval.py answer", "eval.py judge", "eval.py score gqa", "toy.py family", "generate_data.py expand",
                    "train.py toy"}, seen


def test_every_file_that_the_readme_names_exists():
    """Links and pictures of the README lead to files of the repository."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", readme()):
        assert os.path.exists(ROOT / target), f"README links to {target}, which is not there"


def test_nothing_speaks_of_the_machine_that_it_was_written_on():
    """The project stands alone: no absolute paths of somebody's machine."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("runs/*"), *ROOT.glob("prompts/**/*.txt")]:
        found = re.search(r"/(work|home|tmp)/\w+", path.read_text())
        assert not found, f"{path.name} names {found.group()}"


if __name__ == "__main__":
    text = readme()
    head, rest = text.split(BEGIN)
    (ROOT / "README.md").write_text(head + BEGIN + paper_to_code() + END + rest.split(END)[1])
