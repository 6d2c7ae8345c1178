"""
What a language model replied: its words, and raw.jsonl, the file that keeps what was paid for.

    {"key": ..., "id": ..., "kind": ..., "reply": {"choices": [{"message": {"content": ...}}], ...}}
"""
import json
import os
import re

from parts.templates import MARK

REASONING = re.compile(r"(?:<|\[(?=/?think\]))(/?)(?:think|thinking|thought|reasoning)[>\]]", re.I)
FENCE = re.compile(r"^[ \t]*(?:```|~~~)[\w+-]*[ \t]*$\n?", re.M)
ENDS = re.compile(rf"(?:\s*{MARK})+\s*\Z")


def content_of(reply):
    """What a reply says, without what the model thought aloud, fences, and chat formats' marks."""
    text = joined_text(reply["choices"][0]["message"].get("content"))
    text = text.rpartition("<|channel|>final<|message|>")[2].partition("<|channel|>analysis")[0]
    text = without_reasoning(text)
    text = text[:-400] + ENDS.sub("", text[-400:])
    return FENCE.sub("", text).strip()


def joined_text(content):
    """The text of a message's content: a text, a list of parts, some of which are text, or None."""
    if not isinstance(content, list):
        return content or ""
    return "".join(part["text"] for part in content if part["type"] in ("text", "output_text"))


def without_reasoning(text):
    """A text without its <think>...</think>; where an opening is missing, the prompt had it."""
    first, *rest = REASONING.split(text)
    parts = [first]
    is_thought = False
    for slash, part in zip(rest[::2], rest[1::2], strict=True):
        if slash and not is_thought:
            parts.clear()
        is_thought = not slash
        if not is_thought:
            parts.append(part)
    return "".join(parts)


def words_of_refusal(reply):
    """What a reply says instead of an answer, or nothing."""
    return str(reply["choices"][0]["message"].get("refusal") or "")


def unfinished(reply):
    """Why a reply is not a whole answer, or None; "length" is that it ran out of tokens."""
    reason = reply["choices"][0].get("finish_reason")
    return None if reason in (None, "stop") else str(reason)[:40]


class Replies:
    """The replies in raw.jsonl, one a line, by their requests' keys; the text stays on disk.

    A last line that a kill tore is passed over, and cut off the file if `repair`, as whoever
    appends must. Any other line that is no reply is passed over with a note; it is asked again.
    """

    def __init__(self, raw, repair=False):
        self.raw = raw
        self.starts = {}                                  # {key: where its line starts}
        self.noted = set()
        if not os.path.exists(raw):
            return
        start = 0
        with open(raw, "rb") as f:
            for line in f:
                if line.endswith(b"\n"):
                    self.add_line(line, start)
                elif repair:
                    os.truncate(raw, start)
                start += len(line)

    def add_line(self, line, start):
        try:
            row = json.loads(line)
            content_of(row["reply"])
            self.starts.setdefault(row["key"], start)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            print(f"{self.raw}, byte {start}: torn, or no reply; it is passed over")

    def __contains__(self, key):
        return key in self.starts

    def __getitem__(self, key):
        """A reply; its `usage` and `model` are None if they are no counts of tokens and no name."""
        with open(self.raw, "rb") as f:
            f.seek(self.starts[key])
            reply = json.loads(f.readline())["reply"]
        if not has_counts(reply.get("usage") or {}):
            self.leave_out("usage", reply)
        if not isinstance(reply.get("model") or "", str):
            self.leave_out("model", reply)
        return reply

    def leave_out(self, field, reply):
        """What stands beside an answer never costs the answer; the first such reply is told."""
        if field not in self.noted:
            self.noted.add(field)
            print(f"{self.raw}: {field} {reply[field]!r:.80} in a reply is odd, and left out")
        reply[field] = None


def has_counts(usage):
    """Whether a reply's `usage` is an object whose counts of tokens are whole numbers."""
    names = ("prompt_tokens", "completion_tokens")
    return isinstance(usage, dict) and all(isinstance(usage.get(n) or 0, int) for n in names)


# -----------------------------------------------------------------------------
# Questions and answers in a reply

# At the head of a line: "Question:", "**Answer:**", "### Question 2:", "1. Q:"
LABEL = r"(?im)^[^\w\n]*(?:\d+\s*[.)]\W*)?(%s)\W{0,3}[:：]\**"


def labelled(text):
    """The labels of a text's parts, like "qaqa", and these parts; chatter before them is left out.

    A letter is a label only where its word is none: an answer may list "A: red".
    """
    names = [word if re.search(LABEL % word, text) else rf"{word[0]}\d*"
             for word in (r"question\s*\d*", r"answer\s*\d*")]
    _, *pieces = re.split(LABEL % "|".join(names), text)
    labels = "".join(label[0].lower() for label in pieces[::2])
    if "q" not in labels and "answer" not in names[1]:     # "A:" is a label behind "Q:" alone
        return "", []
    parts = []
    for part in pieces[1::2]:
        part = re.sub(r"\s+#+$", "", part.strip())         # "## Question: ... ##"
        for mark in ("**", "*"):         # the end of a line that is bold as a whole, label and all
            if part.count(mark) % 2:
                part = part.removesuffix(mark).strip()
        parts.append(part)
    return labels, parts
