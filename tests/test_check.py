"""What a picture shows, where it is found, and what `python data.py check` says of samples."""
import io
import json
import os
import unicodedata

import numpy as np
import pytest
from conftest import byte_tokenizer, chat
from PIL import Image

import data as data_module
from data import Conversations
from parts.check import inspect_data
from parts.pictures import check_image, image_path, image_size, load_image, open_image
from parts.records import Records
from parts.templates import TEMPLATES
from parts.views import view_of

NOISE = np.random.default_rng(0).integers(0, 256, (6, 8, 4), np.uint8)


def saved(image, form="PNG", **options):
    """A picture as a file in memory."""
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def pixels(*args, **options):
    return np.asarray(load_image(saved(*args, **options))).tolist()


def record(*texts, **more):
    return {"conversations": chat(*texts), **more}


def data_of(folder, template="vicuna_v1"):
    """The data set of folder/chat.json."""
    return Conversations(Records([folder / "chat.json"]), folder, byte_tokenizer(),
                         TEMPLATES[template], view_of("crop", 28, 14))


# -----------------------------------------------------------------------------
# What a picture shows


def test_grey_of_16_bits_is_shown_in_8(tmp_path):
    """Pillow's own convert makes all above 255 white; a viewer shows the high byte. A TIFF may be
    big-endian, or count from white. Training and sampling read the same."""
    grey = Image.fromarray(np.array([[0, 30000, 60000]], np.uint16))
    big = Image.frombytes("I;16B", (3, 1), np.array([[0, 30000, 60000]], ">u2").tobytes())
    want = [[[0] * 3, [117] * 3, [234] * 3]]
    assert pixels(grey) == pixels(grey, "TIFF") == pixels(big, "TIFF") == want
    assert pixels(grey, "TIFF", tiffinfo={262: 0}) == [[[255] * 3, [138] * 3, [21] * 3]]
    grey.save(tmp_path / "a.png")
    ramp = record("<image>\nWhat?", "A ramp.", image="a.png")
    (tmp_path / "chat.json").write_text(json.dumps([ramp]))
    [(_, picture)] = data_of(tmp_path).pictures(0)
    for shown in (picture, open_image(str(tmp_path / "a.png"))):
        assert np.asarray(shown).tolist() == want


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_of_32_bits_are_refused_by_name(mode, tmp_path):
    """Nobody can say which of them is white; the check and the loader agree."""
    Image.new(mode, (4, 4), 7).save(tmp_path / "a.tif")
    for read in (load_image, lambda path: check_image(*os.path.split(path))):
        with pytest.raises(ValueError, match="a.tif.*32-bit numbers.*8 or 16 bits"):
            read(tmp_path / "a.tif")


def test_what_is_transparent_is_white():
    """Black letters on nothing are not black on black, and what was hidden stays hidden."""
    disc = Image.fromarray(NOISE.copy())
    disc.putalpha(Image.new("L", disc.size, 0))
    disc.putpixel((2, 3), (0, 0, 0, 255))
    disc.putpixel((3, 3), (0, 0, 0, 127))
    want = np.full((6, 8, 3), 255)
    want[3, 2] = 0
    want[3, 3] = 128
    for form in ("PNG", "TIFF"):
        assert pixels(disc, form) == want.tolist()
    grey = Image.new("L", (2, 1), 0)
    grey.putpixel((1, 0), 9)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    half = Image.new("LA", (2, 1), (0, 0))
    half.putpixel((1, 0), (9, 255))
    deep = Image.fromarray(np.array([[5, 9 << 8]], np.uint16))
    for image, options in ((half, {}), (grey, {"transparency": 0}), (palette, {"transparency": 0}),
                           (palette, {"transparency": b"\0\xff"}), (deep, {"transparency": 5})):
        assert pixels(image, **options) == [[[255] * 3, [9] * 3]], image.mode


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_an_opaque_picture_has_the_pixels_that_convert_gives(mode):
    """Whoever has no transparency trains on the released code's pixels."""
    image = Image.fromarray(NOISE[..., :3]).convert("LA" if mode == "PA" else mode).convert(mode)
    file = saved(image, "TIFF")
    assert pixels(image, "TIFF") == np.asarray(Image.open(file).convert("RGB")).tolist()


def test_a_picture_stands_upright_whatever_its_bits():
    """EXIF's orientation; `image_size` says the same from the header alone."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("RGB", "I;16", "RGBA"):
        file = saved(Image.new(mode, (30, 20)), exif=exif)
        assert load_image(file).size == image_size(file) == (20, 30), mode


@pytest.mark.parametrize("content, says", [
    (saved(Image.new("RGB", (4, 4)), "PPM").getvalue(), "none of JPEG, PNG, GIF, BMP, WEBP, TIFF"),
    (b"<html>", "none of JPEG"), (saved(Image.fromarray(NOISE)).getvalue()[:70], "truncated"),
    (saved(Image.new("RGB", (1, 600))).getvalue(), "too thin"), (None, "Is a directory")])
def test_what_is_no_picture_is_named(content, says, tmp_path):
    """By the check, before step 0, and by the loader."""
    if content is None:
        (tmp_path / "a.png").mkdir()
    else:
        (tmp_path / "a.png").write_bytes(content)
    for read in (load_image, lambda path: check_image(*os.path.split(path))):
        with pytest.raises(ValueError, match=f"a.png.*: not a readable picture .*{says}"):
            read(tmp_path / "a.png")


# -----------------------------------------------------------------------------
# Where a picture is


def test_a_name_is_found_where_it_can_mean_one_file_only(tmp_path):
    """Windows' slashes, absolute paths into the folder, the Unicode form that macOS writes, and
    another extension: of LLaVA-1.5's OCR-VQA all names end in .jpg, the pictures do not."""
    composed, decomposed = (unicodedata.normalize(form, "Bücher") for form in ("NFC", "NFD"))
    (tmp_path / decomposed).mkdir()
    there = str(tmp_path / decomposed / f"{decomposed}.png")
    Image.new("RGB", (4, 4)).save(there)
    for name in (f"{decomposed}\\{decomposed}.png", there, f"{composed}/{composed}.png",
                 f"{composed}\\{composed}.jpg", f"./{composed}//{decomposed}"):
        assert image_path(tmp_path, name) == there, name
        check_image(tmp_path, name)
    for name in (f"{composed}/two.jpg", f"{composed}/{composed}.txt", f"gone/{composed}.jpg"):
        assert image_path(tmp_path, name) == str(tmp_path / name), "another picture was guessed"
    Image.new("RGB", (4, 4)).save(tmp_path / decomposed / f"{composed}.jpg")
    with pytest.raises(ValueError, match="one of them must go"):
        image_path(tmp_path, f"{composed}/{composed}.webp")


def test_what_is_not_found_is_said_with_what_is_there(tmp_path):
    """A name that leaves the folder is never followed."""
    Image.new("RGB", (4, 4)).save(tmp_path / "1.jpg")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "2.jpg")
    (tmp_path / "images" / "3.jpg").symlink_to("gone.jpg")
    for name, says in (("../1.jpg", "leaves the image folder"), ("..\\1.jpg", "leaves"),
                       (str(tmp_path / "1.jpg"), "leaves"), ("C:\\data\\2.jpg", "; 2.jpg is there"),
                       ("coco/2.jpg", "; 2.jpg is there"), ("/data/2.jpg", "; 2.jpg is there"),
                       ("3.jpg", "a link to gone.jpg, which is"), ("4.jpg", "is not in"),
                       ("a\0b.jpg", "null"), ("x" * 300, "too long")):
        with pytest.raises((FileNotFoundError, ValueError), match=says):
            check_image(tmp_path / "images", name)


# -----------------------------------------------------------------------------
# What the check says of samples


def problems_of(records, folder, template="vicuna_v1"):
    (folder / "chat.json").write_text(json.dumps(records))
    return inspect_data(data_of(folder, template))[0]


@pytest.mark.parametrize("template, bad", [
    ("llava_v0", {0: "###", 1: "</s>", 2: "<unk>"}), ("vicuna_v1", {1: "</s>", 2: "<unk>"}),
    ("plain", {1: "</s>", 2: "<unk>"})])
def test_texts_that_hold_STOP_or_a_special_token_are_bad(template, bad, tmp_path):
    """Or the answers of the trained model end at their first heading."""
    records = [record("Tell me.", "### Cats\nThey purr."), record("Tell me.", "It is </s>."),
               record("What is <unk>?", "A token."), record("Tell me.", "# Cats\n\n* They purr.")]
    found = problems_of(records, tmp_path, template)
    assert found.keys() == bad.keys()
    for i, word in bad.items():
        assert f"holds {word!r}" in found[i] and template in found[i], found[i]


def test_without_a_template_the_check_lists_those_that_would_not_do(tmp_path, capsys):
    """Who checks data before there is a model hears of it, too."""
    records = [record("What?", "A."), record("What?", "### A.")]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    command = ["check", str(tmp_path / "chat.json"), "--workers", "0"]
    assert data_module.main(command) == 0
    printed = capsys.readouterr().out
    assert "--template llava_v0 would refuse 1 samples, which hold its '###'" in printed
    assert "chat.json[1]" in printed and "vicuna_v1" not in printed
    assert data_module.main([*command, "--template", "llava_v0"]) == 1
