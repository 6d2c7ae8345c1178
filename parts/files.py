"""
What lies on disk and what is typed: JSON, JSON lines, flags, read strictly and written at once.
Nothing here needs torch, so commands that only read and write text start without delay.
"""
import argparse
import codecs
import dataclasses
import fcntl
import functools
import importlib
import inspect
import json
import math
import os
import re
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "prompts"
IGNORE = -100         # label of a token that is not scored
IMAGE = "<image>"     # stands for a picture in text; in the tokenizer it is one reserved id


# --------------------------------------------------------------------------------------------------
# Reading


# what a file begins with that is no text, though its name may say so
NOT_TEXT = {
    b"\x1f\x8b": "gzip; unpack it first",
    b"PK\x03\x04": "a zip archive or a workbook; unpack it, or save it as JSON",
    b"PAR1": "Parquet; save it as JSON lines first",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}
NAMES_OF_TYPES = {dict: "an object", list: "a list", str: "text", bool: "true or false",
                  int: "a whole number", float: "a number"}


def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises OSError, and ValueError that says what a file is that holds no such text.
    """
    check_text_file(path)
    with errors_of_file(path):
        return Path(path).read_bytes().decode("utf-8-sig")


def check_text_file(path):
    """Raises OSError for what cannot be read, and ValueError for what begins as no text does."""
    with open(path, "rb") as f:
        head = f.read(8)
    for start, kind in NOT_TEXT.items():
        if head.startswith(start):
            raise ValueError(f"{path}: this is {kind}")


@contextmanager
def errors_of_file(path, lines=0):
    """Name the file in errors about its content, all of which become ValueErrors.

    lines   how many of the file's are before what is read
    """
    try:
        yield
    except json.JSONDecodeError as error:
        place = f"line {lines + error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: bad JSON at {place}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        where = f"{path}: line {lines + 1}" if lines else path
        raise ValueError(f"{where}: {error}") from error


def read_json(path):
    """Yield the records of a JSON array or object, or of JSON lines, one at a time.

    Raises like `read_text`, and ValueError that names line and column of bad JSON.
    """
    for record, _, _ in read_spans(path):
        yield record


def read_spans(path):
    """Yield (record, the byte where it begins, its bytes) of a JSON array or object, or of lines.

    Lines are read one by one, so that a file may be larger than the memory; an array is read whole.
    Raises like `read_json`.
    """
    check_text_file(path)
    with open(path, "rb") as f:
        if f.read(3) != codecs.BOM_UTF8:
            f.seek(0)
        start = f.tell()
        head = f.read(1000).lstrip()
        f.seek(start)
        if head.startswith(b"["):
            with errors_of_file(path):
                yield from read_array(f.read().decode(), start)
            return
        first = next((line for line in f if line.strip()), b"").strip()
        f.seek(start)
        lines = [f.read()] if goes_on(first) else f        # one object, over several lines
        for number, line in enumerate(lines):
            if line.strip():
                with errors_of_file(path, number):
                    record = decode_json(line.rstrip())
                yield record, start, len(line)
            start += len(line)


def goes_on(line):
    """Whether a line of JSON is right as far as it goes, and ends before its value does."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return 0 < len(error.doc) <= error.pos
    except (ValueError, RecursionError):
        pass                             # read_spans says it, with the line
    return False


def read_array(text, start):
    """Yield the spans of a JSON array, whose text begins at the byte `start` of its file."""
    decode = json.JSONDecoder(object_pairs_hook=distinct_keys).raw_decode
    separator = re.compile(r"\s*,\s*|\s*(?=\])")
    done = 0                                      # characters, of which the bytes are in `start`
    at = re.match(r"\s*\[\s*", text).end()
    while text[at:at + 1] != "]":
        value, end = decode(text, at)
        start += len(text[done:at].encode())
        size = len(text[at:end].encode())
        yield value, start, size
        start += size
        done = end
        gap = separator.match(text, end)
        if not gap:
            raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
        at = gap.end()
    if text[at + 1:].strip():
        raise json.JSONDecodeError("Expecting nothing behind the array", text, at + 1)


def decode_json(text):
    return json.loads(text, object_pairs_hook=distinct_keys)


def read_value(path, kind=dict):
    """The only JSON value of a file, of one type. Raises like `read_json`."""
    text = read_text(path)
    with errors_of_file(path):
        value = decode_json(text)
    return typed(value, kind, path)


def typed(value, kind, where):
    """A value that was read, which must be of one type of JSON; for float, any number will do.

    Raises ValueError that says where it stands, what was found and what belongs there.
    """
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: {value!r:.80} where {NAMES_OF_TYPES[kind]} belongs")
    return value


def typed_fields(record, where, **kinds):
    """A record that was read, which must have these fields, each of its type of JSON."""
    typed(record, dict, where)
    for field, kind in kinds.items():
        typed(record.get(field), kind, f"{where}: {field}")
    return record


def distinct_keys(pairs):
    """A JSON object, in which no key may stand twice: one of the two would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in {value!r:.80}")
    return value


def read_lines(path, repair=False, kind=dict):
    """The records of a JSON-lines file that we append to, without a last line that a kill tore.

    `repair` cuts a torn line off the file, as whoever goes on to append must. A file that does not
    exist has no records. Raises ValueError that names a line which is not JSON of this kind.
    """
    if not os.path.exists(path):
        return []
    records = []
    intact = b""
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n"):
                break                    # a kill tore it
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
        records.append(typed(record, kind, f"{path}: line {number}"))
        intact += line
    if repair:
        os.truncate(path, len(intact))
        if intact and not intact.endswith(b"\n"):
            with open(path, "ab") as f:
                f.write(b"\n")
    return records


def library(module, what, package):
    """A module that only `what` needs. Raises ValueError that says how it is installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{what} needs {package}: pip install {package} ({error})") from error


def brief_instructions():
    """Our 11 ways to ask for a brief caption, the questions of stage 1 (the paper has its own)."""
    return (PROMPTS / "brief_instructions.txt").read_text(encoding="utf-8").splitlines()


# --------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def open_atomic(path):
    """A text file to write that takes its place when complete; after an error nothing is left.

    A link is followed. A device or a pipe has no place to take: it is written to.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as f:
            yield f
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{path}.{os.getpid()}.tmp")       # two processes may write the same file
    try:
        # half a surrogate pair, which no encoding has, is written as JSON writes it: \ud83d
        with open(unfinished, "w", encoding="utf-8", errors="backslashreplace") as f:
            yield f
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file at once."""
    with open_atomic(path) as f:
        f.write(text)


def write_json(path, value, indent=1):
    """Write one value as JSON, at once."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_lines(path, rows):
    """Write rows as JSON lines, at once."""
    with open_atomic(path) as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_array(path, records):
    """Write records, as they come, as a JSON array with one a line; at once."""
    with open_atomic(path) as f:
        f.write("[")
        for i, record in enumerate(records):
            f.write((",\n" if i else "\n") + json.dumps(record, ensure_ascii=False))
        f.write("\n]\n")


@contextmanager
def lock_folder(folder):
    """Make a folder and keep it for this process. Raises ValueError while another one has it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            # the system drops this lock with the process, however that ends
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing there; wait for it, or write "
                             "to another place") from None
        yield folder


# --------------------------------------------------------------------------------------------------
# What is typed


def typed_flags(config_class, argv, description):
    """What was typed on a command line, as a dict; its flags are the fields of a dataclass.

    A field without default is a required flag, a bool is --flag / --no-flag, list[str] takes one or
    more words. The comment behind a field is its help. The class may say what is allowed, CHOICES
    {field: [value, ...]}, and which fields are no flags, NOT_FLAGS.
    """
    choices = getattr(config_class, "CHOICES", {})
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    notes = comments_of(config_class)
    for field in dataclasses.fields(config_class):
        if field.name in getattr(config_class, "NOT_FLAGS", ()):
            continue
        required = field.default is dataclasses.MISSING
        note = notes.get(field.name, "").replace("%", "%%")
        if not required and field.default not in (None, "", (), False):      # 0 is False, too
            words = field.default if isinstance(field.default, tuple) else [field.default]
            note += f" (default: {' '.join(map(str, words))})"
        options = {"help": note, "required": required}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            kind = {"nargs": "+"} if field.type == list[str] else {"type": field.type}
            options |= kind | {"choices": choices.get(field.name)}
        parser.add_argument(f"--{field.name}", **options)
    return vars(parser.parse_args(argv))


@functools.cache
def comments_of(config_class):
    """{field: the comment behind it} of a dataclass and the classes that it extends."""
    notes = {}
    for part in reversed(config_class.__mro__[:-1]):          # the last one is object
        source = inspect.getsource(part)
        notes |= re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.MULTILINE)
    return notes


def check_least(config, **least):
    """Raises ValueError that names a numeric flag below its least value, infinite or no number."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and not smallest <= value < math.inf:
            raise ValueError(f"--{name} {value}: a number is needed, {smallest} or more")


def parse_command(commands, argv):
    """A command line -> (function, configuration).

    commands    {"instruct": (function, its config class), "score scienceqa": ..., ...}
    """
    for n_words in (2, 1):
        name = " ".join(argv[:n_words])
        if name in commands:
            function, config_class = commands[name]
            typed = typed_flags(config_class, argv[n_words:], function.__doc__)
            return function, config_class(**typed)
    found = f"{argv[0]} is no command" if argv else "no command given"
    raise ValueError(f"{found}; one of {', '.join(commands)} comes first; -h explains them")


def run_command(commands, argv, doc):
    """Run what a command line asks for; -h alone prints `doc`. argv None is what was typed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in ("-h", "--help"):
        print(textwrap.dedent(doc).strip())
        return None
    function, config = parse_command(commands, argv)
    return function(config)


def run_main(main):
    """Run a program's `main` as a command: errors of a user are one line, never a traceback."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:                  # of `... | head`; nothing may be left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 0
    except (ValueError, OSError) as error:
        status = f"error: {error}"
    except KeyboardInterrupt as error:
        status = str(error) or "stopped"
    sys.exit(status)
