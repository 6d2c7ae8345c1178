"""
The records to train on: how much of which file, where each is from, and what is wrong with one.

A record: {"id": "7", "image": "7.jpg", "conversations": [
    {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]}
or with messages, as TRL and OpenAI have it: {"images": ["7.jpg"], "messages": [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A bus."}]}
"""
import bisect
import json
import os
import re
import zlib
from operator import itemgetter

import numpy as np

from parts.files import IMAGE
from parts.shards import Place, data_urls, read_shard, shards_of

# What other programs' records hold that would be lost here; see `unread_keys`.
MEDIA_AND_ROLES = {"image", "images", "image_path", "image_url", "img", "picture", "pictures",
                   "video", "videos", "audio", "audios", "speech", "system", "messages", "tools",
                   "tool_calls", "function_call", "mp4", "webm", "mov", "avi", "wav", "mp3", "flac"}
ROLES = {"user": "human", "assistant": "gpt"}


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
    """The samples of some sources, see `amount_of`; all as `normal_record` has them.

    They are kept as JSON text in one bytes object, without pictures: their memory is about that of
    their text, and worker processes that are forked share it.

    files, totals, counts    of each source: its path, its records, how many samples it gives
    shards                   (path, the number of its first text) of each file
    texts                    (samples,) the number of each sample's text; repeated samples share one
    problems                 {number of a text: what is wrong with its form}
    checksum                 of the samples and their order
    """

    def __init__(self, sources, seed=0):
        self.files, self.totals, self.counts = [], [], []
        self.shards, self.problems = [], {}
        texts, lines = [], []
        for path, amount in map(amount_of, sources):
            first = len(lines)
            for shard in shards_of(path):
                self.shards.append((shard, len(lines)))
                for record, place in read_shard(shard):
                    lines.append(self.text_of(record, place, len(lines)))
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

    def text_of(self, record, place, number):
        """A record as it is kept; of a bad one, its id alone, beside its problem."""
        name = record.get("id") if isinstance(record, dict) else None
        try:
            record = normal_record(record, place)
        except ValueError as error:
            self.problems[number] = str(error)
            record = {"image": [], "conversations": []}
        return json.dumps(record | {"id": name}, default=str).encode()

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        text = self.texts[i]
        start, end = self.ends[text:text + 2]
        record = json.loads(self.blob[start:end])
        record["image"] = [Place(*name) if isinstance(name, list) else name
                           for name in record["image"]]
        return record

    def problem(self, i, record, folder):
        """What is wrong with the form of sample i, or None; `folder` is that of --images."""
        problem = self.problems.get(self.texts[i])
        is_file = any(isinstance(name, str) for name in record["image"])
        if not problem and is_file and folder is None:
            return "has an image, but no image folder is given (--images DIR)"
        return problem

    def source(self, i):
        """Which file sample i is from, and its index there."""
        text = int(self.texts[i])
        number = bisect.bisect_right(self.shards, text, key=itemgetter(1)) - 1
        path, first = self.shards[number]
        return path, text - first

    def where(self, i):
        """'chat.json[1432] (id 000000123)', the name of a sample in every message."""
        path, index = self.source(i)
        place = f"{os.path.basename(path)}[{index}]"
        name = self[i]["id"]
        if name is None:
            return place
        return f"{place} (id {str(name).encode(errors='backslashreplace').decode()})"


def image_names(record, *read):
    """The pictures of a sample or a question, none, one, or several: file names, or Places.

    Raises ValueError for anything else in "image" or "images", and for media and roles that stand
    under another key, but those in `read`.
    """
    unread = unread_keys(record, "image", "images", *read)
    if unread:
        raise ValueError(f"{unread[0]!r} is not read; file names of pictures, and nothing else, "
                         "go in 'image'")
    if record.get("image") and record.get("images"):
        raise ValueError("has 'image' and 'images'; one of them must go")
    key = "images" if record.get("images") else "image"
    images = record.get(key)
    if images is None or images == "":
        return []
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, (str, Place)) and name
                                              for name in names):
        raise ValueError(f"{key} is {images!r:.80}, neither a file name nor a list of file names")
    return names


def normal_record(record, place=None):
    """A record of any form as {"system": text or None, "image": [...], "conversations": [...]}.

    place   where the record stands in its file, for its data: URLs
    Raises ValueError that says the first thing that is wrong with its form.
    """
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"a {kind} where an object with id, image and conversations belongs")
    system, turns, named = None, record.get("conversations"), []
    if record.get("messages"):
        if turns:
            raise ValueError("has 'conversations' and 'messages'; one of them must go")
        system, turns, named = read_messages(record["messages"])
    if not isinstance(turns, list) or not turns:
        raise ValueError("no conversations; a list of {from, value} turns is needed, or messages "
                         "of {role, content}")
    for i, turn in enumerate(turns):
        problem = turn_problem(turn, ("human", "gpt")[i % 2])
        if problem:
            raise ValueError(f"turn {i} {problem}")
    if len(turns) % 2:
        raise ValueError(f"{len(turns)} turns: the last question has no answer")
    names = image_names(record, "messages")
    if any(named):
        if names or not all(named):
            raise ValueError("some pictures stand in the messages and some do not; put all of them "
                             "there, or all in 'images'")
        names = named
    tags = sum(turn["value"].count(IMAGE) for turn in turns)
    if tags != len(names):
        images = "1 image" if len(names) == 1 else f"{len(names)} images"
        raise ValueError(f"{tags} {IMAGE} tags for {images}; each image needs one tag in a human "
                         "turn")
    names = [find_picture(name, record, place) for name in names]
    turns = [{"from": turn["from"], "value": turn["value"]} for turn in turns]
    return {"system": system, "image": names, "conversations": turns}


def find_picture(name, record, place):
    """A name of a picture as it is, a data: URL as its Place. ValueError for an address."""
    if isinstance(name, str) and re.match("https?://", name):
        raise ValueError(f"image {name!r:.80} is an address; download it and name the file")
    if isinstance(name, str) and name.startswith("data:"):
        if place is None:
            raise ValueError("data: URLs are read from JSON files alone")
        return place._replace(n=data_urls(record).index(name))
    return name


def read_messages(messages):
    """(system text or None, turns, pictures) of messages; a picture without a name is None."""
    system, turns, named = None, [], []
    if not isinstance(messages, list):
        raise ValueError(f"messages is {messages!r:.80}, no list of {{role, content}}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} is not {{role, content}}")
        if message.get("weight") == 0:
            raise ValueError(f"message {i} has weight 0, but every answer is trained on; take the "
                             "message out")
        try:
            text = read_content(message.get("content"), named)
        except ValueError as error:
            raise ValueError(f"message {i}: {error}") from error
        role = message.get("role")
        if role in ("system", "developer") and i == 0:
            system = text
        else:
            turns.append(message | {"from": ROLES.get(role, role), "value": text})
    return system, turns, named


def read_content(content, named):
    """The text of a message, with a tag for each picture; what pictures it names, `named` gets.

    OURS: parts are put on lines of their own, as LLaVA's records have the image.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"content is {content!r:.80}, neither text nor a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"].strip())
        elif kind in ("image", "image_url"):
            if part.get("index") not in (None, len(named)):
                raise ValueError(f"picture {part['index']} where picture {len(named)} is next")
            texts.append(IMAGE)
            named.append(name_in_part(part))
        else:
            raise ValueError(f"a part is {part!r:.80}; parts of type text, image and image_url are "
                             "read")
    return "\n".join(texts)


def name_in_part(part):
    """The picture that a part of a message names, or None."""
    for key in ("image", "image_url", "path", "url"):
        name = part.get(key)
        if isinstance(name, dict):
            name = name.get("url")
        if isinstance(name, str) and name:
            return name
        if part.get(key):
            raise ValueError(f"a picture is {part[key]!r:.80}, no file name and no data: URL")
    return None


def unread_keys(value, *read):
    """The keys of a record or a turn that hold media or a role, but not where we read them."""
    return [key for key in value
            if key.lower() in MEDIA_AND_ROLES and key not in read and value[key]]


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
