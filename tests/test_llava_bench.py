"""A LLaVA-Bench of one's own: questions and reference answers of a text-only teacher (Sec. 5.1)."""
from collections import Counter

import pytest
from test_eval import run
from test_generate_data import SHOP, write_contexts

import eval as eval_py
from extras import llava_bench
from parts.files import read_lines, write_lines


def test_a_bench_has_usable_questions_of_each_type_and_reference_answers(tmp_path, serve, capsys):
    """LLaVA-Bench (COCO)'s construction: its three files agree. A candidate must not be scored
    beside "I'm sorry"; the next picture takes its place."""
    url, _ = serve(faults={"refuses": 0.15})
    captions = write_contexts(tmp_path / "c.jsonl", 40)
    run(llava_bench, "make", "--bench", 6, "--captions", captions, "--out", tmp_path / "b",
        "--base_url", url, "--workers", 1)
    assert "refuses; another picture takes its place" in capsys.readouterr().out
    questions, references, context = (read_lines(tmp_path / "b" / f"{name}.jsonl")
                                      for name in ("questions", "reference", "context"))
    assert Counter(q["category"] for q in questions) == {"conv": 6, "detail": 6, "complex": 6}
    assert "sorry" not in str(questions) + str(references)
    assert {q["image"] for q in questions} == {c["image"] for c in context}
    for question, reference in zip(questions, references, strict=True):
        assert question["question_id"] == reference["question_id"]
        assert question["text"] == reference["prompt"]
    with pytest.raises(ValueError, match="--bench 41.*40 pictures"):
        run(llava_bench, "make", "--bench", 41, "--captions", captions, "--out", "x")


def write_own_bench(folder):
    """Three questions about two pictures: of one a description is there, of the other boxes."""
    asked = [("own.jpg", "Which sign?", "conv"), ("own.jpg", "What is unusual?", "complex"),
             ("7.jpg", "Which bus?", "detail")]
    write_lines(folder / "q.jsonl", [
        {"question_id": i, "image": image, "text": text, "category": category}
        for i, (image, text, category) in enumerate(asked)])
    own = {"id": "1", "image": "own.jpg", "caption": "A sign that says BAKERY."}
    write_lines(folder / "ctx.jsonl", [own, SHOP])
    return ["--questions", folder / "q.jsonl", "--context", folder / "ctx.jsonl"]


def ask_for_references(folder, argv, *more):
    run(llava_bench, "references", *argv, "--out", folder / "ref.jsonl", *more)
    return read_lines(folder / "ref.jsonl")


def test_references_answer_a_persons_questions_from_what_is_known_and_are_paid_once(
        tmp_path, serve, capsys):
    """In-the-Wild's construction: the teacher reads the description, or captions and boxes; what
    refuses is asked for again; eval.py joins the file with the questions."""
    argv = write_own_bench(tmp_path)
    run(llava_bench, "references", *argv, "--out", tmp_path / "ref.jsonl", "--show", 3)
    shown = capsys.readouterr().out
    assert "A sign that says BAKERY.\n\nWhich sign?" in shown
    assert "A bus stops.\n\nbus: [0.1, 0.25, 0.53, 1.0]\n\nWhich bus?" in shown
    assert not list(tmp_path.glob("ref*")), "a look costs nothing and leaves nothing"
    url, log = serve(faults={"refuses": 0.4}, seed=1)
    for _ in range(2):
        rows = ask_for_references(tmp_path, argv, "--base_url", url, "--workers", 1)
    faults = Counter(row["fault"] for row in read_lines(log))
    assert faults["good"] == 3 and faults["refuses"], "an answer was paid twice, or none refused"
    assert [row["text"] for row in rows] == [f"It is about {question}." for question in (
        "Which sign?", "What is unusual?", "Which bus?")]
    answers = tmp_path / "a.jsonl"
    write_lines(answers, rows)
    url, _ = serve(text="8 6")
    run(eval_py, "judge", *argv[:2], "--context", tmp_path / "ctx.jsonl", "--base_url", url,
        "--reference", tmp_path / "ref.jsonl", "--answers", answers,
        "--reviews", tmp_path / "r.jsonl")
    assert len(read_lines(tmp_path / "r.jsonl")) == 3


def test_a_question_that_is_never_answered_costs_no_other_answer(tmp_path, serve):
    """It is named after three tries; without it the others' answers are there, and paid."""
    argv = write_own_bench(tmp_path)
    url, log = serve(says={"unusual": "I'm sorry, I cannot help with that."})
    with pytest.raises(ValueError, match="1 of 3 questions have no .* after 3 tries, e.g. 1"):
        ask_for_references(tmp_path, argv, "--base_url", url)
    assert len(read_lines(log)) == 5
    write_lines(tmp_path / "q.jsonl", [
        row for row in read_lines(tmp_path / "q.jsonl") if row["question_id"] != 1])
    rows = ask_for_references(tmp_path, argv, "--base_url", url)
    assert [row["question_id"] for row in rows] == [0, 2] and len(read_lines(log)) == 5


@pytest.mark.parametrize("record, says", [
    ({"image": "other.jpg", "caption": "A dog."}, "nothing about the pictures of 2 questions"),
    ({"image": "own.jpg", "caption": " "}, "own.jpg: ValueError no captions"),
    ({"image": "own.jpg", "caption": 7}, "own.jpg: TypeError"),
    ({"image": "own.jpg", "captions": ["A dog."], "instances": [
        {"category": "dog", "bbox": [0, 0, 200, 100]}]}, "own.jpg: .*as fractions")])
def test_a_picture_of_which_nothing_is_known_is_named_before_anything_is_paid(
        record, says, tmp_path):
    argv = write_own_bench(tmp_path)
    write_lines(tmp_path / "ctx.jsonl", [record, SHOP])
    with pytest.raises(ValueError, match=says):
        ask_for_references(tmp_path, argv, "--base_url", "http://127.0.0.1:1")
