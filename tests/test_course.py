"""docs/course.md: labs name what there is, their changes apply and do what they say."""
import ast
import re
import runpy
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from extras.benchmarks import main as benchmarks
from parts.checkpoints import load_tokenizer
from parts.files import IGNORE, IMAGE, read_lines, read_value, write_lines
from toy.course import SPLITS
from toy.course import main as course
from toy.world import Scene, Thing, picture_name, read_coco
from toy.world import main as world

PAGE = Path(ROOT, "docs/course.md").read_text(encoding="utf-8")
LABS = dict(re.findall(r"^## (\d+\. .*?)\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE))
CHANGES = {text.split(":")[0]: text
           for text in re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)}
PARTS = ("Question", "Read", "Predict", "Minutes", "Measured", "In the text",
         "Where the miniature differs")
PRETRAINED = Path(ROOT, "toy/pretrained")


# What is so after a change, and not before; run(file) gives what a file defines.


def trains_everything(run):
    model = run("model.py")["LLaVA"].from_parts(str(PRETRAINED / "clip"), str(PRETRAINED / "llm"))
    stage1 = run("train.py")["RECIPES"]["toy"]["stage1"]
    trains = any(name.startswith("f_phi") for name in model.set_stage(1))
    return trains and (stage1["lr_W"], stage1["lr"]) == (1e-2, 5e-4)


def scores_all_words(run):
    tokenizer = load_tokenizer(str(PRETRAINED / "llm"))
    turns = [("Is it?<image>", False), ("Yes.", True)]
    ids, labels = run("data.py")["encode"](turns, tokenizer, [3])
    never = tokenizer.convert_tokens_to_ids(IMAGE), tokenizer.bos_token_id
    return labels == [IGNORE if i in never else i for i in ids]


def draws_the_place(run):
    return run("train.py")["RECIPES"]["toy"]["image_position"] == "random"


def puts_the_image_last(run):
    turns = [{"from": "human", "value": "<image>\nWhy?"}]
    return run("data.py")["arrange"](turns, "first", None)[0]["value"] == "Why?\n<image>"


def asks_with_the_image_last(run):
    return run("sample.py")["human_turn"]("Why?", 1)["value"] == "Why?\n<image>"


def prefers_the_first(run):
    scene = Scene((Thing("red", "star", (2, 2, 10, 10)),))
    answers = {"Assistant 1": "The star is blue.", "Assistant 2": "The star is blue."}
    words = run("toy/teacher.py")["review"]("What colour is the star?", answers, scene)
    first, second = map(float, words.split()[:2])
    return first == second + 2


CLAIMS = {"unfrozen": trains_everything, "labels": scores_all_words, "random": draws_the_place,
          "last": puts_the_image_last, "asked_last": asks_with_the_image_last,
          "first_wins": prefers_the_first}


def test_there_are_twelve_short_labs_with_all_their_parts():
    """A lab is read in two minutes, and leaves nothing to guess."""
    assert len(LABS) == 12
    for title, lab in LABS.items():
        assert len(lab.strip().splitlines()) <= 25, f"{title} is too long"
        missing = [part for part in PARTS if f"- **{part}" not in lab]
        assert not missing, f"{title}: {missing}"
        assert "```bash" in lab, f"{title} has no command"


@pytest.mark.parametrize("title", LABS)
def test_a_lab_names_functions_that_there_are(title):
    """The lines to read are found by name, so the name must stand in that file."""
    line = re.search(r"- \*\*Read\.\*\*(.*)", LABS[title])[1]
    for names, file in re.findall(r"((?:`\w+`(?:, | and )?)+) in \[[^]]*\]\(\.\./([^)]+)\)", line):
        nodes = ast.walk(ast.parse(Path(ROOT, file).read_text(encoding="utf-8")))
        defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert set(re.findall(r"`(\w+)`", names)) <= defined, f"{title}: {names} in {file}"
    assert line.count("](../") == len(re.findall(r"` in \[", line))


def test_the_script_and_the_page_have_the_same_changes():
    """runs/course.sh takes its changes from the page."""
    script = Path(ROOT, "runs/course.sh").read_text(encoding="utf-8")
    used = set(re.findall(r"\bchanged (\w+) ", script.split("\nlab() {")[1]))
    used |= set(re.search(r"for place in (.*?);", script)[1].split())
    assert used == set(CHANGES) == set(CLAIMS)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_small_and_does_what_its_lab_says(name, tmp_path):
    """At most ten changed lines, to the code as it is, in which the claim is not so."""
    changed = re.findall(r"^[+-](?!\+\+|--)", CHANGES[name], re.MULTILINE)
    assert 0 < len(changed) <= 10
    files = re.findall(r"^--- a/(\S+)", CHANGES[name], re.MULTILINE)
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(Path(ROOT, file).read_bytes())
    subprocess.run(["git", "apply"], input=CHANGES[name], text=True, cwd=tmp_path, check=True)
    for folder, holds in ((tmp_path, True), (Path(ROOT), False)):
        assert CLAIMS[name](lambda file, folder=folder: runpy.run_path(str(folder / file))) == holds


def test_pope_asks_for_what_is_there_and_for_what_is_not(tmp_path):
    """Two questions a picture and split; a perfect answerer has an F1 of 100 (POPE's own files)."""
    world(["world", "--out", str(tmp_path / "world"), "--pictures", "40"])
    course(["pope", "--world", str(tmp_path / "world"), "--out", str(tmp_path / "pope"),
            "--pictures", "20"])
    scenes = read_coco(tmp_path / "world" / "annotations" / "instances_held_out.json")
    here = {picture_name(i): {thing.name for thing in scene.things} for i, scene in scenes.items()}
    questions = read_lines(tmp_path / "pope" / "questions.jsonl")
    answers = []
    for question in questions:
        what = re.sub(r"^Is there an? |\?$", "", question["text"])
        is_there = what in here[question["image"]]
        assert is_there == question["question_id"].endswith("yes")
        text = "Yes, there is." if is_there else "No, there is not."
        answers.append({"question_id": question["question_id"], "text": text})
        if question["category"] == "adversarial" and len(here[question["image"]]) > 1:
            words = {word for name in here[question["image"]] for word in name.split()}
            assert set(what.split()) & words
    write_lines(tmp_path / "answers.jsonl", answers)
    benchmarks(["score", "pope", "--answers", str(tmp_path / "answers.jsonl"), "--questions",
                str(tmp_path / "pope" / "questions.jsonl"), "--labels", str(tmp_path / "pope"),
                "--json", str(tmp_path / "scores.json")])
    scores = read_value(tmp_path / "scores.json")
    assert len(questions) == 2 * 20 * len(SPLITS)
    assert [scores[f"{split}.f1"] for split in SPLITS] == [100, 100, 100]
