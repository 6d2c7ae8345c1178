"""
What people have written about pictures, read from disk: COCO's annotation files, captions.

Nothing here needs torch. Files are streamed: instances_train2017.json alone has 450 MB. What is
left out or changed is counted; what cannot be read is a ValueError that names file and record.
"""
import io
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import ijson

from parts.files import read_json, read_text, typed, typed_fields
from parts.templates import HOLDS_STOP

PICTURE_NAME = re.compile(r"\.(jpe?g|png|gif|bmp|webp|tiff?)$|://", re.I)     # or an address


# --------------------------------------------------------------------------------------------------
# Boxes


def four_numbers(box, where):
    """A box, which must be a list of four numbers."""
    if len(typed(box, list, where)) != 4:
        raise ValueError(f"{where}: {box!r:.80}; four numbers are needed")
    return [typed(number, float, where) for number in box]


def box_line(category, box, counts):
    """`dog: [0.1, 0.25, 0.5, 1.0]`: x1, y1, x2, y2 as fractions of the original picture.

    What reaches out of the picture is cut off, and counted. Raises ValueError for a box that is
    inverted or outside, as one in pixels is.
    """
    x1, y1, x2, y2 = (min(max(number, 0.0), 1.0) for number in four_numbers(box, "bbox"))
    has_area = x1 < x2 and y1 < y2       # in the picture
    if not has_area or min(box) < -0.5 or max(box) > 1.5:
        raise ValueError(f"box {box} of {category!r}; [x1, y1, x2, y2] as fractions of the "
                         "picture, 0 to 1, with x1 < x2 and y1 < y2, is needed")
    if min(box) < -0.001 or max(box) > 1.001:
        counts["boxes cut off at their picture's edge"] += 1
    return f"{category}: {[round(float(edge), 3) for edge in (x1, y1, x2, y2)]}"


def box_lines(things, counts, skip_bad=False):
    """The lines of boxes, {"category", "bbox"}; if `skip_bad`, bad ones are left out and counted.

    Raises ValueError that names a bad one, by "annotation", its place in COCO's file, if it has it.
    """
    lines = []
    for i, thing in enumerate(things):
        try:
            lines.append(box_line(thing["category"], thing["bbox"], counts))
        except ValueError as error:
            if not skip_bad:
                where = thing.get("annotation", f"instances[{i}]")
                raise ValueError(f"{where}: {error}; --skip_bad leaves it out") from error
            counts["bad boxes, left out"] += 1
    return lines


# --------------------------------------------------------------------------------------------------
# COCO's files, and other tools' exports in their form


class CocoRow(dict):
    """A row that knows whether a key stood twice in it: one of the two values is lost."""
    twice = None

    def __setitem__(self, key, value):
        if key in self:
            self.twice = key
        super().__setitem__(key, value)


def coco_rows(path, key):
    """Yield (its name in messages, row) of one list of an annotation file, one at a time."""
    with open(path, "rb") as f:
        if f.read(3) != b"\xef\xbb\xbf":                 # a byte order mark is passed over
            f.seek(0)
        try:
            rows = ijson.items(f, f"{key}.item", map_type=CocoRow, use_float=True)
            for i, row in enumerate(rows):
                where = f"{path}: {key}[{i}]"
                typed(row, dict, where)
                if row.twice:
                    raise ValueError(f"{where}: the key {row.twice!r} stands twice in it")
                yield where, row
        except ijson.JSONError as error:
            raise ValueError(f"{path}: not COCO's annotations: {error}") from error


def id_value(row, field, where):
    """An id by its value: 7, 7.0, "7" and "007" are one. Raises ValueError if it is no id."""
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{where}: {field} is {value!r:.80}; a number or a text is needed")
    number = re.fullmatch(r"0*(\d+)(\.0)?", str(value))
    return number[1] if number else str(value)


def read_annotated(captions, instances, counts):
    """The pictures of COCO's captions file, with its instances file if any, or of JSON lines."""
    if instances or b'"annotations"' in Path(captions).read_bytes():
        return coco_records(captions, instances, counts)
    return read_json(captions)


def coco_records(captions, instances, counts):
    """Yield {"id", "image", "captions", "instances": [{"category", "bbox", "annotation"}, ...]} of
    each picture that has captions, in the order of the captions file's images.

    bbox      [x1, y1, x2, y2] as fractions of the picture; COCO has x, y, width, height in pixels
    counts    Counter of what is left out
    Raises ValueError if these are not COCO's captions_*.json and instances_*.json of one split.
    """
    images = {}
    for where, row in coco_rows(captions, "images"):
        typed(row.get("file_name"), str, f"{where}: file_name")
        if images.setdefault(id_value(row, "id", where), row) is not row:
            raise ValueError(f"{where}: the id {row['id']} has come before")
    sentences = defaultdict(list)
    for where, row in coco_rows(captions, "annotations"):
        key = id_value(row, "image_id", where)
        caption = row.get("caption")
        if key not in images:
            counts["captions of no image"] += 1
        elif caption is None or not typed(caption, str, f"{where}: caption").strip():
            counts["captions that are empty"] += 1
        else:
            sentences[key].append(caption)
    if not sentences:
        raise ValueError(f"{captions}: none of its captions is of one of its {len(images)} images; "
                         "COCO's captions_*.json, or JSON lines, are needed")
    boxes = coco_boxes(images, instances, counts) if instances else {}
    counts["images without captions"] += len(images) - len(sentences)
    for key, row in images.items():
        if key in sentences:
            yield {
                "id": Path(row["file_name"]).stem,
                "image": row["file_name"],
                "captions": sentences[key],
                "instances": boxes.get(key, []),
            }


def coco_boxes(images, instances, counts):
    """{image's id: its instances}; COCO has boxes without area, which are left out."""
    names = {}
    for where, row in coco_rows(instances, "categories"):
        names[id_value(row, "id", where)] = typed(row.get("name"), str, f"{where}: name")
    boxes = defaultdict(list)
    for where, row in coco_rows(instances, "annotations"):
        image = images.get(id_value(row, "image_id", where))
        category = names.get(id_value(row, "category_id", where))
        if image is None:                       # the captions file may be about fewer pictures
            counts["boxes of other pictures"] += 1
            continue
        if category is None:
            raise ValueError(f"{where}: no category has its category_id {row['category_id']}")
        corners = corners_of(row, image, where)
        if corners is None:
            counts["boxes without area"] += 1
        else:
            key = id_value(image, "id", where)
            boxes[key].append({"category": category, "bbox": corners, "annotation": where})
    if not boxes:
        raise ValueError(f"{instances}: none of its boxes is of a picture with captions; the two "
                         "files of one split are needed")
    return boxes


def corners_of(row, image, where):
    """A box as [x1, y1, x2, y2], fractions of its image, or None if it has no area."""
    x, y, w, h = four_numbers(row.get("bbox"), f"{where}: bbox")
    width = typed(image.get("width"), float, f"{where}: the width of its image")
    height = typed(image.get("height"), float, f"{where}: the height of its image")
    if width <= 0 or height <= 0:
        raise ValueError(f"{where}: its image has {width} x {height} pixels")
    if w == 0 or h == 0:
        return None
    return [x / width, y / height, (x + w) / width, (y + h) / height]


# --------------------------------------------------------------------------------------------------
# Captions


def caption_lines(sentences, counts):
    """Captions on one line each; what is empty is counted. Raises ValueError if nothing is left."""
    lines = []
    for sentence in sentences:
        line = "" if sentence is None else " ".join(typed(sentence, str, "captions").split())
        if line:
            lines.append(line)
        else:
            counts["captions that are empty"] += 1
    if not lines:
        raise ValueError("no captions and no notes; the teacher would have nothing to go by")
    return lines


def read_caption_pairs(path, columns="image caption"):
    """Yield (image, caption) of a TSV, of JSON lines with these fields, or of a folder of pictures
    that each have their caption in a .txt file beside them.

    columns    a TSV's, in order; CC3M's own file is "caption image", with an address for the image
    Raises ValueError that names the line, or for no pairs at all, and FileNotFoundError.
    """
    pairs = pairs_of_folder(path) if os.path.isdir(path) else pairs_of_file(path, columns)
    counts = Counter()
    for image, caption in pairs:
        is_good = not HOLDS_STOP.search(caption)
        counts[is_good] += 1
        if is_good:
            yield image, caption
    if counts[False]:
        print(f"{path}: {counts[False]:,} captions hold a STOP or special token, and are left out")
    if not counts[True]:
        raise ValueError(f"{path}: no pairs in it")


def pairs_of_folder(path):
    """Yield (picture's name, text of the .txt file beside it)."""
    for picture in sorted(Path(path).rglob("*")):
        if PICTURE_NAME.search(picture.name):
            caption = read_text(picture.with_suffix(".txt"))
            yield str(picture.relative_to(path)), " ".join(caption.split())


def pairs_of_file(path, columns, tabs=-1):
    """Yield (image, caption) of each line. Of a table, columns without a name are passed over,
    unless a line is cut at so many tabs alone: then a caption may hold some."""
    if path.endswith((".json", ".jsonl")):
        rows = read_json(path)
    else:
        names = columns.split()
        lines = io.StringIO(read_text(path), newline=None)
        rows = (dict(zip(names, line.rstrip("\n").split("\t", tabs), strict=False))
                for line in lines)
    for number, row in enumerate(rows, 1):
        where = f"{path}, line {number}"
        typed_fields(row, f"{where}: image and caption are needed, as JSON or in --columns "
                     f"{columns!r} with tabs between", image=str, caption=str)
        image = row["image"]
        caption = " ".join(row["caption"].split())
        if tabs < 0 and PICTURE_NAME.search(caption) and not PICTURE_NAME.search(image):
            raise ValueError(f"{where}: image {image!r} and caption {caption!r} look swapped; "
                             f"--columns {columns!r} must name them in order")
        yield image, caption


# What betrays a writer who saw no picture: {reason: what is found in a reply}. By English words.
# OURS: the paper does not say how bad replies were found.
REJECTED = {
    "speaks of its context": re.compile(
        r"\bcaptions?\b|\bbounding box(es)?\b|\bcoordinates?\b"
        r"|\b(based on|according to|from) the (description|sentences|text)s?\b"
        r"|\b(provided|given|above|following) (text|description|sentence|information|context|list"
        r"|data)s?\b|[\[(]\s*[01]?\.\d+\s*,", re.I),
    "refuses": re.compile(
        r"\b(as an? (ai|language model|text)|i('m| am) (sorry|unable)|i (cannot|can't|can not) (see"
        r"|view|assist|help|fulfill|provide|answer)|cannot be (determined|answered))\b", re.I),
    "holds a STOP or special token": HOLDS_STOP}


def read_amounts(pairs, types):
    """["conversation=58", ...] -> {type: 58, ...}"""
    found = dict(re.findall(rf"\b({'|'.join(types)})=(\d+)(?!\S)", " ".join(pairs)))
    if len(found) < len(pairs) or not any(map(int, found.values())):
        raise ValueError(f"{' '.join(pairs)}: TYPE=N is needed, each TYPE once, out of "
                         f"{', '.join(types)}; N is a whole number, not 0 for all")
    return {kind: int(found.get(kind, 0)) for kind in types}
