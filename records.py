"""
What lies on disk and what is typed: LLaVA-format records, JSON lines and flags, read strictly. No torch in here, so that
commands which only read and write text start at once.

A record: {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}
"""
import argparse
import dataclasses
import functools
import inspect
import json
import os
import re
import sys
import textwrap
import zlib

import numpy as np

IMAGE = "<image>"    # stands for a picture in text, and is one reserved id of the tokenizer
source_of = functools.cache(inspect.getsource)           # of a class: it parses the whole file


def read_json(path):
    """Yield the records of a JSON array or of JSON lines, one at a time. ValueError names the place of bad JSON."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read()
        if not text.lstrip().startswith("["):
            for number, line in enumerate(text.split("\n"), 1):
                try:
                    if line.strip():
                        yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"bad JSON at line {number}, column {error.colno}: {error.msg}") from error
            return
        decode, blank = json.JSONDecoder().raw_decode, re.compile(r"\s*")
        at = blank.match(text, text.index("[") + 1).end()
        while text[at:at + 1] != "]":
            record, at = decode(text, at)
            yield record
            at = blank.match(text, at).end()
            if text[at:at + 1] == ",":
                at = blank.match(text, at + 1).end()
            elif text[at:at + 1] != "]":
                raise json.JSONDecodeError("a comma or ] is missing", text, at)
        if text[at + 1:].strip():
            raise json.JSONDecodeError("something follows the array", text, blank.match(text, at + 1).end())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: bad JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except ValueError as error:                          # UnicodeDecodeError is one
        raise ValueError(f"{path}: {error}") from error


def whole_lines(path, repair=False):
    """The records of a JSON-lines file that we append to, without a last line that a kill tore; `repair` cuts it off the file.

    ValueError names the file if it is no such file.
    """
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        lines = f.read().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
    if repair:
        with open(path, "rb+") as f:
            f.write(b"".join(line + b"\n" for line in lines[:len(records)]))
            f.truncate()
    return records


def write_lines(path, rows):
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def amount_of(source):
    """A source of --data as (file, amount): "a.json" is all of it, 1.0; "a.json=0.5" that share, "a.json=20000" so many."""
    file, sign, amount = str(source).rpartition("=")
    if not sign or os.path.exists(source):
        return source, 1.0
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", amount) or float(amount) == 0:
        raise ValueError(f"{source}: no such file; an amount behind = is a share (=0.5) or a count without dot (=200), above 0")
    return file, float(amount) if "." in amount else int(amount)


def draw(file, n, amount, fraction, seed):
    """Which of a file's n samples are taken, ascending. More than n are whole repeats and a rest.

    A function of seed, file name, n and how many alone: other sources and folders change nothing, and less is part of more.
    """
    many = round((n * amount if isinstance(amount, float) else amount) * fraction)
    if many < 1:
        raise ValueError(f"{file}: nothing would be left of its {n} samples")
    order = np.random.default_rng([seed, zlib.crc32(os.path.basename(file).encode())]).permutation(n)
    return np.sort(np.concatenate([np.tile(np.arange(n), many // n), order[:many % n]]))


class Records:
    """The samples of some sources (see `amount_of`), kept as JSON text in one bytes object: their memory is about the files'
    size, and worker processes that are forked share it. `fraction` of every source is taken (Diss. Sec. 4.5)."""

    def __init__(self, sources, fraction=1.0, seed=0):
        if not 0 < fraction <= 1:
            raise ValueError(f"--fraction {fraction}: a share above 0 and up to 1")
        self.files, self.totals, indices, texts, blobs, sizes = [], [], [], [], [], [0]
        for path, amount in map(amount_of, sources):
            lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
                     for record in read_json(path)]
            if not lines:
                raise ValueError(f"{path}: no records in it")
            indices.append(draw(path, len(lines), amount, fraction, seed))
            kept, place = np.unique(indices[-1], return_inverse=True)
            texts.append(len(sizes) - 1 + place)
            sizes += [len(lines[i]) for i in kept]
            blobs.append(b"".join(lines[i] for i in kept))
            self.files.append(path)
            self.totals.append(len(lines))
        self.blob, self.ends, self.counts = b"".join(blobs), np.cumsum(sizes), [len(drawn) for drawn in indices]
        self.indices = np.concatenate(indices)           # of each sample: its place in its file
        self.texts = np.concatenate(texts)               # and in `ends`; repeated samples share one

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        text = self.texts[i]
        return json.loads(self.blob[self.ends[text]:self.ends[text + 1]].decode("utf-8", "surrogatepass"))

    def source(self, i):
        """Which file record i is from, and its index there."""
        return self.files[np.searchsorted(np.cumsum(self.counts), i, side="right")], int(self.indices[i])

    def where(self, i):
        """'chat.json[1432] (id 000000123)', the name of a sample in every message."""
        path, index = self.source(i)
        record = self[i]
        name = record.get("id") if isinstance(record, dict) else None
        name = str(name).encode(errors="backslashreplace").decode() if name is not None else None     # printable
        return f"{os.path.basename(path)}[{index}]" + (f" (id {name})" if name is not None else "")


def image_names(record):
    """The pictures of a sample: none, one, or a list."""
    images = record.get("image") or []
    return [images] if isinstance(images, str) else images


PICTURES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}      # extensions that may stand for each other


@functools.lru_cache(maxsize=1024)
def pictures_in(folder, changed):
    """{name without extension: [name, ...]} of the pictures in a folder, which is listed once as long as it does not change."""
    found = {}
    for name in os.listdir(folder):
        stem, extension = os.path.splitext(name)
        if extension.lower() in PICTURES:
            found.setdefault(stem, []).append(name)
    return found


def image_path(folder, name):
    """folder/name; if that is no file, then the one picture there whose name differs in its extension alone, if there is one.

    OURS: LLaVA-1.5's lists call every picture of OCR-VQA .jpg, which not all are where they come from. ValueError if the name
    leaves the folder, or if several pictures could be meant.
    """
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
        raise ValueError(f"image {name!r} leaves the image folder {folder}; names are relative to --images")
    path = os.path.join(folder, name)
    parent, (stem, extension) = os.path.dirname(path), os.path.splitext(os.path.basename(path))
    if os.path.exists(path) or extension.lower() not in PICTURES | {""} or not os.path.isdir(parent):
        return path
    found = pictures_in(parent, os.stat(parent).st_mtime_ns).get(stem, [])
    if len(found) > 1:
        raise ValueError(f"image {name!r} is not in {folder}, but {' and '.join(sorted(found))} are; one of them must go")
    return os.path.join(parent, found[0]) if found else path


@functools.lru_cache(2 ** 20)
def header_size(path):
    """(width, height) of a picture, upright; only its head is read. Raises what Pillow raises."""
    from PIL import Image                                # only here: scoring reads no pictures
    with Image.open(path) as image:
        return image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size      # EXIF: lying on its side


def form_problem(record, folder):
    """The first thing that is wrong with a record's form, or None."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__} where an object with id, image and conversations belongs"
    turns, names = record.get("conversations"), image_names(record)
    if not isinstance(turns, list) or not turns:
        return "no conversations; a list of {from, value} turns is needed"
    for i, turn in enumerate(turns):
        want = ("human", "gpt")[i % 2]
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return f"turn {i} is not {{from, value}} with text in value"
        if turn.get("from") != want:
            return f"turn {i} is from {turn.get('from')!r} where {want!r} belongs; turns alternate human, gpt"
        if re.search("[\ud800-\udfff]", turn["value"]):
            return f"turn {i} ({want}) holds half a surrogate pair, which is no text"
        if not turn["value"].strip():
            return f"turn {i} ({want}) is empty"
        if want == "gpt" and IMAGE in turn["value"]:
            return f"turn {i} (gpt) holds {IMAGE}; images belong in human turns"
    if len(turns) % 2:
        return f"{len(turns)} turns: the last question has no answer"
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        return "image is neither a file name nor a list of file names"
    tags = sum(turn["value"].count(IMAGE) for turn in turns)
    if tags != len(names):
        return f"{tags} {IMAGE} tags for {len(names)} image{'s' * (len(names) != 1)}; each image needs one tag in a human turn"
    if names and folder is None:
        return "has an image, but no image folder is given (--images DIR)"
    return None


def brief_instructions():
    """Our 11 ways to ask for a brief caption, the questions of stage 1 (Sec. 4.2; the paper has a list of its own)."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "prompts", "brief_instructions.txt")) as f:
        return f.read().splitlines()


def typed_flags(config, argv, description, choices=None):
    """What was typed on a command line whose flags are the fields of a dataclass, as a dict; nothing is filled in.

    A field without default is a required flag, a bool is --flag / --no-flag, and the comment behind a field is its help, with
    its default if there is one.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    source = "".join(source_of(part) for part in reversed(config.__mro__[:-1]))
    notes = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.MULTILINE))
    for f in dataclasses.fields(config):
        required, default = f.default is dataclasses.MISSING, " ".join(f.default) if isinstance(f.default, tuple) else f.default
        note = notes.get(f.name, "") + (f" (default: {default})" if not required and default not in (None, "") and
                                        default is not False else "")
        how = {"help": note.replace("%", "%%"), "required": required}
        if f.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how |= {"type": str if f.type == list[str] else f.type, "choices": (choices or {}).get(f.name),
                    "nargs": "+" if f.type == list[str] else None}
        parser.add_argument(f"--{f.name}", **how)
    return vars(parser.parse_args(argv))


def run_command(doc, arguments, argv=None):
    """Run what a command line asks for: `arguments` makes (function, configuration) of it; -h alone prints `doc`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in ("-h", "--help"):
        return print(textwrap.dedent(doc).strip())
    run, args = arguments(argv)
    run(args)
