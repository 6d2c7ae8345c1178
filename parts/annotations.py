"""
What people have written about pictures, read from disk: COCO's annotation files, captions.

Nothing here needs torch. Files are streamed: instances_train2017.json alone has 450 MB.
"""
import json
import os
import re
from collections import defaultdict
from pathlib import Path

import ijson

PICTURE_NAME = re.compile(r"\.(jpe?g|png|gif|bmp|webp|tiff?)$|://", re.I)     # or an address


def box_line(category, box):
    """`dog: [0.1, 0.25, 0.5, 1.0]`: x1, y1, x2, y2 as fractions of the original picture."""
    x1, y1, x2, y2 = box
    if not (-0.001 <= x1 < x2 <= 1.001 and -0.001 <= y1 < y2 <= 1.001):
        raise ValueError(f"box {box} of {category!r}; [x1, y1, x2, y2] as fractions of the "
                         "picture, 0 to 1, with x1 < x2 and y1 < y2, is needed")
    rounded = []
    for fraction in box:
        inside = min(max(float(fraction), 0.0), 1.0)
        rounded.append(round(inside, 3))
    return f"{category}: {rounded}"


def coco_rows(path, key):
    """The rows of one list of an annotation file, one at a time."""
    with open(path, "rb") as f:
        yield from ijson.items(f, f"{key}.item", use_float=True)


def coco_records(captions, instances=None):
    """Yield {"id", "image", "captions", "instances": [{"category", "bbox"}, ...]} of each picture
    that has captions, in the order of the captions file's images.

    bbox    [x1, y1, x2, y2] as fractions of the picture; COCO has x, y, width, height in pixels
    Raises ValueError if these are not COCO's captions_*.json and instances_*.json.
    """
    try:
        images = {row["id"]: row for row in coco_rows(captions, "images")}
        sentences = defaultdict(list)
        for row in coco_rows(captions, "annotations"):
            sentences[row["image_id"]].append(row["caption"])
        boxes = coco_boxes(images, instances) if instances else {}
    except (ijson.JSONError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{captions}, {instances}: not COCO's annotations: "
                         f"{type(error).__name__} {error}") from error
    for key, row in images.items():
        if key in sentences:
            yield {"id": Path(row["file_name"]).stem, "image": row["file_name"],
                   "captions": sentences[key], "instances": boxes.get(key, [])}


def coco_boxes(images, instances):
    """{image id: [{"category", "bbox"}, ...]}; COCO has boxes without area, which are left out."""
    names = {row["id"]: row["name"] for row in coco_rows(instances, "categories")}
    boxes = defaultdict(list)
    for row in coco_rows(instances, "annotations"):
        x, y, w, h = row["bbox"]
        image = images.get(row["image_id"])     # the captions file may be about fewer pictures
        if image and min(w, h) > 0:
            width, height = image["width"], image["height"]
            corners = [x / width, y / height, (x + w) / width, (y + h) / height]
            boxes[image["id"]].append({"category": names[row["category_id"]], "bbox": corners})
    return boxes


def read_caption_pairs(path, columns="image caption"):
    """Yield (image, caption) of a TSV, of JSON lines with these fields, or of a folder of pictures
    that each have their caption in a .txt file beside them.

    columns    a TSV's, in order; CC3M's own file is "caption image", with an address for the image
    Raises ValueError that names the line, or for no pairs at all, and FileNotFoundError.
    """
    pairs = pairs_of_folder(path) if os.path.isdir(path) else pairs_of_file(path, columns)
    is_empty = True
    for pair in pairs:
        is_empty = False
        yield pair
    if is_empty:
        raise ValueError(f"{path}: no pairs in it")


def pairs_of_folder(path):
    """Yield (picture's name, text of the .txt file beside it)."""
    for picture in sorted(Path(path).rglob("*")):
        if PICTURE_NAME.search(picture.name):
            caption = picture.with_suffix(".txt").read_text(encoding="utf-8")
            yield str(picture.relative_to(path)), " ".join(caption.split())


def pairs_of_file(path, columns):
    """Yield (image, caption) of each line."""
    is_json = path.endswith((".json", ".jsonl"))
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            cells = zip(columns.split(), line.rstrip("\n").split("\t"), strict=False)
            try:
                row = json.loads(line) if is_json else dict(cells)
                image, caption = row["image"], " ".join(row["caption"].split())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: image and caption are needed, as JSON or "
                                 f"in --columns {columns!r} with tabs between") from error
            if PICTURE_NAME.search(caption) and not PICTURE_NAME.search(image):
                raise ValueError(f"{path}, line {number}: image {image!r} and caption {caption!r} "
                                 f"look swapped; --columns {columns!r} must name them in order")
            yield image, caption


def read_amounts(pairs, types):
    """["conversation=58", ...] -> {type: 58, ...}"""
    found = dict(re.findall(rf"\b({'|'.join(types)})=(\d+)(?!\S)", " ".join(pairs)))
    if len(found) < len(pairs) or not any(map(int, found.values())):
        raise ValueError(f"{' '.join(pairs)}: TYPE=N is needed, each TYPE once, out of "
                         f"{', '.join(types)}; N is a whole number, not 0 for all")
    return {kind: int(found.get(kind, 0)) for kind in types}
