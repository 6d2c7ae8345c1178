"""LLaVA-1.5's data (academic.py): questions, answers and boxes of the academic sets, as conversations to train on."""
import base64
import io
import json
import random
import runpy
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import academic
import eval as ev
from academic import box_to_text, text_to_box
from conftest import ROOT
from images import preprocess
from records import form_problem

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
DESCRIBE, LOCATE = "Please provide a short description for this region: ", "sentence describes: "


@pytest.fixture
def convert(tmp_path, capsys):
    """convert(questions, annotations, *flags) -> (records, printed); of a list come JSON lines, of anything else JSON."""
    def run(questions, annotations=None, *flags):
        argv = ["--out", tmp_path / "out.json", *flags]
        for flag, value in (("questions", questions), ("annotations", annotations)):
            if value is not None:
                text = "\n".join(map(json.dumps, value)) if isinstance(value, list) else json.dumps(value)
                (tmp_path / f"{flag}.json").write_text(text)
                argv += [f"--{flag}", tmp_path / f"{flag}.json"]
        academic.main(list(map(str, argv)))
        records = json.loads((tmp_path / "out.json").read_text())
        for record in records:
            assert form_problem(record, "images") is None, "the converter's own records are refused for training"
        return records, capsys.readouterr().out
    return run


def texts(record):
    return [turn["value"] for turn in record["conversations"]]


def vqa(*pairs):
    """VQAv2's two files, of (image_id, question, answer)."""
    ids = [(1000 * image + i, image, q, a) for i, (image, q, a) in enumerate(pairs)]
    return ({"questions": [{"image_id": image, "question": q, "question_id": i} for i, image, q, _ in ids]},
            {"annotations": [{"image_id": image, "question_id": i, "multiple_choice_answer": a, "answers": [{"answer": "no"}]}
                             for i, image, _, a in reversed(ids)]})


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def test_vqav2_becomes_one_conversation_a_picture_with_its_prompt_said_once(convert):
    """Diss. Sec. 4.2: short answers are asked for by a line behind the question; all questions about a picture are joined."""
    questions, annotations = vqa((458752, "What is this?", "net"), (9, "How many?", "2"), (458752, "What sport? ", "baseball"))
    records, said = convert(questions, annotations)
    assert records == [
        {"id": "000000458752", "image": "coco/train2017/000000458752.jpg", "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?" + SHORT}, {"from": "gpt", "value": "net"},
            {"from": "human", "value": "What sport?"}, {"from": "gpt", "value": "baseball"}]},
        {"id": "000000000009", "image": "coco/train2017/000000000009.jpg", "conversations": [
            {"from": "human", "value": "<image>\nHow many?" + SHORT}, {"from": "gpt", "value": "2"}]}]
    assert "VQAv2: 3 records, 0 bad" in said and "2 pictures, 2 conversations, 3 answers (short 3)" in said


FORMS = {     # one file of each kind: the questions, the annotations, and what is made of them: picture, question, answer
    "OK-VQA": ({"questions": [{"image_id": 7, "question": "Race?", "question_id": 5}]},
               {"annotations": [{"image_id": 7, "question_id": 5, "answers": [
                   {"answer": a, "raw_answer": a + "s"} for a in ("run", "race", "race", "walk", "run")]}]},
               ("coco/train2017/000000000007.jpg", "Race?", "run")),
    "TextVQA": ({"dataset_type": "train", "data": [{"image_id": "e0c", "question": "What brand?", "question_id": 1,
                                                    "answers": ["nous", "dakota", "dakota"]}]}, None,
                ("textvqa/train_images/e0c.jpg", "What brand?", "dakota")),
    "GQA": ({"02930152": {"imageId": "2354786", "question": "Is the sky dark?", "answer": "yes", "fullAnswer": "Yes, it is."}},
            None, ("gqa/images/2354786.jpg", "Is the sky dark?", "yes")),
    "questions": ([{"image": "a/b.png", "question": "What?", "answer": "a dog"}], None, ("a/b.png", "What?", "a dog")),
}


@pytest.mark.parametrize("kind", FORMS)
def test_each_kind_of_file_is_known_by_its_form_and_not_by_its_name(kind, convert):
    """Ours: every file here is called questions.json; of several answers the most frequent one counts, the first of equals."""
    questions, annotations, (image, question, answer) = FORMS[kind]
    records, said = convert(questions, annotations)
    assert said.startswith(f"{kind}: 1 records") and len(records) == 1
    assert records[0]["image"] == image and texts(records[0]) == [f"<image>\n{question}{SHORT}", answer]
    assert texts(convert(questions, annotations, "--format_prompt", "none")[0][0])[0] == f"<image>\n{question}"


def aokvqa():
    """Three questions about two pictures; the right choice is second, fourth, first."""
    rows = [(4, "Which sport?", ["golf", "tennis", "chess", "polo"], 1), (4, "Which day?", ["one", "two", "three", "four"], 3),
            (5, "Which car?", ["a bus", "A. van", "bike", "van"], 0)]
    return [{"split": "train", "image_id": i, "question_id": f"x{i}", "question": q, "choices": c, "correct_choice_idx": k,
             "direct_answers": ["x"]} for i, q, c, k in rows]


def test_a_question_with_choices_is_asked_once_per_choice_in_conversations_of_their_own(convert):
    """Diss. Sec. 4.2: options and letters; each rotation is a conversation, or the answer would stand in the text before."""
    records, said = convert(aokvqa())
    assert said.startswith("A-OKVQA: 3 records, 0 bad") and "2 pictures, 8 conversations, 12 answers (letter 12)" in said
    assert len({r["id"] for r in records}) == 8, "two conversations share an id"
    seen = {}
    for record in records:
        assert record["image"] in ("coco/train2017/000000000004.jpg", "coco/train2017/000000000005.jpg")
        asked = []
        for text, letter in zip(texts(record)[::2], texts(record)[1::2]):
            assert text.endswith(LETTER), "a question lacks the prompt that goes with its options"
            question, *options = text.removesuffix(LETTER).removeprefix("<image>\n").split("\n")
            row = next(row for row in aokvqa() if row["question"] == question)
            assert [option[:3] for option in options] == ["A. ", "B. ", "C. ", "D. "]
            options = [option[3:] for option in options]
            assert sorted(options) == sorted(row["choices"]), "an option was lost"
            assert options["ABCD".index(letter)] == row["choices"][row["correct_choice_idx"]], "the letter names another option"
            asked.append(question)
            seen.setdefault(question, []).append(letter)
        assert len(set(asked)) == len(asked), "one conversation has a question twice"
    assert all(sorted(letters) == list("ABCD") for letters in seen.values()), f"the answer is not each letter once: {seen}"
    once, said = convert(aokvqa(), None, "--no-rotate")
    assert len(once) == 2 and texts(once[0])[1::2] == ["B", "D"] and "3 answers" in said


def test_a_question_is_trained_as_it_is_asked_in_the_evaluation(convert, tmp_path):
    """Diss. Sec. 4.2: MMBench's options, and the short prompt that the scorers know, letter for letter."""
    image = io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "JPEG")
    row = {"index": "1", "question": "Which?", "hint": "", "A": "x", "B": "a y", "answer": "B",
           "image": base64.b64encode(image.getvalue()).decode()}
    (tmp_path / "mmbench.tsv").write_text("\t".join(row) + "\n" + "\t".join(row.values()) + "\n")
    ev.main(["mmbench_data", "--labels", str(tmp_path / "mmbench.tsv"), "--questions", str(tmp_path / "q.jsonl"),
             "--images", str(tmp_path / "pictures")])
    asked = json.loads((tmp_path / "q.jsonl").read_text())["text"]
    records, _ = convert([{"image": "1.jpg", "question": "Which?", "choices": ["x", "a y"], "answer": "a y"}])
    assert texts(records[0]) == [f"<image>\n{asked}", "B"]
    short, _ = convert([{"image": "1.jpg", "question": "Which?", "answer": "a y"}])
    assert ev.bare(texts(short[0])[0].removeprefix("<image>\n")) == "Which?", "the scorers do not know this prompt"


def test_the_prompt_follows_the_record_or_the_flag(convert):
    """Ours: letters where there are choices; what asks in two ways about one picture is two conversations."""
    rows = [{"image": "a.jpg", "question": "Q1?", "answer": "x"}, {"image": "a.jpg", "question": "Q2?", "answer": "y",
                                                                     "choices": ["x", "y"]}]
    records, said = convert(rows)
    assert [texts(r) for r in records] == [["<image>\nQ1?" + SHORT, "x"], ["<image>\nQ2?\nA. x\nB. y" + LETTER, "B"],
                                           ["<image>\nQ2?\nA. y\nB. x" + LETTER, "A"]] and "(short 1, letter 2)" in said
    assert [texts(r) for r in convert(rows, None, "--format_prompt", "short")[0]] == [["<image>\nQ1?" + SHORT, "x", "Q2?", "y"]]
    with pytest.raises(ValueError, match=r"questions.json\[0\]: a letter needs 2 to 26 choices"):
        convert(rows, None, "--format_prompt", "letter")


def test_long_conversations_can_be_cut_and_each_piece_says_the_prompt(convert):
    """Ours: --turns; a piece is a conversation that stands alone, with picture, prompt and an id of its own."""
    rows = [{"image": "a.jpg", "question": f"Q{i}?", "answer": str(i)} for i in range(7)]
    records, _ = convert(rows, None, "--turns", 3)
    assert [len(r["conversations"]) for r in records] == [6, 6, 2] and [r["id"] for r in records] == ["a", "a_1", "a_2"]
    assert all(texts(r)[0].startswith("<image>\n") and texts(r)[0].endswith(SHORT) for r in records)
    assert [a for r in records for a in texts(r)[1::2]] == list("0123456"), "an answer is lost, or stands elsewhere"


def test_pictures_may_be_called_otherwise(convert):
    """Ours: --image_name, for those who keep COCO's pictures in their old folders."""
    questions, annotations = vqa((5, "What?", "cat"))
    name = "val2014/COCO_val2014_{image_id:012d}.jpg"
    assert convert(questions, annotations, "--image_name", name)[0][0]["image"] == "val2014/COCO_val2014_000000000005.jpg"
    with pytest.raises(ValueError, match=r"\[0\]: cannot be used as VQAv2 \(KeyError: 'imageId'\)"):
        convert(questions, annotations, "--image_name", "{imageId}.jpg")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


GOOD = {"image": "a.jpg", "question": "Q?", "answer": "x"}
BAD = [({"image": "a.jpg", "question": "Q?"}, "questions needs image, question, answer; found image, question"),
       ("text", "questions needs image, question, answer; found text"), ({**GOOD, "answer": " "}, "text is needed"),
       ({**GOOD, "answer": 5}, "cannot be used|text is needed"), ({**GOOD, "question": "<image> Q?"}, "without <image>"),
       ({**GOOD, "image": ["a.jpg"]}, "text is needed"), ({**GOOD, "image": ""}, "text is needed"),
       ({**GOOD, "question": None}, "cannot be used"), ({**GOOD, "choices": ["y", "z"]}, "once among them; found 'x'"),
       ({**GOOD, "choices": ["x", "x"]}, "once among them"), ({**GOOD, "choices": ["x"]}, "2 to 26 choices"),
       ({**GOOD, "choices": 7}, "cannot be used")]


@pytest.mark.parametrize("bad, message", BAD)
def test_a_bad_record_is_named_with_its_place_and_left_out_only_on_demand(bad, message, convert):
    """Ours: file, index, what was found, what is needed; --skip_bad leaves it out, counted and shown."""
    with pytest.raises(ValueError, match=rf"^1 of 3 records are bad .*\nquestions.json\[1\]: .*({message})"):
        convert([GOOD, bad, GOOD])
    records, said = convert([GOOD, bad, GOOD], None, "--skip_bad")
    assert "3 records, 1 bad and left out:\nquestions.json[1]: " in said and len(texts(records[0])) == 4, "dropped silently"


def test_many_bad_records_are_counted_and_the_first_are_shown(convert):
    """Ours: a wrong file gives twenty lines and a number, not a million lines; nothing is written if nothing is left."""
    with pytest.raises(ValueError, match=r"^30 of 31 records are bad(.*\n){21}\.\.\. and 10 more$"):
        convert([GOOD] + [{}] * 30)
    with pytest.raises(ValueError, match="1 of 1 records are bad"):
        convert([{**GOOD, "answer": ""}], None, "--skip_bad")


def test_questions_without_their_annotation_are_bad(convert):
    """Ours: VQAv2's two files are joined by question_id; another split's annotations are found out."""
    questions, annotations = vqa((1, "Q0?", "a"), (2, "Q1?", "b"))
    annotations["annotations"].pop()                                      # that of the first question
    with pytest.raises(ValueError, match=r"1 of 2 records are bad.*\n.*\[0\]: VQAv2 needs .* multiple_choice_answer"):
        convert(questions, annotations)
    for others in (None, {"annotations": 5}, {"annotations": [{"id": 1}]}, {"questions": []}, [1]):
        with pytest.raises(ValueError, match="annotations"):
            convert(questions, others)
    with pytest.raises(ValueError, match="no others, have their answers in a file of their own"):
        convert([GOOD], annotations)


@pytest.mark.parametrize("data", [{"a": 1}, [1, 2], {"images": []}, [{"image": "a.jpg", "text": "Q?"}], {"data": [{"x": 1}]}])
def test_a_file_of_no_known_kind_is_refused_with_the_kinds_there_are(data, convert):
    """Ours: what the first record is, and what each kind needs."""
    with pytest.raises(ValueError, match=r"questions.json: no record is of a known kind, .*A-OKVQA \(question, image_id"):
        convert(data)


def test_a_wrong_command_is_one_line(tmp_path, monkeypatch):
    """Ours: wrong flags and files end in a message."""
    (tmp_path / "q.json").write_text(json.dumps([{"image": "a", "phrase": "b", "box": [0, 0, 1, 1], "width": 9, "height": 9}]))
    base = ["--questions", str(tmp_path / "q.json"), "--out", str(tmp_path / "o.json")]
    for flags, message in ((["--turns", "0"], "at least 1"), (["--format_prompt", "short"], "questions of their own"),
                           (["--questions", "gone.json"], "gone.json: no such file")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            academic.main(base + flags)
    for flags in (["--aspect", "keep"], ["--decimals", "1"], ["--quest", "x"]):
        with pytest.raises(SystemExit):
            academic.main(base + flags)
    monkeypatch.setattr(sys, "argv", ["academic.py", "--questions", "gone.json", "--out", "o"])
    with pytest.raises(SystemExit, match="^error: gone.json: no such file$"):
        runpy.run_path(academic.__file__, run_name="__main__")


def test_converting_loads_no_torch(tmp_path):
    """Ours: text in, text out; it starts at once."""
    (tmp_path / "q.json").write_text(json.dumps(GOOD))
    code = "import sys, academic; academic.main(sys.argv[1:]); print({'torch', 'transformers', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, "--questions", tmp_path / "q.json", "--out", tmp_path / "o.json"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Boxes


def seen(width, height, aspect):
    """Of a picture, the part that the model sees: (left, top, right, bottom)."""
    short = min(width, height)
    return ((width - short) / 2, (height - short) / 2, (width + short) / 2, (height + short) / 2) if aspect == "crop" else (
        0, 0, width, height)


@pytest.mark.parametrize("decimals", [2, 3])
@pytest.mark.parametrize("aspect", ["pad", "crop", "stretched"])
def test_a_box_comes_back_within_half_a_unit_of_the_last_decimal(aspect, decimals):
    """Diss. Sec. 4.3: per coordinate 0.005 (or 0.0005) of the side that is 1: longest edge, shortest edge, width or height."""
    rng = random.Random(aspect)
    for _ in range(2000):
        width, height = rng.randint(1, 2000), rng.randint(1, 2000)
        left, top, right, bottom = seen(width, height, aspect)
        (x1, x2), (y1, y2) = (sorted(rng.uniform(a, b) for _ in "12") for a, b in ((left, right), (top, bottom)))
        sides = {"pad": [max(width, height)] * 2, "crop": [min(width, height)] * 2, "stretched": [width, height]}[aspect]
        text = box_to_text([x1, y1, x2, y2], width, height, aspect, decimals)
        assert all(0 <= v <= 1 for v in json.loads(text)), text
        for got, want, side in zip(text_to_box(text, width, height, aspect), (x1, y1, x2, y2), sides * 2):
            assert abs(got - want) <= 0.5 * 10 ** -decimals * side + 1e-6, f"{want} came back as {got} of {width} x {height}"


def find(pixels):
    """The corners of what is red in (3, H, W) pixels, as shares of the picture."""
    red = pixels[0] - pixels[1] > 1.5
    ys, xs = np.where(red)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / red.shape[0]


@pytest.mark.parametrize("aspect", ["pad", "crop", "stretched"])
def test_a_drawn_box_is_where_its_text_says_in_what_the_model_sees(aspect):
    """Diss. Sec. 4.3: the coordinates are those of the 336-pixel square; "pad" as transformers pads for LLaVA-1.5."""
    processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    squares = {"pad": lambda p: processor(p, return_tensors="np").pixel_values[0], "crop": lambda p: preprocess(p, 336).numpy(),
               "stretched": lambda p: preprocess(p.resize((336, 336), Image.Resampling.BICUBIC), 336).numpy()}
    rng = random.Random(0)
    for width, height in ((640, 480), (427, 640), (501, 334), (334, 501), (350, 350), (900, 301)):
        left, top, right, bottom = (round(v) for v in seen(width, height, aspect))
        x1, y1 = rng.randint(left, left + 60), rng.randint(top, top + 60)
        x2, y2 = rng.randint(right - 80, right), rng.randint(bottom - 80, bottom)
        pixels = np.full((height, width, 3), 90, np.uint8)
        pixels[y1:y2, x1:x2] = (255, 0, 0)
        said = json.loads(box_to_text([x1, y1, x2, y2], width, height, aspect))
        off = abs(find(squares[aspect](Image.fromarray(pixels))) - said)
        assert off.max() <= 0.005 + 1.5 / 336, f"{width} x {height}: the box is {off.max():.3f} from where it is said to be"


def test_boxes_are_written_as_in_the_released_mixture():
    """OFFICIAL: corners, two decimals, no zeros behind them; a square picture has the same numbers in every mode."""
    assert box_to_text([28, 80, 48, 100], 100, 100) == "[0.28, 0.8, 0.48, 1.0]"
    assert len({box_to_text([28, 80, 48, 100], 100, 100, aspect) for aspect in ("pad", "crop", "stretched")}) == 1
    assert box_to_text([0, 0, 100, 50], 100, 50) == "[0.0, 0.25, 1.0, 0.75]", "the padding above is not counted"
    assert box_to_text([0, 0, 101, 50], 101, 50, decimals=3) == "[0.0, 0.248, 1.0, 0.743]", "25 rows of padding above, 26 below"
    assert box_to_text([-0.4, 0, 100.6, 50], 100, 50) == "[0.0, 0.25, 1.0, 0.75]", "a hand-drawn edge is cut at the picture's"


@pytest.mark.parametrize("box, aspect", [
    ([10, 10, 5, 20], "pad"), ([10, 10, 10, 20], "pad"), ([0, 0, 120, 20], "pad"), ([-9, 0, 20, 20], "stretched"),
    ([0, 0, 20], "pad"), ([float("nan"), 0, 5, 5], "pad"), ([0, 0, 60, 20], "crop"), ([0, 0, 10, 20], "crop")])
def test_what_is_no_box_of_the_picture_or_not_wholly_seen_is_an_error(box, aspect):
    """Ours: swapped corners, width for x2, and what a crop cuts off would all be trained as a wrong place."""
    with pytest.raises(ValueError, match=r"corners .* 100 x 50 picture, of which .* shows x .* \(--box: xywh or xyxy\?\)"):
        box_to_text(box, 100, 50, aspect)


def test_a_box_is_read_out_of_an_answer_or_refused():
    """Ours: a model's words around the box do not matter; a text without one is no box at 0, 0."""
    assert text_to_box("It is at [0.5, .25,1, 0.75].", 200, 100) == [100, 0, 200, 100]
    assert text_to_box("[0.0, 0.0, 1.0, 1.0]", 200, 100) == [0, 0, 200, 100], "the padding is no part of the picture"
    assert text_to_box("[0.0, 0.0, 1.0, 1.0]", 100, 200) == [0, 0, 100, 200], "the padding is no part of the picture"
    assert text_to_box("[0.5, 0.0, 1.0, 1.0]", 200, 100, "crop") == [100, 0, 150, 100]
    for text in ("", "no", "[0.5, 0.2, 0.9]", "[0.5, 0.2, 0.4, 0.9]", "[12, 30, 50, 60]", "[0.1, 0.2, 0.3, 0.4, 0.5]"):
        with pytest.raises(ValueError, match="has no box"):
            text_to_box(text, 200, 100)
    for call in (lambda: text_to_box("[0, 0, 1, 1]", 9, 9, "keep"), lambda: box_to_text([0, 0, 1, 1], 9, 9, "keep")):
        with pytest.raises(ValueError, match="aspect 'keep': pad, crop, stretched are known"):
            call()


def regions(n=200):
    rng = random.Random(0)
    return [{"image": f"{i % 7}.jpg", "width": 300 + i % 7, "height": 200, "phrase": f"thing {i}.",
             "box": [rng.randint(0, 100), rng.randint(0, 100), rng.randint(5, 150), rng.randint(5, 90)]} for i in range(n)]


def test_regions_are_asked_for_their_words_or_their_box_at_most_ten_in_a_conversation(convert):
    """Diss. Sec. 4.2: both ways, drawn for each region; the box in the text leads back to the box of the record."""
    records, said = convert(regions())
    assert said.startswith("regions: 200 records, 0 bad") and "7 pictures, 21 conversations, 200 answers (" in said
    assert max(len(r["conversations"]) for r in records) == 20 and len({r["id"] for r in records}) == len(records)
    ways, found = {"phrase": 0, "box": 0}, set()
    for record in records:
        for question, answer in zip(texts(record)[::2], texts(record)[1::2]):
            way = "phrase" if DESCRIBE in question else "box"
            ways[way] += 1
            phrase, text = (answer, question) if way == "phrase" else (question.split(LOCATE)[1].removesuffix("."), answer)
            row = regions()[int(phrase.removeprefix("thing "))]
            x, y, w, h = row["box"]
            back = text_to_box(text, row["width"], row["height"])
            assert row["image"] == record["image"] and np.abs(np.subtract(back, [x, y, x + w, y + h])).max() < 0.0051 * 306
            assert question.endswith(("].", f"thing {phrase.split()[1]}.")) and ".." not in question
            found.add(phrase)
    assert len(found) == 200 and min(ways.values()) > 70, f"regions are lost or not drawn evenly: {ways}"
    assert f"phrase {ways['phrase']}" in said and f"box {ways['box']}" in said
    again, other = convert(regions())[0], convert(regions(), None, "--seed", 1)[0]
    assert again == records != other, "the draw is not a function of the seed"
    for way in ("phrase", "box"):
        assert f"({way} 200)" in convert(regions(), None, "--ask", way)[1]


def test_corners_aspect_and_decimals_are_what_the_flags_say(convert):
    """Ours: --box xyxy takes corners; --aspect and --decimals reach the text."""
    row = {"image": "a.jpg", "width": 100, "height": 50, "phrase": "x", "box": [30, 10, 60, 40]}
    for flags, want in ((["--box", "xyxy"], "[0.3, 0.35, 0.6, 0.65]"), ([], "[0.3, 0.35, 0.9, 0.75]"),
                        (["--box", "xyxy", "--aspect", "crop"], "[0.1, 0.2, 0.7, 0.8]"),
                        (["--box", "xyxy", "--aspect", "stretched"], "[0.3, 0.2, 0.6, 0.8]")):
        row["box"] = [30, 10, 60, 40] if flags else [30, 10, 60, 40 - 10 + 10]
        assert texts(convert([row], None, "--ask", "box", *flags)[0][0])[1] == want
    row = {**row, "width": 301, "height": 301}
    assert texts(convert([row], None, "--ask", "box", "--decimals", 3)[0][0])[1] == "[0.1, 0.033, 0.299, 0.166]"


def test_the_size_of_a_picture_is_taken_from_its_file_if_the_record_has_none(convert, tmp_path):
    """Ours: as the model sees it, that is upright; without record or file there is no way to place a box."""
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6                                                       # stored lying on its side
    Image.new("RGB", (50, 100)).save(tmp_path / "images" / "a.jpg", exif=exif)
    row = {"image": "a.jpg", "phrase": "x", "box": [30, 10, 30, 30]}
    records, _ = convert([row], None, "--ask", "box", "--images", tmp_path / "images")
    assert texts(records[0])[1] == "[0.3, 0.35, 0.6, 0.65]", "width and height of the stored picture were taken, or none"
    with pytest.raises(ValueError, match="in the record, or by --images DIR"):
        convert([row])
    with pytest.raises(ValueError, match=r"\[0\]: .*gone.jpg"):
        convert([{**row, "image": "gone.jpg"}], None, "--images", tmp_path / "images")
    for bad in ({"box": [0, 0, 500, 5]}, {"box": "here"}, {"box": None}, {"phrase": " ."}, {"phrase": 5}, {"width": 0},
                {"width": "9"}, {"box": [0, 0, "a", 1]}):
        with pytest.raises(ValueError, match=r"1 of 1 records are bad.*\nquestions.json\[0\]: "):
            convert([{**row, "width": 100, "height": 50, **bad}], None, "--aspect", "crop")
