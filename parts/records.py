"""
The records to train on: how much of which file, where each is from, and what is wrong with one.

A record: {"id": "7", "image": "7.jpg", "conversations": [
    {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]}
"""
import json
import os
import re
import zlib

import numpy as np

from parts.files import IMAGE, read_json

# What other programs' records hold that would be lost here; see `unread_keys`.
MEDIA_AND_ROLES = {"image", "images", "img", "picture", "pictures", "video", "videos", "audio",
                   "audios", "speech", "system", "messages", "tools"}


def amount_of(source):
    """A source of --data as (file, amount).

    "a.json" is all of it, 1.0; "a.json=0.5" that share of it; "a.json=20000" so many of it.

    OURS: "uniformly sampled in training" (Sec. 4.2) is read as uniform over the records: each comes
    once an epoch, so the three types come as 58 : 23 : 77. For equal shares of the types, name
    their three files with one and the same number.
    """
    file, sign, amount = str(source).rpartition("=")
    if not sign or os.path.exists(source):
        return str(source), 1.0
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", amount) or float(amount) == 0:
        raise ValueError(f"{source}: no such file; an amount behind = is a share (=0.5) or a count "
                         "without dot (=200), above 0")
    return file, float(amount) if "." in amount else int(amount)


def draw_samples(file, n, amount, seed):
    """Which of a file's n samples are taken, ascending; more than n are whole repeats and a rest.

    It depends on seed, file name, n and amount alone: other sources and folders change nothing, and
    a smaller amount is part of a larger one.
    """
    count = round(n * amount) if isinstance(amount, float) else amount
    if count < 1:
        raise ValueError(f"{file}: nothing would be left of its {n} samples")
    name = zlib.crc32(os.path.basename(file).encode())
    order = np.random.default_rng([seed, name]).permutation(n)
    repeats = np.tile(np.arange(n), count // n)
    return np.sort(np.concatenate([repeats, order[:count % n]]))


class Records:
    """The samples of some sources, see `amount_of`.

    They are kept as JSON text in one bytes object: their memory is about the files' size, and
    worker processes that are forked share it.

    files, totals, counts    of each source: its path, its records, how many samples it gives
    texts                    (samples,) the number of each sample's text; repeated samples share one
    checksum                 of the samples and their order
    """

    def __init__(self, sources, seed=0):
        self.files, self.totals, self.counts = [], [], []
        texts, lines = [], []
        for path, amount in map(amount_of, sources):
            first = len(lines)
            lines += [json.dumps(record).encode() for record in read_json(path)]
            total = len(lines) - first
            if not total:
                raise ValueError(f"{path}: no records in it")
            drawn = draw_samples(path, total, amount, seed)
            texts.append(first + drawn)
            self.files.append(path)
            self.totals.append(total)
            self.counts.append(len(drawn))
        self.blob = b"".join(lines)
        self.ends = np.cumsum([0, *map(len, lines)])
        self.texts = np.concatenate(texts)
        self.checksum = zlib.crc32(self.texts.tobytes(), zlib.crc32(self.blob))

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        text = self.texts[i]
        start, end = self.ends[text:text + 2]
        return json.loads(self.blob[start:end])

    def source(self, i):
        """Which file sample i is from, and its index there."""
        text = int(self.texts[i])
        file = 0
        while text >= self.totals[file]:
            text -= self.totals[file]
            file += 1
        return self.files[file], text

    def where(self, i):
        """'chat.json[1432] (id 000000123)', the name of a sample in every message."""
        path, index = self.source(i)
        place = f"{os.path.basename(path)}[{index}]"
        record = self[i]
        if not isinstance(record, dict) or record.get("id") is None:
            return place
        printable = str(record["id"]).encode(errors="backslashreplace").decode()
        return f"{place} (id {printable})"


def image_names(record):
    """The names of the pictures of a sample or a question: none, one, or several.

    Raises ValueError for anything else in "image", and for media that stand under another key.
    """
    unread = unread_keys(record, "image")
    if unread:
        raise ValueError(f"{unread[0]!r} is not read; file names of pictures, and nothing else, "
                         "go in 'image'")
    images = record.get("image")
    if images is None or images == "":
        return []
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"image is {images!r:.80}, neither a file name nor a list of file names")
    return names


def record_problem(record, folder):
    """The first thing that is wrong with a record's form, or None; folder is that of --images."""
    if not isinstance(record, dict):
        kind = type(record).__name__
        return f"a {kind} where an object with id, image and conversations belongs"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "no conversations; a list of {from, value} turns is needed"
    for i, turn in enumerate(turns):
        problem = turn_problem(turn, ("human", "gpt")[i % 2])
        if problem:
            return f"turn {i} {problem}"
    if len(turns) % 2:
        return f"{len(turns)} turns: the last question has no answer"
    try:
        names = image_names(record)
    except ValueError as error:
        return str(error)
    tags = sum(turn["value"].count(IMAGE) for turn in turns)
    if tags != len(names):
        images = "1 image" if len(names) == 1 else f"{len(names)} images"
        return f"{tags} {IMAGE} tags for {images}; each image needs one tag in a human turn"
    if names and folder is None:
        return "has an image, but no image folder is given (--images DIR)"
    return None


def unread_keys(value, read=None):
    """The keys of a record or a turn that hold media or a role, but not where we read them."""
    return [key for key in value if key.lower() in MEDIA_AND_ROLES and key != read and value[key]]


def turn_problem(turn, speaker):
    """The first thing that is wrong with one turn of a conversation, or None."""
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        return "is not {from, value} with text in value"
    unread = unread_keys(turn)
    if unread:
        return f"has {unread[0]!r}, which is not read; pictures go in the record's 'image'"
    if turn.get("from") != speaker:
        return f"is from {turn.get('from')!r} where {speaker!r} belongs; turns alternate human, gpt"
    if re.search("[\ud800-\udfff]", turn["value"]):
        return f"({speaker}) holds half a surrogate pair, which is no text"
    if not turn["value"].strip():
        return f"({speaker}) is empty"
    if speaker == "gpt" and IMAGE in turn["value"]:
        return f"(gpt) holds {IMAGE}; images belong in human turns"
    return None
