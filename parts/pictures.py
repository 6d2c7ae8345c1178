"""
One picture on disk: where it is, how it is read, and what may be wrong with it. No torch in here.

Every part of the project reads pictures through `load_image`, so that a picture which passed the
check looks the same to training, sampling, serving and retrieval.
"""
import base64
import functools
import io
import os
import struct
import unicodedata
import warnings
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from parts.shards import PICTURE_EXTENSIONS, Place

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")       # all that Pillow is let to read
# All that Pillow's decoders raise; the last three come with damaged EXIF and TIFF.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, MemoryError,
              struct.error, TypeError, KeyError)
ANY_EXTENSION = ".*"
EXIF_ORIENTATION = 0x0112
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262
MAX_RATIO = 500                          # sides; 1 x 2000 pixels would be resized to 224 x 448,000

# Twice Pillow's own limit, 179 megapixels, is still an error.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


@contextmanager
def opened(source, name=None):
    """A picture (path, Place or file object, called `name` in errors) whose header is read.

    Raises FileNotFoundError, and ValueError for what is no picture of FORMATS, is cut off, or is
    far too large or too thin: of a thin strip, a square crop would show almost nothing.
    """
    name = name or source
    try:
        if isinstance(source, Place):
            source = io.BytesIO(source.read())
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            if max(width, height) > MAX_RATIO * min(width, height):
                raise ValueError(f"{width} x {height} pixels are too thin; one side may be at "
                                 f"most {MAX_RATIO} times the other")
            yield image
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        why = error                      # but for an unknown format, where Pillow prints an object
        if isinstance(error, UnidentifiedImageError):
            why = f"its format is none of {', '.join(FORMATS)}"
        raise ValueError(f"{name}: not a readable picture ({why})") from error


def load_image(source, name=None):
    """A picture as RGB, upright, in 8 bits. Raises as `opened` does."""
    with opened(source, name) as image:
        return upright_rgb(image)


def upright_rgb(image):
    """An open picture as a viewer shows it on white paper.

    OURS: the EXIF orientation is applied; the official code shows such pictures to the model lying
    on their side. Grey, palette and CMYK go through Pillow's convert("RGB"), as there.
    """
    if image.mode in ("I", "F") and image.format != "PNG":
        raise ValueError("its pixels are 32-bit numbers, of which nobody knows what is white; "
                         "save it with 8 or 16 bits")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        return high_bytes(image).convert("RGB")
    # OFFICIAL: alpha is dropped, so that what was hidden is seen, or black letters on nothing are
    # black on black. We put white behind each picture of which some pixel is transparent.
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def high_bytes(image):
    """Grey of 16 bits in 8, where Pillow's convert would cut all values above 255 to white."""
    tags = getattr(image, "tag_v2", {})
    values = np.array(image, np.uint16) >> (tags.get(TIFF_BITS, [16])[0] - 8)
    if tags.get(TIFF_PHOTOMETRIC) == 0:              # 0 is white
        values = 255 - values
    if "transparency" in image.info:
        values[np.array(image) == image.info["transparency"]] = 255
    return Image.fromarray(values.astype(np.uint8))


def open_image(source):
    """A picture from a path or from an http(s) address. Raises as `load_image` does."""
    if not source.startswith(("http://", "https://")):
        return load_image(source)
    import requests  # only here: training reads no addresses

    try:
        reply = requests.get(source, timeout=30)
        reply.raise_for_status()
    except requests.RequestException as error:
        raise ValueError(f"image {source}: {error}") from error
    return load_image(io.BytesIO(reply.content), source)


def data_url(picture, form="PNG"):
    """A picture (PIL) as an address that holds it."""
    file = io.BytesIO()
    picture.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


@functools.lru_cache(2 ** 20)
def image_size(path):
    """(width, height) of a picture as `load_image` shows it; only its header is read.

    Raises as `opened` does.
    """
    with opened(path) as image:
        return upright_size(image)


def upright_size(image):
    """The size of an open picture that may be stored lying on its side."""
    is_lying = image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    return image.size[::-1] if is_lying else image.size


def check_image(folder, name):
    """Decode a picture to its end, as small as possible; returns its path.

    Raises FileNotFoundError with what is there instead, and else as `opened` does.
    """
    path = image_path(folder, name)
    try:
        with opened(path, f"image {name!r}") as image:
            image.draft(image.mode, (1, 1))
            upright_rgb(image)
    except FileNotFoundError:
        if os.path.islink(path):
            raise FileNotFoundError(f"image {name!r} is a link to {os.readlink(path)}, which is "
                                    "not there") from None
        raise FileNotFoundError(f"image {name!r} is not in {folder}"
                                f"{what_is_there(folder, name)}") from None
    return path


def what_is_there(folder, name):
    """The end of a message on a name with folders in it: whether it is there without them."""
    base = os.path.basename(name.replace("\\", "/"))
    if base != name and os.path.isfile(os.path.join(folder, base)):
        return f"; {base} is there"
    return ""


# -----------------------------------------------------------------------------
# From a name to a file


def image_path(folder, name):
    """folder/name. If that is no file: the one file there that is meant beyond doubt. A Place is
    its own path.

    It may differ in its extension alone, in the Unicode form of its letters, or have slashes for
    backslashes; an absolute path may lead into the folder. OURS: LLaVA-1.5's lists call every
    picture of OCR-VQA .jpg, which not all of them are. Raises ValueError if the name leaves the
    folder, or if several files could be meant.
    """
    if isinstance(name, Place):
        return name
    wanted = name
    if not os.path.lexists(os.path.join(folder, name)):
        wanted = name.replace("\\", "/")
    if os.path.isabs(wanted):
        wanted = os.path.relpath(wanted, folder)
    *parents, base = os.path.normpath(wanted).split(os.sep)
    if ".." in (*parents, base):         # normpath leaves it at the head alone
        raise ValueError(f"image {name!r} leaves the image folder {folder}; names are relative to "
                         f"--images{what_is_there(folder, name)}")
    path = os.path.join(folder, wanted)
    if os.path.lexists(path):
        return path
    found = folder
    for parent in parents:
        found = os.path.join(found, entry_of(found, parent) or parent)
    entry = entry_of(found, base)
    stem, extension = os.path.splitext(base)
    if not entry and extension.lower() in PICTURE_EXTENSIONS | {""}:
        entry = entry_of(found, stem + ANY_EXTENSION)
    return os.path.join(found, entry) if entry else path


def entry_of(folder, name):
    """The one entry of a folder that is called so in any Unicode form, or None."""
    if not os.path.isdir(folder):
        return None
    entries = entries_of(folder, os.stat(folder).st_mtime_ns)
    found = entries.get(unicodedata.normalize("NFC", name), [])
    if len(found) > 1:
        raise ValueError(f"image {name!r} is not in {folder}, but {' and '.join(sorted(found))} "
                         "are; one of them must go")
    return found[0] if found else None


@functools.lru_cache(maxsize=1024)
def entries_of(folder, modified):
    """{name: [entries]} of a folder, read again only after it was modified.

    Names are in composed Unicode form (macOS writes the other one); pictures are in it a second
    time, as stem + ANY_EXTENSION.
    """
    entries = {}
    for entry in os.listdir(folder):
        name = unicodedata.normalize("NFC", entry)
        stem, extension = os.path.splitext(name)
        entries.setdefault(name, []).append(entry)
        if extension.lower() in PICTURE_EXTENSIONS:
            entries.setdefault(stem + ANY_EXTENSION, []).append(entry)
    return entries
