"""LLaVA-1.5's data (extras/academic.py): questions, answers and boxes as conversations."""
import json
import os
import pickle
import random
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, chat
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import train
from extras import academic
from extras.academic import box_to_text
from parts.records import normal_record

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
DESCRIBE = "short description for this region: "
LOCATE = "sentence describes: "


@pytest.fixture
def convert(tmp_path, capsys):
    """convert(questions, annotations, *flags) -> (records, printed); lists become JSON lines."""
    def run(questions, annotations=None, *flags):
        argv = ["convert", "--out", tmp_path / "out.json", *flags]
        for flag, value in (("questions", questions), ("annotations", annotations)):
            if value is not None:
                rows = map(json.dumps, value) if isinstance(value, list) else [json.dumps(value)]
                (tmp_path / f"{flag}.json").write_text("\n".join(rows))
                argv += [f"--{flag}", tmp_path / f"{flag}.json"]
        academic.main(list(map(str, argv)))
        records = json.loads((tmp_path / "out.json").read_text())
        for record in records:
            normal_record(record)        # or training refuses it
        return records, capsys.readouterr().out
    return run


def texts(record):
    return [turn["value"] for turn in record["conversations"]]


def vqa(*pairs):
    """VQAv2's two files, of (image_id, question, answer)."""
    rows = [(1000 * image + i, image, q, a) for i, (image, q, a) in enumerate(pairs)]
    questions = [{"image_id": image, "question": q, "question_id": i} for i, image, q, _ in rows]
    annotations = [{"image_id": image, "question_id": i, "multiple_choice_answer": a,
                    "answers": [{"answer": "no"}]} for i, image, _, a in reversed(rows)]
    return {"questions": questions}, {"annotations": annotations}


# -----------------------------------------------------------------------------
# Questions


def test_vqav2_becomes_one_conversation_a_picture_with_its_prompt_once(convert):
    """Diss. Sec. 4.2: a line asks for short answers; all questions about a picture are joined."""
    files = vqa((458752, "What is this?", "net"), (9, "How many?", "2"),
                (458752, "What sport? ", "baseball"))
    records, printed = convert(*files)
    assert [r["id"] for r in records] == ["000000458752", "000000000009"]
    assert records[0]["image"] == "coco/train2017/000000458752.jpg"
    assert texts(records[0]) == ["<image>\nWhat is this?" + SHORT, "net", "What sport?", "baseball"]
    assert texts(records[1]) == ["<image>\nHow many?" + SHORT, "2"]
    assert "VQAv2 or OK-VQA: 3 records, 0 left out" in printed
    assert "2 pictures, 2 conversations, 3 answers (short 3)" in printed
    records, _ = convert(*files, "--image_name", "val2014/{image_id}.jpg")
    assert records[1]["image"] == "val2014/9.jpg"
    records, _ = convert(*files, "--format_prompt", "none")
    assert texts(records[1]) == ["<image>\nHow many?", "2"]


CAPTION = "Provide a one-sentence caption for the provided image."
SIGN = {"image_id": "c1", "caption_str": "a red sign", "reference_strs": ["a sign", "a red sign"]}
COVER = {"imageURL": "http://x/y.gif", "questions": ["Who wrote it?", "Is it art?"],
         "answers": ["Ann Lee", "No"], "title": "T", "authorName": "Ann Lee", "genre": "Law"}
PAGE = json.dumps({"gt_parse": {"text_sequence": "One two"}})
FORMS = {     # the questions, the annotations, the picture, and what is asked and answered
    "VQAv2 or OK-VQA": ({"questions": [{"image_id": 7, "question": "Race?", "question_id": 5}]},
               {"annotations": [{"image_id": 7, "question_id": 5, "answers": [
                   {"answer": a} for a in ("run", "race", "race", "walk", "run")]}]},
               "coco/train2017/000000000007.jpg", [f"<image>\nRace?{SHORT}", "run"]),
    "TextVQA": ({"data": [{"image_id": "e0c", "question": "What brand?",
                           "answers": ["nous", "dakota", "dakota"]}]}, None,
                "textvqa/train_images/e0c.jpg", [f"<image>\nWhat brand?{SHORT}", "dakota"]),
    "GQA": ({"02930152": {"imageId": "2354786", "question": "Dark?", "answer": "yes"}}, None,
            "gqa/images/2354786.jpg", [f"<image>\nDark?{SHORT}", "yes"]),
    "questions": ([{"image": "a/b.png", "question": "What?", "answer": "a dog", "image_id": 5,
                    "question_id": 1}], None,
                  "a/b.png", [f"<image>\nWhat?{SHORT}", "a dog"]),
    "DocVQA": ({"dataset_name": "docvqa", "dataset_split": "train", "data": [
                   {"questionId": 1, "question": "Which date?", "image": "documents/x_1.png",
                    "docId": 7, "answers": ["1/8/93", "1993"], "data_split": "train"}]}, None,
               "docvqa/documents/x_1.png", [f"<image>\nWhich date?{SHORT}", "1/8/93"]),
    "ChartQA": ([{"imgname": "4.png", "query": "How many?", "label": "14"}], None,
                "chartqa/train/png/4.png", [f"<image>\nHow many?{SHORT}", "14"]),
    "DVQA": ([{"question": "Which bar?", "question_id": 12, "template_id": "data", "answer": "bond",
               "image": "bar_train_1.png", "answer_bbox": [1, 2, 3, 4]}], None,
             "dvqa/images/bar_train_1.png", [f"<image>\nWhich bar?{SHORT}", "bond"]),
    "OCR-VQA": ({"014": COVER | {"split": 1}, "015": COVER | {"split": 3}}, None,
                "ocr_vqa/images/014.jpg",
                ["<image>\nWho wrote it?" + SHORT, "Ann Lee", "Is it art?", "No"]),
    "TextCaps": ({"data": [SIGN, SIGN | {"caption_str": "a sign"}]}, None,
                 "textvqa/train_images/c1.jpg", [f"<image>\n{CAPTION}", "a sign"]),
    "TextCaps with OCR": ({"data": [SIGN]},
                          {"data": [{"image_id": "c1", "ocr_tokens": ["GO", "A"]}]},
                          "textvqa/train_images/c1.jpg",
                          [f"<image>\n{CAPTION}\nReference OCR token: GO, A", "a sign"]),
    "SynthDoG": ([{"file_name": "image_0.jpg", "ground_truth": PAGE}], None,
                 "synthdog-en/images/image_0.jpg",
                 ["<image>\nRead out all of the text in the picture.", "One two"]),
    "LAION-GPT-V": ([{"image": "00/1.jpg", "caption": "A cat.", "link": "http://x"}], None,
                    "laion-gpt4v/00/1.jpg",
                    ["<image>\nDescribe this picture in detail.", "A cat."]),
    "ShareGPT or": ([{"id": "q_0", "conversations": chat("Hello.", "Hello!")}], None, None,
                    ["Hello.", "Hello!"]),
    "ShareGPT or ShareGPT4V": (
        [{"id": "9", "image": "coco/train2017/9.jpg",
          "conversations": chat("What is it?\n<image>", "A cat.")}],
        None, "coco/train2017/9.jpg", ["<image>\nWhat is it?", "A cat."]),
}


@pytest.mark.parametrize("kind", FORMS)
def test_each_kind_of_file_is_known_by_its_form_and_not_by_its_name(kind, convert):
    """Diss. Sec. 4.3 and 4.7. Every file here is called questions.json; of several answers the most
    frequent one counts."""
    questions, annotations, image, expected = FORMS[kind]
    records, printed = convert(questions, annotations)
    assert printed.startswith(kind.removesuffix(" with OCR"))
    assert [texts(record) for record in records] == [expected]
    assert records[0].get("image") == image
    if kind == "OCR-VQA":
        assert "\n1 of split 3, not 1\n" in printed, "the test's covers were not counted"
    if kind == "TextCaps":
        assert "\n1 about a picture that has one\n" in printed


def test_ai2d_is_a_folder_with_a_file_for_each_picture(convert, tmp_path):
    """Letters without rotations; where letters are in the picture, it is the second picture."""
    row = {"answerTexts": ["sun", "moon"], "correctAnswer": 1, "questionId": "0.png-0"}
    for name in ("0.png", "1.png"):
        rows = {"Which?": row | {"abcLabel": False}, "And B?": row | {"abcLabel": True}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"imageName": name, "questions": rows}))
    records, printed = convert(None, None, "--questions", tmp_path)
    assert printed.startswith("AI2D: 2 records, 0 left out")
    assert [r["image"] for r in records] == ["ai2d/images/0.png", "ai2d/abc_images/0.png",
                                             "ai2d/images/1.png", "ai2d/abc_images/1.png"]
    assert texts(records[0]) == ["<image>\nWhich?\nA. sun\nB. moon" + LETTER, "B"]


def test_a_question_with_choices_is_asked_once_per_choice_in_conversations_of_their_own(convert):
    """Diss. Sec. 4.2: letters; each rotation stands alone, or the answer would be in the text."""
    choices = {"Which sport?": ["golf", "chess", "polo"], "Which car?": ["a bus", "A. van", "van"]}
    right = {"Which sport?": 1, "Which car?": 0}
    rows = [{"image_id": 4, "question": q, "choices": c, "correct_choice_idx": right[q]}
            for q, c in choices.items()]
    records, printed = convert(rows)
    assert "1 pictures, 3 conversations, 6 answers (letter 6)" in printed
    assert len({r["id"] for r in records}) == 3, "two conversations share an id"
    for turn, question in ((0, "Which sport?"), (2, "Which car?")):
        letters = ""
        for record in records:
            text, letter = texts(record)[turn:turn + 2]
            asked, *options, prompt = text.removeprefix("<image>\n").split("\n")
            assert (asked, "\n" + prompt) == (question, LETTER), "a question lacks its prompt"
            assert [option[:3] for option in options] == ["A. ", "B. ", "C. "]
            options = [option[3:] for option in options]
            assert sorted(options) == sorted(choices[question]), "an option was lost"
            answer = choices[question][right[question]]
            assert options["ABC".index(letter)] == answer, "the letter names another option"
            letters += letter
        assert sorted(letters) == list("ABC")


def test_two_ways_of_asking_about_one_picture_are_two_conversations(convert):
    """Letters where there are choices, and short answers where there are none, or by the flag."""
    rows = [{"image": "a.jpg", "question": "Q1?", "answer": "x"},
            {"image": "a.jpg", "question": "Q2?", "answer": "y", "choices": ["x", "y"]}]
    records, _ = convert(rows)
    assert [texts(r) for r in records] == [["<image>\nQ1?" + SHORT, "x"],
                                           ["<image>\nQ2?\nA. x\nB. y" + LETTER, "B"],
                                           ["<image>\nQ2?\nA. y\nB. x" + LETTER, "A"]]
    records, _ = convert(rows, None, "--format_prompt", "short")
    assert [texts(r) for r in records] == [["<image>\nQ1?" + SHORT, "x", "Q2?", "y"]]


# -----------------------------------------------------------------------------
# Bad input


GOOD = {"image": "a.jpg", "question": "Q?", "answer": "x"}
ASKED = {"image_id": 4, "question": "Q?", "choices": ["x", "y"], "correct_choice_idx": 1}
REGION = {"image": "a.jpg", "phrase": "x", "box": [0, 0, 9, 9], "width": 100, "height": 50}
BAD = [
    (GOOD, {"image": "a.jpg", "question": "Q?"}, "needed are image, question, answer"),
    (GOOD, "text", "needed are .*found text"),
    (GOOD, {**GOOD, "answer": " "}, "text is needed"),
    (GOOD, {**GOOD, "image": ""}, "text is needed"),
    (GOOD, {**GOOD, "question": "<image> Q?"}, "without <image>"),
    (GOOD, {**GOOD, "image": ["a.jpg"]}, "a name or a number is needed"),
    (GOOD, {**GOOD, "question": None}, "cannot be used"),
    (GOOD, {**GOOD, "choices": ["y", "z"]}, "once among them; found 'x'"),
    (GOOD, {**GOOD, "choices": "xy"}, "choices: 'xy' where a list belongs"),
    (ASKED, {**ASKED, "correct_choice_idx": -1}, "counted from 0"),
    (ASKED, {**ASKED, "correct_choice_idx": True}, "True where a whole number belongs"),
    (ASKED, {**ASKED, "image_id": None}, "a name or a number is needed"),
    (REGION, {**REGION, "box": [0, 0, 500, 5]}, "no corners"),
    (REGION, {**REGION, "phrase": " ."}, "words are needed"),
]


@pytest.mark.parametrize("good, bad, message", BAD)
def test_a_bad_record_is_named_and_left_out_only_on_demand(good, bad, message, convert):
    """File, index, what was found, what is needed; --skip_bad leaves it out, counted and shown.
    True is not choice 1, -1 not the last one, "xy" not the choices x and y."""
    problem = rf"^1 of 2 records are bad .*\nquestions.json\[1\]: .*({message})"
    with pytest.raises(ValueError, match=problem):
        convert([good, bad])
    records, printed = convert([good, bad], None, "--skip_bad")
    assert "2 records, 1 left out\nquestions.json[1]: " in printed
    assert {record["image"] for record in records} == {records[0]["image"]}


def test_many_bad_records_are_counted_and_the_first_are_shown(convert):
    """A wrong file gives twenty lines and a number; nothing is written if nothing is left."""
    with pytest.raises(ValueError, match=r"^30 of 31 records are bad(.*\n){20}.*\[20\]: .*$"):
        convert([GOOD] + [{}] * 30)
    with pytest.raises(ValueError, match="1 of 1 records are bad"):
        convert([{**GOOD, "answer": ""}], None, "--skip_bad")


def test_questions_and_annotations_are_joined_by_the_value_of_question_id(convert):
    """Numbers and strings are one id, as other tools export them; what has no answer is bad."""
    questions, annotations = vqa((1, "Q0?", "a"), (2, "Q1?", "b"))
    as_text = [row | {"question_id": str(row["question_id"])} for row in annotations["annotations"]]
    assert convert(questions, {"annotations": as_text}) == convert(questions, annotations)
    with pytest.raises(ValueError, match="a question_id is there twice"):
        convert(questions, {"annotations": [*as_text, as_text[0]]})
    annotations["annotations"].pop()                     # that of the first question
    with pytest.raises(ValueError, match=r"1 of 2 records.*\n.*\[0\]: .*needed are .*answers"):
        convert(questions, annotations)
    for others in (None, {"annotations": 5}, {"annotations": [{"id": 1}]}, [1]):
        with pytest.raises(ValueError, match="annotations"):
            convert(questions, others)
    with pytest.raises(ValueError, match="needs no --annotations"):
        convert([GOOD], annotations)


@pytest.mark.parametrize("data", [{"a": 1}, [1, 2], [{"image": "a.jpg", "text": "Q?"}],
                                  {"data": [{"x": 1}]}, [], 5])
def test_a_file_of_no_known_kind_is_refused_with_the_kinds_there_are(data, convert):
    """The message tells what each kind needs."""
    known = r"questions.json: no record is of a known kind.*A-OKVQA \(image_id, question"
    with pytest.raises(ValueError, match=known):
        convert(data)


# -----------------------------------------------------------------------------
# Boxes


def red_corners(pixels):
    """The corners of what is red in (3, H, W) pixels, as shares of the picture."""
    red = pixels[0] - pixels[1] > 1.5
    ys, xs = np.where(red)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / red.shape[0]


@pytest.mark.parametrize("aspect", ["pad", "stretched"])
def test_a_drawn_box_is_where_its_text_says_in_what_the_model_sees(aspect):
    """Diss. Sec. 4.3: shares of the 336-pixel square, as transformers pads it for LLaVA-1.5."""
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    processor = LlavaImageProcessorPil(do_pad=aspect == "pad", **size)
    rng = random.Random(0)
    for width, height in ((640, 480), (334, 501), (350, 350), (900, 301)):
        x1, y1 = rng.randint(0, 60), rng.randint(0, 60)
        x2, y2 = rng.randint(width - 80, width), rng.randint(height - 80, height)
        pixels = np.full((height, width, 3), 90, np.uint8)
        pixels[y1:y2, x1:x2] = (255, 0, 0)
        picture = Image.fromarray(pixels)
        if aspect == "stretched":
            picture = picture.resize((336, 336), Image.Resampling.BICUBIC)
        square = processor(picture, return_tensors="np").pixel_values[0]
        text = box_to_text([x1, y1, x2, y2], width, height, aspect)
        distance = abs(red_corners(square) - json.loads(text)).max()
        assert distance <= 0.005 + 1.5 / 336, f"{width} x {height}: {text} is elsewhere"


def test_boxes_are_written_as_in_the_released_mixture():
    """OFFICIAL: corners, two decimals, no zeros behind them; an odd row of padding is below."""
    assert box_to_text([28, 80, 48, 100], 100, 100) == "[0.28, 0.8, 0.48, 1.0]"
    assert box_to_text([28, 80, 48, 100], 100, 100, "stretched") == "[0.28, 0.8, 0.48, 1.0]"
    assert box_to_text([0, 0, 100, 50], 100, 50) == "[0.0, 0.25, 1.0, 0.75]"
    assert box_to_text([0, 0, 15, 10], 15, 10) == "[0.0, 0.13, 1.0, 0.8]"
    assert box_to_text([-0.4, 0, 100.6, 50], 100, 50) == "[0.0, 0.25, 1.0, 0.75]"


@pytest.mark.parametrize("box", [[10, 10, 5, 20], [10, 10, 10, 20], [0, 0, 120, 20],
                                 [-9, 0, 20, 20], [0, 0, 20], [float("nan"), 0, 5, 5]])
def test_what_is_no_box_of_the_picture_is_an_error(box):
    """Swapped corners, or a width in the place of x2, would be trained as a wrong place."""
    with pytest.raises(ValueError):
        box_to_text(box, 100, 50)


def test_regions_are_asked_for_their_words_or_their_box_at_most_ten_in_a_conversation(convert):
    """Diss. Sec. 4.2: both ways, drawn for each region; the text's box is that of the record."""
    rows = [REGION | {"phrase": f"thing {i}.", "box": [i, 1, 9, 5 + i]} for i in range(44)]
    records, printed = convert(rows)
    assert "1 pictures, 5 conversations, 44 answers (" in printed
    assert [len(record["conversations"]) for record in records] == [20, 20, 20, 20, 8]
    assert len({record["id"] for record in records}) == 5, "two pieces share an id"
    turns = [text for record in records for text in texts(record)]
    ways = {"phrase": 0, "box": 0}
    for i, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        box = box_to_text([i, 1, i + 9, 6 + i], 100, 50)
        asked, way = (LOCATE, "box") if LOCATE in question else (DESCRIBE, "phrase")
        found = {question.split(asked)[1], answer}
        assert found == ({f"thing {i}.", box} if way == "box" else {f"{box}.", f"thing {i}"})
        ways[way] += 1
    assert min(ways.values()) > 12, f"not drawn evenly: {ways}"
    assert records == convert(rows)[0] != convert(rows, None, "--seed", 1)[0]


REFS = [{"ref_id": i, "ann_id": i, "image_id": 7, "category_id": 1, "split": split,
         "file_name": "COCO_train2014_000000000007_0.jpg",
         "sentences": [{"sent": f"man {i}", "raw": "x"}, {"sent": f"left man {i}", "raw": "y"}]}
        for i, split in enumerate(["train"] * 6 + ["val", "testA"])]
INSTANCES = {"images": [{"id": 7, "width": 100, "height": 50, "file_name": "7.jpg"}],
             "annotations": [{"id": i, "image_id": 7, "bbox": [10, 10, 20.5, 30], "category_id": 1}
                             for i in range(8)]}


class Code:
    """What a pickle must not do when it is read."""

    def __reduce__(self):
        return os.system, ("true",)


def test_refcoco_is_read_from_its_pickle_and_from_json_alike(convert, tmp_path):
    """Every name that people gave, of the training split, at most ten in a conversation."""
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol=2))
    records, printed = convert(None, INSTANCES, "--questions", tmp_path / "refs(unc).p")
    assert printed.startswith("RefCOCO: 8 records, 0 left out\n1 of split val, not train\n")
    assert [len(texts(r)) for r in records] == [20, 4]
    assert {r["image"] for r in records} == {"coco/train2017/000000000007.jpg"}
    assert any("[0.1, 0.35, 0.3, 0.65]" in text for text in texts(records[0]))
    assert convert(REFS, INSTANCES)[0] == records
    with pytest.raises(ValueError, match="nothing in it to train on; found 1 of split val, not"):
        convert(REFS[6:], INSTANCES)
    with pytest.raises(ValueError, match="bbox, width, height in a file of their own"):
        convert(REFS)
    with pytest.raises(ValueError, match="annotations are rows with id in field annotations"):
        convert(REFS, {"images": []})


@pytest.mark.parametrize("content, message", [
    (pickle.dumps([Code()]), "asks for the code .*system; only plain data"),
    (b"no pickle", "no pickle of plain data"), (b"", "Ran out of input")])
def test_a_pickle_that_is_more_than_plain_data_is_refused(content, message, convert, tmp_path):
    """A downloaded file never runs code here."""
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(ValueError, match=f"refs.p: .*{message}"):
        convert(None, INSTANCES, "--questions", tmp_path / "refs.p")


def test_of_visual_genome_ten_regions_a_picture_are_drawn(convert):
    """OFFICIAL: ten; sizes and the folder of a picture are in image_data.json."""
    rows = [{"id": i, "regions": [{"phrase": f"thing {j}", "x": j, "y": 1, "width": 9, "height": 9}
                                  for j in range(n)]} for i, n in ((1, 12), (2, 3))]
    data = [{"image_id": i, "width": 100, "height": 50, "url": f"https://x/{folder}/{i}.jpg"}
            for i, folder in ((1, "VG_100K_2"), (2, "VG_100K"))]
    records, printed = convert(rows, data)
    assert printed.startswith("Visual Genome: 2 records, 0 left out\n2 not drawn")
    assert [r["image"] for r in records] == ["vg/VG_100K_2/1.jpg", "vg/VG_100K/2.jpg"]
    assert [len(texts(r)) for r in records] == [20, 6]
    assert records == convert(rows, data)[0] != convert(rows, data, "--seed", 1)[0]
    rows[1]["regions"][0]["x"] = 99
    with pytest.raises(ValueError, match=r"1 of 2 records are bad.*\n.*\[1\]: .*no corners"):
        convert(rows, data)
    assert [len(texts(r)) for r in convert(rows, data, "--skip_bad")[0]] == [20, 4]


# -----------------------------------------------------------------------------
# The mixture by source


def mixture_record(image, question):
    picture = {"image": image} if image else {}
    return {"id": f"{image} {question}", **picture, "model": "kept",
            "conversations": chat(f"<image>\n{question}", "x")}


COCO = "coco/train2017/1.jpg"
MIXTURE = [(None, "Hello.", "sharegpt"), ("gqa/images/1.jpg", "Q?" + SHORT, "gqa"),
           ("ocr_vqa/images/1.jpg", "Q?" + SHORT, "ocr_vqa"), ("vg/VG_100K/1.jpg", "Q?", "vg"),
           ("textvqa/train_images/1.jpg", CAPTION, "textvqa"),
           (COCO, "Q?\nA. x\nB. y" + LETTER, "a_okvqa"), (COCO, "Q?" + SHORT, "vqa"),
           (COCO, "Please provide a " + DESCRIBE + "[0.1, 0.2, 0.3, 0.4].", "refcoco"),
           (COCO, "Please provide the bounding box coordinate of the region this " + LOCATE + "x.",
            "refcoco"), (COCO, "What is unusual?", "llava_instruct")]


def test_the_mixture_is_split_by_source_and_nothing_is_lost(tmp_path, capsys):
    """The released file of 665K records; each goes to one file, unchanged and in its order."""
    records = [mixture_record(image, question) for image, question, _ in MIXTURE] * 2
    (tmp_path / "mix.json").write_text(json.dumps(records))
    academic.main(["split", "--data", str(tmp_path / "mix.json"), "--out", str(tmp_path / "out")])
    expected = {}
    for record, (_, _, source) in zip(records, MIXTURE * 2, strict=True):
        expected.setdefault(source, []).append(record)
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert found == expected
    counts = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert counts == {source: str(len(rows)) for source, rows in found.items()} | {"all": "20"}
    (tmp_path / "mix.json").write_text("[]")
    with pytest.raises(ValueError, match="mix.json: no records in it"):
        academic.main(["split", "--data", f"{tmp_path}/mix.json", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("record, message", [
    (mixture_record("sam/1.jpg", "Q?"), "'sam/1.jpg' is in none of coco, gqa"),
    (7, "no record in LLaVA's format"), ({"image": COCO}, "no record in LLaVA's format"),
    ({"image": 5, "conversations": []}, "no record in LLaVA's format"),
    ({"image": "gqa/1.jpg"}, r"no record in LLaVA's format \(KeyError\('conversations'\)\)")])
def test_what_is_no_record_of_the_mixture_is_named(record, message, tmp_path):
    """File, index, and what is needed; nothing is written."""
    (tmp_path / "mix.json").write_text(json.dumps([mixture_record(None, "Hello."), record]))
    with pytest.raises(ValueError, match=rf"mix.json\[1\].*{message}"):
        academic.main(["split", "--data", str(tmp_path / "mix.json"), "--out", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


# -----------------------------------------------------------------------------
# Diss. Table 4.2


def test_the_road_to_llava_1_5_changes_one_thing_a_row(tmp_path):
    """Every command of runs/road_to_llava_1.5.sh parses, and no row changes more than it says."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "$OUT/asked"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    shutil.copy(f"{ROOT}/requirements.txt", tmp_path / "installed.txt")
    script = [shutil.which("bash"), f"{ROOT}/runs/road_to_llava_1.5.sh"]
    paths = {"VENV": str(tmp_path), "OUT": str(tmp_path / "out")}
    for _ in range(2):                                   # the second time, all is done
        subprocess.run(script, env=os.environ | paths, check=True)
    lines = (tmp_path / "out" / "asked").read_text().replace(f"{tmp_path}/out/", "").splitlines()
    commands = [shlex.split(line.split("train.py ")[1]) for line in lines if "train.py" in line]
    configs = [train.resolve(argv)[0] for argv in commands]
    first = {config.out: config for config in configs if config.stage == 1}
    rows = [config for config in configs if config.stage == 2]
    assert [row.out for row in rows] == [f"row{n}" for n in range(10)] and len(first) == 4
    written = {source for _, _, source in MIXTURE}
    for line in lines:
        if "convert" in line:
            written.add(Path(line.split("--out ")[1].split()[0]).stem)
    changes = []
    for before, row in zip(rows, rows[1:], strict=False):
        sources, earlier = ({Path(file).stem for file in config.data} for config in (row, before))
        assert sources <= written, f"{row.out} reads what nobody has written: {sources - written}"
        parts = [field for field in ("vision", "projector", "llm")
                 if getattr(first[row.init], field) != getattr(first[before.init], field)]
        assert row.projector == first[row.init].projector, "stage 2 refuses another projector"
        changes.append(parts + sorted(sources - earlier))
    assert changes == [["vqav2_plain"], ["vqav2"], ["projector"],
                       ["a_okvqa", "ocr_vqa", "textvqa", "vqa"], ["refcoco", "vg"], ["vision"],
                       ["gqa"], ["sharegpt"], ["llm"]]
