"""toy/own.py: parts for pictures and words that the toy has never seen, and the two controls."""
import json

import own_worlds
import pytest
from PIL import Image

import train
from parts.files import read_lines
from toy import own


def sample(name, *texts):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": name, "image": f"{name}.png", "conversations": turns}


def parts_of(folder, captions, questions):
    """Run `toy.own parts` in a folder with the pictures a.png and b.png."""
    for name in ("a", "b"):
        Image.new("RGB", (70, 64)).save(folder / f"{name}.png")
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "questions.json").write_text(json.dumps(questions))
    own.main(["parts", "--captions", str(folder / "captions.json"), "--images", str(folder),
              "--questions", str(folder / "questions.json"), "--out", str(folder / "out")])


@pytest.mark.parametrize("captions, questions, error", [
    (["a"], ["a", "b"], r"questions.json\[1\] \(id b\): its picture b.png has no caption"),
    (["a", "c"], ["a"], r"captions.json\[1\] \(id c\): .*c.png"),
    ([], ["a"], "captions.json: no records"),
    (["a", "b"], ["a"], "captions.json: of the words in its 2 captions, 0 are in 20"),
])
def test_data_that_teaches_nothing_is_named(tmp_path, captions, questions, error):
    """File, row and id, before anything trains."""
    captions = [sample(name, "Describe it.", "A grey sheet.") for name in captions]
    questions = [sample(name, "What is it?", "It is a sheet.") for name in questions]
    with pytest.raises(ValueError, match=error):
        parts_of(tmp_path, captions, questions)
    assert not (tmp_path / "out").exists()


def test_the_most_frequent_answer_of_each_question_is_a_control():
    """What one would score who knows the questions alone."""
    asked = [sample("a", "Is it?", "Yes.", "Where?", "Here."), sample("b", "Is it?", "No."),
             sample("c", "Is it?", "No.")]
    assert own.frequent_answers(asked) == {"Is it?": "No.", "Where?": "Here."}


@pytest.mark.slow
def test_a_world_of_ones_own_is_seen(tmp_path, monkeypatch, capsys):
    """docs/training.md's route at a tiny budget: with pictures more is right than without."""
    own_worlds.make("slabs", tmp_path, n=1000, n_held_out=100)
    monkeypatch.chdir(tmp_path)
    own.main("parts --captions captions.json --questions questions.json --images images "
             "--out own --clip_steps 800 --llm_steps 500".split())
    route = "--recipe toy --projector mlp2x_gelu --images images".split()
    train.main([*route, *"--stage 1 --vision own/clip --llm own/llm --data captions.json "
                "--out own/stage1 --lr 3e-3".split()])
    train.main([*route, *"--stage 2 --init own/stage1 --data questions.json --out own/stage2 "
                "--epochs 2".split()])
    own.main("ask --model own/stage2 --questions questions.jsonl --images images "
             "--data questions.json --answers answers.jsonl".split())
    rows = read_lines("answers.jsonl")
    right = {way: own.percent_true(rows, way) for way in ("pictures", "blind", "frequent")}
    assert right["pictures"] > 5 + max(right["blind"], right["frequent"]), right
    assert "frequent" in capsys.readouterr().out
