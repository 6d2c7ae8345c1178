"""GPT-4 as judge (Sec. 5.1): the message byte for byte, scores to the digit, nothing paid twice, no number from garbage."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

import generate_data as gd
import eval as eval_py
import judge
import toy
from conftest import ROOT, lines

COCO = {"id": "000000000007", "image": "000000000007.jpg", "captions": ["A red  bus.", "A bus stops. "],
        "instances": [{"category": "bus", "bbox": [0.1, 0.25, 0.53, 1]},
                      {"category": "person", "bbox": [0.0, 0.5, 0.104, 0.9]}]}
WILD = {"id": "001", "image": "001.jpg", "caption": ["A volcanic cone by the sea.", "Diamond Head, Hawaii."]}


def dump(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_bench(folder, n=6, about=COCO, **more):
    """The four files of a bench of n questions about one picture; returns the flags that name them, and --reviews."""
    kinds = ("conv", "detail", "complex")
    files = {"questions": [{"question_id": i, "image": about["image"], "text": f"What is number {i}?",
                            "category": kinds[i % 3]} for i in range(n)],
             "reference": [{"question_id": i, "text": f"Reference {i}.", "category": kinds[i % 3]} for i in range(n)],
             "answers": [{"question_id": i, "prompt": f"What is number {i}?", "text": f"Answer {i}.", "answer_id": f"a{i}",
                          "model_id": "m", "metadata": {}} for i in range(n)][::-1],       # order does not matter
             "context": [{"image": "another.jpg"}, about]} | more
    flags = {name: dump(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
    flags["reviews"] = folder / "reviews.jsonl"
    return [str(word) for name, path in flags.items() for word in (f"--{name}", path)]


def make_reviews(path, scores, prefix="", **more):
    """A review file with the fields of the released ones: [(category, reference's score, answer's score), ...]."""
    return str(dump(path, [{"id": i + 1, "question_id": i, "answer1_id": f"r{i}", "answer2_id": f"a{i}",
                            "category": prefix + kind, "content": f"{a} {b}\nBecause.", "tuple": [a, b], **more}
                           for i, (kind, a, b) in enumerate(scores)]))


# ---------------------------------------------------------------------------------------------------------------------
# What the judge is asked


def test_the_message_is_the_official_one_byte_for_byte(serve, tmp_path):
    """Sec. 5.1: context, question, the reference as Assistant 1, the answer as Assistant 2, then the rule's prompt; COCO's
    context is the captions and the boxes as stored, Wild's the caption; the category leads to the rule."""
    url, log = serve(text="8 6\nFine.")
    rule = {name: {"role": "Helper", "prompt": f"Rate {name}!\n"} for name in ("conv", "llava_bench_conv")}
    (tmp_path / "rule.json").write_text(json.dumps(rule, indent=1))
    boxes = "bus: [0.1, 0.25, 0.53, 1]\nperson: [0.0, 0.5, 0.104, 0.9]"
    for name, context, told in (("conv", COCO, f"A red  bus.\nA bus stops. \n\n{boxes}"),
                                ("llava_bench_conv", WILD, "A volcanic cone by the sea.\nDiamond Head, Hawaii."),
                                ("llava_bench_conv", WILD | {"caption": "A cone."}, "A cone.")):
        (folder := tmp_path / f"{name}{len(told)}").mkdir()
        eval_py.main(["judge", *make_bench(folder, 1, context), "--base_url", url, "--rule", str(tmp_path / "rule.json")])
        body = lines(log)[-1]["body"]
        assert body["messages"] == [
            {"role": "system", "content": "You are a helpful and precise assistant for checking the quality of the answer."},
            {"role": "user", "content": (
                f"[Context]\n{told}\n\n[Question]\nWhat is number 0?\n\n[Helper 1]\nReference 0.\n\n[End of Helper 1]\n\n"
                f"[Helper 2]\nAnswer 0.\n\n[End of Helper 2]\n\n[System]\nRate {name}!\n\n\n")}]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-4", 0.2, 1024)
        assert lines(folder / "reviews.jsonl")[0]["category"] == name


def test_our_prompts_ask_for_two_numbers_first_and_tell_of_boxes_only_where_there_are_any():
    """The parser takes nothing else, and In-the-Wild has no boxes."""
    rules = judge.read_rules(None)
    assert len(rules) == 6 and len({prompt for _, prompt in rules.values()}) == 2
    for category, (role, prompt) in rules.items():
        assert role == "Assistant" and all(words in prompt for words in ("first line", "one space", "from 1 ", "to 10 "))
        assert ("box" in prompt) == (not category.startswith("llava_bench_"))


def test_show_prints_whole_requests_and_sends_nothing(tmp_path, capsys):
    eval_py.main(["judge", *make_bench(tmp_path), "--base_url", "http://127.0.0.1:9/v1", "--show", "2"])
    said = capsys.readouterr().out
    assert said.count("[End of Assistant 2]") == 2 and not list(tmp_path.glob("reviews*"))


# ---------------------------------------------------------------------------------------------------------------------
# What the judge says


@pytest.mark.parametrize("content, scores", [
    ("8 9", [8, 9]), ("8,9", [8, 9]), ("8.5 7", [8.5, 7]), ("7 9\nAssistant 1 was brief.", [7, 9]), ("10 0\n", [10, 0]),
    *[(text, [-1, -1]) for text in ("8, 9", "8 9 ", " 8 9", "8  9", "8\t9", "(8, 9)", "8/10 9/10", "\n8 9", "", "8", "8 9 7",
                                    "Assistant 1: 8", "eight nine", "nan 9", "8 inf", "8:9", "**8 9**")]])
def test_scores_are_parsed_as_strictly_as_the_official_script_does(content, scores):
    """First line; commas are spaces; one split at single spaces; two floats, or it failed. Not a number is no score."""
    assert judge.parse_scores(content) == scores


def test_a_review_has_the_released_fields_and_the_judges_name_and_date(serve, tmp_path, capsys):
    """id, question_id, answer1_id, answer2_id, category, content, tuple: the official summariser reads ours."""
    url, _ = serve(says={f"number {i}?": f"{i + 1} {9 - i}\nBecause {i}." for i in range(6)})
    eval_py.main(["judge", *make_bench(tmp_path), "--base_url", url, "--judge_model", "some-judge"])
    rows = lines(tmp_path / "reviews.jsonl")
    today = str(judge.date.today())
    assert rows == [{"id": i + 1, "question_id": i, "answer1_id": i, "answer2_id": f"a{i}",
                     "category": ("conv", "detail", "complex")[i % 3], "content": f"{i + 1} {9 - i}\nBecause {i}.",
                     "tuple": [i + 1, 9 - i], "judge": "some-judge", "date": today} for i in range(6)]
    said = capsys.readouterr().out
    assert f"judge: some-judge, {today}" in said and f"{100 * 6.5 / 3.5:.1f}" in said and "85.1" in said


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score(tmp_path, *argv):
    eval_py.main([argv[0], *argv[1:], "--json", str(tmp_path / "score.json")])
    return json.loads((tmp_path / "score.json").read_text())


def test_the_relative_score_is_a_ratio_of_means_over_questions(tmp_path, capsys):
    """Not a mean of ratios, and `all` is over questions, not over categories."""
    scores = [("conv", 10, 5), ("conv", 2, 2), ("conv", 8, 8), ("detail", 4, 1), ("complex", 9, 10)]
    out = score(tmp_path, "score", "llava_bench", "--reviews", make_reviews(tmp_path / "r.jsonl", scores, "llava_bench_"))
    assert out["conv.relative"] == pytest.approx(75) and np.mean([50, 100, 100]) != pytest.approx(75)
    assert out["all.relative"] == pytest.approx(100 * 26 / 33) != pytest.approx((75 + 25 + 1000 / 9) / 3)
    assert (out["all.reference"], out["all.candidate"]) == pytest.approx((66, 52)), "means are printed x 10"
    assert out["all.relative_std"] == 0 == out["failed"]
    assert out["all.relative_low"] < out["all.relative"] < out["all.relative_high"]
    said = capsys.readouterr().out
    assert "In-the-Wild" in said and "67.3 ± 2.0" in said and "judge not recorded" in said


def test_the_interval_is_the_bootstraps(tmp_path):
    """Against a slow loop that draws questions with replacement."""
    rng = np.random.default_rng(1)
    pairs = rng.integers(1, 11, (90, 2)).tolist()
    reviews = make_reviews(tmp_path / "r.jsonl", [("conv", *p) for p in pairs])
    out = score(tmp_path, "score", "llava_bench", "--reviews", reviews)
    slow = []
    for _ in range(4000):
        drawn = np.array(pairs)[rng.integers(0, 90, 90)].sum(0)
        slow.append(100 * drawn[1] / drawn[0])
    low, high = np.percentile(slow, (2.5, 97.5))
    assert abs(out["all.relative_low"] - low) < 1 and abs(out["all.relative_high"] - high) < 1
    assert out == score(tmp_path, "score", "llava_bench", "--reviews", reviews), "it changes from call to call"


def test_several_review_files_give_mean_and_population_deviation(tmp_path, capsys):
    """Table 5: three runs, mean and deviation of their relative scores."""
    files = [make_reviews(tmp_path / f"{n}.jsonl", [("conv", 8, n), ("conv", 7, 7)]) for n in (4, 5, 9)]
    out = score(tmp_path, "score", "llava_bench", "--reviews", *files)
    runs = [100 * (n + 7) / 15 for n in (4, 5, 9)]
    assert out["all.relative"] == pytest.approx(np.mean(runs)) and out["all.relative_std"] == pytest.approx(np.std(runs))
    assert f"{np.mean(runs):.1f} ± {np.std(runs):.1f}" in capsys.readouterr().out
    out = score(tmp_path, "score", "llava_bench", "--official", "--reviews", *files)
    assert out["all.relative"] == pytest.approx(np.mean([round(r, 1) for r in runs]))


def test_a_failed_judgement_is_listed_and_left_out_unless_the_published_arithmetic_is_asked_for(tmp_path, capsys):
    """OFFICIAL: [-1, -1] goes into both means, and means are rounded to three decimals before the ratio."""
    scores = [("conv", 8, 7)] * 30 + [("detail", 9, 4)] * 29 + [("detail", -1, -1)] + [("conv", 7, 5)]
    path = make_reviews(tmp_path / "r.jsonl", scores)
    out = score(tmp_path, "score", "llava_bench", "--reviews", path)
    assert out["failed"] == 1 and out["detail.relative"] == pytest.approx(400 / 9)
    assert out["all.relative"] == pytest.approx(100 * (210 + 116 + 5) / (240 + 261 + 7))
    assert "left out: " + path + ": 59" in capsys.readouterr().out
    out = score(tmp_path, "score", "llava_bench", "--reviews", path, "--official")
    assert out["all.relative"] == pytest.approx(round(330 / 61, 3) / round(507 / 61, 3) * 100, abs=1e-12)
    assert out["all.relative"] != pytest.approx(330 / 507 * 100, abs=1e-4), "the means were not rounded"
    assert "counted as -1 (--official)" in capsys.readouterr().out


def test_above_two_percent_of_failures_there_is_no_score(tmp_path):
    path = make_reviews(tmp_path / "r.jsonl", [("conv", 8, 7)] * 97 + [("conv", -1, -1)] * 3)
    with pytest.raises(ValueError, match="3 of 100 judgements failed.*above 2%.*r.jsonl: 97, .*: 98, .*: 99"):
        score(tmp_path, "score", "llava_bench", "--reviews", path)
    assert not (tmp_path / "score.json").exists()
    assert score(tmp_path, "score", "llava_bench", "--reviews", path, "--official")["failed"] == 3


def test_scoring_needs_no_torch_and_starts_at_once(tmp_path):
    path = make_reviews(tmp_path / "r.jsonl", [("conv", 8, 7)])
    code = ("import sys, eval; eval.main(['score', 'llava_bench', '--reviews', sys.argv[1]]); "
            "sys.exit([m for m in ('torch', 'transformers', 'toy') if m in sys.modules] or 0)")
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_both_orders_are_averaged_and_the_position_bias_is_told(serve, tmp_path, capsys):
    """A judge that gives the first place two points more: the average is as if it did not, and the bias is +2."""
    url, log = serve(says={f"1]\n{first} {i}.": f"{a} {b}\n" for i in range(6)
                           for first, a, b in (("Reference", 8, 5), ("Answer", 7, 6))})
    flags = [*make_bench(tmp_path), "--base_url", url]
    eval_py.main(["judge", *flags])
    assert "position" not in capsys.readouterr().out
    eval_py.main(["judge", *flags, "--swap"])
    assert len(lines(log)) == 12, "the first order was paid twice"
    row = lines(tmp_path / "reviews.jsonl")[0]
    assert row["tuple"] == [7, 6] and row["content"] == "8 5\n" and row["swapped"] == {"content": "7 6\n", "tuple": [6, 7]}
    assert "100.0% of the verdicts depend on the order" in capsys.readouterr().out
    out = score(tmp_path, "score", "llava_bench", "--reviews", str(tmp_path / "reviews.jsonl"))
    assert out["position_bias"] == 2 and out["all.relative"] == pytest.approx(600 / 7)
    assert (out["all.relative_reference_first"], out["all.relative_reference_last"]) == pytest.approx((62.5, 700 / 6))


def test_calibrate_compares_two_judges_of_the_same_answers(tmp_path, capsys):
    """Mean difference and rank correlation per category; ties share their ranks."""
    a = [("conv", 8, 3), ("conv", 8, 5), ("conv", 9, 5), ("conv", 9, 8), ("detail", 5, 5), ("detail", 6, 5), ("conv", -1, -1)]
    b = [("conv", 9, 1), ("conv", 9, 2), ("conv", 9, 3), ("conv", 9, 10), ("detail", 5, 4), ("detail", 8, 6), ("conv", 8, 8)]
    with pytest.raises(ValueError, match="a.jsonl: 1 of 7 judgements failed, e.g. 6; above 2%"):
        judge.agreement(str(make_reviews(tmp_path / "a.jsonl", a)), str(make_reviews(tmp_path / "b.jsonl", b)))
    a, b = (rows + [("complex", 6, 6)] * 50 for rows in (a, b))
    ours, theirs = make_reviews(tmp_path / "a.jsonl", a, judge="new judge"), make_reviews(tmp_path / "b.jsonl", b)
    out = score(tmp_path, "calibrate", "--reviews", ours, "--against", theirs)
    assert out["failed"] == 1 and out["all.n"] == 56 and out["conv.mean_difference"] == pytest.approx(21 / 4 - 16 / 4)
    assert out["conv.reference_difference"] == -0.5 and out["detail.spearman"] is None, "a constant has no rank correlation"
    assert out["conv.spearman"] == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])
    assert out["conv.relative"] == pytest.approx(100 * 21 / 34) and out["conv.relative_against"] == pytest.approx(100 * 16 / 36)
    assert "A: new judge" in (said := capsys.readouterr().out) and "B: judge not recorded" in said
    rows = lines(theirs)
    rows[2]["answer2_id"] = "of another model"
    with pytest.raises(ValueError, match="1 of 57 ids.*of another model"):
        judge.agreement(ours, str(dump(tmp_path / "c.jsonl", rows)))
    with pytest.raises(ValueError, match="different judges"):
        judge.relative_scores([ours, theirs])


# ---------------------------------------------------------------------------------------------------------------------
# No number from garbage


def test_files_that_do_not_fit_are_an_error_with_counts_and_examples(tmp_path):
    """Doubled, missing, foreign ids, another bench's answers, an unknown category, no context, empty: never a number."""
    answer = [{"question_id": i, "prompt": f"What is number {i}?", "text": "x"} for i in range(6)]
    asked = [{"question_id": i, "image": COCO["image"], "text": f"What is number {i}?", "category": "conv"} for i in range(6)]
    for more, says in (
            ({"answers": answer + answer[:2]}, r"answers.jsonl: 2 ids occur more than once, e.g. 0, 1"),
            ({"answers": answer[:4]}, r"answers.jsonl: 2 of 6 ids of .*questions.jsonl are missing, e.g. 4, 5"),
            ({"answers": answer + [{"question_id": "z", "text": "x"}]}, r"1 of 7 ids there are unknown, e.g. 'z'"),
            ({"reference": [a | {"prompt": "Another?"} for a in answer]}, r"reference.jsonl: 6 of 6 answers are to another"),
            ({"reference": [{"question_id": 0}] + answer[1:]}, r"reference.jsonl: 1 of 6 records, e.g. 0, lack .*id, text"),
            ({"answers": []}, r"answers.jsonl: no records in it"), ({"questions": [1]}, r"questions.jsonl: 1 of 1 records"),
            ({"context": [WILD]}, r"context.jsonl: nothing about the pictures of 6 of 6 questions, e.g. '000000000007.jpg'"),
            ({"context": [{"image": COCO["image"], "captions": ["x"]}]}, r"context.jsonl: 000000000007.jpg: .*instances"),
            ({"questions": asked[:5] + [asked[5] | {"category": "chat"}]}, r"1 of 6 questions .*\(5, 'chat'\).*rules for c")):
        with pytest.raises(ValueError, match=says):
            eval_py.main(["judge", *make_bench(tmp_path, **more), "--base_url", "http://127.0.0.1:9/v1"])
    assert not list(tmp_path.glob("reviews*"))
    one, two = (make_reviews(tmp_path / f"{n}.jsonl", [("conv", 8, 7)] * n) for n in (3, 2))
    for files, says in (([one, two], "2.jsonl: 1 of 3 ids"), ([one, one], "more than once"),
                        ([str(dump(tmp_path / "4.jsonl", []))], "no records"),
                        ([str(dump(tmp_path / "1.jsonl", lines(one) * 2))], "3 ids occur more"),
                        ([make_reviews(tmp_path / "5.jsonl", [("conv", 8, float("nan"))])], "not two numbers"),
                        ([make_reviews(tmp_path / "6.jsonl", [("conv", 0, 7)])], "nothing was judged"),
                        ([make_reviews(tmp_path / "7.jsonl", [("conv", 8, 7), ("llava_bench_conv", 8, 7)])], "another bench")):
        with pytest.raises(ValueError, match=says):
            judge.relative_scores(files)
    (tmp_path / "rule.json").write_text('{"conv": "Rate it!"}')
    with pytest.raises(ValueError, match="rule.json: 1 of 1 records, e.g. 'conv', lack role, prompt"):
        judge.read_rules(tmp_path / "rule.json")


def test_reviews_that_somebody_else_made_are_not_overwritten(tmp_path):
    flags = make_bench(tmp_path)
    theirs = make_reviews(tmp_path / "reviews.jsonl", [("conv", 8, 7)])
    with pytest.raises(ValueError, match="was not written here"):
        eval_py.main(["judge", *flags, "--base_url", "http://127.0.0.1:9/v1"])
    assert len(lines(theirs)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is paid twice


@pytest.mark.slow
def test_killed_while_judging_it_goes_on_and_pays_nothing_twice(serve, tmp_path):
    """SIGKILL of a real process, twice, and a torn last line; a server that fails; then every review is the question's own."""
    says = {f"number {i}?": f"{1 + i % 9} 5\n{i}" for i in range(30)}
    url, log = serve(seconds=0.1, faults={"500": 0.05, "reset": 0.05}, says=says)
    command = [sys.executable, os.path.join(ROOT, "eval.py"), "judge", *make_bench(tmp_path, 30), "--base_url", url,
               "--workers", "4", "--attempts", "20"]
    raw, kept = tmp_path / "reviews.jsonl.raw" / "raw.jsonl", 0
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not raw.exists() or len(raw.read_bytes().splitlines()) < kept + 6:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = len(raw.read_bytes().splitlines())
        with open(raw, "ab") as f:
            f.write(b'{"key": "0123", "repl')
    assert not (tmp_path / "reviews.jsonl").exists(), "half a bench was written as if it were whole"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = lines(tmp_path / "reviews.jsonl")
    assert [(r["question_id"], r["tuple"][0]) for r in rows] == [(i, 1 + i % 9) for i in range(30)]
    asked = Counter(row["fault"] for row in lines(log))
    assert asked["good"] <= 30 + 2 * 4, "more was asked twice than what was on its way at a kill"
    before = len(lines(log))
    eval_py.main(command[2:])
    assert len(lines(log)) == before, "a finished run asked again"


def test_without_all_replies_no_reviews_are_written(serve, tmp_path):
    url, _ = serve(faults={"500": 1.0})
    with pytest.raises(ValueError, match="6 requests have no reply.*HTTP 500.*run the same command again"):
        eval_py.main(["judge", *make_bench(tmp_path), "--base_url", url, "--attempts", "1"])
    assert not (tmp_path / "reviews.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# MM-Vet


def make_mm_vet(folder):
    labels = {"v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
              "v1_1": {"imagename": "v1_1.png", "question": "Who is it?", "answer": "a cook<OR>a chef", "capability": ["rec"]},
              "v1_2": {"imagename": "v1_2.png", "question": "And why?", "answer": "luck", "capability": ["rec", "ocr"]}}
    (folder / "mm-vet.json").write_text(json.dumps(labels, indent=1))
    (folder / "a.json").write_text(json.dumps({name: f"said {name}" for name in labels}, indent=1))
    return ["--labels", str(folder / "mm-vet.json"), "--answers", str(folder / "a.json"), "--grades", str(folder / "g.json")]


@pytest.mark.parametrize("content, grade", [
    ("0.5", 0.5), ("1", 1), ("0.0", 0), ("0.7 because", 0.7), ("1.0\n", 1), *[(text, None) for text in (
        "1.1", "-0.1", "nan", "", " 0.5", "Correct", "0.5, as", "0,5")]])
def test_a_grade_is_what_stands_before_the_first_space(content, grade):
    assert judge.parse_grade(content) == grade


def test_mm_vet_is_asked_as_published_and_asked_again_hotter_until_a_number_comes(serve, tmp_path, capsys):
    """Temperature 0, three tokens, one user message that ends in an open cell; then + 0.5 a try; after five 0.0, counted."""
    url, log = serve(says={"said v1_1 | \nPredict the correctness of the answer (digit): ": "0.6", "said v1_0": "0.9",
                           "said v1_1": "Well"}, text="No idea")
    flags = make_mm_vet(tmp_path)
    eval_py.main(["grade_mm_vet", *flags, "--base_url", url, "--runs", "2"])
    asked = [row["body"] for row in lines(log)]
    count = Counter((b["messages"][0]["content"].split("said ")[1][:4], b["temperature"]) for b in asked)
    assert count == {("v1_0", 0): 2, ("v1_1", 0): 2, ("v1_1", 0.5): 2, **{("v1_2", t / 2): 2 for t in range(5)}}
    assert all(len(b["messages"]) == 1 and b["max_tokens"] == 3 for b in asked)
    texts = [b["messages"][0]["content"] for b in asked if b["temperature"] == 0]
    prompt = (judge.PROMPTS / "mm_vet.txt").read_text().strip()
    assert f"{prompt}\nWhat is x? | -1 <AND> -5 | said v1_0 | " in texts
    assert f"{prompt}\nWho is it? | a cook <OR> a chef | said v1_1 | " in texts
    grades, today = json.loads((tmp_path / "g.json").read_text()), str(judge.date.today())
    assert grades["v1_1"] == {"model": ["gpt-4"] * 2, "content": ["0.6"] * 2, "score": [0.6] * 2, "date": [today] * 2}
    assert grades["v1_2"]["score"] == [0, 0] and "in 5 tries: 2, e.g. 'v1_2'" in capsys.readouterr().out
    eval_py.main(["grade_mm_vet", *flags, "--base_url", url, "--runs", "2"])
    assert len(lines(log)) == len(asked), "graded answers were graded again"
    dump(tmp_path / "a.jsonl", [{"question_id": i, "text": f"said v1_{i}"} for i in range(3)])
    eval_py.main(["grade_mm_vet", *flags, "--base_url", url, "--runs", "2", "--answers", str(tmp_path / "a.jsonl")])
    assert len(lines(log)) == len(asked), "an answers file of JSON lines means something else than {id: text}"


def test_our_mm_vet_prompt_has_the_published_columns_and_seven_rows():
    rows = [line for line in (judge.PROMPTS / "mm_vet.txt").read_text().splitlines() if " | " in line]
    assert rows[0] == "Question | Ground truth | Prediction | Correctness" and len(rows) == 9
    assert all(row.count(" | ") == 3 and judge.parse_grade(row.split(" | ")[3]) is not None for row in rows[2:])


def test_mm_vet_scores_are_means_over_runs_with_population_deviation(tmp_path, capsys):
    """A capability's score is over the questions that need it; the total's deviation is over runs, ddof 0."""
    flags = make_mm_vet(tmp_path)
    grades = {"v1_0": [0.0, 1.0], "v1_1": [0.5, 0.5], "v1_2": [1.0, 0.8]}
    (tmp_path / "g.json").write_text(json.dumps({i: {"model": ["gpt-4"] * 2, "content": [str(x) for x in s], "score": s}
                                                 for i, s in grades.items()}, indent=1))
    out = score(tmp_path, "score", "mm_vet", "--grades", flags[-1], "--labels", flags[1])
    assert out["total"] == pytest.approx((50 + 230 / 3) / 2) and out["total_std"] == pytest.approx(np.std([50, 230 / 3]))
    assert out["rec"] == pytest.approx(70) and out["ocr"] == pytest.approx(70) and out["math"] == 50 and "spat" not in out
    assert out["failed"] == 0 and "the benchmark has 218" in capsys.readouterr().out
    assert score(tmp_path, "score", "mm_vet", "--grades", flags[-1])["total"] == out["total"]
    labels = json.loads((tmp_path / "mm-vet.json").read_text())
    (tmp_path / "mm-vet.json").write_text(json.dumps(labels | {"v1_9": labels["v1_0"]}))
    with pytest.raises(ValueError, match="g.json: 1 of 4 ids of .*mm-vet.json are missing, e.g. 'v1_9'"):
        judge.mm_vet_scores(flags[-1], flags[1])
    for bad in ([0.5], [0.5, 1.5], [0.5, None]):
        (tmp_path / "g.json").write_text(json.dumps({"v1_0": {"score": [0, 1]}, "v1_1": {"score": bad}}))
        with pytest.raises(ValueError, match="score of 1 of 2 questions is not 2 numbers from 0 to 1, e.g. 'v1_1'"):
            judge.mm_vet_scores(flags[-1])


# ---------------------------------------------------------------------------------------------------------------------
# The toy world, where the truth is known


def message(scene, question, first, second):
    corners = lambda x, y, w, h: [round(v / toy.SIDE, 3) for v in (x, y, x + w, y + h)]
    boxes = "\n".join(f"{t.name}: {corners(*t.box)}" for t in scene.things)
    text = judge.review_message(f"a picture.\n\n{boxes}", question, first, second, "Assistant", "Judge: [red]!")
    return gd.Request("1", "conv", None, {"messages": [{"content": text}]})


def test_the_scripted_judge_ranks_a_right_answer_above_a_wrong_one_in_either_place():
    """For every kind of question: the teacher's answer about this scene against its answer about another one."""
    rng, kinds = random.Random(3), Counter()
    told = lambda scene: {q.text: q.answer for q in toy.questions(scene, rng)} | dict(toy.reasoning(scene, rng))
    for _ in range(7):
        scene, other = toy.sample_scene(rng), toy.sample_scene(rng)
        here, there = told(scene), told(other)
        pairs = [(text, right, there[text]) for text, right in here.items() if text in there]
        pairs = rng.sample(pairs, min(6, len(pairs)))
        pairs.append((toy.detail_questions()[0], toy.description(scene), toy.description(other)))
        for text, right, wrong in pairs:
            if toy.facts(wrong) <= toy.truths(text, scene)[0]:
                continue                 # what is right there is right here
            kinds[text.split()[0]] += 1
            for swapped in (False, True):
                said = toy.scripted_judge(message(scene, text, *((wrong, right) if swapped else (right, wrong))))
                words = said["choices"][0]["message"]["content"]
                assert "no language model" in said["model"] and "no language model" in words
                scores = judge.parse_scores(words)[::-1 if swapped else 1]
                assert 10 == scores[0] > scores[1] >= 1, (text, right, wrong, said)
    assert len(kinds) >= 4, kinds


def test_the_scripted_judge_refuses_what_it_does_not_know():
    scene = toy.sample_scene(random.Random(0))
    for request, says in ((message(scene, "What is love?", "x", "y"), "only the toy's questions"),
                          (message(toy.Scene(()), "How many things are there?", "x", "y"), "no boxes of the toy world")):
        with pytest.raises(ValueError, match=says):
            toy.scripted_judge(request)


@pytest.fixture(scope="module")
def toy_reviews(tmp_path_factory):
    """A bench of the toy world; a candidate whose detailed descriptions are right and whose other answers are nonsense."""
    out = tmp_path_factory.mktemp("toy")
    rng = random.Random(0)
    toy.save_coco(out / "world", "train", [toy.sample_scene(rng) for _ in range(12)], 1, rng)
    notes = out / "world" / "annotations"
    gd.main(["instruct", "--captions", str(notes / "captions_train.json"), "--instances", str(notes / "instances_train.json"),
             "--out", str(out / "bench"), "--teacher", "script", "--bench", "4"])
    reference = lines(out / "bench" / "reference.jsonl")
    dump(out / "answers.jsonl", [row | {"text": row["text"] if row["category"] == "detail" else
                                        '<script>document.title="owned"</script> & <b>bold</b>'} for row in reference])
    flags = [f"--{name}={out / 'bench' / name}.jsonl" for name in ("questions", "reference", "context")]
    eval_py.main(["judge", *flags, "--answers", str(out / "answers.jsonl"), "--reviews", str(out / "r.jsonl"), "--swap",
                "--judge", "script", "--html", str(out / "r.html"), "--images", str(out / "world" / "images")])
    return out


def test_the_toys_bench_is_judged_offline_and_never_passes_for_a_language_model(toy_reviews, capsys):
    """The reference speaks the truth and gets 10; so does the right half of the candidate, and the nonsense gets 1."""
    out = score(toy_reviews, "score", "llava_bench", "--reviews", str(toy_reviews / "r.jsonl"))
    assert out["detail.relative"] == 100 and out["conv.relative"] == out["complex.relative"] == 10
    assert out["all.reference"] == 100 and out["position_bias"] == 0
    assert "judge: scripted judge (no language model)" in capsys.readouterr().out
    assert all("no language model" in row["judge"] + row["content"] for row in lines(toy_reviews / "r.jsonl"))


# ---------------------------------------------------------------------------------------------------------------------
# The report


def test_the_report_is_one_page_with_everything_in_it(toy_reviews):
    """Pictures as data, all texts escaped, nothing fetched from anywhere."""
    page = (toy_reviews / "r.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 12 == page.count("<img") and "http" not in page
    assert page.count("&lt;script&gt;") >= 8 and page.count("<script>") == 1 and "<b>bold" not in page
    for row in lines(toy_reviews / "bench" / "questions.jsonl"):
        assert row["text"].replace("'", "&#x27;") in page
    assert "no language model" in page and "relative score" in page and "In the other order" in page


def test_a_picture_that_is_missing_stops_before_anything_is_paid(tmp_path):
    with pytest.raises(FileNotFoundError, match="000000000007.jpg is not in"):
        eval_py.main(["judge", *make_bench(tmp_path), "--base_url", "http://127.0.0.1:9/v1", "--html", str(tmp_path / "r.html"),
                    "--images", str(tmp_path)])


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome is installed")
def test_in_a_real_browser_a_click_on_a_column_sorts_by_it(tmp_path):
    """Numbers as numbers, once up, once down; text as text; what a model said is not run."""
    rows = [("", {"question_id": i, "category": kind, "image": "x.jpg", "text": "?"}, {"text": "r"},
             {"text": '<script>document.title="owned"</script><img src="x" onerror="document.title=1">'},
             {"tuple": scores, "content": "c"}) for i, kind, scores in (
                 (10, "detail", [9, 10]), (9, "conv", [10, 2]), (2, "conv", [-1, -1]))]
    judge.write_html(tmp_path / "r.html", rows, "scores")
    clicks = [[], [0], [0], [2], [6], [6], [8]]
    script = """<script>const seen = CLICKS.map(columns => {
        columns.forEach(c => document.querySelectorAll("th")[c].click());
        return [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent).join(); });
        document.body.append("SEEN " + seen.join("; ") + " TITLE " + document.title);</script></html>"""
    page = (tmp_path / "r.html").read_text().replace("</html>", script.replace("CLICKS", json.dumps(clicks)))
    (tmp_path / "clicked.html").write_text(page)
    quiet = ("gpu", "background-networking", "component-update", "sync", "quic", "dev-shm-usage")
    dom = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet),
                          f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "clicked.html").as_uri()],
                         capture_output=True, text=True, timeout=120).stdout
    seen, title = re.search(r"SEEN (.*) TITLE (.*)", dom.split("</script>")[-1]).groups()
    assert title.startswith("LLaVA-Bench"), "a model's answer was run as a script"
    assert seen.split("; ") == ["10,9,2", "2,9,10", "10,9,2", "9,2,10", "2,10,9", "9,10,2", "9,2,10"]


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["make"]])
def test_a_command_is_needed(argv):
    with pytest.raises(ValueError, match="judge, calibrate, score llava_bench, grade_mm_vet, score mm_vet"):
        eval_py.main(argv)


def test_help_explains_every_flag(capsys):
    """Those too that all judges share: the comment behind a field is its help."""
    for command in eval_py.COMMANDS:
        with pytest.raises(SystemExit):
            eval_py.main([*command.split(), "-h"])
    said = capsys.readouterr().out
    assert said.count("requests at a time") == 2 and "mm-vet.json" in said and "pictures, answers, scores" in said
