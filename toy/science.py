"""A toy ScienceQA (Sec. 5.2), and an expert who reads its problems and cannot see its pictures.

    python -m toy.science --out out/toy_scienceqa/data --seed 0

It writes the official layout (problems.json, pid_splits.json, images/SPLIT/PID/image.png), which
eval.py and extras/scienceqa_gpt4.py read. Everything here is OURS. What a problem comes with
decides who can solve it:

    a picture        only who sees it
    a hint           who reads it: one of its sentences has the answer
    both             in two of three, the hint is enough; in the others it tells something else
    neither          who knows words, small numbers and maps

The expert stands in for GPT-4 in the last rows of Table 7, behind toy/teacher.py's endpoint. It is
a script, no language model: it reads a question as it is sent, and nothing else.
"""
import random
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from parts.files import check_least, run_main, typed_flags, write_json
from parts.scienceqa import LETTERS, letter_of
from toy.world import COLOURS, NUMBERS, SHAPES, caption, draw_scene, questions_about, sample_scene

EXPERT = "scripted text-only expert (no language model)"
CONTEXTS = ("picture",) * 5 + ("both",) * 6 + ("hint",) * 4 + ("neither",) * 5
GUESSES = 0.25                           # how often the expert guesses where it cannot tell
SLIPS = 0.08                             # how often it gets wrong what it could have known
ROWS = ("row 1", "row 2", "row 3", "row 4")
GROUPS = {"colour": tuple(COLOURS), "shape": SHAPES, "number": NUMBERS}
WORDS = (*COLOURS, *SHAPES, *NUMBERS)
MAPS = "Row 1 is above row 2."
NATURAL, SOCIAL, LANGUAGE = "natural science", "social science", "language science"
KINDS_OF = {                             # questions about a scene: subject, lecture
    "colour": (NATURAL, "A thing has one colour."),
    "shape": (NATURAL, "A thing has one shape."),
    "count": (NATURAL, "A number is how many there are."),
    "place": (SOCIAL, MAPS),
    "relation": (SOCIAL, "A is left of B, and row 1 is above row 2."),
}


class Fact(NamedTuple):
    """A question with all of its answers."""
    subject: str
    question: str
    right: tuple                         # one of these is among the choices
    pool: tuple                          # the other choices are from here
    lecture: str
    solution: str                        # {}: the right choice


def known_facts():
    """[Fact, ...] that need neither picture nor hint: words, numbers and maps."""
    facts = []
    lecture = "A word can be a colour, a shape or a number."
    for name, group in GROUPS.items():
        others = tuple(word for word in WORDS if word not in group)
        for right, which in ((group, f"is a {name}"), (others, f"is not a {name}")):
            solution = f"What {which} is {{}}."
            facts.append(Fact(LANGUAGE, f"Which word {which}?", right, WORDS, lecture, solution))
    for n in range(1, 5):
        for taken in range(1, n + 1):
            question = (f"If {NUMBERS[taken]} of {NUMBERS[n]} things were taken away, "
                        "how many would be left?")
            solution = f"Taking away {NUMBERS[taken]} leaves {{}}."
            facts.append(Fact(NATURAL, question, (NUMBERS[n - taken],), NUMBERS,
                              "Taking away leaves the others.", solution))
    for i, row in enumerate(ROWS):
        for way, there in (("above", ROWS[i - 1:i]), ("below", ROWS[i + 1:i + 2])):
            if there:
                facts.append(Fact(SOCIAL, f"Which row is {way} {row}?", there, ROWS, MAPS,
                                  f"{way.capitalize()} {row} is {{}}."))
    return facts


FACTS = {fact.question: fact for fact in known_facts()}


def problem_of(rng, fact, hint=""):
    """A problem as the official file has it. Higher grades have more choices.

    The choices stand in the order of the pool, as many of ScienceQA's are sorted.
    """
    grade = rng.randint(1, 12)
    wrong = [choice for choice in fact.pool if choice not in fact.right]
    right = rng.choice(fact.right)
    choices = [right, *rng.sample(wrong, min(1 + (grade - 1) // 4, len(wrong)))]
    choices.sort(key=fact.pool.index)
    return {
        "question": fact.question,
        "choices": choices,
        "answer": choices.index(right),
        "hint": hint,
        "image": None,
        "grade": f"grade{grade}",
        "subject": fact.subject,
        "lecture": fact.lecture,
        "solution": fact.solution.format(right),
    }


def sentence_problem(rng):
    """A hint that is a sentence, and a question about its words."""
    hint = caption(sample_scene(rng), rng, (False, True, False))
    present = tuple(word for word in sorted(WORDS) if re.search(rf"\b{word}\b", hint))
    return problem_of(rng, Fact(LANGUAGE, "Which word is in the sentence?", present,
                                tuple(sorted(WORDS)), "A sentence has words.",
                                "The sentence has {}."), hint)


def draw_facts(scene, rng):
    """[Fact, ...], one of each kind of question that a scene allows, in random order."""
    facts = {kind: {} for kind in KINDS_OF}
    for question in questions_about(scene, rng):
        # no words about seeing: they would make no sense where a hint takes the picture's place
        if question.kind in facts and not re.search("picture|see|many things", question.text):
            facts[question.kind][question.value] = fact_about(question)
    # an answer is drawn, not a question, or most of the counts would be "one"
    drawn = [rng.choice(list(found.values())) for found in facts.values() if found]
    rng.shuffle(drawn)
    return drawn


def fact_about(question):
    """A question of the toy's world with choices; of a place, the row is asked."""
    subject, lecture = KINDS_OF[question.kind]
    right = question.value
    if question.kind == "place":
        row = f"row {question.answer[-2]}"
        return Fact(subject, question.text.replace("Where", "In which row"), (row,), ROWS, lecture,
                    f"{question.answer[:-5]} {row}.")
    pool = GROUPS.get(question.kind, NUMBERS)
    if question.kind == "relation":
        pool = ("above", "below") if right in ("above", "below") else ("left", "right")
    return Fact(subject, question.text, (right,), pool, lecture, question.answer)


def scene_problem(rng, context):
    """(problem, scene); its text proves the answer, or does not, as the context wants it."""
    readable = context == "hint" or (context == "both" and rng.random() < 2 / 3)
    while True:
        scene = sample_scene(rng)
        fact, *others = draw_facts(scene, rng)
        told = others[:2]
        if readable:
            told = [fact, *others[:1]]
        elif context == "picture":
            told = []
        rng.shuffle(told)
        problem = problem_of(rng, fact, " ".join(other.solution for other in told))
        proven = proven_choice(problem["question"], problem["hint"], problem["choices"])
        if proven == (fact.right[0] if readable else None):
            return problem, scene


def draw_problem(rng):
    """(problem, the scene that it shows, or None)."""
    context = rng.choice(CONTEXTS)
    if context == "neither":
        subject = rng.choice((LANGUAGE, NATURAL, SOCIAL))
        taught = [fact for fact in FACTS.values() if fact.subject == subject]
        return problem_of(rng, rng.choice(taught)), None
    if context == "hint" and rng.random() < 1 / 3:
        return sentence_problem(rng), None
    problem, scene = scene_problem(rng, context)
    if context == "hint":
        return problem, None
    return problem | {"image": "image.png"}, scene


def proven_choice(question, hint, choices):
    """The choice that the text proves, or None: it is one of FACTS, or a sentence of the hint names
    whatever the question asks about, and this choice alone.
    """
    if question in FACTS:
        [choice] = [choice for choice in choices if choice in FACTS[question].right]
        return choice
    about = set(re.findall(r"\w+", question)) & {*COLOURS, *SHAPES}
    proven = set()
    for sentence in hint.split(". "):
        named = [choice for choice in choices if re.search(rf"\b{choice}\b", sentence)]
        if len(named) == 1 and about <= set(re.findall(r"\w+", sentence)):
            proven.update(named)
    return proven.pop() if len(proven) == 1 else None


def read_question(text):
    """A question as it is sent -> (question, hint, choices). Raises ValueError for another text."""
    found = re.fullmatch(r"(.*)\nContext: (.*)\nOptions: (\(A\) .*)", text)
    if not found:
        raise ValueError(f"the scripted expert needs Context and Options, found {text[:80]!r}")
    question, hint, options = found.groups()
    return question, hint, re.split(r" ?\([A-E]\) ", options)[1:]


def expert_reply(message, seed):
    """What the expert says to a problem; the same message has the same reply.

    Alone, it says what the text proves, but for slips; where the text proves nothing, it mostly
    says so, and sometimes guesses. Asked again with both outcomes (prompts/scienceqa/requery.txt),
    it keeps to what the text proves, and otherwise trusts the other solver, who may have eyes.
    """
    rng = random.Random(f"{seed} {message}")
    text, again, outcomes = message.partition("\n\nOne solver wrote:\n")
    question, hint, choices = read_question(text)
    letters = LETTERS[:len(choices)]
    proven = proven_choice(question, hint, choices)
    if proven and (again or rng.random() > SLIPS):
        letter = letters[choices.index(proven)]
        return f"From what I read and know, it is {proven}. The answer is {letter}."
    other = letter_of(outcomes.partition("\n\nAnother solver wrote:\n")[0])
    if other:
        return f"The text proves nothing, and the first solver may see. The answer is {other}."
    if proven or rng.random() < GUESSES:
        return f"I can only guess. The answer is {rng.choice(letters)}."
    return "This needs a picture, which I cannot see. I cannot tell."


@dataclass(frozen=True)
class Config:
    out: str                             # folder to write to
    seed: int = 0
    train: int = 2400                    # problems to train on
    test: int = 600


def main(argv=None):
    config = Config(**typed_flags(Config, argv, __doc__))
    check_least(config, train=1, test=1)
    out = Path(config.out)
    rng = random.Random(config.seed)
    problems = {}
    splits = {"train": [], "test": []}
    for split, pids in splits.items():
        for _ in range(getattr(config, split)):
            pid = str(len(problems) + 1)
            problem, scene = draw_problem(rng)
            problems[pid] = problem | {"split": split}
            pids.append(pid)
            if scene:
                folder = out / "images" / split / pid
                folder.mkdir(parents=True, exist_ok=True)
                draw_scene(scene).save(folder / problem["image"])
    write_json(out / "problems.json", problems)
    write_json(out / "pid_splits.json", splits)
    chance = fmean(1 / len(problems[pid]["choices"]) for pid in splits["test"])
    print(f"{out}: {config.train} problems to train on, {config.test} to answer; a guess is right "
          f"in {chance:.1%} of these")


if __name__ == "__main__":
    run_main(main)
