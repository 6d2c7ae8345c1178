"""The toy's teacher and judge: scripts (no language models) behind an endpoint on localhost.

    python -m toy.teacher --port 8100 --world out/toy/world --seed 0

generate_data.py and eval.py ask it as they would ask GPT-4, at --base_url http://127.0.0.1:8100/v1;
the first line that it prints is that address. Everything here is OURS. What it does depends on the
system message of a request:

    prompts/TYPE/system_message.txt         it writes the three response types (Sec. 3, Table 1)
    prompts/reference/system_message.txt    it answers a bench's question (Sec. 5.1)
    eval.py's SYSTEM                        it judges two answers (Sec. 5.1)
    prompts/scienceqa/system_message.txt    it is the text-only expert of toy/science.py (Sec. 5.2)

It knows the pictures of --world by their captions and boxes, as the teacher of the paper does; but
it looks the boxes up for a conversation, too, of which a request shows captions only: what a script
can say needs all there is to know. It can only say what its templates say, and what it judges is
right or wrong, never style. The expert knows no picture and needs no --world. Anything else, it
refuses with HTTP 400 and says why.
"""
import json
import random
import re
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from eval import SYSTEM
from generate_data import TYPES, detail_questions, read_contexts
from parts.files import PROMPTS, brief_instructions, run_main, typed_flags
from toy.science import EXPERT, expert_reply
from toy.world import (
    COLOURS,
    KINDS,
    NUMBERS,
    PAIRS,
    SEEN,
    Scene,
    caption,
    listed,
    questions_about,
    read_coco,
    with_article,
)

TEACHER = "scripted teacher (no language model)"
JUDGE = "scripted judge (no language model)"


# ------------------------------------------------------------------------------------------------
# The teacher: annotations -> [(question, answer), ...]


def teach(kind, scene, rng, pairs=SEEN):
    """What the teacher says to a response type of Sec. 3, or to "brief", stage 1's."""
    if kind == "conversation":
        return teach_conversation(scene, rng, pairs)
    if kind == "detail_description":
        return [(rng.choice(detail_questions()), describe(scene))]
    if kind == "complex_reasoning":
        return [rng.choice(reasoning_pairs(scene, rng))]
    return [(rng.choice(brief_instructions()), caption(scene, rng))]


def describe(scene):
    """The detailed description: everything there is to say, in reading order."""
    sentences = [f"There {count_of(scene.things)} in the picture."]
    for thing in scene.things:
        what = with_article(f"{thing.size} {thing.name}").capitalize()
        sentences.append(f"{what} is in {thing.place}.")
    return " ".join(sentences)


def count_of(things):
    return "is one thing" if len(things) == 1 else f"are {NUMBERS[len(things)]} things"


def teach_conversation(scene, rng, pairs, turns=8):
    """Multi-turn conversation: up to `turns` different questions and their answers."""
    left = questions_about(scene, rng, pairs)
    conversation = []
    for _ in range(min(rng.randint(1, turns), len(left))):
        question = draw_question(left, rng)
        left.remove(question)
        conversation.append((question.text, question.answer))
    return conversation


def draw_question(questions, rng):
    """The kind is drawn first, then the answer's value, then the words: no answer is a safe bet."""
    for field in ("kind", "value", "text"):
        values = sorted({getattr(question, field) for question in questions})
        weights = [3 if value in KINDS else 1 for value in values]
        [drawn] = rng.choices(values, weights)
        questions = [question for question in questions if getattr(question, field) == drawn]
    return questions[0]


def reasoning_pairs(scene, rng):
    """Complex reasoning: an answer first names what it rests on, then concludes."""
    value = rng.choice([value for thing in scene.things for value in thing.pair])
    what = f"{value} thing" if value in COLOURS else value
    found = scene.things_with(value)
    taken = NUMBERS[len(found)]
    left = NUMBERS[len(scene.things) - len(found)]
    pairs = [(
        f"If every {what} were taken away, how many things would be left?",
        f"There {count_of(scene.things)}. Taking away {taken} leaves {left}.",
    )]
    names = listed([with_article(thing.name) for thing in scene.things])
    for attribute in ("colour", "shape"):
        values = {getattr(thing, attribute) for thing in scene.things}
        verdict = "yes, they do" if len(values) == 1 else "no, they do not"
        pairs.append((f"Do all things have the same {attribute}?", f"I see {names}. So {verdict}."))
    if len(scene.unique_things) > 1:
        start, end = rng.sample(scene.unique_things, 2)
        way = (
            f"How do I get from the {start.name} to the {end.name}?",
            f"The {start.name} is in {start.place} and the {end.name} is in {end.place}. "
            f"So go {listed(directions(start, end))}.",
        )
        pairs += [way, way]              # drawn as often as the two above together
    return pairs


def directions(start, end):
    ways = {
        "up": end.row < start.row,
        "down": end.row > start.row,
        "left": end.column < start.column,
        "right": end.column > start.column,
    }
    return [way for way, leads_there in ways.items() if leads_there]


# ------------------------------------------------------------------------------------------------
# The judge


def statements(text):
    """An answer's clauses: "There are two things. A ..." -> {"there are two things", "a ..."}"""
    clauses = [" ".join(clause.lower().split()) for clause in re.split(r"[.,]", text)]
    return {clause for clause in clauses if clause}


def truths(question, scene, tries=400):
    """All that can rightly be said to a question, and how many statements a full answer makes.

    What the teacher says is random, so it is asked again and again. One kind of answer, to "In
    short, ...", lists a few facts of many in any order: 40 of them hold practically all facts.
    """
    if question in detail_questions():
        facts = statements(describe(scene))
        return facts, len(facts)
    last_needed = 40 if question.startswith("In short") else 0
    facts = set()
    needed = 0
    for seed in range(tries):
        rng = random.Random(seed)
        answers = []
        for _ in range(10):
            answers.append(rng.choice(reasoning_pairs(scene, rng)))
        if seed < 80:
            answers += [(q.text, q.answer) for q in questions_about(scene, rng, PAIRS)]
        for text, answer in answers:
            if text == question:
                made = statements(answer)
                facts |= made
                needed = len(made)
        if facts and seed >= last_needed:
            return facts, needed
    raise ValueError(f"the scripted judge knows only the toy's questions, not {question!r}; take a "
                     "language model as judge")


def review(question, answers, scene):
    """A review in the form that a language model has: two scores, then their reasons.

    A score is 1 + 9 x the share of right statements, among those made or, if an answer is too
    short, those needed: only an answer that is right from end to end gets a 10.

    answers    {"Assistant 1": ..., "Assistant 2": ...}
    """
    facts, needed = truths(question, scene)
    scores = []
    reasons = []
    for name, answer in answers.items():
        made = statements(answer)
        right = len(made & facts)
        wrong = "; ".join(sorted(made - facts)) or "nothing"
        score = 1 + 9 * right / max(len(made), needed)     # COURSE: a judge that prefers the first
        scores.append(f"{score:.3g}")
        reasons.append(f"{name}: {right} right of {len(made)} said and {needed} needed; "
                       f"wrong: {wrong}.")
    return "\n".join([" ".join(scores), f"This is a {JUDGE}.", *reasons])


# ------------------------------------------------------------------------------------------------
# From a request to a reply


class Picture(NamedTuple):
    id: str
    scene: Scene


def read_pictures(world):
    """{what a request tells of a picture: Picture}, of all splits of a world.

    Each is known by its captions, and by captions and boxes. Raises ValueError if two pictures have
    the same captions: nobody could tell which of them a conversation is to be about. It has not
    happened in the worlds of our seeds; another seed draws another world.
    """
    pictures = {}
    folder = Path(world, "annotations")
    for captions in sorted(folder.glob("captions_*.json")):
        instances = captions.with_name(captions.name.replace("captions", "instances"))
        scenes = read_coco(instances)
        for context in read_contexts(str(captions), str(instances)):
            picture = Picture(context.id, scenes[int(context.id)])
            twin = pictures.setdefault(context.captions, picture)
            if twin is not picture:
                raise ValueError(f"{folder}: the pictures {twin.id} and {picture.id} have the same "
                                 "captions; draw the world with another --seed")
            pictures[f"{context.captions}\n\n{context.boxes}"] = picture
    if not pictures:
        raise ValueError(f"{folder}: no captions_*.json; python -m toy.world world --out {world}")
    return pictures


class Script:
    """The teacher and the judge of one world, the expert, and who is meant by a request.

    `seed` stands for what is random in a language model: the same request has the same reply.
    """

    def __init__(self, world, seed):
        self.seed = seed
        self.pictures = read_pictures(world) if world else {}
        self.roles = {SYSTEM: "judge"}
        for role in (*TYPES, "reference", "scienceqa"):
            message = PROMPTS / role / "system_message.txt"
            self.roles[message.read_text().strip()] = role

    def reply_to(self, body):
        """(model, text). Raises ValueError for whatever is not of the toy."""
        system, *_, query = (message["content"].strip() for message in body["messages"])
        role = self.roles.get(system)
        if role == "judge":
            return JUDGE, self.judge(query)
        if role == "scienceqa":
            return EXPERT, expert_reply(query, self.seed)
        if role == "reference":
            context, _, question = query.rpartition("\n\n")
            return TEACHER, self.answer(question, self.picture_of(context))
        if role is None:
            raise ValueError("the system message is none of prompts/ or of eval.py; the scripted "
                             "teacher and judge follow no other")
        picture = self.picture_of(query)
        if role == "detail_description":
            return TEACHER, describe(picture.scene)
        turns = self.teach(role, picture)
        blocks = [f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in turns]
        return TEACHER, "\n===\n".join(blocks)

    def picture_of(self, text):
        if text not in self.pictures:
            raise ValueError(f"no picture of --world has the annotations {text[:80]!r}; "
                             "for other pictures take a language model")
        return self.pictures[text]

    def teach(self, kind, picture):
        return teach(kind, picture.scene, random.Random(f"{self.seed} {picture.id} {kind}"))

    def answer(self, question, picture):
        """The reference answer to a question that was asked here, or to one for a description."""
        if question in detail_questions():
            return describe(picture.scene)
        answers = dict(self.teach("conversation", picture))
        answers |= self.teach("complex_reasoning", picture)
        if question not in answers:
            raise ValueError(f"the scripted teacher did not ask {question!r} about the picture "
                             f"{picture.id}; has --seed changed?")
        return answers[question]

    def judge(self, message):
        context, _, rest = message.partition("\n\n[Question]\n")
        question = rest.partition("\n\n[")[0]
        answers = re.findall(r"\[([^\]\n]+ [12])\]\n(.*?)\n\n\[End of \1\]", rest, re.DOTALL)
        if len(answers) != 2:
            raise ValueError("[Question] and the answers of [... 1] and [... 2] are needed")
        picture = self.picture_of(context.removeprefix("[Context]\n"))
        return review(question, dict(answers), picture.scene)


class Handler(BaseHTTPRequestHandler):
    """POST /v1/chat/completions, as far as parts/client.py speaks it."""
    protocol_version = "HTTP/1.1"        # connections stay open
    disable_nagle_algorithm = True       # or a reply waits for 40 ms

    def do_POST(self):
        request = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            model, text = self.server.script.reply_to(json.loads(request))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return self.send(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return self.send(200, {"model": model, "choices": choices})

    def send(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """The client has a progress bar."""


@dataclass(frozen=True)
class Config:
    world: str = None                    # folder of toy.world; the expert needs none
    port: int = 0                        # 0: a free one; the printed address has it
    seed: int = 0                        # of what the teacher says


def main(argv=None):
    config = Config(**typed_flags(Config, argv, __doc__))
    server = ThreadingHTTPServer(("127.0.0.1", config.port), Handler)
    server.daemon_threads = True
    server.script = Script(config.world, config.seed)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_main(main)
