"""
The arithmetic of the released scripts, digit for digit, wherever it differs from what we print.

    python -m extras.published scienceqa --labels DIR --answers results.json     90.92, not 90.90
    python -m extras.published llava_bench --reviews r1.jsonl r2.jsonl r3.jsonl
    python -m extras.benchmarks score NAME --official ...                        the others

It averages failed judgements as -1, draws answers that it cannot read, and pairs by position. Use
it to reproduce a published number from published files, and eval.py for your own.
"""
import functools
import random
import re
from dataclasses import dataclass
from pathlib import Path

from eval import (
    TABLE_7,
    LLaVABench,
    ScienceQA,
    methods_of,
    relative_scores,
    scienceqa_scores,
)
from parts import scienceqa
from parts.files import run_command, run_main, write_json
from parts.scoring import check_ids, percent, read_by_id, read_object

# --------------------------------------------------------------------------------------------------
# ScienceQA and LLaVA-Bench


@dataclass(frozen=True)
class PublishedScienceQA(ScienceQA):
    seed: int = 0                        # of the random choices


def read_results(path):
    """({id: text}, {id: index} as stored, if they are) of a result file or of JSON lines.

    A result file is {"outputs": {id: text}, "results": {id: index}}.
    """
    is_lines = '"question_id"' in Path(path).read_text(encoding="utf-8-sig")[:1000]
    if is_lines:
        return {pid: row["text"] for pid, row in read_by_id(path, "text").items()}, {}
    file = read_object(path)
    if not isinstance(file.get("outputs"), dict):
        raise ValueError(f"{path}: outputs: {{id: text}} are needed, found {', '.join(file)}")
    return file["outputs"], file.get("results", {})


def choices_in(outputs, problems):
    """{id: choice} of texts {id: text}, see scienceqa.choice_of; some problems may have none."""
    letters = {pid: scienceqa.letter_of(text) for pid, text in outputs.items()}
    return {pid: scienceqa.choice_of(problems[pid], letters[pid])
            for pid in problems if pid in letters}


def draw_choices(choices, problems, rng, unread=False):
    """Choices at random where a letter is none of the problem's, and where none is read, too."""
    drawn = {}
    for pid, choice in choices.items():
        if choice == -1 or (choice is None and unread):
            choice = rng.randrange(len(problems[pid]["choices"]))
        drawn[pid] = choice
    return drawn


def published_scienceqa(config):
    """ScienceQA as the first scripts score it.

    What names no choice of its problem is drawn, once for the accuracy and once more for the stored
    `results`, of which the paper's table is made: where they are stored, they count. A problem
    without an answer is wrong. The released 13B run has 90.92 by them and 90.90 by what it says.
    """
    problems = scienceqa.read_problems(config.labels, config.split)
    rng = random.Random(config.seed)
    choices = []
    stored = {}
    for path in (config.answers, config.second, config.requery):
        outputs = {}
        if path:
            outputs, results = read_results(path)
            check_ids(path, outputs, problems, partial=True)
            if path == config.answers:
                stored = results
        choices.append(choices_in(outputs, problems))
    ours, second, verdicts = choices
    wrong = dict.fromkeys(problems)
    undrawn = scienceqa_scores(problems, {"ours": [wrong | ours]})["ours"]
    unparsed = (sum(ours.get(pid) is None for pid in problems), len(problems))
    ours = wrong | draw_choices(ours, problems, rng, unread=True)
    if stored:
        ours = {pid: int(stored.get(pid, -1)) for pid in problems}
    second = draw_choices(second, problems, rng)
    verdicts = draw_choices(verdicts, problems, rng)
    scores = scienceqa_scores(problems, methods_of(ours, second, verdicts))
    scienceqa.print_methods(scores, unparsed, TABLE_7, config.json)
    print(f"AVG of what the answers say, with nothing drawn: {percent(undrawn['AVG']):.2f}")


def published_relative_score(scores):
    """(relative score, reference's mean, answers' mean) of one run: means have three decimals."""
    reference, answers = [round(float(mean), 3) for mean in scores.mean(0)]
    return answers / reference * 100, reference, answers


def published_score_of_several(scores):
    """The same of one run of several, whose relative score has one decimal before their mean."""
    relative, reference, answers = published_relative_score(scores)
    return round(relative, 1), reference, answers


def published_llava_bench(config):
    """LLaVA-Bench as the released script scores it: failed judgements count as -1 for both."""
    score = published_relative_score if len(config.reviews) == 1 else published_score_of_several
    numbers, text = relative_scores(config.reviews, score, most_failed=1)
    print(f"{text}, counted as -1")
    if config.json:
        write_json(config.json, numbers)


# --------------------------------------------------------------------------------------------------
# POPE


def texts_by_position(predictions, questions, split):
    """The answers of one split, in their own order: the n-th belongs to the n-th label.

    predictions    [(id, prompt, text), ...]
    """
    split_of = {str(question["question_id"]): question["category"] for question in questions}
    return [text for name, _, text in predictions if split_of[name] == split]


# --------------------------------------------------------------------------------------------------
# Short answers: the official answer processor, and what VQAv2's and VizWiz's servers do instead

MARKS = ';/[]"{}()=+\\_-><@`,?!'
SERVER_MARKS = ";:/'[]\"()=+\\_><@`,?"
DIGITS = dict(none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6",
              seven="7", eight="8", nine="9", ten="10")
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've""".split()


def misspellings():
    """{word without one of its apostrophes: word}; somebody'd stands there like this."""
    corrected = {}
    for word in CONTRACTIONS:
        for i, sign in enumerate(word):
            if sign == "'":
                corrected[word[:i] + word[i + 1:]] = word
    return corrected | {"somebody'd": "somebodyd"}


MISSPELT = misspellings()


def punctuate(text, marks=MARKS):
    """A mark goes where one of its kind has a blank beside it, or where a comma stands between
    digits; else it becomes a blank. A mistyped look-behind saves a full stop only from what follows
    it, a digit, and at most 32 of them go.
    """
    gone = re.search(r"\d,+\d", text)
    new = {}
    for mark in marks:
        if gone or f"{mark} " in text or f" {mark}" in text:
            new[mark] = ""
        else:
            new[mark] = " "
    return re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(new)), count=32)


def plain_words(text):
    """Number words as digits, no articles, contractions with their apostrophes, single blanks."""
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(MISSPELT.get(word, word) for word in words if word not in ("a", "an", "the"))


@functools.cache
def normalise(text):
    """A short answer as the VQA benchmarks compare it: "Two dogs." -> "2 dogs"."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(punctuate(text.replace("\n", " ").replace("\t", " ").strip()))


def server_matches(text, humans):
    """How many human answers a text equals on the servers.

    Human answers stay as they are if all ten agree, and only lose punctuation otherwise; the
    normalised prediction goes through the servers' own steps, with marks of their own.
    """
    said = plain_words(punctuate(normalise(text), SERVER_MARKS))
    if len(set(humans)) > 1:
        humans = [punctuate(human, SERVER_MARKS) for human in humans]
    return humans.count(said)


COMMANDS = {
    "scienceqa": (published_scienceqa, PublishedScienceQA),
    "llava_bench": (published_llava_bench, LLaVABench)}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
