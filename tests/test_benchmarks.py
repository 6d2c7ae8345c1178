"""The benchmarks of LLaVA-1.5 (Diss. Sec. 4.4): each scorer on a few rows of the official form,
with numbers worked out by hand, and with the trap of that benchmark among the rows."""
import base64
import json

import openpyxl
import pytest

from extras import benchmarks, published
from parts.files import read_lines, write_json, write_lines

PICTURE = base64.b64encode(b"a picture").decode()
SHORT = "\nAnswer the question using a single word or phrase."
HUMANS = {"sure": ["cat"] * 10, "split": ["Two dogs."] * 2 + ["cat"] * 8}


def score(folder, name, answers, *flags, labels=None):
    """Run `score NAME` on {id: text}, or on whole rows; returns the unrounded numbers."""
    if isinstance(answers, dict):
        answers = [{"question_id": i, "text": text} for i, text in answers.items()]
    write_lines(folder / "a.jsonl", answers)
    argv = ["score", name, "--answers", folder / "a.jsonl", "--json", folder / "s.json", *flags]
    if labels:
        argv += ["--labels", folder / labels]
    benchmarks.main([str(word) for word in argv])
    return json.loads((folder / "s.json").read_text())


def write_tsv(path, rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------------------
# Yes or no

LABELS = ("yes", "yes", "No", "NO", "no", "yes")
SAID = ("Yes, there is.", "There isn't any", "NO", "**No**\n\nThe picture shows", "", "No")


def write_pope(folder, said=SAID, labels=LABELS):
    """Three splits of one picture; the labels stand in the reverse order of the questions."""
    (folder / "coco").mkdir()
    questions, answers = [], []
    for split in ("adversarial", "popular", "random"):
        rows = [{"question_id": i + 1, "image": "COCO_val2014_000000310196.jpg",
                 "text": f"Is there a {i} in the image?", "label": label}
                for i, label in enumerate(labels)]
        write_lines(folder / "coco" / f"coco_pope_{split}.json", rows[::-1])
        for row, text in zip(rows, said, strict=True):
            question = {"question_id": len(questions), "image": row["image"],
                        "text": row["text"] + SHORT, "category": split}
            questions.append(question)
            answers.append({"question_id": question["question_id"], "prompt": question["text"],
                            "text": text})
    write_lines(folder / "q.jsonl", questions)
    return answers


def test_pope_reads_the_first_word_and_what_is_neither_yes_nor_no_is_wrong(tmp_path):
    """One of three is found, one of the others is wrongly found: F1 = 2 x 1 / (2 + 3)."""
    answers = write_pope(tmp_path)
    flags = ["--questions", tmp_path / "q.jsonl"]
    scores = score(tmp_path, "pope", answers, *flags, labels="coco")
    wanted = {"f1": 40, "accuracy": 50, "precision": 50, "recall": 100 / 3, "yes": 100 / 6,
              "unparsed": 100 / 3}
    for split in ("random", "popular", "adversarial"):
        found = {name: scores[f"{split}.{name}"] for name in wanted}
        assert found == pytest.approx(wanted), "yes, no and neither are not told apart"
    assert scores["f1"] == pytest.approx(40)


def test_popes_published_arithmetic_takes_all_for_yes_and_pairs_by_position(tmp_path):
    """OFFICIAL: only No, not or no in the first sentence is no; the n-th label is the n-th's."""
    answers = write_pope(tmp_path)
    flags = ["--questions", tmp_path / "q.jsonl", "--official"]
    scores = score(tmp_path, "pope", answers, *flags, labels="coco")
    # labels, reversed: yes no no no yes yes; said: yes yes yes yes yes no
    assert scores["random.accuracy"] == pytest.approx(100 * 2 / 6)
    assert scores["f1"] == pytest.approx(200 * 2 / (5 + 3))


def test_answers_without_a_word_have_no_f1(tmp_path):
    """Half of POPE's labels are yes: empty answers, taken for yes, had an F1 of 66.67."""
    answers = write_pope(tmp_path, said=[""] * 6)
    scores = score(tmp_path, "pope", answers, "--questions", tmp_path / "q.jsonl", labels="coco")
    assert scores["f1"] is None and scores["random.accuracy"] == 0


def test_a_label_that_is_neither_yes_nor_no_is_an_error(tmp_path):
    answers = write_pope(tmp_path, labels=("yes", "yes", "no", "no", "no", "perhaps"))
    with pytest.raises(ValueError, match="json is 'perhaps', not one of yes, no"):
        score(tmp_path, "pope", answers, "--questions", tmp_path / "q.jsonl", labels="coco")


@pytest.mark.parametrize("flags, points", [([], 75 + 50), (["--official"], 100 + 100)])
def test_mme_adds_the_share_of_pictures_that_are_all_right(tmp_path, flags, points):
    """Accuracy + pictures with both right, in percent; "Not sure" is "no" officially."""
    (tmp_path / "mme").mkdir()
    rows = [(f"{picture}.txt", f"Is it {word}? Please answer yes or no.", label, "Yes")
            for picture in ("0014", "0020") for word, label in (("red", "Yes"), ("blue", "No"))]
    write_tsv(tmp_path / "mme" / "OCR.txt", rows)
    texts = ["Yes", "No.", "yes, it is", "Not sure"]
    answers = [{"question_id": f"OCR/{row[0][:4]}.png", "text": text,
                "prompt": row[1].removesuffix(" Please answer yes or no.") + SHORT}
               for row, text in zip(rows, texts, strict=True)]
    scores = score(tmp_path, "mme", answers[::-1], *flags, labels="mme")
    assert scores["OCR"] == points
    assert scores["perception"] is None, "the sum of ten tasks is undefined without nine of them"
    write_tsv(tmp_path / "mme" / "OCR.txt", [rows[0], rows[0]])
    answers = [answers[0], answers[0] | {"text": "No"}]
    scores = score(tmp_path, "mme", answers, *flags, labels="mme")
    assert scores["OCR.acc"] == 50, "a question that is asked twice has one answer"


# --------------------------------------------------------------------------------------------------
# Choices


def write_mmbench(folder):
    """Two questions with two rows: index and index + 1,000,000 are the same, rotated. The second
    has a third option, behind a gap, and a character that no .xlsx can hold."""
    head = "index question hint A B C D answer category image source l2-category comment split"
    rows = [head.split()]
    for index, a, b, answer, image in ((7, "dog", "cat", "A", PICTURE), (8, "1", "2", "B", "7"),
                                       (1_000_007, "cat", "dog", "B", "7"),
                                       (1_000_008, "2", "1", "A", "7")):
        d, split = ("3", "dev\a") if a in "12" else ("nan", "dev")
        rows.append([str(index), "Which?", "nan", a, b, "None", d, answer, "kind", image, "s",
                     "level", "c", split])
    write_tsv(folder / "dev.tsv", rows)


def test_mmbench_counts_a_question_only_if_each_rotation_is_right(tmp_path, capsys):
    """An answer may be a sentence; "A" among many words is an article; an option's text counts.
    Where a rotation is missing, chance is right more often."""
    write_mmbench(tmp_path)
    answers = {7: "(A)", 8: "B", 1_000_007: "A thing of sorts", 1_000_008: "The answer: A."}
    scores = score(tmp_path, "mmbench", answers, "--upload", tmp_path / "up.xlsx", labels="dev.tsv")
    assert scores == {"circular": 50, "plain": 100, "unparsed": 25, "kind": 50, "level": 50}
    assert "1 of 2 questions have fewer rows than options" in capsys.readouterr().out
    head, first, second, *_ = openpyxl.load_workbook(tmp_path / "up.xlsx").active.values
    assert head == tuple("index question A B C D prediction answer split".split())
    assert (first[6], second[8]) == ("(A)", "dev?")
    with pytest.raises(ValueError, match="reads .xlsx; name the file so"):
        score(tmp_path, "mmbench", answers, "--upload", tmp_path / "up.tsv", labels="dev.tsv")


def questions_of(folder, name, labels):
    """What `NAME_data` makes of a label file; the pictures go to folder/images."""
    argv = [f"{name}_data", "--labels", folder / labels, "--questions", folder / "q.jsonl",
            "--images", folder / "images"]
    benchmarks.main([str(word) for word in argv])
    return read_lines(folder / "q.jsonl")


def test_mmbench_data_writes_questions_and_one_picture_for_all_rotations(tmp_path):
    """The prompt of LLaVA-1.5: hint, question, an option a line up to a gap, and how to answer."""
    write_mmbench(tmp_path)
    questions = questions_of(tmp_path, "mmbench", "dev.tsv")
    assert questions[2] == {
        "question_id": 1_000_007, "image": "7.png",
        "text": "Which?\nA. cat\nB. dog\n"
                "Answer with the option's letter from the given choices directly."}
    assert questions[1]["text"].startswith("Which?\nA. 1\nB. 2\nAnswer")
    assert {path.read_bytes() for path in (tmp_path / "images").iterdir()} == {b"a picture"}
    with (tmp_path / "dev.tsv").open("a") as sheet:
        sheet.write("9" + "\tx" * 14)
    with pytest.raises(ValueError, match="a row has more cells than the first"):
        questions_of(tmp_path, "mmbench", "dev.tsv")


def test_seed_bench_wants_the_letter_alone_and_all_kinds_for_all(tmp_path):
    """What is not the bare letter is wrong; without the videos `all` is undefined."""
    rows = [{"question_id": name, "answer": "B", "data_type": "video" if "v" in name else "image"}
            for name in ("101669", "104933", "v1")]
    write_json(tmp_path / "SEED-Bench.json", {"questions": rows})
    answers = {"101669": "B", "104933": "B."}
    scores = score(tmp_path, "seed_bench", answers, labels="SEED-Bench.json")
    assert (scores["image"], scores["all"], scores["unparsed"]) == (50, None, 50)
    scores = score(tmp_path, "seed_bench", answers, "--official", labels="SEED-Bench.json")
    assert scores["all"] == pytest.approx(100 / 3), "a missing answer is a wrong one"


CHOOSE = {"id": "Art_1", "question": "<image 1> Which?", "question_type": "multiple-choice",
          "answer": "B", "options": "['red', 'blue']", "image_1": "1.jpg"}
NUMBER = CHOOSE | {"id": "Art_2", "question_type": "open", "options": "[]",
                   "answer": "['24/7', '3.429']"}


@pytest.mark.parametrize("label, text, right", [
    (CHOOSE, "B", True), (CHOOSE, "(A) is wrong, so (B)", True),
    (CHOOSE, "The answer is B or A", False), (CHOOSE, "I think that it is blue here", True),
    (CHOOSE, "blue", False), (NUMBER, "3.43", True), (NUMBER, "Thus the result is 3.4288.", True),
    (NUMBER, "It is 24/7.", True), (NUMBER, "34.3", False)])
def test_mmmus_answers_are_read_as_published(tmp_path, label, text, right):
    """Of several letters the last one, option texts only among more than five words. Open answers
    are numbers with two decimals or words, behind the key words of a line; any truth will do.
    Neither question nor picture is needed."""
    fields = ("id", "question_type", "options", "answer")
    write_json(tmp_path / "mmmu.json", [{name: label[name] for name in fields}])
    scores = score(tmp_path, "mmmu", {label["id"]: text}, labels="mmmu.json")
    assert scores["accuracy"] == 100 * right


def test_mmmus_rows_become_questions_and_are_scored(tmp_path):
    """The published prompt: options as (A), (B) and a blank line; an open one asks for a word."""
    write_lines(tmp_path / "rows.jsonl", [CHOOSE, NUMBER])
    questions = questions_of(tmp_path, "mmmu", "rows.jsonl")
    assert questions[0] == {
        "question_id": "Art_1", "image": "1.jpg",
        "text": "<image 1> Which?\n(A) red\n(B) blue\n\n"
                "Answer with the option's letter from the given choices directly."}
    assert questions[1]["text"] == f"<image 1> Which?{SHORT}"
    answers = [q | {"text": text} for q, text in zip(questions, "B7", strict=True)]
    assert score(tmp_path, "mmmu", answers, labels="rows.jsonl")["accuracy"] == 50


@pytest.mark.parametrize("change, says", [
    ({"image_1": None}, "1.: image_1: None where text belongs"),
    ({"options": "['red']"}, "Art_1 has the options .'red'.; 2 to 10"),
    ({"question_type": "choice"}, "Art_1 is 'choice', not one of multiple-choice, open")])
def test_a_row_of_mmmu_that_is_no_question_is_named(change, says, tmp_path):
    write_json(tmp_path / "rows.json", [CHOOSE | change])
    with pytest.raises(ValueError, match=says):
        questions_of(tmp_path, "mmmu", "rows.json")


def test_mathvista_has_questions_and_counts_what_only_a_language_model_could_read(tmp_path):
    """LLaVA-1.5's two format prompts, and the unit that an answer is in. Read are choices by text
    or letter, integers, floats at the problem's precision; the rest is wrong."""
    choice = {"question_type": "multi_choice", "answer_type": "text", "choices": ["red", "blue"],
              "question": "Which?", "image": "images/1.jpg"}
    number = {"question_type": "free_form", "answer_type": "float", "precision": 1.0, "unit": "cm",
              "question": "How long?", "image": "images/2.jpg"}
    problems = {"1": choice, "2": choice, "3": number, "4": number}
    write_json(tmp_path / "test.json", problems)         # a test split has no answers
    questions = questions_of(tmp_path, "mathvista", "test.json")
    assert questions[0] == {
        "question_id": "1", "image": "images/1.jpg",
        "text": "Which?\nA. red\nB. blue\n"
                "Answer with the option's letter from the given choices directly."}
    assert questions[2]["text"] == f"How long? (Unit: cm){SHORT}"
    answers = {"1": "(B)", "2": "The blue one", "3": "1.24", "4": "1.3"}
    truths = {"1": "blue", "2": "blue", "3": "1.2", "4": "1.2"}
    write_json(tmp_path / "testmini.json", {
        name: problem | {"answer": truths[name]} for name, problem in problems.items()})
    scores = score(tmp_path, "mathvista", answers, labels="testmini.json")
    assert scores == {"accuracy": 50, "unparsed": 25}


# --------------------------------------------------------------------------------------------------
# Short answers


def test_vqav2_takes_the_mean_over_nine_humans_and_fills_its_upload(tmp_path):
    """Two of ten humans agree: 0.6. What has no answer is empty in the server's file."""
    write_json(tmp_path / "v2_annotations.json", {"annotations": [
        {"question_id": i, "answers": [{"answer": human} for human in humans]}
        for i, humans in enumerate(HUMANS.values())]})
    scores = score(tmp_path, "vqav2", {0: "the cat", 1: "2 dogs"}, labels="v2_annotations.json")
    assert scores["accuracy"] == pytest.approx(100 * (1 + 0.6) / 2)
    write_lines(tmp_path / "q.jsonl", [{"question_id": i, "text": "What?"} for i in range(3)])
    score(tmp_path, "vqav2", {0: "The cat.", 2: "Two"}, "--questions", tmp_path / "q.jsonl",
          "--upload", tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text()) == [
        {"question_id": 0, "answer": "cat"}, {"question_id": 1, "answer": ""},
        {"question_id": 2, "answer": "2"}]


def test_textvqa_finds_answers_by_picture_and_question(tmp_path):
    """LLaVA's ids are pictures, which have several questions, some of them twice; the OCR line is
    not part of one."""
    humans = [*HUMANS.items(), ("sure", ["red"] * 10)]
    write_json(tmp_path / "TextVQA_0.5.1_val.json", {"data": [
        {"question_id": i, "image_id": "003a8ae2ef43b901", "question": f"what is {name}?",
         "answers": said} for i, (name, said) in enumerate(humans)]})
    answers = [{"question_id": "003a8ae2ef43b901", "text": text,
                "prompt": f"What is {name}?\nReference OCR token: DAKOTA, CAT{SHORT}"}
               for name, text in (("split", "two dogs"), ("sure", "Cat"), ("sure", "red"))]
    scores = score(tmp_path, "textvqa", answers, labels="TextVQA_0.5.1_val.json")
    assert scores["accuracy"] == pytest.approx(100 * (1 + 0.6 + 1) / 3)


def test_vizwiz_ids_are_places_in_its_annotations(tmp_path):
    """Unanswerable questions have a score of their own; without human answers the server scores."""
    rows = [{"image": f"VizWiz_val_{i}.jpg", "question": "What is this?", "answer_type": kind,
             "answers": [{"answer": answer}] * 10}
            for i, (kind, answer) in enumerate((("other", "black"), ("unanswerable", "x")))]
    write_json(tmp_path / "val.json", rows)
    hint = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    answers = [{"question_id": i, "prompt": f"What is this?{hint}{SHORT}", "text": text}
               for i, text in enumerate(("Black", "Unanswerable"))]
    scores = score(tmp_path, "vizwiz", answers, labels="val.json")
    assert scores == {"accuracy": 50, "unanswerable": 0}
    write_lines(tmp_path / "q.jsonl", [{"question_id": i, "image": row["image"],
                                        "text": row["question"]} for i, row in enumerate(rows)])
    score(tmp_path, "vizwiz", answers, "--questions", tmp_path / "q.jsonl",
          "--upload", tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text())[1] == {
        "image": "VizWiz_val_1.jpg", "answer": "unanswerable"}
    answers[0]["prompt"] = "Is it red?"
    with pytest.raises(ValueError, match="0 answers another question than 'What is this"):
        score(tmp_path, "vizwiz", answers, labels="val.json")


def test_gqa_counts_balanced_questions_and_its_server_gets_all(tmp_path):
    """Lower case without full stops; "a dog" is not "dog"; a table has the balanced ones only."""
    write_json(tmp_path / "questions.json", {
        str(i): {"answer": "dog", "isBalanced": i < 2} for i in range(3)})
    answers = {"0": "Dog..", "1": "a dog", "2": "Dog."}
    scores = score(tmp_path, "gqa", answers, "--upload", tmp_path / "up.json",
                   labels="questions.json")
    assert scores == {"accuracy": 50}
    assert json.loads((tmp_path / "up.json").read_text())[2] == {
        "questionId": "2", "prediction": "dog"}
    write_json(tmp_path / "more_questions.json", {"2": {"answer": "cat", "isBalanced": True}})
    with pytest.raises(ValueError, match="2 has a label in another file, too"):
        score(tmp_path, "gqa", answers, labels=".")


@pytest.mark.parametrize("text, normal", [
    ("The cat's meow", "cat 's meow"), ("1,000.5", "1000.5"), ("Two dogs.", "2 dogs"),
    ("U.S.A.", "usa"), ("None", "0"), ("red / blue", "red blue"), ("x-ray, 2", "x ray 2"),
    ("The", ""), ("$5.00", "$5.00"), ("12:30", "12:30"), ("wont go", "won't go"), ("4.", "4"),
    ("ten-year-old", "10 year old"), ("it's 3 o'clock", "it 's 3 o'clock")])
def test_short_answers_are_normalised_as_published(text, normal):
    """Worked out with the official answer processor, whose quirks count."""
    assert published.normalise(text) == normal


# --------------------------------------------------------------------------------------------------
# What does not belong together


BOTH = {"0": "dog", "1": "dog"}


@pytest.mark.parametrize("answers, change, says", [
    ({"0": "dog"}, {}, "1 have no answer, e.g. 1"),
    (BOTH | {"9": "dog"}, {}, "1 are answered too often, or not asked, e.g. 9"),
    ([{"question_id": str(i % 2), "text": "dog"} for i in range(3)], {}, "too often"),
    ({"0": "dog", "1": 7}, {}, "a.jsonl.1.: text: 7 where text belongs"),
    ({}, {}, "a.jsonl: it is empty"),
    (BOTH, {"answer": 5}, "json: 0: answer: 5 where text belongs"),
    (BOTH, {"isBalanced": "no"}, "json: 0: isBalanced: 'no' where true or false belongs")])
def test_missing_doubled_foreign_and_odd_rows_are_never_a_number(tmp_path, answers, change, says):
    """Of answers and labels alike."""
    label = {"answer": "dog", "isBalanced": True}
    write_json(tmp_path / "questions.json", {"0": label | change, "1": label})
    with pytest.raises(ValueError, match=says):
        score(tmp_path, "gqa", answers, labels="questions.json")
