"""What comes from disk (data.py): pictures, JSON files, the checks before step 0, batches, the command."""
import io
import json
import os
import random
import re
import runpy
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_llava
from PIL import Image
from transformers import CLIPImageProcessorPil, LlamaConfig

import data
import images
from data import TEMPLATES, Conversations, Steps, collate, inspect, micro_batches, plan_epoch
from images import load_image, preprocess, view_of
from model import IGNORE
from records import IMAGE, Records, image_path, read_json


def chat(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def noise(width, height, mode="RGB", low=0, high=256):
    pixels = np.random.default_rng(0).integers(low, high, (height, width, 3), np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


def problem_of(record, folder, tmp_path):
    """What the check before step 0 says of one record, or None."""
    (tmp_path / "one.json").write_text(json.dumps([record]))
    records = Records([tmp_path / "one.json"])
    return inspect(Conversations(records, folder, None, None, view_of("crop", 224, 14)))[0].get(0)


def saved(image, **how):
    file = io.BytesIO()
    image.save(file, **how)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------- pixels (Sec. 4.2: X_v)

SIZES = [(1, 1), (1, 7), (224, 224), (225, 223), (223, 500), (640, 480), (333, 500), (31, 29), (448, 300), (301, 997),
         (13, 640)]


@pytest.mark.parametrize("size", [28, 224, 336])
def test_pixels_are_those_of_the_clip_processor_of_transformers(size):
    """Sec. 4.1: g sees what CLIP was trained on; bit for bit transformers' own, odd sizes and upscaling included."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    rng = random.Random(size)
    for w, h in SIZES + [(rng.randint(1, 400), rng.randint(1, 400)) for _ in range(12)]:
        image = noise(w, h)
        X_v = preprocess(image, size)
        want = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
        assert X_v.shape == (3, size, size) and X_v.dtype == torch.float32
        assert torch.equal(X_v, want), f"{w} x {h} at {size}: off by {(X_v - want).abs().max()}; CLIP sees other pixels"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "I;16", "RGB"])
def test_pictures_of_every_mode_load_as_the_clip_processor_has_them(mode, tmp_path):
    """The released code: convert("RGB"), whatever the file holds."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    name = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    noise(41, 33, mode).save(name)
    with Image.open(name) as image:
        assert image.mode == mode
        want = torch.as_tensor(np.asarray(processor(image.convert("RGB"))["pixel_values"][0]))
    assert torch.equal(preprocess(load_image(name), 28), want), f"a {mode} picture reaches CLIP with other pixels"


@pytest.mark.parametrize("orientation, upright", [(1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270),
                                                  (8, Image.Transpose.ROTATE_90), (5, Image.Transpose.TRANSPOSE)])
def test_a_picture_stands_upright_whatever_the_camera_wrote(orientation, upright, tmp_path):
    """Ours (the released code shows such pictures lying on their side): the EXIF orientation is applied."""
    exif, image = Image.Exif(), noise(30, 20)
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    want = image.transpose(upright) if upright is not None else image
    got = load_image(tmp_path / "x.png")
    assert got.size == want.size and got.tobytes() == want.tobytes(), f"orientation {orientation} is shown turned or mirrored"


def levels(image, size):
    """The picture as CLIP sees it, in 0..255."""
    return preprocess(image, size).permute(1, 2, 0).numpy() * images.CLIP_STD * 255 + images.CLIP_MEAN * 255


def test_resizing_only_what_the_crop_keeps_changes_no_pixel_by_more_than_rounding(monkeypatch):
    """Ours: beyond MAX_RESIZED pixels only the crop is resized; the picture is the same up to one level of 255."""
    for w, h in SIZES + [(28, 2000), (2000, 28), (3, 200), (1, 2000), (2000, 1)]:
        monkeypatch.setattr(images, "MAX_RESIZED", 2 ** 26)
        plain = levels(noise(w, h), 28)
        monkeypatch.setattr(images, "MAX_RESIZED", 0)
        worst = np.abs(levels(noise(w, h), 28) - plain).max()
        assert worst < 1.01, f"{w} x {h}: a huge picture would be off by {worst:.0f} levels"


@pytest.mark.parametrize("w, h", [(1, 20000), (20000, 1), (20000, 3), (3, 20001), (1, 2000), (2000, 1)])
def test_extremely_long_pictures_need_neither_the_memory_nor_the_error(w, h):
    """Ours: 20000 x 1 would become 4,480,000 x 224 before the crop; the middle is all that CLIP sees of it."""
    image = noise(w, h, low=64, high=192)                  # nothing overshoots 0 or 255, which would be clipped
    got, near = levels(image, 224), 60                    # the crop shows at most 3 source pixels; 60 are around them
    box = (max(0, (w - near) // 2), max(0, (h - near) // 2))
    middle = image.crop((*box, box[0] + min(w, near + w % 2), box[1] + min(h, near + h % 2)))
    worst = np.abs(got - levels(middle, 224)).max()
    assert worst < 2.01, f"{w} x {h}: not the middle of the picture, off by {worst:.0f} levels"


def test_a_sample_without_pictures_has_an_empty_stack():
    """Sec. 4.1: text-only samples have K = 0 pictures of the right shape, so that batches concatenate."""
    view = view_of("crop", 28, 14)
    assert view.X_v([]).shape == (0, 3, 28, 28)
    assert view.X_v([noise(5, 9), noise(30, 28)]).shape == (2, 3, 28, 28)


def png_header(width, height):
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")


def bad_exif():
    """A JPEG with good pixels, turned, whose EXIF block claims a float (type 11) for a tag that is an integer."""
    tiff = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", 2)
    tiff += struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHIf", 0x0100, 11, 1, 1.5) + struct.pack("<I", 0)
    return saved(noise(40, 30), format="JPEG", exif=b"Exif\0\0" + tiff)


JPEG, PNG = saved(noise(60, 50), format="JPEG"), saved(noise(60, 50), format="PNG")
BROKEN = {"half.jpg": JPEG[:len(JPEG) // 2], "head.jpg": JPEG[:20], "half.png": PNG[:len(PNG) // 2], "empty.jpg": b"",
          "text.jpg": b"<html>404</html>", "bomb.png": png_header(50000, 50000), "crc.png": PNG[:60] + b"\0\0\0\0" + PNG[64:],
          "dds.jpg": b"DDS " + struct.pack("<7I", 124, 0x1007, 8, 8, 0, 0, 0) + bytes(96),
          "half.gif": saved(noise(60, 50), format="GIF")[:900],
          "half.webp": saved(noise(60, 50), format="WEBP")[:300], "half.tif": saved(noise(60, 50), format="TIFF")[:500]}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_whole_picture_is_an_error_with_its_name(name, tmp_path):
    """Ours: a broken picture is reported before step 0 with its file, never replaced by other pixels, never a traceback."""
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=f"{re.escape(name)}: not a readable picture"):
        load_image(tmp_path / name)
    problem = problem_of({"image": name, "conversations": chat(IMAGE, "A cat.")}, str(tmp_path), tmp_path)
    assert problem and name in problem, "the check passes a picture that training cannot load"


def test_a_picture_with_a_damaged_exif_block_is_loaded_or_reported(tmp_path):
    """Ours: cameras and editors write broken EXIF; a bad tag may cost that sample, not the whole check or run."""
    (tmp_path / "x.jpg").write_bytes(bad_exif())
    if problem := problem_of({"image": "x.jpg", "conversations": chat(IMAGE, "A cat.")}, str(tmp_path), tmp_path):
        assert "x.jpg" in problem
        with pytest.raises(ValueError, match="x.jpg: not a readable picture"):
            load_image(tmp_path / "x.jpg")
    else:
        assert load_image(tmp_path / "x.jpg").size == (30, 40), "what passed the check fails or lies on its side in training"


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x", "a/../../x", ".."])
def test_an_image_name_cannot_leave_the_image_folder(name, tmp_path):
    """Ours: data sets are downloaded; a name in one of them must not open any other file."""
    with pytest.raises(ValueError, match=re.escape(f"image {name!r} leaves the image folder")):
        image_path(str(tmp_path), name)
    record = {"image": name, "conversations": chat(IMAGE, "A cat.")}
    assert "leaves the image folder" in problem_of(record, str(tmp_path), tmp_path)


def test_an_image_name_may_go_through_subfolders(tmp_path):
    """The published data sets: names such as 00453/004539375.jpg."""
    for name in ("00453/004539375.jpg", "./x.jpg", "a/../x.jpg", "..x/y.jpg"):
        assert image_path(str(tmp_path), name) == os.path.join(tmp_path, name)


# ------------------------------------------------------------------------------------------------------- JSON (Sec. 3)

A, B = {"id": "ä 🐈", "conversations": chat("Was?", "Ein Kater.")}, {"id": 2, "conversations": chat("\ud83d?", "\u2028 \u0000")}
GOOD_JSON = {"array": json.dumps([A, B]), "pretty array": json.dumps([A, B], indent=2),
             "blank array": f" \n[ {json.dumps(A)}\n, {json.dumps(B)} ]\n\n",
             "lines": f"{json.dumps(A)}\n{json.dumps(B)}\n", "blank lines": f"\n{json.dumps(A)}\r\n\r\n \n{json.dumps(B)}"}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("form", GOOD_JSON)
def test_arrays_and_lines_read_alike(form, bom, tmp_path):
    """Ours: JSON array or JSON lines, with or without a byte order mark; unicode and lone surrogates come back as they were."""
    (tmp_path / "x.json").write_text(bom + GOOD_JSON[form], encoding="utf-8", newline="")
    assert list(read_json(tmp_path / "x.json")) == [A, B]
    records = Records([tmp_path / "x.json"])
    assert len(records) == 2 and [records[0], records[1]] == [A, B], "a record changes on its way to the worker"


def test_unescaped_unicode_reads_as_written(tmp_path):
    """Ours: UTF-8, as published; U+2028 is no line end."""
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "ä\u2028🐈"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(read_json(tmp_path / "x.jsonl")) == [{"id": "ä\u2028🐈"}]


BAD_JSON = {
    "missing comma": ('[{"a": 1}\n {"b": 2}]', "line 2, column 2"),
    "missing value": ('[{"a": 1},\n , {"b": 2}]', "line 2, column 2"),
    "bad value": ('[\n{"a": 1},\n{"b": x}]', "line 3, column 7"),
    "cut off after a comma": ('[{"a": 1},\n', "bad JSON at line"),
    "cut off between records": ('[{"a": 1}', "bad JSON at line"),
    "cut off within a record": ('[{"a": 1},\n {"b": "x', "line 2, column 8"),
    "garbage after the array": ('[{"a": 1}]\n oops', "line 2, column 2"),
    "two arrays": ('[{"a": 1}]\n[{"b": 2}]', "line 2, column 1"),
    "bad line": ('{"a": 1}\n{"b": }\n{"c": 3}', "line 2, column 7"),
    "two records on a line": ('{"a": 1}\n{"b": 2} {"c": 3}', "line 2, column 10"),
    "object over lines": ('{\n"a": [1]\n}', "line 1, column 2"),
    "not UTF-8": (b'[{"a": "\xff"}]', "utf-8"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json_is_named_with_its_place(kind, tmp_path):
    """Ours: a damaged or half-copied file stops the run; whatever was read silently would be another data set."""
    text, place = BAD_JSON[kind]
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"x\.json: .*" + place):
        print("read without an error:", list(read_json(tmp_path / "x.json")))


@pytest.mark.parametrize("text", ["", " \n", "[]", "\ufeff[ ]"])
def test_a_file_without_records_is_an_error(text, tmp_path):
    """Ours: an empty file among several would go unnoticed."""
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json: no records in it"):
        Records([tmp_path / "x.json"])


def test_a_missing_file_is_an_error(tmp_path):
    """Ours: the path that was typed, in the message."""
    with pytest.raises(FileNotFoundError, match="nowhere.json: no such file"):
        Records([tmp_path / "nowhere.json"])


def test_every_sample_is_named_by_file_index_and_id(tmp_path):
    """Ours: every message about a sample names file, index there, and id; also over several files."""
    files = {"a.json": [{"id": 5}, {"id": "x"}, {"id": 0}], "b.json": [["no object"]], "c.json": [{}, {"id": "z"}]}
    for name, records in files.items():
        (tmp_path / name).write_text(json.dumps(records))
    records = Records([tmp_path / name for name in files])
    assert [records.where(i) for i in range(len(records))] == [
        "a.json[0] (id 5)", "a.json[1] (id x)", "a.json[2] (id 0)", "b.json[0]", "c.json[0]", "c.json[1] (id z)"]
    assert records[4] == {} and records[3] == ["no object"] and records.source(5) == (tmp_path / "c.json", 1)


# ------------------------------------------------------------------------------------------------ the check of a record


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("a.png", "b.png"):
        noise(20, 30).save(folder / name)
    (folder / "text.jpg").write_text("not found")
    return str(folder)


ONE = chat("<image>\nWhat?", "A cat.")
PROBLEMS = [
    (["a"], "a list where an object with id, image and conversations belongs"),
    ("a", "a str where an object"),
    ({"image": "a.png"}, "no conversations; a list of {from, value} turns is needed"),
    ({"conversations": []}, "no conversations"),
    ({"conversations": {"from": "human"}}, "no conversations"),
    ({"conversations": ["Hi?", "Hi."]}, "turn 0 is not {from, value} with text in value"),
    ({"conversations": [*chat("Hi?"), {"from": "gpt", "value": None}]}, "turn 1 is not {from, value}"),
    ({"conversations": chat("Hi?", "Hi.")[::-1]}, "turn 0 is from 'gpt' where 'human' belongs; turns alternate human, gpt"),
    ({"conversations": [{"from": "system", "value": "x"}, *chat("Hi?")]}, "turn 0 is from 'system' where 'human' belongs"),
    ({"conversations": [{"value": "Hi?"}, *chat("Hi?")]}, "turn 0 is from None"),
    ({"conversations": chat("Hi?", " \n")}, "turn 1 (gpt) is empty"),
    ({"conversations": chat("", "Hi.")}, "turn 0 (human) is empty"),
    ({"image": "a.png", "conversations": chat("<image>", "Is <image> one?")},
     "turn 1 (gpt) holds <image>; images belong in human turns"),
    ({"conversations": chat("Hi?", "Hi.", "And?")}, "3 turns: the last question has no answer"),
    ({"image": 5, "conversations": ONE}, "image is neither a file name nor a list of file names"),
    ({"image": ["a.png", None], "conversations": ONE}, "image is neither a file name nor a list"),
    ({"image": ["a.png", ""], "conversations": ONE}, "image is neither a file name nor a list"),
    ({"image": {"file": "a.png"}, "conversations": ONE}, "image is neither a file name nor a list"),
    ({"conversations": ONE}, "1 <image> tags for 0 images; each image needs one tag in a human turn"),
    ({"image": "a.png", "conversations": chat("Hi?", "Hi.")}, "0 <image> tags for 1 image; each image needs one tag"),
    ({"image": "a.png", "conversations": chat("<image><image>", "Hi.")}, "2 <image> tags for 1 image;"),
    ({"image": ["a.png", "b.png"], "conversations": ONE}, "1 <image> tags for 2 images;"),
    ({"image": "no.png", "conversations": ONE}, "image 'no.png' is not in "),
    ({"image": ["a.png", "no.png"], "conversations": chat("<image><image>", "Hi.")}, "image 'no.png' is not in "),
    ({"image": "text.jpg", "conversations": ONE}, "text.jpg"),
    ({"image": [".", "a.png"], "conversations": chat("<image><image>", "Hi.")}, "image '.'"),
    ({"image": "../a.png", "conversations": ONE}, "image '../a.png' leaves the image folder"),
    ({"conversations": chat("Hi?", "Hi \ud83d")}, "turn 1 (gpt)"),
]


@pytest.mark.parametrize("record, message", PROBLEMS, ids=[m for _, m in PROBLEMS])
def test_what_is_wrong_with_a_record_is_said(record, message, pictures, tmp_path):
    """Ours: everything that would fail, or train on nonsense, hours later is a message before step 0."""
    found = problem_of(record, pictures, tmp_path)
    assert message in (found or ""), f"{record} would be trained on" if found is None else f"the message is: {found}"


def test_good_records_have_no_problem(pictures, tmp_path):
    """Sec. 4.2: none, one or several pictures; one name or a list of names."""
    for names, text in ((None, "Hi?"), ([], "Hi?"), ("", "Hi?"), ("a.png", "<image>"), (["a.png"], "<image>\nWhat?"),
                        (["a.png", "b.png"], "<image>\nand\n<image>?"), (["a.png", "a.png"], "<image><image>")):
        assert problem_of({"image": names, "conversations": chat(text, "Hi.")}, pictures, tmp_path) is None
    assert problem_of({"conversations": chat("Hi?", "Hi.")}, None, tmp_path) is None, "text alone needs no image folder"
    problem = problem_of({"image": "a.png", "conversations": ONE}, None, tmp_path)
    assert problem == "has an image, but no image folder is given (--images DIR)"


# ------------------------------------------------------------------------------------------------------ a small world


def write_world(folder, n=22):
    """n good samples in folder/world.json, pictures in folder/images: every fifth text only, every seventh two images."""
    os.makedirs(folder / "images" / "sub", exist_ok=True)
    rng, records = random.Random(0), []
    for i in range(n):
        Image.new("RGB", (10 + i, 20), (i, 0, 0)).save(folder / "images" / "sub" / f"{i}.png")
        image, question = {"image": f"sub/{i}.png"}, "<image>\nWhat?"
        if i % 5 == 4:
            image, question = {}, "Hi?"
        elif i % 7 == 6:
            image, question = {"image": [f"sub/{i}.png", "sub/0.png"]}, "<image>\nand\n<image>\nSame?"
        answers = ["cat " * rng.randint(1, 9) for _ in range(rng.randint(1, 3))]
        turns = chat(*(text for j, answer in enumerate(answers) for text in ("Why?" if j else question, answer)))
        records.append({"id": f"x{i}", **image, "conversations": turns})
    (folder / "world.json").write_text(json.dumps(records))
    return records


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def conversations(world, **more):
    records = Records([world / "world.json"])
    return Conversations(records, world / "images", byte_tokenizer(), TEMPLATES["vicuna_v1"], view_of("crop", 28, 14), **more)


def test_the_draw_of_eq_2_is_made_anew_each_epoch_and_repeats_with_the_seed(world):
    """Eq. (2): drawn per sample and epoch; a function of (seed, epoch, sample), so that a resumed run sees the same."""
    places = lambda dataset, epoch: [dataset.encoded(i, epoch)[3][0]["value"].startswith(IMAGE) for i in range(len(dataset))]
    one = [places(conversations(world, seed=3), epoch) for epoch in range(20)]
    assert one == [places(conversations(world, seed=3), epoch) for epoch in range(20)], "a resumed run would see other samples"
    assert one != [places(conversations(world, seed=4), epoch) for epoch in range(20)], "the seed does nothing"
    moving = [i for i in range(22) if i % 5 != 4 and i % 7 != 6]
    assert all({epoch[i] for epoch in one} == {True, False} for i in moving), "a sample's image never moves"
    assert len({tuple(epoch[i] for epoch in one) for i in moving}) == len(moving), "all samples move in step"


def test_a_data_set_gives_samples_with_their_pictures_and_questions_that_match(world):
    """Sec. 4.2: ids, labels and one X_v a picture; `question` is the sample up to its first answer."""
    dataset = conversations(world)
    for i in range(len(dataset)):
        sample, (question, answer) = dataset[0, i, True], dataset.question(i)
        start = min(t for t, label in enumerate(sample["labels"]) if label != IGNORE)
        assert question["input_ids"] == sample["input_ids"][:start], f"sample {i}: the prompt is not what training saw"
        assert answer == dataset.records[i]["conversations"][1]["value"]
        assert len(sample["X_v"]) * 4 == sample["input_ids"].count(dataset.tokenizer.convert_tokens_to_ids(IMAGE))
        copy = dataset[0, i, False]
        assert copy["input_ids"] == sample["input_ids"] and set(copy["labels"]) == {IGNORE}, "a filling copy would be scored"


def test_pictures_of_dropped_turns_are_dropped_with_them(tmp_path):
    """Sec. 4.1: as many pictures as placeholders, also after truncation; a sample that cannot fit names itself."""
    os.mkdir(tmp_path / "images")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / "images" / name)
    turns = chat("<image>\nOne?", "1", "<image>\nTwo?", "2" * 200)
    (tmp_path / "world.json").write_text(json.dumps([{"id": 7, "image": ["a.png", "b.png"], "conversations": turns}]))
    make = lambda limit: conversations(tmp_path, max_length=limit)
    assert make(300).encoded(0)[2] == ["a.png"] and len(make(300)[0, 0, True]["X_v"]) == 1
    assert make(900).encoded(0)[2] == ["a.png", "b.png"] and len(make(900)[0, 0, True]["X_v"]) == 2
    with pytest.raises(ValueError, match=r"^world\.json\[0\] \(id 7\): \d+ tokens \(4 of them visual\).*the limit is 50$"):
        make(50)[0, 0, True]


# -------------------------------------------------------------------------------------------------------------- batches

RNG = np.random.default_rng(0)      # about LLaVA-Instruct: conversations, descriptions, reasoning; and a mix with a long tail
LENGTHS = np.concatenate([RNG.normal(650, 150, 7400), RNG.normal(450, 50, 2800), RNG.normal(520, 70, 9800)])
MIXED = np.concatenate([296 + RNG.lognormal(4.5, 0.8, 19000), RNG.lognormal(6.2, 0.9, 1000)])
LENGTHS, MIXED = (RNG.permutation(lengths.astype(int).clip(40, 2048)) for lengths in (LENGTHS, MIXED))


@pytest.mark.parametrize("n, size", [(20000, 32), (1601, 32), (31, 32), (32, 32), (7, 1)])
def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own(n, size):
    """Sec. 4.2 (epochs, batch size): each sample once an epoch, another order in each, the same again from the seed."""
    plans = [plan_epoch(LENGTHS[:n], size, 7, epoch) for epoch in range(3)]
    for plan in plans:
        assert sorted(np.concatenate(plan)) == list(range(n)), "a sample is seen twice or never"
        assert [len(batch) for batch in plan] == [size] * (n // size) + [n % size] * (n % size > 0), "batches are not full"
    flat = [np.concatenate(plan).tolist() for plan in plans]
    assert flat[0] == np.concatenate(plan_epoch(LENGTHS[:n], size, 7, 0)).tolist(), "a resumed run gets another order"
    if n > size:
        assert flat[0] != flat[1] != flat[2], "every epoch has the same order"
        assert flat[0] != np.concatenate(plan_epoch(LENGTHS[:n], size, 8, 0)).tolist(), "the seed does nothing"


def test_less_than_3_percent_of_a_batch_is_padding_and_batches_stay_mixed():
    """Ours: length windows; the order is still random, so that the lengths of one batch do not tell those of the next."""
    for lengths, micro in ((LENGTHS, 32), (LENGTHS, 4), (MIXED, 16), (MIXED, 4)):
        plan, padded = plan_epoch(lengths, 32, 0, 0), 0
        for batch in plan:
            for keys in micro_batches(batch, lengths, 0, micro, 1, 0):
                padded += len(keys) * max(lengths[i] for _, i, _ in keys)
        waste = 1 - lengths.sum() / padded
        assert waste < 0.03, f"{100 * waste:.1f}% of all tokens would be padding in micro-batches of {micro}"
    plan = plan_epoch(LENGTHS, 32, 0, 0)
    means = np.array([LENGTHS[batch].mean() for batch in plan[:-1]])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1, "batches come sorted by length"


def test_the_batches_of_a_small_data_set_mix_anew_in_each_epoch():
    """Ours: data of one's own may be smaller than one length window; the same samples would share a batch in every epoch."""
    lengths = np.arange(100, 420)                                        # no two are equally long
    one, two = ({frozenset(batch.tolist()) for batch in plan_epoch(lengths, 32, 0, epoch)} for epoch in (0, 1))
    assert not one & two, f"{len(one & two)} of 10 batches hold the same samples in both epochs"


@pytest.mark.parametrize("micro", [1, 3, 4, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [32, 13, 5, 1])
def test_ranks_share_a_batch_without_overlap_and_with_equal_work(n, world_size, micro):
    """Eq. (3) over the global batch: every sample scored on one rank; all ranks have equally many and large micro-batches."""
    batch = np.random.default_rng(n).permutation(500)[:n]
    shares = [micro_batches(batch, LENGTHS, 2, micro, world_size, rank) for rank in range(world_size)]
    scored = [i for share in shares for keys in share for epoch, i, scored in keys if scored]
    assert sorted(scored) == sorted(batch), "a sample counts twice or never"
    sizes = [[len(keys) for keys in share] for share in shares]
    assert all(s == sizes[0] for s in sizes) and 0 < min(sizes[0]) and max(sizes[0]) <= micro, f"ranks get {sizes}"
    everything = [key for share in shares for keys in share for key in keys]
    assert len(everything) - n < world_size and all(epoch == 2 and i in batch for epoch, i, _ in everything), "too much filling"


def test_training_is_a_function_of_the_step_number(world):
    """Ours: Steps[k] does not depend on what was asked before, so a run resumes at any step; each sample once an epoch."""
    dataset = conversations(world, seed=5)
    lengths = np.array([len(dataset.encoded(i)[0]) for i in range(len(dataset))])
    indices = np.array([i for i in range(len(dataset)) if i not in (3, 8)])
    make = lambda rank: Steps(dataset, indices, lengths, 8, 2, world_size=2, rank=rank)
    straight, jumping = [[make(rank)[step] for step in range(6)] for rank in (0, 1)], make(1)
    assert make(0).per_epoch == 3
    for step in (5, 0, 3, 1, 4, 2, 2):
        for one, other in zip(jumping[step], straight[1][step], strict=True):
            assert one["ids"] == other["ids"] and all(torch.equal(one[k], other[k]) for k in ("input_ids", "labels", "X_v"))
    for epoch in (0, 1):
        seen = [name for rank in straight for step in rank[3 * epoch:3 * epoch + 3] for micro in step
                for name, labels in zip(micro["ids"], micro["labels"]) if (labels != IGNORE).any()]
        assert sorted(seen) == sorted(dataset.records.where(int(i)) for i in indices), f"epoch {epoch} is not each sample once"


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_pads_on_the_side_that_it_is_told(side):
    """Sec. 4.2: padding is neither attended to nor scored; pictures of all rows follow each other."""
    samples = [{"where": "a", "input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7], "X_v": torch.ones(2, 3, 4, 4),
                "sizes": [(4, 4), (8, 4)]},
               {"where": "b", "input_ids": [8], "labels": [8], "X_v": torch.zeros(0, 3, 4, 4), "sizes": []},
               {"where": "c", "input_ids": [0, 1], "labels": [IGNORE, 1], "X_v": torch.full((1, 3, 4, 4), 2.0),
                "sizes": [(2, 4)]}]
    batch, left = collate(samples, pad_id=9, side=side), side == "left"
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8] if left else [8, 9, 9], [9, 0, 1] if left else [0, 1, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], *([[-100, -100, 8], [-100, -100, 1]] if left else
                                                        [[8, -100, -100], [-100, 1, -100]])]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1] if left else [1, 0, 0], [0, 1, 1] if left else [1, 1, 0]]
    assert batch["X_v"][:, 0, 0, 0].tolist() == [1, 1, 2] and batch["ids"] == ["a", "b", "c"]
    assert batch["sizes"] == [(4, 4), (8, 4), (2, 4)]


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("llm"))
    LlamaConfig().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(world, capsys):
    """(exit code, printed text) of `python data.py ARGS --images ...`, without worker processes."""
    def command(name, *args, file="world.json"):
        code = data.main([name, str(world / file), "--images", str(world / "images"), "--workers", "0", *map(str, args)])
        return code, capsys.readouterr().out
    return command


def test_check_passes_good_data(run, llm):
    """Ours: exit code 0 and the count; with a language model the labels are made too."""
    assert run("check") == (0, "22 samples, 0 bad\n")
    assert run("check", "--llm", llm) == (0, "22 samples, 0 bad\n")


def test_check_lists_every_bad_sample(run, world, llm):
    """Ours: exit code 1; all of them with file, index and id, so that one run finds what has to be mended."""
    records = json.loads((world / "world.json").read_text())
    for i in range(50):
        records.append({"id": f"bad{i}", "image": f"gone{i}.jpg", "conversations": chat("<image>", "A cat.")})
    records += [{"id": "long", "conversations": chat("Hi?", "cat " * 3000)},
                {"id": "half", "conversations": chat("Hi?", "\ud83d")}, None]
    (world / "bad.json").write_text(json.dumps(records))
    code, out = run("check", file="bad.json")
    assert code == 1 and "75 samples, 52 bad\n" in out, out[-300:]
    for i in range(50):
        assert f"bad.json[{22 + i}] (id bad{i}): image 'gone{i}.jpg' is not in " in out
    assert "bad.json[73] (id half): " in out and "bad.json[74]: a NoneType where an object" in out
    code, out = run("check", "--llm", llm, file="bad.json")
    assert code == 1 and "75 samples, 53 bad\n" in out
    assert re.search(r"bad\.json\[72\] \(id long\): 12\d+ tokens .* a single answer left, the limit is 2048\n", out)


def test_check_prints_what_no_terminal_can_show(world, capsys):
    """Ours: an id that is half a surrogate pair must not end the list of problems with a traceback."""
    (world / "odd.json").write_text(json.dumps([{"id": "\ud83d", "conversations": []}, {"id": "next", "conversations": []}]))
    assert data.main(["check", str(world / "odd.json"), "--workers", "0"]) == 1
    assert "odd.json[1] (id next): no conversations" in capsys.readouterr().out


def test_worker_processes_find_what_one_process_finds(world, capsys, llm):
    """Ours: --workers makes the check faster, not different."""
    outs = []
    for workers in ("0", "2"):
        data.main(["stats", str(world / "world.json"), "--images", str(world / "images"), "--llm", llm, "--workers", workers])
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]


def test_show_marks_what_is_scored(run, world, llm):
    """Table 2: the answers and STOP, and nothing else, between « and »."""
    code, out = run("show", "--llm", llm, "--image_position", "first", "--image_size", "28")
    turns = json.loads((world / "world.json").read_text())[0]["conversations"]
    head, text = out.split("\n", 1)
    assert code == 0 and head.startswith("world.json[0] (id x0), template vicuna_v1, ") and "images ['sub/0.png']" in head
    want = f"{data.USER_SYSTEM} USER: [4 x <image>]\nWhat? ASSISTANT:« {turns[1]['value'].strip()}</s>»"
    want += "".join(f"USER: {q['value']} ASSISTANT:« {a['value'].strip()}</s>»" for q, a in zip(turns[2::2], turns[3::2]))
    assert text == want + "\n", "what is shown as scored is not what is scored"


def test_show_with_a_checkpoint_uses_its_template_and_its_tokens_per_image(run, tmp_path):
    """Ours: a checkpoint knows its template (here the paper's, Table 2) and its N."""
    model = tiny_llava()
    model.meta["template"] = "llava_v0"
    model.save_pretrained(tmp_path / "model")
    code, out = run("show", "--model", tmp_path / "model", "--index", "1")
    assert code == 0 and "template llava_v0" in out and "[4 x <image>]" in out
    assert re.search(r"###Assistant:« (cat ?)+###»", out), out


def test_a_checkpoint_that_names_no_template_needs_the_flag(run, tmp_path):
    """Ours: a folder in llava-hf layout from elsewhere says nothing of its template; a guess would be another prompt."""
    tiny_llava().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="--template"):
        run("show", "--model", tmp_path / "model")
    assert "template llava_v0" in run("show", "--model", tmp_path / "model", "--template", "llava_v0")[1]


@pytest.mark.parametrize("args, message", [
    ([], "show needs --model DIR or --llm DIR"), (["--llm", "LLM", "--index", "22"], "0 to 21"),
    (["--llm", "LLM", "--index", "-1"], "0 to 21"),
    (["--llm", "LLM", "--template", "chatml_direct"], "chatml_direct needs the token")])
def test_show_refuses_what_it_cannot_show(args, message, run, llm):
    """Ours: the message says what is allowed."""
    with pytest.raises(ValueError, match=message):
        run("show", *[llm if a == "LLM" else a for a in args])


def test_show_of_a_bad_sample_says_which_and_why(run, world, llm):
    """Ours: file, index, id and the problem."""
    records = [{"id": 9, "conversations": ONE}, {"id": "long", "conversations": chat("Hi?", "cat " * 3000)}]
    (world / "one.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"one\.json\[0\] \(id 9\): 1 <image> tags for 0 images"):
        run("show", "--llm", llm, file="one.json")
    with pytest.raises(ValueError, match=r"one\.json\[1\] \(id long\): \d+ tokens .* the limit is 2048"):
        run("show", "--llm", llm, "--index", "1", file="one.json")


def test_stats_measures_what_training_would_see(run, world, llm):
    """Sec. 4.2: turns, images, token lengths, what is scored and what would be trimmed, per file."""
    records = json.loads((world / "world.json").read_text())
    code, out = run("stats")
    assert code == 0 and "world.json: 22 samples, 0 bad" in out and "tokens per sample" not in out
    assert re.search(r"images +21 in 18 samples, 4 text only", out), out
    code, out = run("stats", "--llm", llm, "--image_size", "28")
    dataset = conversations(world)
    lengths = [len(dataset.encoded(i)[0]) for i in range(22)]
    scored = sum(len(f" {t['value'].strip()}") + 1 for r in records for t in r["conversations"][1::2])
    assert f"max {max(lengths)}   (one image = 4)" in out and f"scored tokens         {scored} of {sum(lengths)}" in out, out
    assert "0 samples without any" in out and "0 samples lose 0 answers" in out
    answers = [len(r["conversations"]) // 2 for r in records]
    limit = max(length for length, n in zip(lengths, answers) if n == 1)
    code, out = run("stats", "--llm", llm, "--image_size", "28", "--max_length", limit + 20)
    trimmed = sum(len(conversations(world, max_length=limit + 20).encoded(i)[3]) // 2 < n for i, n in enumerate(answers))
    assert trimmed and f"{trimmed} samples lose " in out, out


def test_the_command_line_ends_in_one_line_for_a_typing_error(monkeypatch, world):
    """Ours: a wrong path is a message, not a traceback; an unknown or shortened flag is refused."""
    monkeypatch.setattr(sys, "argv", ["data.py", "check", str(world / "nowhere.json")])
    with pytest.raises(SystemExit, match=r"^error: .*nowhere\.json: no such file$"):
        runpy.run_path(data.__file__, run_name="__main__")
    for args in (["check"], ["cheque", "x"], ["check", "x", "--imag", "y"], ["check", "x", "--template", "vicuna"]):
        with pytest.raises(SystemExit) as stop:
            data.main(args)
        assert stop.value.code == 2
