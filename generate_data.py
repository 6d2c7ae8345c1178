"""
Where the data comes from: a text-only teacher reads captions and boxes and writes instruction-following data (Sec. 3).

    python generate_data.py instruct --captions captions_train2014.json --instances instances_train2014.json \\
        --out data/instruct --base_url https://api.openai.com/v1 --model gpt-4o                     instruct.json
    python generate_data.py filter --pairs cc3m.tsv --columns "caption image" --out data/cc3m       the concept filter of CC3M
    python generate_data.py expand --pairs data/cc3m/pairs.tsv --out data/cc3m/chat.json            stage 1's samples

    picture's annotations --read_contexts--> Context --messages--> system, few-shot examples, context
      --ask--> the reply, kept raw on disk before anybody looks at it --parse, objection--> records and rejects

The teacher never sees a picture: captions and boxes are all it knows (Table 1, top). The released project has no such
program; what is the paper's here is the context, the three types, their few-shot numbers and the message list.
"""
import fcntl
import hashlib
import heapq
import json
import math
import os
import random
import re
import sys
import threading
import time
import unicodedata
import zlib
from array import array
from collections import Counter, defaultdict
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import ijson
import numpy as np
import requests
from tqdm import tqdm

from records import IMAGE, brief_instructions, read_json, run_command, typed_flags, write_lines

TYPES = ("conversation", "detail_description", "complex_reasoning")
HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# Context: what the teacher may know of a picture (Sec. 3, "symbolic representations")


class Context(NamedTuple):
    """One picture in words.

    captions  one a line
    boxes     one a line, `category: [x1, y1, x2, y2]`: corners as fractions of the original picture, three decimals
    """
    id: str
    image: str
    captions: str
    boxes: str = ""


def box_line(category, box):
    """`dog: [0.1, 0.25, 0.5, 1.0]`"""
    if len(box) != 4 or not all(-0.001 <= v <= 1.001 for v in box) or box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"box {box} of {category!r}; [x1, y1, x2, y2] as fractions of the picture, 0 to 1, with x1 < x2 and "
                         "y1 < y2, is needed")
    return f"{category}: {[round(min(max(float(v), 0.0), 1.0), 3) for v in box]}"


def from_record(record):
    """A JSON line {"id", "image", "captions": [...], "instances": [{"category", "bbox"}, ...]} -> Context.

    The place to adapt for another domain: all that is known and can be written may stand in "captions" or, to keep it
    apart, in "notes": strings as "text on the sign: CLOSED", "taken at: 14:05, harbour". Either list may be missing.
    """
    if alone := [field for field in ("captions", "notes") if isinstance(record.get(field), str)]:
        raise ValueError(f"{alone[0]} must be a list of strings, found {record[alone[0]]!r}")
    lines = [" ".join(text.split()) for text in record.get("captions", []) + record.get("notes", [])]
    if not any(lines):
        raise ValueError("no captions and no notes; the teacher would have nothing to go by")
    boxes = [box_line(thing["category"], thing["bbox"]) for thing in record.get("instances", [])]
    return Context(str(record["id"]), record["image"], "\n".join(filter(None, lines)), "\n".join(boxes))


def from_coco(captions, instances=None):
    """COCO's two annotation files -> Contexts, in the order of the captions file's images. Pictures without a caption are
    left out: COCO has none such. Both files are streamed: instances_train2017.json alone is 450 MB."""
    def rows(path, key):
        with open(path, "rb") as f:
            yield from ijson.items(f, f"{key}.item", use_float=True)
    images = {row["id"]: (row["file_name"], row["width"], row["height"]) for row in rows(captions, "images")}
    said, boxes = defaultdict(list), defaultdict(list)
    for row in rows(captions, "annotations"):
        said[row["image_id"]].append(" ".join(row["caption"].split()))
    if instances:
        names = {row["id"]: row["name"] for row in rows(instances, "categories")}
        for row in rows(instances, "annotations"):
            x, y, w, h = row["bbox"]
            if row["image_id"] in said and min(w, h) > 0:        # the image lists may differ; COCO has boxes without area
                _, width, height = images[row["image_id"]]
                boxes[row["image_id"]].append(
                    box_line(names[row["category_id"]], (x / width, y / height, (x + w) / width, (y + h) / height)))
    for key, (name, _, _) in images.items():
        if key in said:
            yield Context(Path(name).stem, name, "\n".join(said.pop(key)), "\n".join(boxes.pop(key, ())))


def read_contexts(captions, instances=None):
    """All Contexts of a COCO captions file (with its instances file, if any), or of JSON lines.

    ValueError names file and record; FileNotFoundError the file.
    """
    for path in filter(None, (captions, instances)):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such file")
    with open(captions, "rb") as f:
        coco = b'"annotations"' in f.read() if instances is None else True
    if coco:
        try:
            contexts = list(from_coco(captions, instances))
        except (ijson.JSONError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{captions}{f' or {instances}' if instances else ''}: not COCO's annotations: "
                             f"{type(error).__name__} {error}") from error
    else:
        contexts = []
        for i, record in enumerate(read_json(captions)):
            try:
                contexts.append(from_record(record))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{captions}[{i}]: {type(error).__name__} {error}; needed are id, image, captions (strings), "
                                 "and for boxes instances: [{category, bbox}]") from error
    twice = [i for i, n in Counter(c.id for c in contexts).items() if n > 1]
    if twice or not contexts:
        raise ValueError(f"{captions}: " + (f"{len(twice)} ids occur twice, e.g. {twice[0]}" if twice else "no pictures in it"))
    return contexts


# ---------------------------------------------------------------------------------------------------------------------
# The three prompts


def read_prompts(folder):
    """{type: (system message, [(context, answer), ...])} of a folder that is laid out like prompts/.

    Few-shot examples are the files NNN_caps.txt and NNN_conv.txt. The paper has 2, 3 and 3 of them (Sec. 3).
    """
    prompts, questions = {}, Path(folder, "detail_instructions.txt")
    for kind in TYPES:
        system, caps = Path(folder, kind, "system_message.txt"), sorted(Path(folder, kind).glob("*_caps.txt"))
        answers = [path.with_name(path.name.replace("_caps", "_conv")) for path in caps]
        for path in (system, *answers, questions):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; the folder holds detail_instructions.txt and for each type "
                                        f"({', '.join(TYPES)}) TYPE/system_message.txt, TYPE/NNN_caps.txt, TYPE/NNN_conv.txt")
        prompts[kind] = system.read_text(), [(c.read_text(), a.read_text()) for c, a in zip(caps, answers)]
    return prompts


def context_text(kind, context):
    """What is shown of a picture: for a conversation the captions, else captions and boxes (Sec. 3)."""
    return context.captions if kind == "conversation" or not context.boxes else f"{context.captions}\n\n{context.boxes}"


def messages(system, shots, text, language=None):
    """The message list: system message, few-shot examples as user and assistant turns, the query."""
    if language:
        system += f"\n\nWrite in {language}, whatever the language of the sentences. Only the words Question and Answer stay."
    turns = [("system", system), *((role, said) for shot in shots for role, said in zip(("user", "assistant"), shot))]
    return [{"role": role, "content": said} for role, said in (*turns, ("user", text))]


def detail_questions(folder=HERE / "prompts"):
    """Ways to ask for a detailed description, one a line: our 16 (Sec. 3; the paper has its own list), or --prompts'."""
    return Path(folder, "detail_instructions.txt").read_text().strip().splitlines()


class Request(NamedTuple):
    """One thing to ask the teacher. `key`, the hash of `id` and `body`, is how its reply is found again."""
    id: str
    kind: str
    context: Context
    body: dict
    question: str = ""                   # of a reference answer

    @property
    def key(self):
        return hashlib.sha256(json.dumps([self.id, self.body], sort_keys=True).encode()).hexdigest()[:32]


DENSE = "\u0e00-\u0eff\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"      # Thai, Lao, Korean, Japanese, Chinese


def count_tokens(text):
    """About as many tokens as a large byte-pair vocabulary makes of a text: words, DENSE characters, three digits, signs."""
    return len(re.findall(rf"[{DENSE}]|[^\W\d_{DENSE}]+|\d{{1,3}}|[^\w\s]", text))


# ---------------------------------------------------------------------------------------------------------------------
# The client. `ask` is the only place in the project that speaks to a language model over the network.


class TryAgain(Exception):
    """A failure that may pass: `reason` is what it is counted under, `after` the seconds that the server asks for."""

    def __init__(self, reason, after=None):
        super().__init__(reason)
        self.reason, self.after = reason, after


LOCAL = threading.local()                # a connection pool for each thread
UNREACHED = {"refused": "connection refused", "Errno -": "unknown host", "connect timeout": "no connection", "SSL": "SSL error"}


def ask(base_url, body, timeout=120):
    """POST `body` to an OpenAI-compatible `base_url`/chat/completions; returns the reply, a dict.

    The key, if the server wants one, is the environment's OPENAI_API_KEY.
    Raises TryAgain for what may pass: 408, 409, 429, 5xx, a dropped or timed-out connection, a torn or foreign reply, an
    empty answer. Raises ValueError, with the server's words, for what will not: 400, 401, 403, 404, no credit.
    A reply whose finish_reason is "length" or "content_filter" is returned: it is an outcome, and it has been paid.
    """
    key, url = os.environ.get("OPENAI_API_KEY", ""), f"{base_url.rstrip('/')}/chat/completions"
    LOCAL.session = session = getattr(LOCAL, "session", None) or requests.Session()
    try:
        reply = session.post(url, json=body, timeout=(10, timeout), headers={"Authorization": f"Bearer {key}"} if key else {})
    except requests.ReadTimeout as error:
        raise TryAgain("timeout") from error
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError,
            requests.exceptions.ContentDecodingError) as error:
        why = next((why for sign, why in UNREACHED.items() if sign in str(error)), None)
        raise TryAgain(f"{url}: {why}" if why else "connection lost") from error
    except requests.RequestException as error:           # no address, a wrong scheme, ...
        raise ValueError(f"{url}: {error}") from error
    words = re.sub(r"\s+", " ", reply.text)[:500]
    if key:
        words = words.replace(key, "OPENAI_API_KEY")
    if reply.status_code != 200:
        if "content_filter" in words:
            return {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}
        if (reply.status_code in (408, 409, 429) or reply.status_code >= 500) and "insufficient_quota" not in words:
            raise TryAgain(f"HTTP {reply.status_code}", retry_after(reply.headers.get("Retry-After")))
        raise ValueError(f"{url}, model {body.get('model')!r}: HTTP {reply.status_code}: {words}")
    try:
        found = reply.json()
        text, finish = found["choices"][0]["message"]["content"], found["choices"][0].get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise TryAgain("not a chat completion") from error
    if not isinstance(text, str) or not text.strip():
        if finish not in ("length", "content_filter"):
            raise TryAgain("empty answer")
        found["choices"][0]["message"]["content"] = ""
    return found


def retry_after(header):
    """Seconds from a Retry-After header: a number, or a date."""
    try:
        return max(0.0, float(header))
    except (TypeError, ValueError):
        try:
            return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
        except (TypeError, ValueError):
            return None


def ask_all(jobs, ask, keep, workers, attempts=8, rpm=0, tpm=0, note=print):
    """`ask(job)` for all of `jobs`, an iterable of (job, tokens), `workers` at a time; `keep(job, reply)` as each comes in.

    A failure that may pass is tried again later, up to `attempts` times, and holds up no worker meanwhile. At most `rpm`
    requests and `tpm` tokens a minute are sent (0: no limit). Returns [(job, reason)] of those that failed to the end.
    Whatever ends the run (ValueError from `ask`, Ctrl-C), replies that are on their way are waited for and kept; Ctrl-C while
    it waits ends the process at once, without them.
    """
    jobs, left, later, running, failed, seen, free_at = iter(jobs), True, [], {}, [], set(), 0.0
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                while len(running) < workers and time.monotonic() >= free_at:
                    if later and later[0][0] <= time.monotonic():
                        _, _, attempt, entry = heapq.heappop(later)
                    elif left and (entry := next(jobs, None)):
                        attempt = 1
                    else:
                        left = False
                        break
                    if 0 < tpm < entry[1]:
                        raise ValueError(f"--tpm {tpm:g}: one request and its answer may have {entry[1]} tokens; raise it")
                    running[pool.submit(ask, entry[0])] = attempt, entry
                    free_at = max(free_at, time.monotonic()) + 60 * max(1 / rpm if rpm else 0, entry[1] / tpm if tpm else 0)
                if not (left or later or running):
                    return failed
                pause = None             # until something ends, or until the next request may go
                if len(running) < workers and (left or later):
                    pause = max(0.0, free_at - time.monotonic(), 0.0 if left else later[0][0] - time.monotonic())
                if not running:
                    time.sleep(pause)
                for future in wait(running, pause, FIRST_COMPLETED).done if running else ():
                    attempt, entry = running[future]
                    try:
                        keep(entry[0], future.result())
                    except TryAgain as error:
                        if error.reason not in seen:
                            note(f"{error.reason}: tried {attempts} times at most")
                            seen.add(error.reason)
                        if attempt == attempts:
                            failed.append((entry[0], error.reason))
                        else:
                            after = error.after
                            if after is None:            # back off, twice as long each time, jittered
                                after = min(60, 0.25 * 2 ** attempt) * random.uniform(0.5, 1)
                            heapq.heappush(later, (time.monotonic() + after, id(entry), attempt + 1, entry))
                    del running[future]
        except BaseException as stop:
            try:
                if n := sum(not future.done() for future in running):
                    note(f"{str(stop) or 'stopping'}: waiting for {n} replies under way; Ctrl-C ends at once, without them")
                for future in as_completed(running):
                    if not future.exception():
                        keep(running[future][1][0], future.result())
            except KeyboardInterrupt:
                note("ended at once: the replies under way are not kept")
                os._exit(130)            # any other way out waits for the threads
            raise


# ---------------------------------------------------------------------------------------------------------------------
# Nothing paid is lost, nothing is paid twice


@contextmanager
def whole_file(path):
    """A text file to write that takes its place when it is whole; after an error nothing of it is left."""
    try:
        with open(f"{path}.tmp", "w", encoding="utf-8", errors="backslashreplace") as f:     # half a surrogate: as JSON has it
            yield f
        os.replace(f"{path}.tmp", path)
    finally:
        Path(f"{path}.tmp").unlink(missing_ok=True)


@contextmanager
def only_one(folder):
    """The folder, made if need be, for this process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)     # the system drops it with the process, however that ends
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing there; wait for it, or write to another place") from None
        yield folder


class Replies:
    """raw.jsonl files, one reply a line, as {key: place in the file}; the text stays on disk.

    A last line that a kill tore is passed over, and cut off the file if `repair`: only whoever appends to it may. Any other
    line that is no reply is passed over with a note, so that its request is asked again.
    """

    def __init__(self, paths, repair=False):
        self.files, self.places, bad = [], {}, []
        for path in filter(os.path.exists, paths):
            end = 0
            with open(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    if not line.endswith(b"\n"):
                        if repair:
                            os.truncate(path, end)
                        break
                    try:
                        self.places.setdefault(json.loads(line)["key"], (len(self.files), end))
                    except (ValueError, KeyError, TypeError):
                        bad.append(number)
                    end += len(line)
            self.files.append(open(path, "rb"))
        if bad and repair:
            print(f"{path}, line {bad[0]}: torn, or no reply; passed over ({len(bad)} in all), what is missing is asked again")

    def __contains__(self, key):
        return key in self.places

    def __getitem__(self, key):
        file, place = self.places[key]
        self.files[file].seek(place)
        return json.loads(self.files[file].readline())["reply"]


def ask_missing(plan, raw, ask, args, price):
    """Ask for every request of `plan` that has no reply in the file `raw` yet; returns [(request, reason)] of failures.

    What ends it early (ValueError, OSError for a full disk, KeyboardInterrupt) says how many replies are kept, and where.
    """
    have, spent = Replies([raw], repair=True), 0.0
    known = [request.key in have for request in plan()]
    done, total = sum(known), len(known)
    if have.places:
        print(f"{raw}: {len(have.places)} replies, {done} of them to these {total} requests; {total - done} are new")
    missing = ((r, count_tokens(json.dumps(r.body["messages"], ensure_ascii=False)) + args.max_tokens)
               for r, asked in zip(plan(), known) if not asked)
    where = lambda: f"{done} of {total} replies are kept in {raw}"
    with open(raw, "ab", buffering=0) as f, tqdm(total=total, initial=done, unit="request", disable=None) as bar:
        def keep(request, reply):
            nonlocal spent, done
            line = json.dumps({"key": request.key, "id": request.id, "kind": request.kind, "reply": reply}).encode() + b"\n"
            end = f.seek(0, os.SEEK_END)
            try:
                if f.write(line) < len(line):                    # one write, straight to the system: SIGKILL cannot undo it
                    raise OSError("the disk is full")
            except OSError as error:
                f.truncate(end)                                  # no torn line
                raise OSError(f"{error}; a reply that came is lost") from error
            done, spent = done + 1, spent + price(reply)
            bar.set_postfix_str(f"${spent:.2f}" if spent else "")
            bar.update()
        try:
            return ask_all(missing, ask, keep, args.workers, args.attempts, args.rpm, args.tpm,
                           lambda said: tqdm.write(f"{said} ({where()})", file=sys.stderr))
        except (ValueError, OSError, KeyboardInterrupt) as error:
            kind = next(kind for kind in (ValueError, OSError, KeyboardInterrupt) if isinstance(error, kind))
            raise kind(f"{str(error) or 'stopped'}; {where()}; {AGAIN}") from error


# ---------------------------------------------------------------------------------------------------------------------
# From a reply to a record, or to the reason why not


class Reject(Exception):
    """Why a reply is no record; the reason is what it is counted under."""


LABEL = re.compile(r"^[^\w\n]*(?:\d+\s*[.)]\W*)?(question|answer|q|a)\s*\d*\W{0,3}[:：]", re.IGNORECASE | re.MULTILINE)


def parse(kind, text):
    """A teacher's words -> [(question, answer), ...]; the question of a detailed description is None. Raises Reject.

    The form asked for is "Question:\\n...\\n===\\nAnswer:\\n...\\n===\\n". Models also return markdown, numbers, "Q:", no
    separators or a question without answer at the end; all that is understood. Refusals are known in English only.
    """
    clean = lambda part: re.sub(r"^\s*[=\-*_#]{3,}\s*$", "", part, flags=re.MULTILINE).strip().strip("*#").strip()
    pieces = LABEL.split(text)                           # [before, label, said, label, said, ...]
    if kind == "detail_description":
        said = [clean(part) for label, part in zip(pieces[1::2], pieces[2::2]) if label.lower().startswith("a")]
        answer = said[0] if said else clean(re.sub(r"^\W*(detailed )?description\W*:", "", text, flags=re.IGNORECASE))
        turns = [(None, answer)] if answer else []
    else:
        if len(pieces) == 1:                             # labels in another language, or none: the separators must do
            parts = re.split(r"(?m)^\s*={3,}\s*$", text)
            said = [clean(re.sub(r"^\W*[^\W\d_]+\s*[:：]\s*", "", part.strip())) for part in parts]
            pieces = [""] + [x for i, part in enumerate(filter(None, said)) for x in ("qa"[i % 2], part)]
        turns, question = [], ""
        for label, part in zip(pieces[1::2], map(clean, pieces[2::2])):
            if label.lower().startswith("q"):
                question = part
            elif question and part:
                turns.append((question, part))
                question = ""
        turns = turns[:1] if kind == "complex_reasoning" else turns
    if not turns:
        raise Reject("refuses" if SPEAKS_OF["refuses"].search(text) else
                     "no question and answer" if kind != "detail_description" else "no answer")
    return turns


SPEAKS_OF = {                            # OURS, for English: the released project does not say how bad replies were found
    "speaks of its context": re.compile(
        r"\bcaptions?\b|\bbounding box(es)?\b|\bcoordinates?\b"
        r"|\b(based on|according to|from) the (description|sentences|text)s?\b"
        r"|\b(provided|given|above|following) (text|description|sentence|information|context|list|data)s?\b"
        r"|[\[(]\s*[01]?\.\d+\s*,", re.IGNORECASE),
    "refuses": re.compile(r"\b(as an? (ai|language model|text)|i('m| am) (sorry|unable)|i (cannot|can't|can not) "
                          r"(see|view|assist|help|fulfill|provide|answer)|cannot be (determined|answered))\b", re.IGNORECASE),
    "names the image token": re.compile(re.escape(IMAGE))}

SCRIPTS = {language: set(scripts.split()) for scripts, languages in {
    "LATIN": "English French German Spanish Portuguese Italian Dutch Polish Czech Swedish Danish Norwegian Finnish Turkish "
             "Vietnamese Indonesian Swahili Romanian Hungarian",
    "CYRILLIC": "Russian Ukrainian Bulgarian Serbian", "ARABIC": "Arabic Persian Urdu", "DEVANAGARI": "Hindi Marathi Nepali",
    "CJK": "Chinese", "CJK HIRAGANA KATAKANA KATAKANA-HIRAGANA": "Japanese", "HANGUL": "Korean", "GREEK": "Greek",
    "HEBREW": "Hebrew", "THAI": "Thai", "BENGALI": "Bengali", "TAMIL": "Tamil"}.items() for language in languages.split()}


def in_script(text, language):
    """Are four of five letters of the language's script? Tells Chinese from English, not German from English."""
    letters = [unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()]
    if language == "Japanese" and "HIRAGANA" not in letters:     # else Chinese would do
        return False
    return sum(name in SCRIPTS[language] for name in letters) >= 0.8 * len(letters)


class Sketches:
    """Finds near-duplicates by the 8 smallest hashes of a text's runs of four words (characters, where there are no blanks;
    MinHash): 6 in common are too many."""

    def __init__(self):
        self.owner = {}                  # hash -> the text that had it first

    def twin(self, name, text):
        """The name of an earlier text that this one nearly repeats, or None."""
        words = re.findall(rf"[{DENSE}]|[^\W{DENSE}]+", text.lower())
        runs = {" ".join(words[i:i + 4]) for i in range(len(words) - 3)}
        smallest = sorted(zlib.crc32(run.encode()) for run in runs)[:8]
        common = Counter(self.owner.setdefault(h, name) for h in smallest)
        return next((other for other, n in common.most_common() if n >= 6 and other != name), None)


def whole_text(reply):
    """What a reply says; raises Reject if it was cut off."""
    choice = reply["choices"][0]
    if choice.get("finish_reason") in ("length", "content_filter"):
        raise Reject({"length": "cut off at max_tokens", "content_filter": "content filter"}[choice["finish_reason"]])
    return choice["message"]["content"].strip()


def check_words(text, language):
    """Raises Reject if a text betrays that its writer saw no picture, or is in another language."""
    for reason, pattern in SPEAKS_OF.items():
        if pattern.search(text):
            raise Reject(reason)
    if language and not in_script(text, language):
        raise Reject("wrong language")


def record_of(request, reply, args, sketches):
    """A reply -> LLaVA's record, with the picture before or after the first question at random: Eq. (2). Raises Reject."""
    rng = random.Random(f"{args.seed} {request.id}")
    turns = parse(request.kind, whole_text(reply))
    text = "\n".join(part for turn in turns for part in turn if part)       # what the teacher wrote
    check_words(text, args.language)
    turns = [(question or rng.choice(detail_questions(args.prompts)), answer) for question, answer in turns]
    if not args.keep_duplicates:
        if len({question.lower() for question, _ in turns}) < len(turns):
            raise Reject("asks the same twice")
        if sketches.twin(request.id, text):
            raise Reject("near-duplicate")
    return {"id": request.id, "image": request.context.image, "conversations": conversation(turns, rng)}


def conversation(turns, rng):
    """[(question, answer), ...] -> LLaVA's turns; Eq. (2) draws whether the picture leads or follows the first question."""
    first = f"{IMAGE}\n{turns[0][0]}" if rng.random() < 0.5 else f"{turns[0][0]}\n{IMAGE}"
    said = [first] + [part for turn in turns for part in turn][1:]
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(said)]


# ---------------------------------------------------------------------------------------------------------------------
# instruct: captions and boxes -> instruct.json


@dataclass(frozen=True)
class Instruct:
    out: str                             # folder for instruct.json, rejected.jsonl, raw.jsonl, metadata.json
    captions: str                        # COCO's captions_*.json, or JSON lines of id, image, captions, instances
    instances: str = None                # COCO's instances_*.json
    teacher: str = "api"                 # api: a chat endpoint; script: the toy's scripted teacher, no language model
    base_url: str = "https://api.openai.com/v1"  # any OpenAI-compatible endpoint; key: environment variable OPENAI_API_KEY
    model: str = "gpt-4"                 # the paper's; any chat model that the endpoint has
    temperature: float = 1.0             # OURS: not released
    max_tokens: int = 1024               # OURS: not released
    extra: str = None                    # JSON object of further fields of the request, e.g. {"seed": 0}; null removes one
    prompts: str = str(HERE / "prompts")  # folder of TYPE/system_message.txt, NNN_caps.txt, ..., detail_instructions.txt
    language: str = None                 # language to write in, by its English name; the script of the answers is checked
    mix: list[str] = ("conversation=58", "detail_description=23", "complex_reasoning=77")  # shares; a picture gets one type
    numbers: list[str] = ()              # TYPE=N: exactly so many pictures, drawn for each type by itself (instead of --mix)
    limit: int = None                    # only the first N requests
    seed: int = 0
    workers: int = 16                    # requests at a time
    rpm: float = 0                       # requests a minute at most; 0: no limit
    tpm: float = 0                       # tokens a minute at most, counting max_tokens for an answer; 0: no limit
    timeout: float = 120                 # seconds without a byte
    attempts: int = 8                    # times that a request is tried
    price_in: float = 0                  # money for a million tokens of prompt
    price_out: float = 0                 # money for a million tokens of answer
    keep_duplicates: bool = False        # near-duplicates stay: for a teacher that speaks in set phrases
    show: int = 0                        # print the first N requests whole, send nothing
    estimate: bool = False               # print requests, tokens, money and hours, send nothing
    shard: str = None                    # i/n: only every n-th request from the i-th on, in OUT/shard_i_of_n
    merge: bool = False                  # write the outputs from the replies of all OUT/shard_*; send nothing
    bench: int = 0                       # make a LLaVA-Bench (COCO) of N pictures instead


AGAIN = "run the same command again, with the same flags: it asks only for the others"
LEAST = {"limit": 1, "show": 0, "bench": 0, "workers": 1, "attempts": 1, "rpm": 0, "tpm": 0, "timeout": 0.001, "temperature": 0,
         "max_tokens": 1, "max_new_tokens": 1, "batch_size": 1, "runs": 1, "price_in": 0, "price_out": 0, "most": 1, "least": 1}


def in_range(args):
    """`args`; ValueError names a flag that is too small, infinite or no number."""
    for name, least in LEAST.items():
        if (value := getattr(args, name, None)) is not None and not least <= value < math.inf:
            raise ValueError(f"--{name} {value}: a number is needed, {least} or more")
    return args


def amounts(flag, pairs):
    """--mix or --numbers, ["conversation=58", ...] -> {type: 58.0}"""
    found, number = dict(pair.partition("=")[::2] for pair in pairs), r"\d+" if flag == "--numbers" else r"\d+(\.\d+)?"
    if (len(found) < len(pairs) or not all(k in TYPES and re.fullmatch(number, v) for k, v in found.items())
            or not any(map(float, found.values()))):
        raise ValueError(f"{flag} {' '.join(pairs)}: TYPE=N is needed, each TYPE once, out of {', '.join(TYPES)}; N is a "
                         f"{'whole ' * (flag == '--numbers')}number, not 0 for all")
    return {kind: float(found.get(kind, 0)) for kind in TYPES}


def draw(contexts, args):
    """[(type, context), ...]: which picture gets which type, by --mix (one each) or --numbers; seeded."""
    rng, pairs = random.Random(args.seed), []
    if args.numbers:
        if args.mix != Instruct.mix:
            raise ValueError("--numbers and --mix: only one of them can say how much of each type there is")
        for kind, n in amounts("--numbers", args.numbers).items():
            if n > len(contexts):
                raise ValueError(f"--numbers {kind}={n:.0f}, but there are {len(contexts)} pictures")
            order = random.Random(f"{args.seed} {kind}").sample(range(len(contexts)), len(contexts))      # its own, and whole:
            pairs += [(kind, i) for i in order[:int(n)]]         # more of one type leaves all the others as they are
    else:
        shares = amounts("--mix", args.mix)
        order, edge, total = rng.sample(range(len(contexts)), len(contexts)), 0.0, sum(shares.values())
        for kind, share in shares.items():
            start, edge = edge, edge + share * len(contexts) / total
            pairs += [(kind, i) for i in order[round(start):round(edge)]]
    rng.shuffle(pairs)
    return [(kind, contexts[i]) for kind, i in pairs]


def body_of(args, said):
    """The request's JSON."""
    try:
        extra = {**json.loads(args.extra or "{}")}
    except (ValueError, TypeError) as error:
        raise ValueError(f"--extra {args.extra}: a JSON object is needed, e.g. {{\"seed\": 0}} ({error})") from error
    body = {"model": args.model, "messages": said, "temperature": args.temperature, "max_tokens": args.max_tokens, **extra}
    return {name: value for name, value in body.items() if value is not None}


def requests_of(pairs, prompts, args):
    for kind, context in pairs:
        said = messages(*prompts[kind], context_text(kind, context), args.language)
        yield Request(f"{context.id}-{kind}", kind, context, body_of(args, said))


def price(reply, args):
    usage = reply.get("usage") or {}
    return ((usage.get("prompt_tokens") or 0) * args.price_in + (usage.get("completion_tokens") or 0) * args.price_out) / 1e6


def print_estimate(plan, prompts, args):
    """Requests, tokens, money and hours. Answers are taken to be as long as the few-shot examples."""
    long = {kind: np.mean([count_tokens(answer) for _, answer in prompts[kind][1]] or [300]) for kind in TYPES}
    long["reference"] = np.mean([*long.values()])        # of a bench
    fixed, n, tokens_in, tokens_out = {}, Counter(), Counter(), Counter()
    for r in plan():
        *before, query = (m["content"] for m in r.body["messages"])
        fixed[r.kind] = fixed.get(r.kind) or sum(map(count_tokens, before)) + 4 * len(r.body["messages"])
        n[r.kind] += 1
        tokens_in[r.kind] += fixed[r.kind] + count_tokens(query)
        tokens_out[r.kind] += long[r.kind]
    print(f"{'type':<20}{'requests':>10}{'tokens in':>15}{'tokens out':>13}{'money':>12}")
    cost = lambda kinds: sum(tokens_in[k] * args.price_in + tokens_out[k] * args.price_out for k in kinds) / 1e6
    rows = [(kind, [kind]) for kind in long if n[kind]] + [("all", long)]
    for name, kinds in rows:
        print(f"{name:<20}{sum(n[k] for k in kinds):>10,}{sum(tokens_in[k] for k in kinds):>15,}"
              f"{sum(int(tokens_out[k]) for k in kinds):>13,}{cost(kinds):>12,.2f}")
    counted, requests_ = sum(tokens_in.values()) + args.max_tokens * sum(n.values()), sum(n.values())
    for limit, flag, amount in ((args.rpm, "--rpm", requests_), (args.tpm, "--tpm", counted)):
        print(f"{flag} {limit:,.0f}: {amount / limit / 60:,.1f} hours at least" if limit else f"{flag}: no limit given")


def print_requests(plan):
    for r in plan():
        print(f"--- {r.id}: {', '.join(f'{k} {v}' for k, v in r.body.items() if k != 'messages')}")
        for message in r.body["messages"]:
            print(f"[{message['role']}]\n{message['content']}")


def write_records(plan, replies, prompts, out, args):
    """instruct.json, a LLaVA file, and rejected.jsonl, each reject with its reason; returns the report."""
    kept, why, long, turns, answers = Counter(), defaultdict(Counter), defaultdict(list), Counter(), 0
    sketches, usage = Sketches(), Counter()
    for kind, (_, shots) in prompts.items():             # a model may repeat the examples that it was shown
        for i, (_, answer) in enumerate(shots):
            sketches.twin(f"{kind} example {i}", answer)
    with whole_file(out / "instruct.json") as f, whole_file(out / "rejected.jsonl") as bad:
        f.write("[")
        for request in plan():
            if request.key not in replies:
                continue
            answers += 1
            reply = replies[request.key]
            usage.update({k: v for k, v in (reply.get("usage") or {}).items() if isinstance(v, int)})
            try:
                record = record_of(request, reply, args, sketches)
            except Reject as reject:
                why[request.kind][str(reject)] += 1
                bad.write(json.dumps({"id": request.id, "kind": request.kind, "reason": str(reject),
                                      "text": reply["choices"][0]["message"]["content"]}, ensure_ascii=False) + "\n")
                continue
            f.write((",\n" if sum(kept.values()) else "\n") + json.dumps(record, ensure_ascii=False))
            said = [turn["value"] for turn in record["conversations"][1::2]]
            kept[request.kind] += 1
            turns[request.kind] += len(said)
            long[request.kind] += [len(text.split()) for text in said]
        f.write("\n]\n")
    return {"replies": answers, "usage": dict(usage), "money": price({"usage": usage}, args), "types": {kind: {
        "records": kept[kind], "answers": turns[kind], "words_per_answer": float(np.mean(long[kind])) if long[kind] else 0,
        "rejected": dict(why[kind].most_common())} for kind in TYPES if kept[kind] or why[kind]}}


def print_report(report, out):
    print(f"{'type':<20}{'records':>9}{'answers':>9}{'words/answer':>14}   rejected")
    for kind, row in report["types"].items():
        print(f"{kind:<20}{row['records']:>9,}{row['answers']:>9,}{row['words_per_answer']:>14.1f}   "
              + (", ".join(f"{reason} {n}" for reason, n in row["rejected"].items()) or "none"))
    money = f", money {report['money']:,.2f}" if report["money"] else ""
    print(f"{report['replies']} replies, tokens {report['usage'].get('prompt_tokens', 0):,} in and "
          f"{report['usage'].get('completion_tokens', 0):,} out{money}; wrote {out / 'instruct.json'}")


def teacher_of(args):
    """What answers a request."""
    if args.teacher == "api":
        return lambda request: ask(args.base_url, request.body, args.timeout)
    from toy import scripted_teacher                     # only here: toy.py stands above this file
    return lambda request: scripted_teacher(request, args.seed)


def prompts_hash(prompts):
    return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:16]


def instruct(args):
    """Captions and boxes -> instruction data in LLaVA's format. Start it again after any interruption: it goes on."""
    if args.language and args.language not in SCRIPTS:
        raise ValueError(f"--language {args.language}: known are {', '.join(sorted(SCRIPTS))}")
    if args.teacher == "script":
        args = replace(args, model="scripted teacher (no language model)", keep_duplicates=True)
    part, parts = shard_of(args.shard)
    prompts, contexts = read_prompts(args.prompts), read_contexts(args.captions, args.instances)
    if args.bench:
        return bench(args, contexts, prompts)
    pairs = draw(contexts, args)[:args.limit][part::parts]
    if not pairs:
        raise ValueError(f"--shard {args.shard}: no request falls to it; take fewer shards")
    plan = lambda: requests_of(pairs[:args.show or None], prompts, args)
    if args.show:
        return print_requests(plan)
    if args.estimate:
        return print_estimate(plan, prompts, args)
    out = Path(args.out) / (f"shard_{part}_of_{parts}" if args.shard else "")
    with only_one(out):
        raw, failed, stop = [out / "raw.jsonl"], [], None
        if args.merge:
            raw = sorted(Path(args.out).glob("shard_*/raw.jsonl"))
            print(f"merging {len(raw)} shards: {', '.join(path.parent.name for path in raw)}")
        else:
            try:
                failed = ask_missing(plan, raw[0], teacher_of(args), args, lambda reply: price(reply, args))
            except (ValueError, KeyboardInterrupt) as error:     # what is paid can be used all the same
                stop = error
        replies, failed = Replies(raw), dict(Counter(reason for _, reason in failed))
        if have := sum(request.key in replies for request in plan()):        # else the files of another run stay as they are
            report = write_records(plan, replies, prompts, out, args)
            report |= {"requests": len(pairs), "failed": failed, "date": str(date.today()), "teacher": args.model,
                       "prompts": prompts_hash(prompts), "seed": args.seed, "settings": asdict(args)}
            (out / "metadata.json").write_text(json.dumps(report, indent=1) + "\n")
            print_report(report, out)
    if stop:
        raise stop
    if missing := len(pairs) - have:
        raise ValueError(f"{missing} of {len(pairs)} requests have no reply yet ({failed or 'not asked'}), {have} have; "
                         f"{f'see {out}' if have else f'nothing is written in {out}'}; "
                         + ("run the shards to their end, with the same flags" if args.merge else AGAIN))


def shard_of(text):
    """"2/8" -> (2, 8); None -> (0, 1)"""
    found = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not part < parts:
        raise ValueError(f"--shard {text}: i/n with 0 <= i < n is needed, e.g. 0/4")
    return part, parts


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA-Bench (COCO): questions about new pictures, and the reference answers of a text-only teacher (Sec. 5.1)

CATEGORY = dict(zip(TYPES, ("conv", "detail", "complex")))


def bench(args, contexts, prompts):
    """--bench N: N pictures, a question of each type about each, and their reference answers, in eval.py's files:
    questions.jsonl, reference.jsonl, context.jsonl. A picture for which a type is rejected makes room for the next one."""
    if unused := [f"--{name}" for name in ("mix", "numbers", "limit", "shard", "merge")
                  if getattr(args, name) != getattr(Instruct, name)]:
        raise ValueError(f"--bench has a question of each type about each picture, and no use for {', '.join(unused)}")
    if args.bench > len(contexts):
        raise ValueError(f"--bench {args.bench}: {args.captions} has {len(contexts)} pictures")
    order = random.Random(args.seed).sample(contexts, len(contexts))
    system, asked, tried = (Path(args.prompts) / "reference" / "system_message.txt").read_text(), {}, 0
    ask, cost = teacher_of(args), lambda reply: price(reply, args)
    question_requests = lambda some: list(requests_of([(kind, c) for c in some for kind in TYPES], prompts, args))
    reference_request = lambda c, kind, question: Request(f"{c.id}-reference-{kind}", "reference", c, body_of(args, messages(
        system, [], f"{context_text('reference', c)}\n\n{question}", args.language)), question)
    if args.show or args.estimate:
        plan = [r for c in order[:args.bench] for r in question_requests([c]) + [
            reference_request(c, kind, f"(the question that is the reply to {c.id}-{kind})") for kind in TYPES]]
        return print_requests(lambda: plan[:args.show]) if args.show else print_estimate(lambda: plan, prompts, args)

    def usable(plan, read):
        """{picture: [read(request, reply) of each type]}, of the pictures for which none is rejected."""
        finish(ask_missing(lambda: iter(plan), out / "raw.jsonl", ask, args, cost))
        replies, found = Replies([out / "raw.jsonl"]), defaultdict(list)
        for request in plan:
            try:
                found[request.context].append(read(request, replies[request.key]))
            except Reject as reject:
                print(f"{request.id}: {reject}; another picture takes its place")
        return {context: said for context, said in found.items() if len(said) == len(TYPES)}

    def question_of(request, reply):
        first = record_of(request, reply, args, Sketches())["conversations"][0]["value"]
        return request.kind, first.replace(IMAGE, "").strip()

    def answer_of(request, reply):
        check_words(text := whole_text(reply), args.language)
        return text

    with only_one(Path(args.out)) as out:
        while len(asked) < args.bench:
            some = order[tried:tried + args.bench - len(asked)]
            if not some:
                raise ValueError(f"{len(asked)} of {len(order)} pictures have a usable question and answer of each type; "
                                 f"--bench {args.bench} needs more pictures")
            tried += len(some)
            questions = usable(question_requests(some), question_of)
            answers = usable([reference_request(c, *row) for c, rows in questions.items() for row in rows], answer_of)
            asked |= {c: list(zip(questions[c], said)) for c, said in answers.items()}
        rows = [(c, kind, question, text) for c, said in asked.items() for (kind, question), text in said]
        write_lines(out / "questions.jsonl", [{"question_id": i, "image": c.image, "text": question, "category": CATEGORY[kind]}
                                              for i, (c, kind, question, _) in enumerate(rows)])
        write_lines(out / "reference.jsonl", [
            {"question_id": i, "prompt": question, "text": text, "answer_id": f"reference-{i}", "model_id": args.model,
             "metadata": {}, "category": CATEGORY[kind]} for i, (_, kind, question, text) in enumerate(rows)])
        write_lines(out / "context.jsonl", [
            {"id": c.id, "image": c.image, "captions": c.captions.split("\n"), "instances": [
                {"category": line.rpartition(": ")[0], "bbox": json.loads(line.rpartition(": ")[2])}
                for line in c.boxes.splitlines()]} for c in asked])
        (out / "metadata.json").write_text(json.dumps({
            "pictures": len(asked), "tried": tried, "teacher": args.model, "prompts": prompts_hash(prompts), "seed": args.seed,
            "date": str(date.today()), "settings": asdict(args)}, indent=1) + "\n")
    print(f"{len(rows)} questions about {len(asked)} pictures and their reference answers: {out}/questions.jsonl, "
          "reference.jsonl, context.jsonl")


def finish(failed):
    if failed:
        raise ValueError(f"{len(failed)} requests have no reply ({dict(Counter(reason for _, reason in failed))}); "
                         + AGAIN)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: which pairs of CC3M, and naive expansion (Sec. 4.2 and the appendix)


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def read_pairs(path, columns="image caption"):
    """Yield (image, caption) from a TSV, from JSON lines with these two fields, or from a folder of pictures with .txt files.

    `columns` names a TSV's columns in order; CC3M's own file is "caption image", with an address for the image. An image with
    blanks must end as a picture's file does, and no caption may be an address or a file name: columns are easily swapped.
    """
    named = lambda text: "://" in text or text.lower().endswith(PICTURES)
    if os.path.isdir(path):
        texts = {p.with_suffix(""): p for p in Path(path).rglob("*.txt")}
        for picture in sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in PICTURES):
            if picture.with_suffix("") not in texts:
                raise ValueError(f"{picture}: no {picture.stem}.txt with its caption beside it")
            yield str(picture.relative_to(path)), " ".join(texts[picture.with_suffix("")].read_text().split())
        return
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file or folder")
    names = columns.split()
    if not {"image", "caption"} <= set(names):
        raise ValueError(f"--columns {columns!r}: the words image and caption are needed, e.g. \"caption image\"")
    tsv = not path.endswith((".jsonl", ".json"))
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                row = dict(zip(names, line.rstrip("\n").split("\t"))) if tsv else json.loads(line)
                image, caption = row["image"], " ".join(row["caption"].split())
                swapped = named(caption) and " " not in caption or " " in image and not named(image)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: " + (f"columns {names}, split by tabs, are needed" if tsv
                                                                else "JSON with image and caption is needed")) from error
            if swapped:
                raise ValueError(f"{path}, line {number}: image {image!r} and caption {caption!r} look swapped; "
                                 + (f"--columns {columns!r} must name the columns in their order" if tsv else "swap them"))
            yield image, caption


STOP_WORDS = frozenset("""
a an the this that these those some any each every all both either neither no none such own other another same several many
few much more most one two three four five six seven eight nine ten first second last next it its he him his she her hers they
them their we us our you your i me my mine who whom whose which what there here where when how why while if so as at by for
from in into of off on onto out over under up down with without within along across after against among around before behind
below beneath beside besides between beyond during except inside near outside past since through throughout till to toward
towards until upon via and or but nor yet than then too very just also only even still not never ever always often again once
is are was were be been being am has have had having do does did doing done can could will would shall should may might must
get gets got getting go goes going gone come comes coming came make makes making made take takes taking took taken give gives
giving put puts show shows showing shown see sees seen look looks looking seem seems sit sits sitting stand stands standing
lie lies lying hold holds holding wear wears wearing walk walks walking run runs running ride rides riding play plays playing
eat eats eating pose poses posing use uses using used fill fills filled cover covers covered hang hangs hanging like about
because however
""".split())
WORDS = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|[^\w\s]")


def light_phrases(captions):
    """A set of noun phrases a caption, without a tagger: the runs of words between function words, frequent verbs and signs.

    OURS, as rough as it is fast: "a small dog sits on the wooden bench" -> {"small dog", "wooden bench"}.
    """
    for caption in captions:
        phrases, run = set(), []
        for word in (*WORDS.findall(caption.lower()), "."):
            if word in STOP_WORDS or not word[0].isalpha():
                if run:
                    phrases.add(" ".join(run[-4:]))
                    run = []
            else:
                run.append(word)
        yield phrases


def spacy_phrases(captions):
    """The same by spaCy's noun chunks, as the paper has it; determiners are dropped."""
    import spacy
    for doc in spacy.load("en_core_web_sm", exclude=["ner", "lemmatizer"]).pipe(captions, batch_size=1000):
        yield {" ".join(t.lower_ for t in chunk if t.pos_ not in ("DET", "PRON", "PUNCT", "SPACE"))
               for chunk in doc.noun_chunks} - {""}


def concept_filter(phrases, most=100, least=3, seed=0):
    """Which captions to keep for an even coverage of concepts (appendix; CC3M 3M -> 595K).

    phrases   for each caption its set of noun phrases
    Phrases seen fewer than `least` times are dropped. From the rarest of the others up, each adds all its captions, or
    `most` random ones if it has more. OURS: ties in order of first appearance, the random ones are drawn from all of a
    phrase's captions, kept already or not.
    Returns (kept, before, after): bool per caption, and how often each phrase occurs in all and in the kept captions.
    """
    number, flat, lengths, rng = {}, array("i"), array("i"), np.random.default_rng(seed)
    for some in phrases:
        flat.extend(number.setdefault(phrase, len(number)) for phrase in sorted(some))
        lengths.append(len(some))
    flat, owner = np.frombuffer(flat, np.int32), np.repeat(np.arange(len(lengths)), lengths)
    before = np.bincount(flat, minlength=len(number))
    by_phrase, ends, kept = owner[np.argsort(flat, kind="stable")], np.cumsum(before), np.zeros(len(lengths), bool)
    for p in np.argsort(before, kind="stable"):
        if before[p] >= least:
            captions = by_phrase[ends[p] - before[p]:ends[p]]
            kept[captions if len(captions) <= most else rng.choice(captions, most, replace=False)] = True
    return kept, before, np.bincount(flat[kept[owner]], minlength=len(number))


@dataclass(frozen=True)
class Filter:
    pairs: str                           # TSV, JSON lines of image and caption, or a folder of pictures with .txt captions
    out: str                             # folder for pairs.tsv, metadata.json, coverage.png
    columns: str = "image caption"       # of a TSV; "caption image" for CC3M's own
    finder: str = "auto"                 # noun phrases by spacy, by our light finder, or (auto) by spaCy if it is installed
    most: int = 100                      # captions that one phrase adds
    least: int = 3                       # occurrences below which a phrase is dropped
    seed: int = 0


def filter_pairs(args):
    """The concept filter of CC3M: pairs in, fewer pairs out, with every frequent enough concept in them."""
    finder = args.finder if args.finder != "auto" else "spacy" if find_spec("en_core_web_sm") else "light"
    if finder == "spacy" and not find_spec("en_core_web_sm"):        # a package, which needs spacy
        raise ValueError("--finder spacy: pip install spacy, then python -m spacy download en_core_web_sm; or --finder light")
    print(f"noun phrases: {'spaCy en_core_web_sm' if finder == 'spacy' else 'the light finder'}")
    pairs = list(read_pairs(args.pairs, args.columns))
    captions = tqdm((caption for _, caption in pairs), total=len(pairs), unit="caption", disable=None)
    find = {"light": light_phrases, "spacy": spacy_phrases}[finder]
    kept, before, after = concept_filter(find(captions), args.most, args.least, args.seed)
    if not kept.any():
        raise ValueError(f"{args.pairs}: no noun phrase is in {args.least} of the {len(pairs)} captions; lower --least")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / "pairs.tsv") as f:
        f.writelines(f"{image}\t{caption}\n" for (image, caption), keep in zip(pairs, kept) if keep)
    frequent = before >= args.least
    counts = {"pairs": len(pairs), "kept": int(kept.sum()), "phrases": len(before), "phrases_frequent": int(frequent.sum()),
              "phrases_covered": int((frequent & (after > 0)).sum()), "finder": finder, "settings": asdict(args)}
    (out / "metadata.json").write_text(json.dumps(counts, indent=1) + "\n")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for frequency, name in ((before, f"all {len(pairs):,} pairs"), (after, f"kept {int(kept.sum()):,} pairs")):
        ax.loglog(np.arange(1, len(frequency) + 1), np.maximum(np.sort(frequency)[::-1], 0.5), label=name)
    ax.axhline(args.least, lw=0.5, color="grey")
    ax.set(xlabel="noun phrases, the most frequent first", ylabel="captions with the phrase (at 0.5: none)")
    ax.legend()
    figure.savefig(out / "coverage.png", dpi=110)
    print("pairs {pairs:,} -> {kept:,}; noun phrases {phrases:,}, frequent enough {phrases_frequent:,}, of these covered "
          "{phrases_covered:,}".format(**counts))
    print(f"wrote {out / 'pairs.tsv'}, metadata.json, coverage.png")


@dataclass(frozen=True)
class Expand:
    pairs: str                           # TSV, JSON lines of image and caption, or a folder of pictures with .txt captions
    out: str                             # the LLaVA file to write
    columns: str = "image caption"       # of a TSV
    seed: int = 0


def expand(args):
    """Naive expansion: image and caption -> Human: X_q X_v, Assistant: X_c, with X_q from our list of 11 (Sec. 4.2)."""
    rng, ways, count = random.Random(args.seed), brief_instructions(), 0
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(args.out) as f:
        for count, (image, caption) in enumerate(read_pairs(args.pairs, args.columns), 1):
            if not caption or IMAGE in caption or "://" in image:
                raise ValueError(f"{args.pairs}, pair {count}: " + (
                    f"the image is {image}; download the pictures and name the files" if "://" in image else
                    f"{IMAGE}, which stands for the picture, is in the caption" if caption else "no caption"))
            record = {"id": Path(image).stem, "image": image, "conversations": conversation([(rng.choice(ways), caption)], rng)}
            f.write((",\n" if count > 1 else "[\n") + json.dumps(record, ensure_ascii=False))
        if not count:
            raise ValueError(f"{args.pairs}: no pairs in it")
        f.write("\n]\n")
    print(f"wrote {count:,} samples to {args.out}")


COMMANDS = {"instruct": (Instruct, instruct), "filter": (Filter, filter_pairs), "expand": (Expand, expand)}


def arguments(argv):
    """A command line -> (function, its configuration)"""
    if not argv or argv[0] not in COMMANDS:
        raise ValueError(f"{f'{argv[0]} is no command' if argv else 'no command given'}; one of {', '.join(COMMANDS)} comes "
                         "first; -h explains them")
    config, run = COMMANDS[argv[0]]
    choices = {"teacher": ["api", "script"], "finder": ["auto", "light", "spacy"]}
    return run, in_range(config(**typed_flags(config, argv[1:], run.__doc__, choices)))


def main(argv=None):
    run_command(__doc__, arguments, argv)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                              # of `--show 1 | head`; nothing may be left to flush at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        sys.exit(str(error) or "stopped")
