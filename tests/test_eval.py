"""How it is scored: each benchmark's rules, quirks and published arithmetic, and no number from answers that do not belong."""
import csv
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import eval as ev
from conftest import ROOT, tiny_llava
from images import load_image
from records import form_problem

WORD = "\nAnswer the question using a single word or phrase."


def write(path, rows):
    """JSON lines, or what is no list as JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else json.dumps(rows))
    return path


def said(name, text, prompt="?"):
    return {"question_id": name, "prompt": prompt, "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}


@pytest.fixture
def score(tmp_path):
    """score(name, answers, labels, ...) -> the numbers of --json; `answers` is a list of records, or a file."""
    def run(name, answers, labels, **flags):
        path = answers if isinstance(answers, Path) else write(tmp_path / "answers.jsonl", answers)
        flags = {k: str(v) if isinstance(v, Path) else v for k, v in flags.items()}
        labels = [str(x) for x in (labels if isinstance(labels, list) else [labels])]
        ev.score(name, ev.Score(answers=str(path), labels=labels, json=str(tmp_path / "out.json"), **flags))
        return json.loads((tmp_path / "out.json").read_text())
    return run


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_scoring_loads_no_torch(tmp_path):
    """Two modes, cleanly apart: `score` reads text and writes numbers, so it starts at once and needs no model library."""
    write(tmp_path / "q_questions.json", {"1": {"answer": "yes", "isBalanced": True, "types": {"structural": "verify"}}})
    write(tmp_path / "a.jsonl", [said("1", "Yes.")])
    code = ("import sys, eval; eval.main(sys.argv[1:]); "
            "print({'torch', 'transformers', 'PIL', 'matplotlib', 'openpyxl', 'sample'} & set(sys.modules))")
    argv = ["score", "gqa", "--answers", tmp_path / "a.jsonl", "--labels", tmp_path]
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()", f"scoring imports {done.stdout.splitlines()[-1]}"
    assert "accuracy  100.00" in done.stdout


@pytest.mark.parametrize("argv, error", [
    ([], "score"), (["score"], "pope"), (["score", "popes"], "mathvista"), (["judges"], "answer"),
    (["score", "pope", "--answers", "a"], "--labels"), (["score", "pope", "--upload", "u", "--answers", "a"], "no server"),
    (["score", "gqa", "--answers", "gone.jsonl", "--upload", "u"], "gone.jsonl: no such file"),
    (["score", "gqa", "--upload", "u"], "--answers FILE is needed"), (["score", "mme", "--labels", "."], "no .*txt"),
    (["scienceqa_data", "--labels", "gone.json"], "gone.json"),
    (["answer", "--model", "m", "--questions", "q", "--answers", "a", "--batch_size", "0"], "--batch_size 0: a number is"),
    (["grade_mm_vet", "--labels", "l", "--answers", "a", "--grades", "g", "--workers", "0"], "--workers 0: a number is"),
    (["score", "vqav2", "--answers", "a", "--json", "j"], "--labels")])
def test_a_wrong_command_is_a_plain_error(argv, error, tmp_path, monkeypatch):
    """What a user typed and cannot work is a ValueError or FileNotFoundError that says what would."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        ev.main(argv)


def test_the_interval_is_wilsons():
    """A 95% interval on every accuracy: 8 of 10 is anything from 49.0 to 94.3, 0 of 10 still up to 27.8 (textbook values)."""
    assert [round(x, 1) for x in ev.wilson(8, 10)] == [49.0, 94.3]
    assert [round(x, 1) for x in ev.wilson(0, 10)] == [0.0, 27.8]
    assert [round(x, 1) for x in ev.wilson(10, 10)] == [72.2, 100.0]


# ---------------------------------------------------------------------------------------------------------------------
# What does not belong together is never scored


@pytest.fixture
def gqa(tmp_path):
    """30 balanced questions, and 10 that are not; the path of the official file."""
    labels = {str(i): {"question": f"What is {i}?", "answer": f"thing {i % 7}", "isBalanced": i < 30, "imageId": "n1",
                       "types": {"structural": "query" if i % 3 else "verify"}} for i in range(40)}
    return write(tmp_path / "testdev_all_questions.json", labels)


@pytest.mark.parametrize("change, error", [
    (lambda rows: rows[:-2], "of 30 questions and 28 answers 2 have no answer, e.g. 28, 29"),
    (lambda rows: rows + [rows[3]], "1 are answered too often, e.g. 3"),
    (lambda rows: rows[1:] + [said("x7", "a")], "1 have no answer, e.g. 0; 1 are answered but not asked, e.g. x7"),
    (lambda rows: [], "empty"), (lambda rows: [{"question_id": 1}], r"\[0\]: question_id and text"),
    (lambda rows: [*rows[:29], said("29", None)], r"\[29\]"), (lambda rows: ["text"], r"\[0\]")])
def test_answers_that_do_not_fit_give_an_error_and_no_number(change, error, gqa, score, tmp_path):
    """Ids that do not match, missing, doubled and foreign answers: file, counts, examples; nothing is written."""
    rows = [said(str(i), "thing 1") for i in range(30)]
    with pytest.raises(ValueError, match=f"answers.jsonl.*{error}"):
        score("gqa", change(rows), gqa)
    assert not (tmp_path / "out.json").exists(), "a number was written"


def test_a_torn_answers_file_is_an_error(gqa, tmp_path):
    """A run that was killed leaves half a line: to be finished, not to be scored."""
    (tmp_path / "a.jsonl").write_text(json.dumps(said("1", "x")) + "\n" + '{"question_id": "2", "te')
    with pytest.raises(ValueError, match="a.jsonl: bad JSON at line 2"):
        ev.main(["score", "gqa", "--answers", str(tmp_path / "a.jsonl"), "--labels", str(gqa)])


def test_labels_in_another_form_are_an_error(score, tmp_path):
    """The wrong file among --labels is named, not a KeyError."""
    with pytest.raises(ValueError, match="gqa: .*wrong.json.*official form"):
        score("gqa", [said("1", "a")], write(tmp_path / "wrong.json", {"1": {"reply": "a"}}))
    with pytest.raises(ValueError, match="seed_bench: .*official form"):
        score("seed_bench", [said("1", "a")], write(tmp_path / "wrong.json", {"rows": []}))


# ---------------------------------------------------------------------------------------------------------------------
# POPE


def pope_files(folder, seed=0, images=6, ids_once=True):
    """Questions in LLaVA's form and the three official label files: 6 objects for each of some pictures."""
    rng, questions, number = random.Random(seed), [], itertools.count(1)
    for split in ("adversarial", "popular", "random"):
        rows = []
        for image in range(images):
            for k in range(6 if split != "random" or image else 5):
                thing = f"{'thing' if k % 2 == 0 else split} {k}"
                row = {"question_id": len(rows) + 1, "image": f"{image}.jpg", "text": f"Is there a {thing} in the image?"}
                rows.append(row | {"label": "no" if k % 2 else "yes"})
                questions.append({"question_id": next(number) if ids_once else row["question_id"], "image": row["image"],
                                  "text": row["text"] + WORD, "category": split})
        write(folder / f"coco_pope_{split}.json", rows)
    write(folder / "questions.jsonl", questions)
    return questions, [said(q["question_id"], rng.choice(["Yes", "No"]), q["text"]) for q in questions]


def plain_pope(folder, split, texts):
    """POPE's measures, counted one by one."""
    rows = [json.loads(line) for line in (folder / f"coco_pope_{split}.json").read_text().splitlines()]
    cells = {"tp": 0, "fp": 0, "tn": 0, "fn": 0}
    for text, row in zip(texts, rows):
        cells[("t" if (text == "Yes") == (row["label"] == "yes") else "f") + ("p" if text == "Yes" else "n")] += 1
    tp, fp, tn, fn = cells.values()
    p, r = tp / (tp + fp), tp / (tp + fn)
    return {"f1": 200 * p * r / (p + r), "accuracy": 100 * (tp + tn) / len(rows), "precision": 100 * p, "recall": 100 * r,
            "yes": 100 * (tp + fp) / len(rows)}


@pytest.mark.parametrize("ids_once", [True, False])
def test_pope_is_joined_by_question_not_by_position(ids_once, score, tmp_path):
    """F1 of yes in each split and their mean, whatever the order of the answers; --official pairs by position. Positive
    questions are the same in all three splits, so ids that start anew in each do not tell them apart: the order does."""
    questions, answers = pope_files(tmp_path, ids_once=ids_once)
    if not ids_once:                                       # greedy answers to the same question are the same
        first = {}
        answers = [a | {"text": first.setdefault((q["image"], q["text"]), a["text"])} for q, a in zip(questions, answers)]
    flags = {"labels": tmp_path, "questions": tmp_path / "questions.jsonl"}
    want = {}
    for split in ("random", "popular", "adversarial"):
        texts = [a["text"] for q, a in zip(questions, answers) if q["category"] == split]
        want |= {f"{split}.{key}": value for key, value in plain_pope(tmp_path, split, texts).items()}
    want["f1"] = sum(want[f"{split}.f1"] for split in ("random", "popular", "adversarial")) / 3
    assert score("pope", answers, **flags) == pytest.approx(want)
    if ids_once:
        assert score("pope", answers, **flags, official=True) == pytest.approx(want)
        shuffled = random.Random(1).sample(answers, len(answers))
        assert score("pope", shuffled, **flags) == pytest.approx(want), "the order of the answers changes the score"
        assert score("pope", shuffled, **flags, official=True) != pytest.approx(want), "--official does not pair by position"
    by_label = sorted(range(len(answers)), key=lambda i: ("adversarial", "popular", "random").index(questions[i]["category"]))
    rows = [answers[i] | {"question_id": n} for i, n in zip(by_label, [*range(1, 37), *range(1, 37), *range(1, 36)])]
    if not ids_once:
        assert score("pope", rows, tmp_path) == pytest.approx(want), "the label files as questions"


@pytest.mark.parametrize("text, yes", [
    ("Yes", 1), ("No", 0), ("no", 0), ("NO", 1), ("nope", 1), ("There isn't", 1), ("", 1), ("no\nbecause", 1), ("No, it is", 0),
    ("It is not there", 0), ("Yes. No", 1), ("No.Yes", 0), (" no", 0), ("no\tno", 1), ("n,o", 0), ("Né, no", 0)])
def test_popes_no_is_a_word_of_the_first_sentence(text, yes, score, tmp_path):
    """OFFICIAL: the part before the first full stop, without commas, split at single blanks: No, not or no; else it is yes."""
    _, answers = pope_files(tmp_path, images=1)
    got = score("pope", [a | {"text": text} for a in answers], tmp_path, questions=tmp_path / "questions.jsonl")
    assert got["popular.yes"] == 100 * yes


def test_pope_without_a_yes_has_no_f1(score, tmp_path, capsys):
    """F1 and precision are undefined if no answer is yes: null in the JSON, said in the table; no division by zero."""
    _, answers = pope_files(tmp_path)
    got = score("pope", [a | {"text": "No"} for a in answers], tmp_path, questions=tmp_path / "questions.jsonl")
    assert got["random.f1"] is got["random.precision"] is got["f1"] is None and got["random.recall"] == got["random.yes"] == 0
    assert got["random.accuracy"] == pytest.approx(100 * 17 / 35)
    shown = capsys.readouterr().out
    assert re.search(r"random\.f1 +undefined", shown) and "no answer is rightly yes" in shown


def test_pope_with_other_labels_is_an_error_unless_official(score, tmp_path, capsys):
    """The current label file of `random` is a reshuffled one of 3000; paired by position it gives nonsense in silence."""
    _, answers = pope_files(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "coco_pope_random.json").read_text().splitlines()]
    write(tmp_path / "coco_pope_random.json", rows[::-1] + [rows[0] | {"text": "Is there a fish in the image?"}])
    flags = {"labels": tmp_path, "questions": tmp_path / "questions.jsonl"}
    with pytest.raises(ValueError, match="labels of random: of 36 questions and 35 answers 1 have no answer.*fish.*e3e39262"):
        score("pope", answers, **flags)
    assert score("pope", answers, **flags, official=True)["random.f1"] > 0
    assert "35 answers and 36 labels, paired by position" in capsys.readouterr().out
    (tmp_path / "coco_pope_random.json").unlink()
    with pytest.raises(ValueError, match="split random, but no labels"):
        score("pope", answers, **flags)


def test_one_split_of_pope_has_no_mean(score, tmp_path):
    """`f1` is the mean of three splits, so one alone has none."""
    _, answers = pope_files(tmp_path)
    got = score("pope", [a | {"question_id": i + 1} for i, a in enumerate(answers[:36])],
                tmp_path / "coco_pope_adversarial.json")
    assert got["adversarial.f1"] and got["f1"] is None


# ---------------------------------------------------------------------------------------------------------------------
# MME


def mme_files(folder, tasks, pictures=3):
    """The tool's TASK.txt (one with two blanks, as some official lines have) and answers in LLaVA's form, all right."""
    answers = []
    for task in tasks:
        lines = []
        for i in range(pictures):
            for ask, label in (("cold drinks", "Yes"), ("cold rinks", "No")):
                question, blanks = f'Is the word in "{task}" {ask}?', "  " if i == 1 else " "
                lines.append(f"{i:04}.{'txt' if i % 2 else 'png'}\t{question}{blanks}Please answer yes or no.\t{label}\n")
                answers.append(said(f"{task}/{'images/' * (i % 2)}{i:04}.jpg", label, question + WORD))
        (folder / f"{task}.txt").write_text("".join(lines))
    return answers


def test_mmes_score_is_accuracy_plus_accuracy_by_picture(score, tmp_path):
    """TASK = 100 (acc + acc+); perception is the sum of ten tasks, cognition of four. Two questions share an id."""
    answers = mme_files(tmp_path, ev.PERCEPTION + ev.COGNITION)
    assert score("mme", answers, tmp_path)["perception"] == 2000
    rng, slow = random.Random(0), {}
    for a in answers:
        a["text"] = rng.choice(["yes", "No", "Yes, it is", "unclear", "", "YES"])
    for task in ev.PERCEPTION + ev.COGNITION:
        mine = [a["text"].lower() for a in answers if a["question_id"].startswith(task + "/")]
        ok = [text[:4].startswith(("yes", "no")[i % 2]) for i, text in enumerate(mine)]
        slow[f"{task}.acc"] = 100 * sum(ok) / 6
        slow[f"{task}.acc_plus"] = 100 * sum(ok[i] and ok[i + 1] for i in (0, 2, 4)) / 3
        slow[task] = slow[f"{task}.acc"] + slow[f"{task}.acc_plus"]
    slow["perception"], slow["cognition"] = (sum(slow[task] for task in group) for group in (ev.PERCEPTION, ev.COGNITION))
    assert score("mme", rng.sample(answers, len(answers)), tmp_path) == pytest.approx(slow)


@pytest.mark.parametrize("text, read", [
    ("Yes", "yes"), ("no", "no"), ("Not sure", "no"), ("I know", "other"), ("know it", "no"), ("", "other"), ("Yes no", "yes"),
    ("no yes", "no"), ("  yes", "other"), (" yes", "yes"), ("\u00e9 no", "no"), ("ANSWER: yes", "other")])
def test_mme_reads_four_characters(text, read, score, tmp_path, capsys):
    """OFFICIAL: exactly yes or no, else "yes", else "no" within the first four characters, else other, which is wrong."""
    answers = [a | {"text": text} for a in mme_files(tmp_path, ["OCR"], 1)]
    got = score("mme", answers, tmp_path)
    assert got["OCR.acc"] == (0 if read == "other" else 50) and got["OCR.acc_plus"] == 0
    assert got["perception"] is None and got["cognition"] is None, "a sum over tasks that are not there"
    assert f"{2 * (read == 'other')} answers are neither" in capsys.readouterr().out
    right_if = [a | {"text": text if i == (read == "no") else "x"} for i, a in enumerate(answers)]
    assert score("mme", right_if, tmp_path)["OCR.acc"] == (0 if read == "other" else 50)


def test_mme_labels_that_are_no_pairs_are_an_error(score, tmp_path):
    """Two lines for each picture, a task that exists, Yes or No: else it is not the tool's folder."""
    answers = mme_files(tmp_path, ["OCR"], 2)
    lines = (tmp_path / "OCR.txt").read_text().splitlines(keepends=True)
    for bad, error in (([lines[0], lines[2], lines[1], lines[3]], "one after the other"), (lines[:3], "not asked"),
                       ([*lines[:3], "0001.txt\tWhat?\tMaybe\n"], "Yes or No"), (["a line\n"], "Yes or No")):
        (tmp_path / "OCR.txt").write_text("".join(bad))
        with pytest.raises(ValueError, match=error):
            score("mme", answers, tmp_path)
    (tmp_path / "OCR.txt").rename(tmp_path / "ocr.txt")
    with pytest.raises(ValueError, match="the tasks are existence"):
        score("mme", answers, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("B.", "B"), ("(B)", "B"), ("(B).", "B"), ("B)", "B"), ("The answer is B", "B"), ("answer :B", "B"), ("", None),
    ("Answer: C, because", "C"), ("b", None), ("A or B", None), ("A", "A"), ("A dog", "A"), ("A thing on a mat", None),
    ("A cat on the mat", "C"), ("it is a small cat", "C"), ("cat and dog", None), ("E", "E"), ("F", None),
    ("A. dog, not B. bird", None), ("(A) or B.", "B"), ("B B", "B"), ("D:", "D"), ("the Cat.", "C"), ("B\u3002", None)])
def test_mmbench_reads_a_letter_or_a_quoted_option(text, letter):
    """One bare letter among the words (an A in a sentence may be an article), one with signs, one option quoted; else None."""
    assert ev.option_of(text, {"A": "bird", "B": "dog", "C": "cat", "D": "fish"}) == letter


def mmbench_tsv(path, questions=5, answers=True):
    """An MMBench TSV with its rotations: two to four options, a hint with a line break and quotation marks, a picture."""
    rows = []
    for i in range(questions):
        options = [f"option {i}{k}" for k in range(2 + i % 3)]
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            rows.append({
                "index": 241 + i + turn * 10 ** 6, "question": f"Which {i}?", "hint": 'A "hint".\n\nMore.' if i % 2 else "",
                **dict(itertools.zip_longest("ABCD", turned, fillvalue="")), "answer": "ABCD"[turned.index(options[0])],
                "category": f"category_{i % 2}", "image": "iVBORw0K" * 9, "source": "s", "l2-category": f"group {i % 2}",
                "comment": "", "split": "dev"})
    rows = [row if answers else {k: v for k, v in row.items() if k != "answer"} for row in rows]
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def test_mmbench_counts_a_question_only_if_all_its_rotations_are_right(score, tmp_path):
    """CircularEval: 2 + 3 + 4 + 2 + 3 rows of 5 questions; one wrong rotation spoils its question, not the plain accuracy."""
    rows = mmbench_tsv(tmp_path / "mmbench_dev.tsv")
    answers = [said(row["index"], row["answer"]) for row in rows]
    assert len(rows) == 14 and score("mmbench", answers, tmp_path)["circular"] == 100
    answers[1]["text"] = "C"                               # the rotation of question 0
    answers[5]["text"] = answers[9]["text"] = "none of them"           # question 2 plain; question 3 plain
    got = score("mmbench", answers[::-1], tmp_path / "mmbench_dev.tsv")
    assert got == pytest.approx({"circular": 40, "plain": 60, "rows": 100 * 11 / 14, "unparsed": 200 / 14,
                                 "category_0": 100 / 3, "category_1": 50, "group 0": 100 / 3, "group 1": 50})
    answers[1]["text"] = "option 01"                       # quotes an option: B in this row, and wrong; option 00 is right
    assert score("mmbench", answers, tmp_path)["circular"] == 40
    answers[1]["text"] = "I see option 00 there."
    assert score("mmbench", answers, tmp_path)["circular"] == 60


def test_mmbench_draws_only_if_official(score, tmp_path):
    """OFFICIAL: an unreadable answer ends in a draw from A to E. Here never, and there with a seed."""
    rows = mmbench_tsv(tmp_path / "m.tsv", 30)
    answers = [said(row["index"], "well") for row in rows]
    first, again, other = (score("mmbench", answers, tmp_path, official=True, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and 5 < first["rows"] < 40
    assert score("mmbench", answers, tmp_path)["rows"] == 0


def test_mmbench_writes_its_result_sheet(tmp_path, capsys):
    """The sheet has the official columns, with `prediction` behind the options and without picture, hint and category; a
    test split, without answers, gets a sheet and no score."""
    rows = mmbench_tsv(tmp_path / "m.tsv")
    write(tmp_path / "a.jsonl", [said(row["index"], row["answer"]) for row in rows])
    argv = ["score", "mmbench", "--answers", str(tmp_path / "a.jsonl"), "--labels", str(tmp_path / "m.tsv"), "--upload"]
    ev.main([*argv, str(tmp_path / "sheet.tsv")])
    sheet = list(csv.reader(open(tmp_path / "sheet.tsv", newline=""), delimiter="\t"))
    assert sheet[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert sheet[1] == ["241", "Which 0?", "option 00", "option 01", "", "", "A", "A", "dev"] and len(sheet) == 15
    capsys.readouterr()
    ev.main(["score", "mmbench", "--answers", str(tmp_path / "sheet.tsv"), *argv[4:6]])
    assert re.search(r"circular +100\.00", capsys.readouterr().out), "a result sheet is not read as answers"
    mmbench_tsv(tmp_path / "m.tsv", answers=False)
    ev.main([*argv, str(tmp_path / "sheet.tsv")])
    shown = capsys.readouterr().out
    assert "test split" in shown and "circular" not in shown


def test_a_result_sheet_of_excel_is_written_and_read(tmp_path, capsys):
    """MMBench's server takes .xlsx; what a model says stays text there, be it empty or like a formula."""
    rows = mmbench_tsv(tmp_path / "m.tsv")
    texts = [row["answer"] for row in rows[:-2]] + ["", "=B2&C2"]
    write(tmp_path / "a.jsonl", [said(row["index"], text) for row, text in zip(rows, texts)])
    argv = ["score", "mmbench", "--labels", str(tmp_path / "m.tsv"), "--answers"]
    ev.main([*argv, str(tmp_path / "a.jsonl"), "--upload", str(tmp_path / "sheet.xlsx"), "--json", str(tmp_path / "a.json")])
    sheet = ev.read(str(tmp_path / "sheet.xlsx"))
    assert list(sheet[0].values()) == ["241", "Which 0?", "option 00", "option 01", "", "", "A", "A", "dev"]
    assert [row["prediction"] for row in sheet] == texts
    ev.main([*argv, str(tmp_path / "sheet.xlsx"), "--json", str(tmp_path / "b.json")])
    assert Path(tmp_path / "a.json").read_text() == Path(tmp_path / "b.json").read_text()


def test_without_openpyxl_a_sheet_of_excel_is_a_plain_error(tmp_path, monkeypatch):
    rows = mmbench_tsv(tmp_path / "m.tsv")
    write(tmp_path / "a.jsonl", [said(row["index"], row["answer"]) for row in rows])
    monkeypatch.setitem(sys.modules, "openpyxl", None)         # as if it were not installed
    with pytest.raises(ValueError, match="pip install openpyxl"):
        ev.main(["score", "mmbench", "--answers", str(tmp_path / "a.jsonl"), "--labels", str(tmp_path / "m.tsv"),
                 "--upload", str(tmp_path / "sheet.xlsx")])


def test_mmbenchs_sheet_becomes_questions_and_pictures(tmp_path, capsys):
    """The prompt: hint if any, question, options to the first gap, the letter instruction (in Chinese for CN); all rotations of
    a question show one file, so that a batch encodes it once; a picture may be given as another row's index."""
    rows = mmbench_tsv(tmp_path / "m.tsv")
    rows[0]["image"], rows[4]["image"], rows[4]["question"], rows[3]["C"] = "QUJD", "241", "\u54ea\u4e2a?", "nan"
    with open(tmp_path / "m.tsv", "w", newline="") as f:
        csv.writer(f, delimiter="\t").writerows([list(rows[0]), *(row.values() for row in rows)])
    ev.main(["mmbench_data", "--labels", str(tmp_path / "m.tsv"), "--questions", str(tmp_path / "q.jsonl"), "--images",
             str(tmp_path / "pictures")])
    asked = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [q["question_id"] for q in asked] == [row["index"] for row in rows]
    assert asked[0]["text"] == f"Which 0?\nA. option 00\nB. option 01\n{ev.BY_LETTER}"
    assert asked[3]["text"] == f'A "hint".\n\nMore.\nWhich 1?\nA. option 11\nB. option 12\n{ev.BY_LETTER}'
    assert asked[4]["text"].endswith("\nC. option 11\n\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002")
    assert asked[0]["image"] == "241.jpg" and asked[2]["image"] == asked[4]["image"] == "242.jpg"
    assert (tmp_path / "pictures" / "242.jpg").read_bytes() == b"ABC" and len(list((tmp_path / "pictures").iterdir())) == 5


def test_seed_bench_wants_the_letter_itself(score, tmp_path, capsys):
    """OFFICIAL: the text must equal the letter. Image, video and all; answers to pictures alone have no `all`."""
    questions = [{"question_id": f"{'v' * (i > 7)}{i}", "data_type": "video" if i > 7 else "image", "answer": "ABCD"[i % 4],
                  "question_type_id": 1 + (i > 3) + 9 * (i > 7), "question": "?"} for i in range(12)]
    labels = write(tmp_path / "SEED-Bench.json", {"questions": questions, "question_type": {
        "Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 11}})
    answers = [{"question_id": q["question_id"], "prediction": q["answer"]} for q in questions]
    for i, text in ((0, "A."), (1, "b"), (9, "B. it is"), (2, "(C)"), (3, "")):
        answers[i]["prediction"] = text
    got = score("seed_bench", answers, labels, upload=tmp_path / "up.jsonl")
    assert got == pytest.approx({"image": 50, "video": 75, "all": 700 / 12, "Scene Understanding": 0, "Instance Identity": 100,
                                 "Action Recognition": 75, "unparsed": 500 / 12})
    assert [json.loads(line) for line in (tmp_path / "up.jsonl").read_text().splitlines()] == answers
    got = score("seed_bench", answers[:8], labels)
    assert got["image"] == 50 and got["video"] is got["all"] is None and "no answers to video" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 have no answer, e.g. 7"):
        score("seed_bench", answers[:7], labels)
    got = score("seed_bench", answers[:7], labels, official=True)
    assert (got["image"], got["video"], got["all"]) == pytest.approx((37.5, 0, 25)), "missing is wrong, officially"


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("(B)", "B"), ("B.", "B"), ("The answer is (C), not (B)", "B"), ("It is C. No, B it is", "B"), ("'B'", "B"),
    ("dog", None), ("I think that it shows a dog there", "B"), ("a dog, but no cat, and one more dog", "B"), ("", None),
    ("The DNA is there", "A"), ("no idea at all what this is", None), ("A. cat D. fish", "D"), (".,!A,.", None), ("'A.'", "A")])
def test_mmmu_takes_the_last_choice_that_is_named(text, letter):
    """The official parser: "(A)", else "A ", else "A.", else an option in more than five words; several: the last."""
    assert ev.choice_of(text, ["cat", "dog", "bird", "fish"]) == letter


@pytest.mark.parametrize("text, truth, right", [
    ("3.14", "3.14", 1), ("3.141", "3.14", 1), ("The answer is 1,234.", "1234", 1), ("so x = 7", "7", 1), ("-5", "-5", 1),
    ("It is Paris.", "paris", 1), ("It is in Paris, France", "Paris", 1), ("Paris is nice", "Paris", 0), ("Paris", "Paris", 1),
    ("42", "paris", 0), ("the value is 1e3", "1000", 1), ("", "paris", 0), ("is :", "paris", 0), ("5", "-5", 0),
    ("it is 7 or 8", "8", 1), ("the result is x", "x", 1), ("the result is xy", "x", 0), ("the result is 2 x", "x", 1),
    ("First is 3\nthen is 4", "3", 1), ("x = 3\ny = 4", "3", 0)])
def test_mmmus_open_answers_are_searched_behind_key_words(text, truth, right):
    """Numbers rounded to two decimals must equal, words must be contained in what follows the last key word of a line."""
    assert ev.open_right(text, [truth]) == bool(right)


def test_mmmu_counts_what_it_cannot_read(score, tmp_path):
    """Accuracy over all questions; unparsed choices are wrong, drawn only if --official."""
    rows = [{"id": f"validation_Art_Theory_{i}", "question_type": "multiple-choice", "options": "['cat', 'dog']",
             "answer": "B"} for i in range(3)]
    rows += [{"id": "validation_Math_1", "question_type": "open", "options": "[]", "answer": "['7', '7.0 m']"}]
    labels = write(tmp_path / "mmmu.json", rows)
    answers = [said(row["id"], text) for row, text in zip(rows, ["B", "(A)", "dunno", "it is 7.001"])]
    got = score("mmmu", answers, labels)
    assert got == pytest.approx({"accuracy": 50, "unparsed": 25, "Art_Theory": 100 / 3, "Math": 100})
    drawn = {score("mmmu", answers, labels, official=True, seed=seed)["accuracy"] for seed in range(8)}
    assert drawn == {50, 75}


def test_mathvista_scores_what_needs_no_language_model(score, tmp_path):
    """A choice, its letter, an integer, a number with its precision; everything else is unparsed, and wrong."""
    choice = {"question_type": "multi_choice", "answer_type": "text", "choices": ["3/11", "8/11"], "precision": None}
    free = {"question_type": "free_form", "choices": None, "precision": 1.0}
    choice |= {"answer": "8/11"}
    whole, real, some = (free | {"answer_type": kind, "answer": truth}
                         for kind, truth in (("integer", "14"), ("float", "1.5"), ("list", "[1]")))
    cases = [(choice, "8/11", 1, 0), (choice, "B", 1, 0), (choice, "(B)", 1, 0), (choice, "A.", 0, 0), (choice, "C", 0, 1),
             (choice, "The answer is 8/11", 0, 1), (whole, "14", 1, 0), (whole, "15", 0, 0), (whole, "14.0", 0, 1),
             (real, "1.46", 1, 0), (real, "", 0, 1), (some, "[1]", 0, 1)]
    for i, (problem, text, right, unparsed) in enumerate(cases):
        got = score("mathvista", [said(str(i), text)], write(tmp_path / "testmini.json", {str(i): problem}))
        assert got == {"accuracy": 100 * right, "unparsed": 100 * unparsed}, (problem, text)


# ---------------------------------------------------------------------------------------------------------------------
# ScienceQA


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("E", "E"), ("F", None), ("b", None), ("B. a dog", "B"), ("B.", None), ("B.a", None), ("", None), ("AB", None),
    ("LECTURE: x\n The answer is C.", "C"), ("The answer is C", None), ("The answer is C!", "C"), ("The answer is C\n", None),
    ("The answer is A. The answer is A.", None), ("The answer is A. No: the answer is B.", "A"), ("The answer is Z.", "Z"),
    ("A. so The answer is B.", "A"), (" B", None), ("\u00c4. x", None)])
def test_scienceqas_letter_is_found_in_three_ways(text, letter):
    """All of the text; its beginning "B. "; "The answer is B." exactly once, with any character in the full stop's place."""
    assert ev.letter_of(text) == letter


@pytest.fixture
def science(tmp_path):
    """60 problems of all kinds, their folder, and the ids of the test split."""
    rng, problems = random.Random(0), {}
    for i in range(60):
        choices = [f"choice {k}" for k in range(2 + i % 4)]
        problems[str(i)] = {"question": f"Which  is {i}?", "choices": choices, "answer": rng.randrange(len(choices)),
                            "hint": ["", f"A hint {i}. "][i % 2], "image": [None, "image.png", "image.png"][i % 3],
                            "grade": f"grade{1 + i % 12}", "lecture": ["", "Learn\nthis."][i % 2], "solution": "Since so.",
                            "subject": ["natural science", "social science", "language science"][i % 5 % 3]}
    write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid_splits.json", {"train": [str(i) for i in range(20)], "test": [str(i) for i in range(20, 60)]})
    return problems, tmp_path


def test_scienceqas_columns_are_subject_context_and_grade(science, score):
    """Table 7's nine columns, counted one by one; a problem with hint and picture is in TXT and in IMG, one without in NO."""
    problems, folder = science
    rng, answers, slow = random.Random(1), [], {}
    for i in range(20, 60):
        p, letter = problems[str(i)], rng.choice("ABCDE")
        answers.append(said(str(i), rng.choice([letter, f"{letter}. yes", f"So. The answer is {letter}.", "unsure"])))
        ok = letter == "ABCDE"[p["answer"]] and answers[-1]["text"] != "unsure"
        grade = int(p["grade"].replace("grade", ""))
        for key, member in {"NAT": p["subject"][0] == "n", "SOC": p["subject"][0] == "s", "LAN": p["subject"][0] == "l",
                            "TXT": p["hint"] != "", "IMG": p["image"] is not None, "NO": not p["hint"] and not p["image"],
                            "G1-6": grade <= 6, "G7-12": grade > 6, "AVG": True}.items():
            if member:
                slow.setdefault(key, []).append(ok)
    want = {key: 100 * sum(hits) / len(hits) for key, hits in slow.items()}
    want["unparsed"] = 100 * sum(a["text"] == "unsure" for a in answers) / 40
    assert 0 < want["unparsed"] < 60 and len(want) == 10
    assert score("scienceqa", answers, folder) == pytest.approx(want)
    labels = [folder / "pid_splits.json", folder / "problems.json"]
    assert score("scienceqa", answers[::-1], labels) == pytest.approx(want)


def test_scienceqas_table_has_the_papers_rows(science, score, capsys):
    """Ours first, then Table 7 as printed in the paper."""
    score("scienceqa", [said(str(i), "A") for i in range(20, 60)], science[1])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "scienceqa NAT SOC LAN TXT IMG NO G1-6 G7-12 AVG unparsed".split()
    assert lines[1].startswith("ours")
    assert [line.split()[0] for line in lines[2:4]] == ["low", "high"]
    assert "LLaVA                90.36  95.95  88.00  89.49  88.00  90.66  90.93  90.90  90.92" in "\n".join(lines)
    assert max(map(len, lines)) <= 128


def test_the_papers_result_file_has_its_own_arithmetic(science, score, tmp_path):
    """OFFICIAL: unreadable answers were drawn twice, for the accuracy and for the stored `results`; Table 7 is made of these.
    By default what has no choice of the problem is wrong (90.90), --official takes what is stored (90.92)."""
    problems, folder = science
    pids = [str(i) for i in range(20, 60)]
    outputs = {pid: f"Assistant: SOLUTION: x\n The answer is {'ABCDE'[problems[pid]['answer']]}." for pid in pids}
    results = {pid: problems[pid]["answer"] for pid in pids}
    assert len(problems["20"]["choices"]) == 2
    outputs["20"], outputs["21"] = "The answer is D.", "No idea"          # no such choice; drawn right in the stored results
    results["22"] = (results["22"] + 1) % 2                               # and one that the file has wrong
    path = write(tmp_path / "v0.json", {"acc": 0, "outputs": outputs, "results": results})
    got = score("scienceqa", path, folder)
    assert got["AVG"] == pytest.approx(95) and got["unparsed"] == pytest.approx(2.5)
    assert score("scienceqa", path, folder, official=True)["AVG"] == pytest.approx(97.5)
    del outputs["23"]
    with pytest.raises(ValueError, match="1 have no answer, e.g. 23"):
        score("scienceqa", write(path, {"outputs": outputs}), folder)
    assert score("scienceqa", path, folder, official=True, seed=3)["AVG"] < 100


def test_scienceqa_draws_only_if_official(science, score):
    """OFFICIAL: a random choice for what is unparsed; 40 answers of nothing are 0% here, and about a third there."""
    answers = [said(str(i), "?") for i in range(20, 60)]
    first, again, other = (score("scienceqa", answers, science[1], official=True, seed=s) for s in (0, 0, 1))
    assert first == again != other and 10 < first["AVG"] < 70 and first["unparsed"] == 100
    assert score("scienceqa", answers, science[1])["AVG"] == 0


def test_ensembling_takes_the_other_model_or_its_verdict(science, score, tmp_path):
    """Sec. 5.2: complement = the second model, ours where it failed; judge = its verdict where the two differ, else ours."""
    problems, folder = science
    right = {str(i): "ABCDE"[problems[str(i)]["answer"]] for i in range(20, 60)}
    wrong = {pid: "B" if letter == "A" else "A" for pid, letter in right.items()}
    text = lambda letter: f"Because. The answer is {letter}." if letter else "I cannot tell."
    ours, second = dict(right), dict(right)
    ours |= {str(i): wrong[str(i)] for i in range(20, 30)}                 # 10 wrong
    second |= {str(i): wrong[str(i)] for i in range(28, 36)}               # 8 wrong, two of them as ours
    second |= {"20": None, "40": None}                                     # failed: once where we are wrong, once where right
    verdicts = {str(i): right[str(i)] for i in range(20, 25)} | {"25": None, "26": wrong["26"], "30": wrong["30"]}
    write(tmp_path / "second.jsonl", [said(pid, text(letter)) for pid, letter in second.items()])
    write(tmp_path / "requery.json", {"outputs": {pid: text(letter) for pid, letter in verdicts.items()}})
    flags = {"labels": folder, "second": tmp_path / "second.jsonl"}
    got = score("scienceqa", [said(pid, letter) for pid, letter in ours.items()], **flags, requery=tmp_path / "requery.json")
    assert got["AVG"] == 75
    assert got["complement"] == pytest.approx(100 * (40 - 8 - 1) / 40)     # 20 falls back on our wrong one, 40 on our right one
    assert got["upper_bound"] == pytest.approx(100 * (40 - 3) / 40)        # 20, 28, 29: neither
    assert got["judge"] == pytest.approx(100 * (30 + 5 - 1) / 40)          # 21-24 and 20 put right, 30 put wrong
    assert "judge" not in score("scienceqa", [said(pid, letter) for pid, letter in ours.items()], **flags)
    with pytest.raises(ValueError, match="--second is missing"):
        score("scienceqa", tmp_path / "second.jsonl", folder, requery=tmp_path / "requery.json")


PROBLEM = {"question": "Which  one?\nSay.", "choices": ["red", "dark  blue"], "answer": 1, "hint": " Look\nhere. ",
           "image": "image.png", "lecture": "Colours\nare many.", "solution": "It is Answer: dark."}


@pytest.mark.parametrize("form, question, answer", [
    ("QCM-A", "Which one?\nSay.\nContext: Look\nhere.\nOptions: (A) red (B) dark blue", "The answer is B."),
    ("CQM-A", "Context: Look\nhere.\nQuestion: Which one?\nSay.\nOptions: (A) red (B) dark blue", "The answer is B."),
    ("QCM-LEA", None, "Colours\nare many. It is dark. The answer is B."),
    ("QCM-LA", None, "Colours\nare many. The answer is B."),
    ("QCM-ELA", None, "It is dark. Colours\nare many. The answer is B."), ("QCM-EA", None, "It is dark. The answer is B."),
    ("QCM-AL", None, "The answer is B. BECAUSE: It is dark."), ("QCM-AE", None, "The answer is B. BECAUSE: Colours\nare many."),
    ("QCM-ALE", None, "The answer is B. BECAUSE: Colours\nare many. It is dark."),
    ("QCM-AEL", None, "The answer is B. BECAUSE: It is dark. Colours\nare many."),
    ("QCM-LEPA", None, "LECTURE: Colours\nare many.\nSOLUTION: It is Answer: dark.\n###\nANSWER: B."),
    ("letter", "Context: Look\nhere.\nWhich one?\nSay.\nA. red\nB. dark blue\n" + ev.BY_LETTER, "B")])
def test_scienceqas_formats_are_the_released_ones(form, question, answer):
    """INPUT-OUTPUT as the released converter writes it, quirks included: AL gives the solution and AE the lecture, double
    blanks are halved, every "Answer: " goes; LLaVA-1.5's letter format is another one."""
    got = ev.science_turn(PROBLEM, form)
    assert got[1] == answer and got[0] == (question or ev.science_turn(PROBLEM, "QCM-A")[0])


def test_scienceqas_formats_without_context_or_reasoning():
    """No hint is N/A (and no line at all in the letter format); no lecture leaves a blank less; nothing at all leaves the one
    blank that the converter leaves; BECAUSE of nothing goes; three blanks become two, as replacing once does."""
    bare = PROBLEM | {"hint": "", "lecture": "", "solution": "So\\nit is.", "question": "Question: Is   it?"}
    assert ev.science_turn(bare, "QCM-LEA") == ("Is  it?\nContext: N/A\nOptions: (A) red (B) dark blue",
                                                "So\nit is. The answer is B.")
    assert ev.science_turn(bare, "letter")[0].startswith("Question: Is  it?\nA. red")
    assert ev.science_turn(bare, "QCM-LEPA")[1] == "SOLUTION: So\nit is.\n###\nANSWER: B."
    none = bare | {"solution": ""}
    assert ev.science_turn(none, "QCM-LEA")[1] == " The answer is B."
    assert ev.science_turn(none, "QCM-AL")[1] == "The answer is B."
    assert ev.science_turn(none, "QCM-LEPA")[1] == "###\nANSWER: B."
    for form in ("QCM-XA", "QMC-A", "QCM", "letters"):
        with pytest.raises(ValueError, match="QCM or CQM.*LEPA; or letter"):
            ev.science_turn(PROBLEM, form)


def test_scienceqa_becomes_training_records_and_questions(science, tmp_path, capsys):
    """Training: the picture behind the text (in front in the letter format), as PID/image.png; questions: the text alone, for
    sample.py puts the picture in front; --no-images leaves the pictures out; every record is one that training takes."""
    problems, folder = science
    (tmp_path / "images").mkdir()
    out, questions = tmp_path / "train.json", tmp_path / "q.jsonl"
    for form, place in (("QCM-LEA", -1), ("letter", 0)):
        ev.main(["scienceqa_data", "--labels", str(folder), "--split", "test", "--format", form, "--out", str(out),
                 "--questions", str(questions)])
        records, asked = json.loads(out.read_text()), [json.loads(line) for line in questions.read_text().splitlines()]
        assert [r["id"] for r in records] == [q["question_id"] for q in asked] == [str(i) for i in range(20, 60)]
        for r, q in zip(records, asked):
            assert form_problem(r, tmp_path / "images") is None
            assert r.get("image") == q.get("image") == (f"{r['id']}/image.png" if problems[r["id"]]["image"] else None)
            lines = r["conversations"][0]["value"].split("\n")
            assert ("<image>" in lines) == ("image" in r) and ("image" not in r or lines[place] == "<image>")
            assert q["text"] == "\n".join(line for line in lines if line != "<image>")
            assert q["category"] == problems[r["id"]]["subject"]
    assert "40 problems of test (27 with a picture)" in capsys.readouterr().out
    ev.main(["scienceqa_data", "--labels", str(folder), "--no-images", "--out", str(out)])
    assert len(json.loads(out.read_text())) == 20 and "image" not in out.read_text().replace("image.png", "")
    with pytest.raises(ValueError, match="--out FILE or --questions FILE"):
        ev.main(["scienceqa_data", "--labels", str(folder)])
    with pytest.raises(ValueError, match="'val'"):
        ev.main(["scienceqa_data", "--labels", str(folder), "--split", "val", "--out", str(out)])


def test_what_two_models_differ_on_is_asked_again(science, tmp_path):
    """Sec. 5.2: the second model gets the question and both outcomes, only where the two parsed answers differ (failed and
    answered differ, failed and failed do not)."""
    ours = {str(i): "The answer is A." for i in range(20, 60)} | {"50": "?", "51": "?"}
    theirs = dict(ours) | {"30": "The answer is {B}. The answer is B.", "31": "none", "51": "The answer is C."}
    for name, texts in (("a.jsonl", ours), ("b.jsonl", theirs)):
        write(tmp_path / name, [said(pid, text) for pid, text in texts.items()])
    ev.main(["scienceqa_data", "--labels", str(science[1]), "--split", "test", "--no-images",
             "--questions", str(tmp_path / "q.jsonl"), "--answers", str(tmp_path / "a.jsonl"),
             "--second", str(tmp_path / "b.jsonl")])
    asked = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [q["question_id"] for q in asked] == ["30", "31", "51"]
    assert all(part in asked[0]["text"] for part in ("Which is 30?", "The answer is A.", theirs["30"], "The answer is X."))


# ---------------------------------------------------------------------------------------------------------------------
# Short answers


@pytest.mark.parametrize("text, normal", [
    ("The cat's meow", "cat 's meow"), ("1,000.5", "1000.5"), ("Two dogs.", "2 dogs"), ("U.S.A.", "usa"), ("a. b. c", "b c"),
    ("None", "0"), ("red / blue", "red blue"), ("it's 3 o'clock", "it 's 3 o'clock"), ("x-ray, 2", "x ray 2"), ("The", ""),
    ("$5.00", "$5.00"), ("12:30", "12:30"), ("wont go", "won't go"), ("4.", "4"), ("ten-year-old", "10 year old"),
    ("AT&T", "at&t"), ("", ""), ("somebody'd", "somebodyd"), ("couldn'tve", "couldn't've"), ("'ows'at", "'ow's'at"),
    ("an\na\tthe  X?", "x"), ("\u00c9T\u00c9, oui", "\u00e9t\u00e9 oui"), (".5", ".5"), ("a.b", "ab"), ("." * 40, "." * 8)])
def test_short_answers_are_normalised_as_by_the_official_class(text, normal):
    """The vectors of the official answer processor: quirks of the period and of `somebody'd` included."""
    assert ev.normalise(text) == normal


def slow_normal(text):
    """The rules of the answer processor, step by step."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    out = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]:
        if mark + " " in text or " " + mark in text or re.search(r"(?<=\d)(\,)+(?=\d)", text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    kept, gone = "", 0
    for i, sign in enumerate(out):
        if sign == "." and gone < 32 and not out[i + 1:i + 2].isdigit():
            gone += 1
        else:
            kept += sign
    words = [{"none": "0", "zero": "0", "one": "1", "two": "2", "ten": "10"}.get(word, word) for word in kept.lower().split()]
    return " ".join({"wont": "won't", "dont": "don't"}.get(word, word) for word in words if word not in ("a", "an", "the"))


def test_the_normaliser_agrees_with_its_rules_on_random_text():
    """2,000 random answers of marks, blanks, digits, articles and number words."""
    rng = random.Random(0)
    pieces = [*';/[]"{}()=+\\_-><@`,?!.:\' ', "  ", "\n", "7", "12", "a", "the", "ten", "wont", "None", "\u00fc"]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(14)))
        assert ev.normalise(text) == slow_normal(text), repr(text)


def test_vqa_accuracy_is_the_mean_over_leaving_one_human_out():
    """min(1, matches / 3) over the ten sets of nine: 0, 0.3, 0.6, 0.9, 1; predictions and humans normalised alike."""
    for n in range(11):
        humans = ["Two dogs."] * n + [f"other {i}" for i in range(10 - n)]
        slow = sum(min(1, sum(h == "Two dogs." for j, h in enumerate(humans) if j != i) / 3) for i in range(10)) / 10
        assert ev.vqa_accuracy("2 DOGS", {"answers": humans}) == pytest.approx(slow)
        assert ev.vqa_accuracy("2 DOGS", {"answers": [{"answer": h} for h in humans]}) == pytest.approx(slow)
    for bad in (["a"] * 9, ["a"] * 11):
        with pytest.raises(ValueError, match="ten human answers"):
            ev.vqa_accuracy("a", {"answers": bad})


def test_the_servers_rules_leave_equal_humans_alone():
    """OFFICIAL: on VQAv2's server humans are normalised only if they differ, and then only their punctuation; its marks are a
    list of its own, with colon and apostrophe."""
    assert ev.vqa_accuracy("two", {"answers": ["two"] * 10}) == 1
    assert ev.vqa_accuracy("two", {"answers": ["two"] * 10}, official=True) == 0, "2 is not two"
    assert ev.vqa_accuracy("red/blue", {"answers": ["red/blue"] * 9 + ["x"]}, official=True) == 1
    assert ev.vqa_accuracy("12:30", {"answers": ["12:30"] * 9 + ["x"]}, official=True) == 1
    assert ev.vqa_accuracy("12:30", {"answers": ["12:30"] * 10}, official=True) == 0


def test_vqav2_fills_its_upload_and_scores_its_annotations(score, tmp_path, capsys):
    """The server wants every question of test2015; what was not asked is left empty and counted. With annotations it is scored
    here, and then every question needs its answer."""
    answers = [said(i, text) for i, text in ((262144000, "Yes."), (7, "Two  dogs"))]
    write(tmp_path / "q.jsonl", [{"question_id": i, "image": "x.jpg", "text": "?"} for i in (5, 7, 262144000)])
    path = write(tmp_path / "a.jsonl", answers)
    argv = ["score", "vqav2", "--answers", str(path), "--upload", str(tmp_path / "up.json")]
    ev.main([*argv, "--questions", str(tmp_path / "q.jsonl")])
    want = [{"question_id": i, "answer": text} for i, text in ((5, ""), (7, "2 dogs"), (262144000, "yes"))]
    assert json.loads((tmp_path / "up.json").read_text()) == want
    assert "1 of 3 questions have no answer and are left empty" in capsys.readouterr().out
    ev.main(argv)
    assert json.loads((tmp_path / "up.json").read_text()) == want[:0:-1]
    with pytest.raises(ValueError, match="too often, e.g. 7"):
        ev.main([*argv[:3], str(write(tmp_path / "b.jsonl", [*answers, answers[1]])), *argv[4:]])
    annotation = lambda i, humans: {"question_id": i, "answers": [{"answer": h, "answer_id": k} for k, h in enumerate(humans)]}
    labels = {"annotations": [annotation(7, ["2 dogs"] * 2 + ["cat"] * 8), annotation(262144000, ["yes"] * 10)]}
    assert score("vqav2", path, write(tmp_path / "annotations.json", labels)) == pytest.approx({"accuracy": 80})
    labels["annotations"].append(annotation(5, ["x"] * 10))
    with pytest.raises(ValueError, match="1 have no answer, e.g. 5"):
        score("vqav2", path, write(tmp_path / "annotations.json", labels))


def test_textvqa_is_found_by_picture_and_question(score, tmp_path, capsys):
    """Joined on (image id, lower-cased question of the prompt); the line of OCR tokens is no part of it, and is reported."""
    rows = [{"question_id": 34602 + i, "image_id": "003a", "question": f"What is {i} on  the Sign?",
             "answers": ["stop"] * (i + 1) + ["x"] * (9 - i)} for i in range(4)]
    labels = write(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
    ocr = "\nReference OCR token: STOP, a, 7"
    answers = [said("003a", "Stop.", row["question"].lower() + (ocr if i else "") + WORD) for i, row in enumerate(rows)]
    assert score("textvqa", answers[::-1], labels, upload=tmp_path / "up.json") == pytest.approx({"accuracy": 70})
    assert "3 of 4 prompts hold OCR tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "up.json").read_text()) == [{"question_id": 34602 + i, "answer": "stop"} for i in range(4)]
    by_id = [a | {"question_id": row["question_id"]} for a, row in zip(answers, rows)]
    assert score("textvqa", by_id, labels) == pytest.approx({"accuracy": 70})
    with pytest.raises(ValueError, match="1 have no answer.*what is 3.*1 are answered but not asked.*what else"):
        score("textvqa", [*answers[:3], said("003a", "stop", "What else?" + WORD)], labels)


def test_vizwiz_uploads_by_picture_and_scores_unanswerable_apart(score, tmp_path, capsys):
    """The upload names pictures; accuracy, and that of the type unanswerable, with the validation split's answers; the prompt's
    extra line is no part of the question."""
    extra = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    rows = [{"image": f"VizWiz_val_{i:08}.jpg", "question": f"What is {i}?", "answer_type": ["other", "unanswerable"][i % 2],
             "answers": [{"answer": "unanswerable" if i % 2 else "Black", "answer_confidence": "yes"}] * 10} for i in range(4)]
    labels, test = write(tmp_path / "val.json", rows), [{"image": r["image"], "question": r["question"]} for r in rows]
    answers = [said(i, text, rows[i]["question"] + extra + WORD)
               for i, text in enumerate(["Black.", "Unanswerable", "blue", "black"])]
    got = score("vizwiz", answers[::-1], labels, upload=tmp_path / "up.json")
    assert got == pytest.approx({"accuracy": 50, "unanswerable": 50})
    upload = json.loads((tmp_path / "up.json").read_text())
    assert upload[:2] == [{"image": "VizWiz_val_00000000.jpg", "answer": "black"},
                          {"image": "VizWiz_val_00000001.jpg", "answer": "unanswerable"}]
    write(tmp_path / "q.jsonl", [{"question_id": f"q{i}", "image": r["image"], "text": r["question"] + extra + WORD}
                                 for i, r in enumerate(rows)])
    named = [a | {"question_id": f"q{a['question_id']}"} for a in answers]
    assert score("vizwiz", named, labels, questions=tmp_path / "q.jsonl") == got
    argv = ["score", "vizwiz", "--answers", str(write(tmp_path / "a.jsonl", answers)), "--upload", str(tmp_path / "up.json")]
    (tmp_path / "up.json").unlink()
    ev.main([*argv, "--labels", str(write(tmp_path / "test.json", test))])
    assert json.loads((tmp_path / "up.json").read_text()) == upload and "server scores" in capsys.readouterr().out
    ev.main(argv)
    assert json.loads((tmp_path / "up.json").read_text())[0] == {"image": "VizWiz_test_00000000.jpg", "answer": "black"}
    with pytest.raises(ValueError, match="have no answer"):
        score("vizwiz", [answers[1], answers[0] | {"question_id": 1}, *answers[2:]], labels)


def test_gqa_compares_lower_case_without_full_stops(gqa, score, tmp_path, capsys):
    """Exact equality after stripping full stops at the end, over balanced questions; open ones are those of type query."""
    texts = {i: ["Thing {}.", "thing {}...", "thing {} ", "the thing {}", "THING {}"][i % 5].format(i % 7) for i in range(30)}
    answers = [said(str(i), text) for i, text in texts.items()]
    right = {i: i % 5 in (0, 1, 4) for i in texts}
    want = {"accuracy": 60, "open": 100 * sum(right[i] for i in texts if i % 3) / 20,
            "binary": 100 * sum(right[i] for i in texts if not i % 3) / 10}
    assert score("gqa", answers, gqa, upload=tmp_path / "up.json") == pytest.approx(want)
    assert json.loads((tmp_path / "up.json").read_text())[:2] == [{"questionId": "0", "prediction": "thing 0"},
                                                                  {"questionId": "1", "prediction": "thing 1"}]
    assert score("gqa", answers + [said("35", "x")], gqa) == pytest.approx(want), "an unbalanced question changes the score"
    shown = capsys.readouterr().out
    assert re.search(r"accuracy +60\.00 +42\.3\d +75\.4\d +62\.0 +63\.3", shown), shown


# ---------------------------------------------------------------------------------------------------------------------
# Answering


def test_questions_of_one_picture_share_its_features_and_get_the_answers_they_get_alone(chats, tmp_path):
    """`answer` goes through sample.py: greedy, in batches; a picture is encoded once a batch, however many questions it has,
    and every answer is, token for token, the one that the question gets by itself."""
    import sample
    from data import TEMPLATES
    model, folder = tiny_llava(), tmp_path / "model"
    model.tokenizer.chat_template = TEMPLATES["vicuna_v1"].jinja()
    model.meta |= {"template": "vicuna_v1", "stage": 2}
    model.save_pretrained(folder)
    names = ["0_0.tiff", "8_0.tiff", "16_0.tiff"]
    questions = [{"question_id": f"{name} {k}", "image": name, "text": f"Is {k} here{' then' * k}?"}
                 for k in range(4) for name in names]
    questions += [{"question_id": "two", "image": ["8_0.tiff", "0_0.tiff"], "text": "Which?"},
                  {"question_id": "none", "text": "Why?"}]
    write(tmp_path / "q.jsonl", questions)

    def answers(path, *more):
        ev.main(["answer", "--model", str(folder), "--questions", str(tmp_path / "q.jsonl"), "--images", str(chats / "images"),
                 "--answers", str(tmp_path / path), "--max_new_tokens", "10", *more])
        return [json.loads(line) for line in (tmp_path / path).read_text().splitlines()]
    together, alone = answers("together.jsonl", "--batch_size", "6"), answers("alone.jsonl", "--batch_size", "1")
    plain = lambda rows: [(a["question_id"], a["prompt"], a["text"]) for a in rows]
    assert plain(together) == plain(alone) and [a["question_id"] for a in together] == [q["question_id"] for q in questions]
    assert len({a["text"] for a in together}) > 6, "the answers depend on nothing: the test tests nothing"

    config = sample.Config(model=str(folder), questions=str(tmp_path / "q.jsonl"), images=str(chats / "images"),
                           answers=str(tmp_path / "counted.jsonl"), temperature=0.0, max_new_tokens=10, batch_size=6)
    talker, encoded = sample.Talker(config), []
    talker.model.g.embeddings.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    sample.answer_file(talker, config)
    assert encoded == [2, 2, 2], f"batches of 6 questions about 3 pictures, 4 each, were encoded as {encoded} pictures"

    def ids(some):
        steps = talker.model.stream(**talker.batch(some), stop=talker.stop, max_new_tokens=10)
        return [[i for i in row if i is not None] for row in zip(*steps)]
    pictures = [load_image(chats / "images" / name) for name in names]
    asked = [([talker.ask(f"Is {k} so?", 1)], [pictures[k % 2]]) for k in range(5)]
    asked += [([talker.ask("Both?", 2)], pictures[1::-1])]
    assert ids(asked) == [ids([one])[0] for one in asked], "a shared picture changes an answer's ids"


# ---------------------------------------------------------------------------------------------------------------------
# What looks like a score and is none


def test_a_torn_sheet_is_no_score(tmp_path, capsys):
    """A last row that was cut has no answer, as an unreadable reply has no letter: None is not right. Rotations that are
    missing make circular easier, which is said."""
    rows = mmbench_tsv(tmp_path / "m.tsv")
    write(tmp_path / "a.jsonl", [said(row["index"], row["answer"]) for row in rows])
    argv = ["score", "mmbench", "--answers", str(tmp_path / "a.jsonl"), "--labels", str(tmp_path / "m.tsv")]
    lines = (tmp_path / "m.tsv").read_text().splitlines()
    (tmp_path / "m.tsv").write_text("\n".join([*lines[:-1], lines[-1].split("\t")[0]]) + "\n")
    with pytest.raises(ValueError, match="1 of 14 rows have no answer"):
        ev.main(argv)
    (tmp_path / "m.tsv").write_text("\n".join(lines[:-1]) + "\n")
    write(tmp_path / "a.jsonl", [said(row["index"], row["answer"]) for row in rows[:-1]])
    ev.main(argv)
    assert "1 of" in (shown := capsys.readouterr().out) and "fewer rows than options" in shown


@pytest.mark.parametrize("name, labels", [
    ("vqav2", {"annotations": []}), ("textvqa", {"data": []}),
    ("gqa", {"1": {"isBalanced": False, "answer": "a", "types": {"structural": "query"}}})])
def test_labels_without_labels_are_an_error(name, labels, tmp_path):
    write(tmp_path / "l.json", labels)
    write(tmp_path / "a.jsonl", [{"question_id": "1", "prompt": "What?", "text": "a"}])
    with pytest.raises(ValueError, match="there are no labels in it"):
        ev.main(["score", name, "--answers", str(tmp_path / "a.jsonl"), "--labels", str(tmp_path / "l.json")])


def test_an_upload_holds_each_answer_once_or_is_not_written(tmp_path):
    write(tmp_path / "a.jsonl", [said("1", "a"), said("2", "b"), said("1", "c")])
    with pytest.raises(ValueError, match="1 are answered too often, e.g. 1"):
        ev.main(["score", "gqa", "--answers", str(tmp_path / "a.jsonl"), "--upload", str(tmp_path / "up.json")])
    assert not (tmp_path / "up.json").exists()


def test_a_name_that_occurs_twice_in_one_object_is_a_doubled_answer(tmp_path):
    """Python's reader lets the last one win; the released result files of ScienceQA are such an object."""
    (tmp_path / "a.json").write_text('{"outputs": {"7": "A", "7": "B"}}')
    with pytest.raises(ValueError, match="1 names occur more than once"):
        ev.answers_of(str(tmp_path / "a.json"))


@pytest.mark.parametrize("content", ["5", '{"outputs": [1]}', '[{"question_id": 1}]'])
def test_what_is_no_answers_file_is_named(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json\[0\]: question_id and text are needed"):
        ev.answers_of(str(tmp_path / "a.json"))


def test_an_interval_is_an_answer_of_mmmu_and_no_list(tmp_path, capsys):
    """Open answers such as "[0, 5)" begin like a list of answers."""
    row = {"id": "validation_Math_1", "question_type": "open", "options": "[]", "answer": "[0, 5)"}
    (tmp_path / "l.json").write_text(json.dumps([row]))
    write(tmp_path / "a.jsonl", [said("validation_Math_1", "The answer is [0, 5)")])
    ev.main(["score", "mmmu", "--answers", str(tmp_path / "a.jsonl"), "--labels", str(tmp_path / "l.json")])
    assert "accuracy" in capsys.readouterr().out


def test_characters_that_no_sheet_can_hold_are_replaced_and_counted(tmp_path, capsys):
    rows = mmbench_tsv(tmp_path / "m.tsv")
    write(tmp_path / "a.jsonl", [said(row["index"], "A\x0b" if k == 0 else row["answer"]) for k, row in enumerate(rows)])
    ev.main(["score", "mmbench", "--answers", str(tmp_path / "a.jsonl"), "--labels", str(tmp_path / "m.tsv"),
             "--upload", str(tmp_path / "s.xlsx")])
    assert "1 cells hold characters" in capsys.readouterr().out
    assert ev.read(str(tmp_path / "s.xlsx"))[0]["prediction"] == "A?"
