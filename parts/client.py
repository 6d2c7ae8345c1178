"""
One OpenAI-compatible endpoint, asked many times: nothing that is paid is lost, or paid twice.

    requests --those without a reply in raw.jsonl--> ask, in several threads --> raw.jsonl

`ask` is the only place in the project that speaks to a language model over the network; what it
answered is read by parts/replies.py.
"""
import functools
import hashlib
import json
import os
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from typing import NamedTuple
from urllib.parse import urlsplit

import requests
from requests import exceptions
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from parts.files import check_least, errors_of_file, typed
from parts.replies import Replies, content_of, joined_text, unfinished

AGAIN = "run the same command again, with the same flags: it asks only for the others"
TOKEN = re.compile(r"[a-zA-Z]+|\d{1,3}|\S")
MOST_BYTES = 2 ** 24           # of a reply; what is longer is no answer to anything we ask
UNSENDABLE = (exceptions.InvalidURL, exceptions.MissingSchema, exceptions.InvalidSchema,
              exceptions.InvalidJSONError)
TORN = (exceptions.ChunkedEncodingError, exceptions.ContentDecodingError)
BUSY = re.compile(r"overload|rate.?limit|unavailable|timed? ?out|try again|busy", re.I)
THREAD = threading.local()     # what each thread asks has its own deadline


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
    timeout: float = 120          # seconds for a whole reply
    attempts: int = 8             # times that a request is tried
    max_wait: float = 600         # seconds that a server may ask to wait; above it the run stops
    show: int = 0                 # print the first N requests whole, send nothing
    estimate: bool = False        # print requests, tokens, money and hours, send nothing
    price_in: float = 0           # money for a million tokens of prompt
    price_out: float = 0          # money for a million tokens of answer

    def __post_init__(self):
        check_least(self, temperature=0, max_tokens=1, workers=1, rpm=0, timeout=0.001, attempts=1,
                    max_wait=0, show=0, price_in=0, price_out=0)
        with errors_of_file("--extra"):
            extra = json.loads(self.extra or "{}")
        typed(extra, dict, "--extra")
        address = urlsplit(self.base_url)                 # it is written into files and messages
        if "@" in address.netloc or address.query:
            raise ValueError("--base_url: an address without user, password or parameters is "
                             "needed; a key belongs into OPENAI_API_KEY")

    def money(self, tokens_in, tokens_out):
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6      # per million


class Request(NamedTuple):
    """One thing to ask. `key`, a hash of id and body, is how its reply is found again."""
    id: str
    kind: str
    body: dict

    @property
    def key(self):
        return hash_of([self.id, self.body])


def hash_of(value):
    """What changes with a value of JSON, and with nothing else."""
    text = json.dumps(value, sort_keys=True)
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
    """The JSON of a request."""
    body = {"model": endpoint.model, "messages": messages, "temperature": endpoint.temperature,
            "max_tokens": endpoint.max_tokens, **json.loads(endpoint.extra or "{}")}
    return {name: value for name, value in body.items() if value is not None}


def is_preview(asked, endpoint):
    """Whether a person wants to look before paying; then requests, or their cost, are printed."""
    if endpoint.show:
        print_requests(asked[:endpoint.show])
    elif endpoint.estimate:
        print_estimate(asked, endpoint)
    return bool(endpoint.show or endpoint.estimate)


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


def print_estimate(asked, endpoint):
    """Print requests, tokens, money and hours; answers are taken to be as long as the examples."""
    rows = {"all": Counter()}
    for request in asked:
        tokens = [count_tokens(m["content"]) + 4 for m in request.body["messages"]]
        answers = tokens[2:-1:2] or [300]                 # of the assistant, behind the system's
        for row in (rows["all"], rows.setdefault(request.kind, Counter())):
            row.update(requests=1, prompts=sum(tokens), answers=sum(answers) / len(answers))
    for kind, row in rows.items():
        cost = endpoint.money(row["prompts"], row["answers"])
        print(f"{kind:<20}{row['requests']:>9,} requests, {row['prompts']:>13,} tokens in, "
              f"{row['answers']:>13,.0f} out, money {cost:>10,.2f}")
    if endpoint.rpm:
        print(f"--rpm {endpoint.rpm:,.0f}: {len(asked) / endpoint.rpm / 60:,.1f} hours at least")


# --------------------------------------------------------------------------------------------------
# One request


class TryAgain(Exception):
    """A failure that may pass; `after` is the seconds that the server asks to wait, or None."""

    def __init__(self, reason, after=None):
        super().__init__(reason)
        self.after = after


@functools.cache
def timed(connection_class):
    """A class of connections that are shut when a reply is not whole in time, however it drips."""
    class Timed(connection_class):
        def getresponse(self):
            shut = functools.partial(self.sock.shutdown, socket.SHUT_RDWR)
            THREAD.deadline = threading.Timer(self.timeout, shut)
            THREAD.deadline.daemon = True
            THREAD.deadline.start()
            return super().getresponse()
    return Timed


class TimedAdapter(HTTPAdapter):
    """Makes connections of `timed` classes for a session of requests, with or without a proxy."""

    def get_connection_with_tls_context(self, *args, **options):
        pool = super().get_connection_with_tls_context(*args, **options)
        pool.ConnectionCls = timed(type(pool).ConnectionCls)
        return pool


SESSION = requests.Session()   # its connections stay open from one request to the next
for scheme in ("http://", "https://"):
    SESSION.mount(scheme, TimedAdapter(pool_maxsize=1000))


def api_key():
    """The environment's OPENAI_API_KEY. Raises ValueError, without it, if no header can hold it."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key.isascii() or not key.isprintable():
        raise ValueError("OPENAI_API_KEY: line breaks or letters that no header can hold; set it "
                         "again, without what was pasted beside it")
    return key


def ask(base_url, body, timeout=120):
    """POST a request's body to base_url/chat/completions; returns the reply, a dict.

    The key, if the server wants one, is the environment's OPENAI_API_KEY; neither a message nor a
    reply shows it. `timeout` counts for the whole reply.
    Raises TryAgain for what may pass: 408, 409, 429, 5xx, a dropped or timed-out connection, a torn
    or foreign reply, an empty answer. Raises ValueError, with the server's words, for what will
    not: 400, 401, 403, 404, no credit. An answer that was cut off, filtered or refused is paid: it
    returns.
    """
    url = f"{base_url.rstrip('/')}/chat/completions"
    key = api_key()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    THREAD.deadline = None                                # until there is a connection
    start = time.monotonic()
    try:
        with SESSION.post(url, json=body, headers=headers, timeout=(10, timeout), stream=True,
                          allow_redirects=False) as response:
            value = read_body(response, key)
        has_error = isinstance(value, dict) and value.get("error") and not value.get("choices")
        if response.status_code == 200 and not has_error:
            return read_completion(value)
    except (exceptions.RequestException, TryAgain) as error:
        if isinstance(error, UNSENDABLE):
            raise
        reason = masked(str(error), key)
        if time.monotonic() - start > timeout:
            reason = "timeout"
        elif isinstance(error, TORN):                     # whose words count the bytes of each
            reason = "connection lost"
        raise TryAgain(reason) from error
    finally:
        if THREAD.deadline:
            THREAD.deadline.cancel()
    return read_refusal(response, value, f"{url}, model {body.get('model')!r}")


def masked(text, key):
    """A text without the key. A word, or a few letters, is no key, but what a server without keys
    is given: it stays, for answers may have it."""
    if len(key) >= 8 and not key.isalpha():
        for spelling in (json.dumps(key)[1:-1], key):     # within JSON, and outside
            text = text.replace(spelling, "OPENAI_API_KEY")
    return text


def read_body(response, key):
    """The JSON value of a response, or its text if it is none. Raises TryAgain if it is too long.

    JSON is written anew, so that a key has one spelling in it, and is masked.
    """
    content = bytearray()
    for part in response.iter_content(2 ** 16):
        content += part
        if len(content) > MOST_BYTES:
            raise TryAgain(f"a reply of more than {MOST_BYTES:,} bytes")
    text = content.decode("utf-8-sig", "replace") or response.headers.get("Location", "")
    try:                                  # Python reads no more than 4,300 digits
        value = json.loads(text, parse_int=lambda digits: int(digits[:20]))
        return json.loads(masked(json.dumps(value), key))
    except (ValueError, RecursionError):
        return masked(text, key)


def read_completion(reply):
    """The reply, if it is one. Raises TryAgain if it is not, or says nothing without a reason."""
    try:
        choice = reply["choices"][0]
        content_of(reply)
        is_empty = not joined_text(choice["message"].get("content")).strip()
        if choice["message"].get("refusal"):
            choice["finish_reason"] = "refusal"
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise TryAgain("not a chat completion") from error
    if is_empty and not unfinished(reply):
        raise TryAgain("empty answer")
    return reply


def read_refusal(response, value, where):
    """What a response that is no success means: an empty reply if a filter refused, or an error."""
    error = value.get("error") if isinstance(value, dict) else None
    fields = error if isinstance(error, dict) else {}
    words = " ".join(str(fields.get("message") or error or value).split())[:500]
    signs = (fields.get("code"), fields.get("type"))
    if "content_filter" in signs:
        return {"choices": [{"message": {"content": "", "refusal": words},
                             "finish_reason": "content_filter"}]}
    code = response.status_code
    if code == 200 and isinstance(signs[0], int):         # some tell the code in the body only
        code = signs[0]
    may_pass = code in (408, 409, 429) or code >= 500 or (code == 200 and BUSY.search(words))
    if not may_pass or "insufficient_quota" in signs:
        raise ValueError(f"{where}: HTTP {code}: {words}")
    retry = Retry()
    retry.retry_after_max = 10 ** 9                       # --max_wait is ours
    try:
        after = retry.get_retry_after(response)           # None without this header
    except (InvalidHeader, ValueError, OverflowError):
        after = None
    raise TryAgain(words if response.status_code == 200 else f"HTTP {code}", after)


# --------------------------------------------------------------------------------------------------
# All requests


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
        """Ask for all of `missing`. Raises ValueError if one still has no reply.

        Whatever ends it early (ValueError, a full disk, Ctrl-C), requests on their way are waited
        for and their replies kept.
        """
        with ThreadPoolExecutor(self.endpoint.workers) as pool, self.bar:
            try:
                futures = [pool.submit(self.fetch, request) for request in missing]
                reasons = [future.result() for future in as_completed(futures)]
            except BaseException as error:
                self.stopping.set()
                self.note(f"{str(error) or 'stopping'}: waiting for replies under way")
                pool.shutdown(cancel_futures=True)
                raise
        failures = Counter(reason for reason in reasons if reason)
        if failures:
            raise ValueError(f"{failures.total()} of {self.total} requests have no reply yet "
                             f"({', '.join(sorted(failures))[:500]})")

    def fetch(self, request):
        """Ask until there is a reply, and keep it; else returns the reason of the last failure."""
        endpoint = self.endpoint
        reason = "stopped"
        pause = 0
        for attempt in range(endpoint.attempts):
            self.stopping.wait(pause)
            self.wait_turn()
            if self.stopping.is_set():
                break
            try:
                reply = ask(endpoint.base_url, request.body, endpoint.timeout)
            except TryAgain as error:
                reason = str(error)
                if reason not in self.noted:
                    self.noted.add(reason)
                    self.note(f"{reason}: tried {endpoint.attempts} times at most")
                if error.after and error.after > endpoint.max_wait:
                    raise ValueError(f"{reason}: the server asks for a wait of {error.after:.0f} "
                                     f"seconds; --max_wait {endpoint.max_wait:g}") from error
                # twice as long each time, jittered
                pause = error.after or 0.5 * 2 ** min(attempt, 7) * random.uniform(0.5, 1)
            else:
                self.keep(request, reply)
                return None
        return reason

    def wait_turn(self):
        """Sleep until --rpm allows a request; turns are even."""
        if not self.endpoint.rpm:
            return
        with self.lock:
            start = max(time.monotonic(), self.next_start)
            self.next_start = start + 60 / self.endpoint.rpm
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
    Raises ValueError, also if a request still has no reply, OSError (a full disk) or
    KeyboardInterrupt, which say how many replies are kept, and where.
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
            client.run(missing)
        except (ValueError, OSError, KeyboardInterrupt) as error:
            what = str(error) or "stopped"
            raise type(error)(f"{what}; {client.place()}; {AGAIN}") from error


def ask_everything(asked, raw, endpoint):
    """`ask_missing`, then the Replies."""
    ask_missing(asked, raw, endpoint)
    return Replies(raw)
