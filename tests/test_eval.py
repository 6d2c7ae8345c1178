"""How it is scored (Sec. 5): LLaVA-Bench by a judge, MM-Vet, ScienceQA."""
import json
import math

import numpy as np
import pytest
from conftest import lines

import eval as eval_py
from extras import judges, published
from parts.files import read_lines, write_json, write_lines
from parts.questions import AnswerFile
from parts.scienceqa import science_turn

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
    with pytest.raises(ValueError, match="a file is named more than once"):
        run(eval_py, "score", "llava_bench", "--reviews", *[tmp_path / "r.jsonl"] * 2)
    run(judges, "swap", *flags, "--swapped", tmp_path / "s.jsonl")
    assert "standing first is worth +2.00 points" in capsys.readouterr().out
    run(judges, "html", *argv, "--reviews", tmp_path / "r.jsonl", "--page", tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text().count("<tr>") == 7


def test_a_judge_is_held_against_another_by_kind(tmp_path):
    """B gives what A gives but for one question: its place among the others is another, too."""
    for name, last in (("a", 6), ("b", 3)):
        write_lines(tmp_path / f"{name}.jsonl", [
            {"question_id": i, "category": KINDS[i // 3], "tuple": [8, score]}
            for i, score in enumerate((5, 4, last, 2, 3, 4))])
    run(judges, "calibrate", "--reviews", tmp_path / "a.jsonl", "--against", tmp_path / "b.jsonl",
        "--json", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["conv.relative"], found["conv.relative_against"]) == (62.5, 50)
    assert (found["conv.spearman"], found["detail.spearman"]) == (-0.5, 1)
    assert (found["all.questions"], found["all.mean_difference"]) == (6, 0.5)


@pytest.mark.parametrize("change, says", [
    (lambda rows: rows[:-1], "1 have no answer, e.g. 5"),
    (lambda rows: [*rows, rows[0]], "the id 0 occurs more than once"),
    (lambda rows: [*rows, {"question_id": 99, "text": "x"}], "or not asked, e.g. 99")])
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
    write_lines(verdicts, [{"question_id": "5", "text": "The answer is C."},     # 0: no difference
                           {"question_id": "0", "text": "The answer is B."}])
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


@pytest.mark.parametrize("form, answer", [
    ("QCM-A", "The answer is B."), ("QCM-ALE", "The answer is B. BECAUSE: L. S."),
    ("QCM-LEPA", "LECTURE: L.\nSOLUTION: S.\n###\nANSWER: B."), ("letter", "B")])
def test_scienceqa_has_the_formats_of_the_released_converter(form, answer):
    """Table 8 has two of them; the first release and LLaVA-1.5 have their own."""
    problem = {"question": "Which?", "choices": ["red", "blue"], "answer": 1, "hint": "",
               "lecture": "L.", "solution": "S."}
    question, told = science_turn(problem, form)
    assert told == answer
    if form == "letter":
        assert question == ("Which?\nA. red\nB. blue\n"
                            "Answer with the option's letter from the given choices directly.")
    else:
        assert question == "Which?\nContext: N/A\nOptions: (A) red (B) blue"


def test_published_scienceqa_counts_what_the_result_file_stores(tmp_path):
    """The released 90.92 beside 90.90: a letter that its problem lacks was drawn, and stored."""
    write_scienceqa(tmp_path)                                    # truth: A B C A B C
    outputs = {str(i): f"The answer is {letter}." for i, letter in enumerate("ABCABE")}
    stored = {str(i): i % 3 for i in range(6)}
    write_json(tmp_path / "results.json", {"outputs": outputs, "results": stored})
    run(published, "scienceqa", "--labels", tmp_path, "--answers", tmp_path / "results.json",
        "--json", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["AVG"] == 100


@pytest.mark.parametrize("change, says", [
    ({"answer": 3}, "problem 0: answer 3 of 3 choices"),
    ({"hint": None}, "problem 0: hint: None where text belongs")])
def test_a_damaged_problem_of_scienceqa_is_named(tmp_path, change, says):
    problems = write_scienceqa(tmp_path)
    problems["0"] |= change
    write_json(tmp_path / "problems.json", problems)
    ours = answers_file(tmp_path / "a.jsonl", "ABCAAA")
    with pytest.raises(ValueError, match=says):
        run(eval_py, "score", "scienceqa", "--labels", tmp_path, "--answers", ours)


# --------------------------------------------------------------------------------------------------
# MM-Vet, and the published arithmetic of LLaVA-Bench


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


@pytest.mark.parametrize("content, grade", [
    ("0.7", 0.7), ("0.7\nThe answer is mostly right.", 0.7), ("1.0 because", 1), (" .5", 0.5),
    ("Correctness: 0.7", 0.7), ("**0.7**", 0.7), ("-0.5", None), ("7", None), ("70%", None),
    ("1/2", None), ("nan", None), ("It is right", None), ("", None)])
def test_a_grade_is_a_number_from_0_to_1_in_the_first_line(content, grade):
    """OFFICIAL: the first word; a number that stands alone elsewhere in the line will do, too."""
    assert judges.parse_grade(content) == grade


@pytest.mark.parametrize("finish, tries", [("stop", 5), ("length", 1)])
def test_a_judge_without_numbers_gives_no_grades(finish, tries, tmp_path, serve):
    """No zeros in every column; what --max_tokens cuts off is not paid for five times."""
    labels = {"v1_0": {"question": "What?", "answer": "x", "capability": ["rec"]}}
    write_json(tmp_path / "mm-vet.json", labels)
    write_json(tmp_path / "a.json", {"v1_0": "an answer"})
    url, log = serve(text="The answer is", finish=finish)
    with pytest.raises(ValueError, match="1 of 1 gradings have no number, e.g. v1_0"):
        run(judges, "grade_mm_vet", "--labels", tmp_path / "mm-vet.json", "--answers",
            tmp_path / "a.json", "--grades", tmp_path / "g.json", "--base_url", url)
    assert len(lines(log)) == tries


@pytest.mark.parametrize("grade, says", [
    ({"score": [2]}, "score from 0 to 1"), ({"score": ["1"]}, "v1_0: '1' where a number belongs"),
    ({}, "v1_0: score: None where a list belongs"), ({"score": [math.nan]}, "score from 0 to 1")])
def test_odd_grades_are_named(grade, says, tmp_path):
    write_json(tmp_path / "g.json", {"v1_0": grade})
    with pytest.raises(ValueError, match=says):
        run(judges, "score", "mm_vet", "--grades", tmp_path / "g.json")


@pytest.mark.parametrize("pair, says", [
    ([80, 90], "1 of 3 judgements failed: 0"), ([0, 8], "1 of 3 judgements failed: 0"),
    ([8], "two numbers are needed"), ([8, None], "tuple of 0: None where a number belongs"),
    ("8 7", "tuple of 0: '8 7' where a list belongs"), ([8, math.nan], "two numbers")])
def test_scores_that_were_not_asked_for_are_no_judgement(pair, says, tmp_path):
    """The judge is asked for 1 to 10; 80 of 100 would move the mean of all."""
    write_lines(tmp_path / "r.jsonl", [
        {"question_id": i, "category": "conv", "tuple": [8, 6] if i else pair} for i in range(3)])
    with pytest.raises(ValueError, match=says):
        run(eval_py, "score", "llava_bench", "--reviews", tmp_path / "r.jsonl")


# --------------------------------------------------------------------------------------------------
# A file of answers that grows

def test_two_processes_do_not_answer_into_one_file(tmp_path):
    """The second is refused while the first one lives; after a kill another goes on."""
    write_lines(tmp_path / "q.jsonl", [{"question_id": i, "text": f"{i}?"} for i in range(3)])
    files = (tmp_path / "q.jsonl", tmp_path, tmp_path / "a.jsonl", "my_model")
    first = AnswerFile(*files)
    first.write(next(first.batches(1)), ["The first's."])
    with pytest.raises(ValueError, match="a.jsonl: another process is writing it"):
        AnswerFile(*files)
    first.file.close()                   # as the system does for a process that is killed
    second = AnswerFile(*files)
    for part in second.batches(1):
        second.write(part, ["The second's."])
    second.finish()
    answers = read_lines(tmp_path / "a.jsonl")
    assert [(row["question_id"], row["text"]) for row in answers] == [
        (0, "The first's."), (1, "The second's."), (2, "The second's.")]


def published_score(folder, *runs):
    """The published relative score of all questions; a run is the scores of its reviews."""
    files = []
    for i, scores in enumerate(runs):
        files.append(folder / f"{i}.jsonl")
        write_lines(files[-1], [{"question_id": j, "category": "conv", "tuple": pair}
                                for j, pair in enumerate(scores)])
    run(published, "llava_bench", "--reviews", *files, "--json", folder / "s.json")
    return json.loads((folder / "s.json").read_text())["all.relative"]


def test_the_published_relative_score_has_its_own_arithmetic(tmp_path):
    """One run is a ratio of means with three decimals; of several, each is rounded to one first. A
    failed judgement is -1 for both, where eval.py would leave it out, and say 75."""
    assert published_score(tmp_path, [[3, 2]]) == pytest.approx(200 / 3)
    assert published_score(tmp_path, [[3, 2]], [[3, 2]]) == pytest.approx(66.7)
    assert published_score(tmp_path, [[8, 6], [-1, -1]]) == pytest.approx(100 * 2.5 / 3.5)
