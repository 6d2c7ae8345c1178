"""How it is scored (Sec. 5): LLaVA-Bench by a judge, ScienceQA, and the benchmarks of LLaVA-1.5."""
import json

import numpy as np
import pytest
from conftest import lines

import eval as eval_py
from extras import benchmarks, judges, published
from parts.files import read_lines, write_json, write_lines

KINDS = ("conv", "detail", "complex")


def write_bench(folder, n=6):
    questions = [{"question_id": i, "image": f"{i}.jpg", "text": f"What is number {i}?",
                  "category": KINDS[i % 3]} for i in range(n)]
    write_lines(folder / "q.jsonl", questions)
    for name in ("ref", "a"):
        write_lines(folder / f"{name}.jsonl", [
            {"question_id": q["question_id"], "prompt": q["text"], "text": f"{name} {i}"}
            for i, q in enumerate(questions)])
    write_lines(folder / "ctx.jsonl", [
        {"image": q["image"], "captions": ["a thing"],
         "instances": [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}]} for q in questions])
    return ["--questions", folder / "q.jsonl", "--reference", folder / "ref.jsonl",
            "--answers", folder / "a.jsonl", "--context", folder / "ctx.jsonl"]


def run(module, *argv):
    return module.main([str(word) for word in argv])


def test_a_review_message_has_the_published_layout():
    """Sec. 5.1: byte for byte, or other people's scores are no comparison."""
    message = eval_py.review_message("C", "Q", "one", "two", "Assistant", "P")
    assert message == ("[Context]\nC\n\n[Question]\nQ\n\n[Assistant 1]\none\n\n[End of Assistant 1]"
                       "\n\n[Assistant 2]\ntwo\n\n[End of Assistant 2]\n\n[System]\nP\n\n")


@pytest.mark.parametrize("content, scores", [
    ("8 7\nwords", [8, 7]), ("8, 7", [-1, -1]), ("8,7", [8, 7]), ("8 7 6", [-1, -1]),
    ("nan 7", [-1, -1]), ("Score: 8 7", [-1, -1]), ("", [-1, -1])])
def test_scores_are_two_numbers_on_the_first_line(content, scores):
    """OFFICIAL: exactly two, with exactly one space."""
    assert eval_py.parse_scores(content) == scores


def test_a_judge_is_asked_once_for_each_question_and_never_paid_twice(tmp_path, serve, capsys):
    """The relative score is a ratio of means: 100 x mean of answers / mean of the reference."""
    argv = write_bench(tmp_path)
    url, log = serve(text="8 6\nwords")
    flags = [*argv, "--reviews", tmp_path / "r.jsonl", "--base_url", url]
    run(eval_py, "judge", *flags)
    run(eval_py, "judge", *flags)
    assert len(lines(log)) == 6, "a judgement was paid twice"
    reviews = read_lines(tmp_path / "r.jsonl")
    assert [row["tuple"] for row in reviews] == [[8, 6]] * 6
    run(eval_py, "score", "llava_bench", "--reviews", tmp_path / "r.jsonl",
        "--json", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["all.relative"] == 75.0
    assert "85.1" in capsys.readouterr().out, "the paper's row is not beside ours"
    run(judges, "swap", *flags, "--swapped", tmp_path / "s.jsonl")
    assert "standing first is worth +2.00 points" in capsys.readouterr().out
    run(judges, "html", *argv, "--reviews", tmp_path / "r.jsonl", "--page", tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text().count("<tr>") == 7
    run(judges, "calibrate", "--reviews", tmp_path / "r.jsonl", "--against", tmp_path / "r.jsonl")
    assert "A 75.0, B 75.0" in capsys.readouterr().out


def test_a_judge_that_fails_too_often_gives_no_score(tmp_path, serve):
    """Above 2% there is no number, but the names of what failed."""
    argv = write_bench(tmp_path)
    url, _ = serve(text="I would say they are equal.")
    with pytest.raises(ValueError, match="6 of 6 judgements failed"):
        run(eval_py, "judge", *argv, "--reviews", tmp_path / "r.jsonl", "--base_url", url)


@pytest.mark.parametrize("change, says", [
    (lambda rows: rows[:-1], "1 have no answer, e.g. 5"),
    (lambda rows: [*rows, rows[0]], "the id 0 occurs more than once"),
    (lambda rows: [*rows, {"question_id": 99, "text": "x"}], "answered but not asked, e.g. 99")])
def test_missing_doubled_and_foreign_answers_are_an_error(tmp_path, change, says):
    """A score over other questions is no score."""
    argv = write_bench(tmp_path)
    write_lines(tmp_path / "a.jsonl", change(read_lines(tmp_path / "a.jsonl")))
    with pytest.raises(ValueError, match=says):
        run(eval_py, "judge", *argv, "--reviews", tmp_path / "r.jsonl")


# --------------------------------------------------------------------------------------------------
# ScienceQA


def write_scienceqa(folder, n=6):
    subjects = ("natural science", "social science", "language science")
    problems = {str(i): {
        "question": f"Which is {i}?", "choices": ["red", "blue", "green"], "answer": i % 3,
        "hint": "A hint." if i % 2 else "", "image": "image.png" if i % 4 == 0 else None,
        "subject": subjects[i % 3], "grade": f"grade{1 + i}", "lecture": "L.", "solution": "S."}
        for i in range(n)}
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": list(problems), "train": list(problems)})
    return problems


def answers_file(path, letters):
    write_lines(path, [{"question_id": str(i), "text": f"The answer is {letter}."}
                       for i, letter in enumerate(letters)])
    return path


def test_scienceqa_counts_by_subject_context_and_grade_and_ensembles(tmp_path):
    """Table 7: complement has the second model's answers, judge its verdicts where they differ."""
    write_scienceqa(tmp_path)
    ours = answers_file(tmp_path / "a.jsonl", "ABCAAA")          # truth: A B C A B C
    second = answers_file(tmp_path / "b.jsonl", "ABCABB")
    verdicts = tmp_path / "v.jsonl"
    write_lines(verdicts, [{"question_id": "5", "text": "The answer is C."}])
    run(eval_py, "score", "scienceqa", "--labels", tmp_path, "--answers", ours,
        "--second", second, "--requery", verdicts, "--json", tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["AVG"] == pytest.approx(100 * 4 / 6) and scores["NAT"] == 100
    assert scores["second.AVG"] == pytest.approx(100 * 5 / 6) and scores["second.LAN"] == 50
    assert scores["complement.AVG"] == pytest.approx(100 * 5 / 6)
    assert scores["judge.AVG"] == pytest.approx(100 * 5 / 6)


def test_scienceqa_data_writes_what_training_and_sampling_read(tmp_path):
    """QCM-LEA: question, context, options; lecture, explanation, answer."""
    write_scienceqa(tmp_path)
    run(eval_py, "scienceqa_data", "--labels", tmp_path, "--out", tmp_path / "train.json")
    record = json.loads((tmp_path / "train.json").read_text())[1]
    assert record["conversations"][1]["value"] == "L. S. The answer is B."
    assert record["conversations"][0]["value"].startswith("Which is 1?\nContext: A hint.\nOptions:")


# --------------------------------------------------------------------------------------------------
# Benchmarks


def test_pope_reads_no_in_the_first_sentence_and_averages_three_splits(tmp_path):
    """F1 of "yes" in each split."""
    (tmp_path / "coco").mkdir()
    questions, answers = [], []
    for split in ("random", "popular", "adversarial"):
        rows = [{"question_id": i, "image": f"{split}{i}.jpg", "text": f"Is there a dog {i}?",
                 "label": "yes" if i < 2 else "no"} for i in range(4)]
        write_lines(tmp_path / "coco" / f"coco_pope_{split}.json", rows)
        for row in rows:
            name = f"{split}-{row['question_id']}"
            questions.append({**row, "question_id": name, "category": split})
            text = "Yes" if row["question_id"] in (0, 2) else "No, there is not."
            answers.append({"question_id": name, "prompt": row["text"], "text": text})
    write_lines(tmp_path / "q.jsonl", questions)
    write_lines(tmp_path / "a.jsonl", answers)
    run(benchmarks, "score", "pope", "--answers", tmp_path / "a.jsonl",
        "--questions", tmp_path / "q.jsonl", "--labels", tmp_path / "coco",
        "--json", tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["f1"] == 50 and scores["random.accuracy"] == 50


def test_gqa_and_vqa_compare_short_answers_as_published(tmp_path):
    """GQA: lower case without a full stop; VQA: min(1, matches / 3) over ten humans."""
    write_json(tmp_path / "l.json", {
        str(i): {"answer": "dog", "isBalanced": True, "types": {"structural": "query"}}
        for i in range(2)})
    write_lines(tmp_path / "a.jsonl", [{"question_id": "0", "text": "Dog."},
                                       {"question_id": "1", "text": "a dog"}])
    run(benchmarks, "score", "gqa", "--answers", tmp_path / "a.jsonl", "--labels",
        tmp_path / "l.json", "--json", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["accuracy"] == 50
    humans = ["2 dogs"] * 2 + ["cats"] * 8
    assert benchmarks.vqa_accuracy("Two dogs.", {"answers": humans}) == 0.6


def test_mm_vet_grades_are_means_in_percent(tmp_path, serve, capsys):
    """Diss. Table 4.4: of all questions, and of those that need a capability."""
    labels = {f"v1_{i}": {"question": f"What is {i}?", "answer": "x", "capability": [cap]}
              for i, cap in enumerate(("rec", "ocr"))}
    write_json(tmp_path / "mm-vet.json", labels)
    write_json(tmp_path / "a.json", dict.fromkeys(labels, "an answer"))
    url, _ = serve(says={"What is 0?": "1.0", "What is 1?": "0.5"})
    run(judges, "grade_mm_vet", "--labels", tmp_path / "mm-vet.json", "--answers",
        tmp_path / "a.json", "--grades", tmp_path / "g.json", "--base_url", url)
    numbers, _ = judges.mm_vet_scores(str(tmp_path / "g.json"), str(tmp_path / "mm-vet.json"))
    assert (numbers["total"], numbers["rec"], numbers["ocr"]) == (75, 100, 50)
    assert np.isfinite(numbers["total_std"])


def test_gqas_server_gets_every_answer_and_a_table_the_balanced_ones(tmp_path):
    """The server of GQA wants all questions; accuracy is over the balanced ones."""
    write_json(tmp_path / "l.json", {
        str(i): {"answer": "dog", "isBalanced": i < 2, "types": {"structural": "query"}}
        for i in range(4)})
    write_lines(tmp_path / "a.jsonl", [{"question_id": str(i), "text": "Dog."} for i in range(4)])
    run(benchmarks, "score", "gqa", "--answers", tmp_path / "a.jsonl", "--labels",
        tmp_path / "l.json", "--upload", tmp_path / "up.json")
    rows = json.loads((tmp_path / "up.json").read_text())
    assert rows == [{"questionId": str(i), "prediction": "dog"} for i in range(4)]


@pytest.mark.parametrize("text, value", [("red", "red"), ("(B)", "blue"), ("5", None), ("Z", None)])
def test_a_number_is_no_choice_of_mathvista(text, value):
    """What is no choice and no letter of one is unparsed, whatever kind the answer has."""
    problem = {"question_type": "multi_choice", "answer_type": "integer",
               "choices": ["red", "blue"]}
    assert benchmarks.value_named(problem, text) == value


def test_the_published_relative_score_is_rounded_only_over_several_runs(tmp_path, capsys):
    """One run is a ratio of means with three decimals; of several, each is rounded to one first."""
    reviews = tmp_path / "r.jsonl"
    write_lines(reviews, [{"question_id": i, "category": "conv", "tuple": [3, 2], "judge": "j"}
                          for i in range(3)])
    run(published, "llava_bench", "--reviews", reviews, "--json", tmp_path / "s.json")
    one = json.loads((tmp_path / "s.json").read_text())["all.relative"]
    (tmp_path / "r2.jsonl").write_bytes(reviews.read_bytes())
    run(published, "llava_bench", "--reviews", reviews, tmp_path / "r2.jsonl",
        "--json", tmp_path / "s.json")
    several = json.loads((tmp_path / "s.json").read_text())["all.relative"]
    assert one == pytest.approx(200 / 3) and several == pytest.approx(66.7)
