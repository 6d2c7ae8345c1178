"""ScienceQA with a text-only expert: its answers, its verdicts, and the ensembles of Table 7."""
import json

import pytest
from test_eval import answers_file, run, write_scienceqa

import eval as eval_py
from extras import scienceqa_gpt4
from parts.files import read_lines


def test_the_expert_answers_then_judges_and_nothing_is_paid_twice(serve, tmp_path):
    """Sec. 5.2: two solved problems stand before each; only where the two differ is it asked again.

    The truth is ABCABC. The expert gives up on problem 4 and is wrong on 5, ours is wrong on 4, 5.
    """
    write_scienceqa(tmp_path)
    letters = dict(enumerate("ABCA"))
    says = {"Another solver wrote": "The first is right. The answer is C."}
    says |= {f"Which is {i}?": f"So. The answer is {letter}." for i, letter in letters.items()}
    says |= {"Which is 4?": "I would need the picture.", "Which is 5?": "The answer is B."}
    url, log = serve(says=says)
    common = ("--labels", tmp_path, "--base_url", url)
    expert, verdicts = tmp_path / "gpt4.jsonl", tmp_path / "verdicts.jsonl"
    for _ in range(2):
        run(scienceqa_gpt4, "answer", *common, "--out", expert)
    asked = read_lines(log)
    assert len(asked) == 6, "a problem was asked twice"
    messages = asked[0]["body"]["messages"]
    roles = [message["role"] for message in messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"], "not two shots"
    ours = answers_file(tmp_path / "ours.jsonl", "ABCAAC")
    run(scienceqa_gpt4, "judge", *common, "--answers", ours, "--second", expert, "--out", verdicts)
    assert [row["question_id"] for row in read_lines(verdicts)] == ["4", "5"]
    prompt = read_lines(log)[-1]["body"]["messages"][-1]["content"]
    assert "Which is" in prompt and "One solver wrote:\nThe answer is" in prompt
    run(eval_py, "score", "scienceqa", "--labels", tmp_path, "--answers", ours, "--second", expert,
        "--requery", verdicts, "--json", tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())
    sixths = {name: round(scores[name] * 6 / 100) for name in (
        "AVG", "second.AVG", "complement.AVG", "upper_bound.AVG", "judge.AVG")}
    assert sixths == {"AVG": 5, "second.AVG": 4, "complement.AVG": 4, "upper_bound.AVG": 5,
                      "judge.AVG": 5}


def test_solved_problems_have_no_picture_and_are_enough(tmp_path):
    """The expert sees no picture, so an example with one would teach it to guess."""
    write_scienceqa(tmp_path)            # problems 0 and 4 have pictures
    config = scienceqa_gpt4.AskAlone(labels=str(tmp_path), out="", shots=4)
    questions = [question for question, _ in scienceqa_gpt4.solved_problems(config)]
    assert len(set(questions)) == 4 and not any("0?" in q or "4?" in q for q in questions)
    config = scienceqa_gpt4.AskAlone(labels=str(tmp_path), out="", shots=5)
    with pytest.raises(ValueError, match="--shots 5 needs as many problems without a picture"):
        scienceqa_gpt4.solved_problems(config)


def test_a_file_that_was_not_written_here_is_not_replaced(tmp_path):
    """As a judge's reviews: answers of another run would be lost."""
    write_scienceqa(tmp_path)
    expert = answers_file(tmp_path / "gpt4.jsonl", "ABCABC")
    with pytest.raises(ValueError, match="gpt4.jsonl was not written here"):
        run(scienceqa_gpt4, "answer", "--labels", tmp_path, "--out", expert, "--base_url", "x")
