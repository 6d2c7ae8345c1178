"""
One picture on disk: where it is, how it is read, and what may be wrong with it. No torch in here.

Every part of the project reads pictures through `load_image`, so that a picture which passed the
check looks the same to training, sampling, serving and retrieval.
"""
import functools
import io
import os
import struct
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

# Extensions that may stand for each other, see `image_path`.
PICTURE_EXTENSIONS = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
# All that Pillow's decoders raise; the last four come with damaged EXIF, AVIF, DDS and JPEG 2000.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError,
              struct.error, TypeError, RuntimeError, MemoryError)
EXIF_ORIENTATION = 0x0112
MAX_RATIO = 500                          # sides; 1 x 2000 pixels would be resized to 224 x 448,000

# Twice Pillow's own limit, 179 megapixels, is still an error.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def load_image(source, name=None):
    """A picture (path or file object, called `name` in errors) as RGB, upright.

    OURS: the EXIF orientation is applied; the official code shows such pictures to the model lying
    on their side. Grey, palette, RGBA and CMYK go through Pillow's convert("RGB"), as there.
    Raises FileNotFoundError, and ValueError for what is no picture, is cut off, or is far too large
    or too thin.
    """
    try:
        with Image.open(source) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        why = reason_of(error)
        raise ValueError(f"{name or source}: not a readable picture ({why})") from error
    check_shape(*image.size, name or source)
    return image


def open_image(source):
    """A picture from a path or from an http(s) address. Raises as `load_image` does."""
    if not source.startswith(("http://", "https://")):
        if not os.path.isfile(source):
            raise FileNotFoundError(f"image {source}: no such file")
        return load_image(source)
    import requests  # only here: training reads no addresses

    try:
        reply = requests.get(source, timeout=30)
        reply.raise_for_status()
    except requests.RequestException as error:
        raise ValueError(f"image {source}: {error}") from error
    return load_image(io.BytesIO(reply.content), source)


def reason_of(error):
    """Pillow's words, but for an unknown format, where it would print the address of an object."""
    if isinstance(error, UnidentifiedImageError):
        return "its format is not known"
    return error


def check_shape(width, height, name):
    """Raises ValueError for a strip of which a square crop would show almost nothing."""
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{name}: a picture of {width} x {height} pixels is too thin; one side "
                         f"may be at most {MAX_RATIO} times the other")


def image_problem(folder, name):
    """What is wrong with a picture, or None. It is decoded to its end, as small as possible."""
    try:
        path = image_path(folder, name)
        with Image.open(path) as image:
            check_shape(*image.size, name)
            image.draft(image.mode, (1, 1))
            ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        return absence(folder, name)
    except UNREADABLE as error:
        return f"image {name!r}: {reason_of(error)}"
    return None


def absence(folder, name):
    """What `image_problem` says of a picture that is not there."""
    return f"image {name!r} is not in {folder}"


@functools.lru_cache(2 ** 20)
def image_size(path):
    """(width, height) of a picture as `load_image` shows it; only its header is read.

    Raises ValueError for what is no picture.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a readable picture ({reason_of(error)})") from error
    if orientation >= 5:                 # it is stored lying on its side
        return height, width
    return width, height


# -----------------------------------------------------------------------------
# From a name to a file


def image_path(folder, name):
    """folder/name. If that is no file: the one picture there that differs in its extension alone.

    OURS: LLaVA-1.5's lists call every picture of OCR-VQA .jpg, which not all of them are. Raises
    ValueError if the name leaves the folder, or if several pictures could be meant.
    """
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
        raise ValueError(f"image {name!r} leaves the image folder {folder}; "
                         "names are relative to --images")
    path = os.path.join(folder, name)
    stem, extension = os.path.splitext(os.path.basename(path))
    parent = os.path.dirname(path)
    is_picture = extension.lower() in PICTURE_EXTENSIONS | {""}
    if os.path.exists(path) or not is_picture or not os.path.isdir(parent):
        return path
    found = pictures_in(parent, os.stat(parent).st_mtime_ns).get(stem, [])
    if len(found) > 1:
        raise ValueError(f"image {name!r} is not in {folder}, but {' and '.join(sorted(found))} "
                         "are; one of them must go")
    if not found:
        return path
    return os.path.join(parent, found[0])


@functools.lru_cache(maxsize=1024)
def pictures_in(folder, modified):
    """{name without extension: [name, ...]}, read again only after the folder was modified."""
    found = {}
    for name in os.listdir(folder):
        stem, extension = os.path.splitext(name)
        if extension.lower() in PICTURE_EXTENSIONS:
            found.setdefault(stem, []).append(name)
    return found
