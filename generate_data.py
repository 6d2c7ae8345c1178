"""
Where the data comes from: a text-only teacher writes instruction-following data (Sec. 3).

    python generate_data.py instruct --captions captions_train2014.json \\
        --instances instances_train2014.json --out data/instruct --model gpt-4
    python generate_data.py expand --pairs pairs.tsv --out chat.json      # stage 1's samples

    annotations -> Context -> system message, examples, context -> reply -> turns -> record

The teacher never sees a picture: captions and boxes are all that it knows of one (Table 1, top).
The paper has the context, the three types of response and a few examples of each. How many, and
the form of the messages, are those of the released prompts; the wording in prompts/, the parser and
the checks are ours. extras/concept_filter.py filters CC3M to 595K pairs.
"""
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

from parts import annotations, client, files, scoring
from parts.annotations import REJECTED
from parts.client import Endpoint, Request
from parts.files import IMAGE, PROMPTS
from parts.replies import Replies, content_of, labelled, unfinished, words_of_refusal

TYPES = ("conversation", "detail_description", "complex_reasoning")     # 58K, 23K, 77K
WRITE_IN = ("\n\nWrite in {}, whatever the language of the sentences. Only the words Question and "
            "Answer stay.")

# --------------------------------------------------------------------------------------------------
# Context: the picture in words, its "symbolic representations" (Sec. 3)


class Context(NamedTuple):
    """What the teacher may know of one picture (Table 1)."""
    id: str
    image: str          # a file name, relative to train.py's --images
    captions: str       # one a line; COCO has five
    boxes: str = ""     # one a line, see parts/annotations.py


def from_record(record, counts, skip_bad=False):
    """A JSON line {"id", "image", "captions": [...], "instances": [{"category", "bbox"}, ...]}.

    For another domain, whatever else is known goes into "notes", a list of sentences that the
    teacher reads after the captions: "text on the sign: CLOSED", "taken at: 14:05".
    """
    image = files.typed(record["image"], str, "image")
    sentences = record.get("captions", []) + record.get("notes", [])
    captions = "\n".join(annotations.caption_lines(sentences, counts))
    boxes = "\n".join(annotations.box_lines(record.get("instances", []), counts, skip_bad))
    return Context(scoring.id_of(record, "id", "record"), image, captions, boxes)


def read_contexts(captions, instances=None, skip_bad=False):
    """All Contexts of COCO's captions file, with its instances file if any, or of JSON lines.

    Raises ValueError that names file and record, FileNotFoundError.
    """
    counts = Counter()                              # of what is left out or changed
    contexts = {}                                   # by id, which a reply is found by
    for i, record in enumerate(annotations.read_annotated(captions, instances, counts)):
        try:
            context = from_record(record, counts, skip_bad)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{captions}[{i}]: {type(error).__name__} {error}; needed are id, "
                             "image, captions (a list), instances: [{category, bbox}]") from error
        if contexts.setdefault(context.id, context) is not context:
            raise ValueError(f"{captions}[{i}]: the id {context.id} has come before")
    if not contexts:
        raise ValueError(f"{captions}: no pictures in it")
    for what, n in (+counts).items():
        print(f"{captions}: {n:,} {what}")
    return list(contexts.values())


# --------------------------------------------------------------------------------------------------
# Request: system message, few-shot examples, context


def read_prompts(folder=PROMPTS):
    """{type: (system message, [(context, response), ...])}, from a folder like prompts/.

    Few-shot examples are the files NNN_caps.txt and NNN_conv.txt.
    """
    prompts = {}
    for kind in TYPES:
        shots = []                                  # OFFICIAL: 2, 3 and 3 of them
        for path in sorted(Path(folder, kind).glob("*_caps.txt")):
            response = path.with_name(path.name.replace("_caps", "_conv"))
            shots.append((files.read_text(path), files.read_text(response)))
        prompts[kind] = files.read_text(Path(folder, kind, "system_message.txt")), shots
    if not detail_questions(folder):
        raise ValueError(f"{folder}/detail_instructions.txt: one question a line is needed")
    return prompts


def detail_questions(folder=PROMPTS):
    """Ways to ask for a detailed description, 16 of ours; the paper's list is in its appendix."""
    return files.read_text(Path(folder, "detail_instructions.txt")).strip().splitlines()


def context_text(kind, context):
    """What the teacher is shown: for a conversation the captions, else captions and boxes.

    OFFICIAL: conversations are written from captions alone; Sec. 3 does not say so.
    """
    if kind == "conversation" or not context.boxes:
        return context.captions
    return f"{context.captions}\n\n{context.boxes}"


def make_request(kind, context, prompts, config):
    """The request for one type of response to one picture."""
    system, shots = prompts[kind]
    if config.language:                             # the examples stay English
        system += WRITE_IN.format(config.language)
    messages = client.chat_messages(system, shots, context_text(kind, context))
    return Request(f"{context.id}-{kind}", kind, client.request_body(config, messages))


def assign_types(contexts, config):
    """[(type, Context), ...]: which picture gets which type; seeded.

    OURS: by --mix each picture is asked about once. The paper has 158K samples of about 80K
    pictures: --numbers conversation=58000 detail_description=23000 complex_reasoning=77000.
    """
    rng = random.Random(config.seed)
    chosen = (types_by_number(contexts, config) if config.numbers
              else types_by_mix(contexts, config, rng))
    pairs = [(kind, context) for kind, part in chosen.items() for context in part]
    rng.shuffle(pairs)                              # so that --limit takes some of each type
    return pairs


def types_by_mix(contexts, config, rng):
    """{type: [Context, ...]}: one random order of all, cut into shares."""
    shares = annotations.read_amounts(config.mix, TYPES)
    order = rng.sample(contexts, len(contexts))
    chosen, end = {}, 0.0
    for kind, share in shares.items():
        start, end = end, end + share * len(contexts) / sum(shares.values())
        chosen[kind] = order[round(start):round(end)]
    return chosen


def types_by_number(contexts, config):
    """{type: [Context, ...]}: a random order for each type, so that one leaves the others alone."""
    chosen = {}
    for kind, n in annotations.read_amounts(config.numbers, TYPES).items():
        if n > len(contexts):
            raise ValueError(f"--numbers {kind}={n}, but there are {len(contexts)} pictures")
        chosen[kind] = random.Random(f"{config.seed} {kind}").sample(contexts, len(contexts))[:n]
    return chosen


# --------------------------------------------------------------------------------------------------
# Response: turns, or the reason why it is none


class Reject(Exception):
    """Why a reply is no record; the reason is what it is counted under."""


TITLE = re.compile(r"^\W*(detailed )?description\W*:\**", re.I)    # some put it above theirs
RULE = re.compile(r"^\s*[=\-*_#]{3,}\s*$", re.M)                 # a line like ===, --- or ***


def parse(kind, text):
    """What a teacher wrote -> [(question, answer), ...]; a description's question is None.

    The form asked for is "Question:\\n...\\n===\\nAnswer:\\n..."; "Q:" and markdown are read, too.
    Raises Reject unless questions and answers take turns: a part of an answer would be lost.
    """
    text = RULE.sub("", text)
    labels, parts = labelled(text)                  # "qaqa", [question, answer, ...]
    if kind == "detail_description":
        if not labels:                              # the text is the answer
            labels, parts = "a", [TITLE.sub("", text).strip()]
        if "q" not in labels:
            labels, parts = "q" + labels, [None, *parts]
    while labels.endswith("q") or parts[-1:] == [""]:       # a last question without its answer
        labels, parts = labels[:-1], parts[:-1]
    if labels != "qa" * (len(parts) // 2) or "" in parts:
        raise Reject("question and answer do not take turns")
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    if kind == "detail_description":                # its question is drawn, see make_record
        turns = [(None, answer) for _, answer in turns]
    return turns if kind == "conversation" else turns[:1]       # of the others one is asked for


def read_turns(kind, reply):
    """A reply -> [(question, answer), ...]. Raises Reject, also for a reply that was cut off."""
    finish = unfinished(reply)
    if finish:
        raise Reject("cut off at max_tokens" if finish == "length" else f"finish_reason {finish}")
    text = content_of(reply)
    turns = parse(kind, text)
    words = "\n".join(part for turn in turns for part in turn if part)
    for reason, pattern in REJECTED.items():        # in the turns; without any, in all of it
        if pattern.search(words or text):
            raise Reject(reason)
    if not turns:                                   # last: a refusal has none, either
        raise Reject("no question and answer")
    return turns


def make_record(context, request, reply, questions, seed):
    """A reply -> a sample. OFFICIAL: a description's question is drawn here; Sec. 3 sends it."""
    rng = random.Random(f"{seed} {request.id}")     # its own: no other reply changes this record
    turns = [(question or rng.choice(questions), answer)
             for question, answer in read_turns(request.kind, reply)]
    return {"id": request.id, "image": context.image, "conversations": to_turns(turns, rng)}


def to_turns(pairs, rng):
    """[(question, answer), ...] -> LLaVA's turns, the picture before or after the first question.

    As in the released data, one draw of Eq. (2) is written down; train.py draws it anew.
    """
    texts = [text for pair in pairs for text in pair]       # question, answer, question, ...
    texts[0] = f"{IMAGE}\n{texts[0]}" if rng.random() < 0.5 else f"{texts[0]}\n{IMAGE}"
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


# --------------------------------------------------------------------------------------------------
# instruct: captions and boxes -> instruct.json


@dataclass(frozen=True, kw_only=True)
class Instruct(Endpoint):
    out: str                   # folder for instruct.json, rejected.jsonl, raw.jsonl, metadata.json
    captions: str              # COCO's captions_*.json, or JSON lines of id, image, captions, ...
    instances: str = None      # COCO's instances_*.json
    model: str = "gpt-4"       # the paper's; any chat model that the endpoint has
    prompts: str = str(PROMPTS)     # folder of TYPE/system_message.txt, TYPE/NNN_caps.txt, ...
    language: str = None       # language to write in, by its English name
    mix: list[str] = ("conversation=58", "detail_description=23", "complex_reasoning=77")  # shares
    numbers: list[str] = ()    # instead of --mix, TYPE=N: N pictures, drawn for each type alone
    limit: int = None          # only the first N requests
    seed: int = 0              # of which picture gets which type, and of all draws in records
    skip_bad: bool = False     # leave out boxes that are outside of their picture, or inverted
    keep_duplicates: bool = False  # equal answers stay: for a teacher that speaks in set phrases

    def __post_init__(self):
        super().__post_init__()
        files.check_least(self, limit=1)
        if self.numbers and self.mix != Instruct.mix:
            raise ValueError("--numbers and --mix: only one can say how much there is of each type")


def good_records(plan, replies, config, counts, rejected):
    """Yield the records of good replies; count all replies, and collect the rejected ones."""
    questions = detail_questions(config.prompts)
    examples = {answer for kind, (_, shots) in read_prompts(config.prompts).items()
             for _, example in shots for _, answer in parse(kind, example)}
    earlier = set()                                 # {all answers of a record, ...}
    for context, request in plan:
        reply = replies[request.key]                # the key: a hash of the request
        usage = reply.get("usage") or {}            # what the server counted, if it does
        counts["tokens in"] += usage.get("prompt_tokens") or 0
        counts["tokens out"] += usage.get("completion_tokens") or 0
        try:
            record = make_record(context, request, reply, questions, config.seed)
            answers = tuple(turn["value"] for turn in record["conversations"][1::2])
            if examples.issuperset(answers):
                raise Reject("repeats an example")
            if answers in earlier and not config.keep_duplicates:
                raise Reject("duplicate")           # OURS: set phrases teach little
        except Reject as reject:
            counts[f"{request.kind}, rejected: {reject}"] += 1
            rejected.append({"id": request.id, "kind": request.kind, "reason": str(reject),
                             "text": content_of(reply) or words_of_refusal(reply)})
        else:
            earlier.add(answers)
            counts[f"{request.kind}, records"] += 1
            counts[f"{request.kind}, answers"] += len(answers)
            yield record


def write_outputs(plan, out, config):
    """instruct.json, rejected.jsonl and metadata.json, anew from all replies that there are."""
    replies = Replies(out / "raw.jsonl")
    answered = [(context, request) for context, request in plan if request.key in replies]
    if not answered:                                # an earlier instruct.json stays as it is
        return
    counts, rejected = Counter(replies=len(answered)), []
    records = good_records(answered, replies, config, counts, rejected)
    files.write_array(out / "instruct.json", records)       # counts and rejects on the way
    files.write_lines(out / "rejected.jsonl", rejected)
    counts["money"] = config.money(counts["tokens in"], counts["tokens out"])
    files.write_json(out / "metadata.json", {
        "counts": counts, "date": str(date.today()), "settings": asdict(config),
        "prompts": client.hash_of(read_prompts(config.prompts))})
    for what, n in sorted(counts.items()):
        print(f"{what:<60}{n:>12,}")
    print(f"wrote {out / 'instruct.json'}")


def instruct(config):
    """Captions and boxes -> instruction data in LLaVA's format. Started again, it resumes."""
    prompts = read_prompts(config.prompts)          # bad files are an error before anything is paid
    contexts = read_contexts(config.captions, config.instances, config.skip_bad)
    pairs = assign_types(contexts, config)[:config.limit]
    plan = [(context, make_request(kind, context, prompts, config)) for kind, context in pairs]
    requests = [request for _, request in plan]
    if client.is_preview(requests, config):         # look before you pay
        return
    with files.lock_folder(config.out) as out:
        try:
            client.ask_missing(requests, out / "raw.jsonl", config)
        finally:
            write_outputs(plan, out, config)        # what is paid can be used, however it ends


# --------------------------------------------------------------------------------------------------
# expand: image and caption -> stage 1's samples


@dataclass(frozen=True)
class Expand:
    pairs: str                           # TSV, JSON lines, or a folder of pictures with .txt files
    out: str                             # the LLaVA file to write
    columns: str = "image caption"       # of a TSV, in order
    seed: int = 0                        # of questions and of the picture's place


def expanded_pairs(config):
    """Yield naive expansions: Human: X_q X_v, Assistant: X_c, which is the caption as it is."""
    rng = random.Random(config.seed)
    questions = files.brief_instructions()
    for image, caption in annotations.read_caption_pairs(config.pairs, config.columns):
        if not caption or "://" in image:           # CC3M's file has addresses
            raise ValueError(f"{config.pairs}: image {image!r}, caption {caption!r}; the name of a "
                             "picture that is downloaded, and words are needed")
        turns = to_turns([(rng.choice(questions), caption)], rng)
        yield {"id": Path(image).with_suffix("").as_posix(), "image": image, "conversations": turns}


def expand(config):
    """Image-caption pairs -> stage 1's samples, each with one of our 11 brief instructions."""
    files.write_array(config.out, expanded_pairs(config))
    print(f"wrote {config.out}")


COMMANDS = {"instruct": (instruct, Instruct), "expand": (expand, Expand)}


def main(argv=None):
    return files.run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    files.run_main(main)
