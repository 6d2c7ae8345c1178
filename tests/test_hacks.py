"""docs/hacks: ten forks, each a patch and a page. All are applied, run and taken back."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

HACKS = sorted(path.stem for path in Path(ROOT, "docs/hacks").glob("*.patch"))
LEFT_OUT = shutil.ignore_patterns(".*", "out", "data", "tests", "__pycache__")
SETUP = """
python -m toy.world world --out out/toy/world --pictures 48
python generate_data.py expand --pairs out/toy/world/pairs.jsonl --out out/toy/stage1.json
mkdir out/toy/instruct
cp out/toy/stage1.json out/toy/instruct/instruct.json
python train.py --recipe toy --stage 1 --out out/toy/stage1
python train.py --recipe toy --stage 2 --init out/toy/stage1 --out out/toy/stage2
"""


def run_lines(lines, folder):
    """Run commands as a reader would, but for the length of trainings and of answers."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:"
                        + os.environ["PATH"]}
    for line in lines.strip().splitlines():
        if "train.py" in line:
            line += " --max_steps 2 --val_samples 2 --global_batch_size 4"
        if "eval.py answer" in line:
            line += " --max_new_tokens 4 --batch_size 60"
        if "toy.dpo" in line:
            line = re.sub(r"\d+$", "2", line)
        done = subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True,
                              text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project in which the toy has run, for a few steps."""
    folder = tmp_path_factory.mktemp("hacks") / "project"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    run_lines(SETUP, folder)
    return folder


def test_a_hack_is_small_and_has_a_page():
    """At most forty changed lines, so that it is read in a sitting; a page says what it is for."""
    assert len(HACKS) == 10
    for name in HACKS:
        patch = Path(ROOT, "docs/hacks", f"{name}.patch").read_text()
        changed = re.findall(r"^[+-](?!\+\+|--)", patch, re.MULTILINE)
        assert 0 < len(changed) <= 40, f"{name} changes {len(changed)} lines"
        page = Path(ROOT, "docs/hacks", f"{name}.md").read_text()
        assert f"git apply docs/hacks/{name}.patch" in page and "Read first:" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", HACKS)
def test_a_hack_runs_and_is_taken_back(name, project):
    """Its page's commands, from the patch on; afterwards the project is as it was."""
    page = Path(ROOT, "docs/hacks", f"{name}.md").read_text()
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL))
    try:
        run_lines(commands, project)
    finally:
        subprocess.run(["git", "apply", "-R", f"docs/hacks/{name}.patch"], cwd=project, check=True)
