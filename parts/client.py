"""
One OpenAI-compatible endpoint, asked many times: nothing that is paid is lost, or paid twice.

    requests --those without a reply in raw.jsonl--> ask, in several threads --> raw.jsonl

`ask` is the only place in the project that speaks to a language model over the network.
"""
import functools
import hashlib
import json
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple

import requests
from requests import exceptions
from tqdm import tqdm
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from parts.files import check_least

AGAIN = "run the same command again, with the same flags: it asks only for the others"
TOKEN = re.compile(r"[a-zA-Z]+|\d{1,3}|\S")
UNREACHED = {"refused": "connection refused", "Errno -": "unknown host",
             "connect timeout": "no connection", "SSL": "SSL error"}
LOST = (exceptions.ConnectionError, exceptions.ChunkedEncodingError,
        exceptions.ContentDecodingError)
THREAD = threading.local()     # each thread has its own pool of connections


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The flags of every command that asks an endpoint.

    A subclass adds `model`: a flag, or a property where that flag has another name.
    """
    base_url: str = "https://api.openai.com/v1"  # OpenAI-compatible; its key: $OPENAI_API_KEY
    temperature: float = 1.0      # of the model's answers
    max_tokens: int = 1024        # of an answer
    extra: str = None             # JSON object of further fields of a request; null removes one
    workers: int = 16             # requests at a time
    rpm: float = 0                # requests a minute at most; 0: no limit
    tpm: float = 0                # tokens a minute at most, max_tokens for an answer; 0: no limit
    timeout: float = 120          # seconds without a byte
    attempts: int = 8             # times that a request is tried
    show: int = 0                 # print the first N requests whole, send nothing

    def __post_init__(self):
        check_least(self, temperature=0, max_tokens=1, workers=1, rpm=0, tpm=0, timeout=0.001,
                    attempts=1, show=0)


class Request(NamedTuple):
    """One thing to ask. `key`, a hash of id and body, is how its reply is found again."""
    id: str
    kind: str
    body: dict

    @property
    def key(self):
        text = json.dumps([self.id, self.body], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def chat_messages(system, shots, text):
    """The message list: system message, few-shot examples as user and assistant turns, the query.

    shots    [(what a user says, what the assistant answers), ...]
    """
    messages = [{"role": "system", "content": system}]
    for question, answer in shots:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": text}]


def request_body(endpoint, messages):
    """The JSON of a request. Raises ValueError if --extra is no JSON object."""
    try:
        extra = {**json.loads(endpoint.extra or "{}")}
    except (ValueError, TypeError) as error:
        raise ValueError(f"--extra {endpoint.extra}: a JSON object is needed, e.g. "
                         f'{{"seed": 0}} ({error})') from error
    body = {"model": endpoint.model, "messages": messages, "temperature": endpoint.temperature,
            "max_tokens": endpoint.max_tokens, **extra}
    return {name: value for name, value in body.items() if value is not None}


def print_requests(asked):
    """Print requests as they would be sent."""
    for request in asked:
        settings = [f"{k} {v}" for k, v in request.body.items() if k != "messages"]
        print(f"--- {request.id}: {', '.join(settings)}")
        for message in request.body["messages"]:
            print(f"[{message['role']}]\n{message['content']}")


@functools.cache
def count_tokens(text):
    """About as many tokens as a byte-pair vocabulary makes of a text: words, three digits, signs.

    A letter beyond ASCII counts as one, as in scripts without blanks.
    """
    return len(TOKEN.findall(text))


def tokens_of(request):
    """About how many tokens each message of a request has, with its role."""
    return [count_tokens(message["content"]) + 4 for message in request.body["messages"]]


def print_estimate(asked, endpoint, money):
    """Print requests, tokens, money and hours; answers are taken to be as long as the examples.

    money    (tokens of prompts, tokens of answers) -> what they cost
    """
    rows = {}
    for request in asked:
        tokens = tokens_of(request)
        answers = tokens[2:-1:2] or [300]                 # of the assistant, behind the system's
        for kind in ("all", request.kind):
            row = rows.setdefault(kind, Counter())
            row.update(requests=1, prompts=sum(tokens), answers=sum(answers) / len(answers))
    for kind, row in rows.items():
        cost = money(row["prompts"], row["answers"])
        print(f"{kind:<20}{row['requests']:>9,} requests, {row['prompts']:>13,} tokens in, "
              f"{row['answers']:>13,.0f} out, money {cost:>10,.2f}")
    counted = rows["all"]["prompts"] + endpoint.max_tokens * len(asked)     # as servers count
    if endpoint.rpm:
        print(f"--rpm {endpoint.rpm:,.0f}: {len(asked) / endpoint.rpm / 60:,.1f} hours at least")
    if endpoint.tpm:
        print(f"--tpm {endpoint.tpm:,.0f}: {counted / endpoint.tpm / 60:,.1f} hours at least")


def content_of(reply):
    """What a reply says."""
    return reply["choices"][0]["message"]["content"]


# --------------------------------------------------------------------------------------------------
# One request


class TryAgain(Exception):
    """A failure that may pass; `after` is the seconds that the server asks to wait, or None."""

    def __init__(self, reason, after=None):
        super().__init__(reason)
        self.reason = reason
        self.after = after


def ask(base_url, body, timeout=120):
    """POST a request's body to base_url/chat/completions; returns the reply, a dict.

    The key, if the server wants one, is the environment's OPENAI_API_KEY; no message shows it.
    Raises TryAgain for what may pass: 408, 409, 429, 5xx, a dropped or timed-out connection, a torn
    or foreign reply, an empty answer. Raises ValueError, with the server's words, for what will
    not: 400, 401, 403, 404, no credit. An answer that was cut off or filtered is paid: it returns.
    """
    url = f"{base_url.rstrip('/')}/chat/completions"
    key = os.environ.get("OPENAI_API_KEY", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if not hasattr(THREAD, "session"):
        THREAD.session = requests.Session()
    try:
        response = THREAD.session.post(url, json=body, headers=headers, timeout=(10, timeout))
    except exceptions.ReadTimeout as error:
        raise TryAgain("timeout") from error
    except LOST as error:
        causes = [cause for sign, cause in UNREACHED.items() if sign in str(error)]
        raise TryAgain(f"{url}: {causes[0]}" if causes else "connection lost") from error
    except (exceptions.RequestException, UnicodeError) as error:   # no address, a wrong scheme, ...
        raise ValueError(f"{url}: {error}") from error
    if response.status_code == 200:
        return read_completion(response)
    words = " ".join(response.text.split())[:500]
    if key:
        words = words.replace(key, "OPENAI_API_KEY")
    return read_refusal(response, words, f"{url}, model {body.get('model')!r}")


def read_completion(response):
    """The reply in a response. Raises TryAgain if it is none, or says nothing without a reason."""
    try:
        reply = response.json()
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""
        answered = bool(text.strip())
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise TryAgain("not a chat completion") from error
    if not answered and choice.get("finish_reason") not in ("length", "content_filter"):
        raise TryAgain("empty answer")
    choice["message"]["content"] = text
    return reply


def read_refusal(response, words, where):
    """What a response that is no success means: an empty reply if a filter refused, or an error."""
    code = response.status_code
    if "content_filter" in words:
        return {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}
    may_pass = code in (408, 409, 429) or code >= 500
    if not may_pass or "insufficient_quota" in words:
        raise ValueError(f"{where}: HTTP {code}: {words}")
    try:
        after = Retry().get_retry_after(response)        # seconds or a date; None without header
    except InvalidHeader:
        after = None
    raise TryAgain(f"HTTP {code}", after)


# --------------------------------------------------------------------------------------------------
# All requests


class Replies:
    """The replies in raw.jsonl, one a line, by their requests' keys; the text stays on disk.

    A last line that a kill tore is passed over, and cut off the file if `repair`, as whoever
    appends must. Any other line that is no reply is passed over with a note; it is asked again.
    """

    def __init__(self, raw, repair=False):
        self.raw = raw
        self.starts = {}                                  # {key: where its line starts}
        if not os.path.exists(raw):
            return
        start = 0
        with open(raw, "rb") as f:
            for line in f:
                if line.endswith(b"\n"):
                    self.note_line(line, start)
                elif repair:
                    os.truncate(raw, start)
                start += len(line)

    def note_line(self, line, start):
        try:
            self.starts.setdefault(json.loads(line)["key"], start)
        except (ValueError, KeyError, TypeError):
            print(f"{self.raw}, byte {start}: torn, or no reply; it is passed over")

    def __contains__(self, key):
        return key in self.starts

    def __getitem__(self, key):
        with open(self.raw, "rb") as f:
            f.seek(self.starts[key])
            return json.loads(f.readline())["reply"]


class Client:
    """What the threads that ask one endpoint share: the file of replies, the pace, the end.

    file    raw.jsonl, opened to append, without a buffer
    done    how many of `total` requests have their reply in it
    """

    def __init__(self, endpoint, file, done, total):
        self.endpoint = endpoint
        self.file = file
        self.done = done
        self.total = total
        self.bar = tqdm(total=total, initial=done, unit="request", disable=None)
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.next_start = 0.0                             # when the next request may be sent
        self.noted = set()

    def run(self, missing):
        """Ask for all of `missing`; returns [(request, reason)] of those that failed to the end.

        Whatever ends it early (ValueError, a full disk, Ctrl-C), requests on their way are waited
        for and their replies kept; Ctrl-C meanwhile ends the process at once, without them.
        """
        with ThreadPoolExecutor(self.endpoint.workers) as pool, self.bar:
            try:
                futures = {pool.submit(self.fetch, request): request for request in missing}
                outcomes = [(futures[future], future.result()) for future in as_completed(futures)]
            except BaseException as error:
                self.stopping.set()
                try:
                    self.note(f"{str(error) or 'stopping'}: waiting for replies under way; "
                              "Ctrl-C ends at once, without them")
                    pool.shutdown(cancel_futures=True)
                except KeyboardInterrupt:
                    self.note("ended at once: the replies under way are not kept")
                    os._exit(130)                         # any other way out waits for the threads
                raise
        return [(request, reason) for request, reason in outcomes if reason]

    def fetch(self, request):
        """Ask until there is a reply, and keep it; else returns the reason of the last failure."""
        endpoint = self.endpoint
        tokens = sum(tokens_of(request)) + endpoint.max_tokens      # as servers count
        reason = "stopped"
        for attempt in range(1, endpoint.attempts + 1):
            self.wait_turn(tokens)
            if self.stopping.is_set():
                break
            try:
                reply = ask(endpoint.base_url, request.body, endpoint.timeout)
            except TryAgain as error:
                reason = error.reason
                if reason not in self.noted:
                    self.noted.add(reason)
                    self.note(f"{reason}: tried {endpoint.attempts} times at most")
                if attempt < endpoint.attempts:           # twice as long each time, jittered
                    back_off = min(60, 0.25 * 2 ** attempt) * random.uniform(0.5, 1)
                    self.stopping.wait(back_off if error.after is None else error.after)
            else:
                self.keep(request, reply)
                return None
        return reason

    def wait_turn(self, tokens):
        """Sleep until --rpm and --tpm allow a request of so many tokens; turns are even."""
        rpm, tpm = self.endpoint.rpm, self.endpoint.tpm
        if 0 < tpm < tokens:
            raise ValueError(f"--tpm {tpm:g}: one request and its answer may have {tokens} tokens; "
                             "raise it")
        minutes = max(1 / rpm if rpm else 0, tokens / tpm if tpm else 0)
        with self.lock:
            start = max(time.monotonic(), self.next_start)
            self.next_start = start + 60 * minutes
        self.stopping.wait(start - time.monotonic())

    def keep(self, request, reply):
        """Append a reply, with today's date, by one write: no kill after it can undo it."""
        row = {"key": request.key, "id": request.id, "kind": request.kind,
               "reply": {**reply, "date": str(date.today())}}
        line = json.dumps(row).encode() + b"\n"
        with self.lock:
            end = self.file.seek(0, os.SEEK_END)
            try:
                if self.file.write(line) < len(line):
                    raise OSError("the disk is full")
            except OSError as error:
                self.file.truncate(end)                   # no torn line
                raise OSError(f"{error}; a reply that came is lost") from error
            self.done += 1
            self.bar.update()

    def place(self):
        """How many replies there are, and where."""
        return f"{self.done} of {self.total} replies are kept in {self.file.name}"

    def note(self, text):
        """Tell the user something beside the progress bar."""
        tqdm.write(f"{text} ({self.place()})", file=sys.stderr)


def ask_missing(asked, raw, endpoint):
    """Ask for each request that has no reply in the file `raw` yet, and keep every reply there.

    asked    list of Requests
    Returns [(request, reason)] of those that failed to the end. Raises ValueError, OSError (a full
    disk) or KeyboardInterrupt, which say how many replies are kept, and where.
    """
    replies = Replies(raw, repair=True)
    missing = [request for request in asked if request.key not in replies]
    done = len(asked) - len(missing)
    if replies.starts:
        print(f"{raw}: {len(replies.starts)} replies, {done} of them to these {len(asked)} "
              f"requests; {len(missing)} are new")
    with open(raw, "ab", buffering=0) as f:
        client = Client(endpoint, f, done, len(asked))
        try:
            return client.run(missing)
        except (ValueError, OSError, KeyboardInterrupt) as error:
            what = str(error) or "stopped"
            raise type(error)(f"{what}; {client.place()}; {AGAIN}") from error


def ask_everything(asked, raw, endpoint):
    """`ask_missing`, then the Replies; raises ValueError if a request still has none."""
    failed = ask_missing(asked, raw, endpoint)
    if failed:
        reasons = sorted({reason for _, reason in failed})
        raise ValueError(f"{len(failed)} requests have no reply ({', '.join(reasons)}); {AGAIN}")
    return Replies(raw)
