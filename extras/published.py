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

from eval import TABLE_7, LLaVABench, relative_scores, scienceqa_scores
from parts import scienceqa
from parts.files import read_text, read_value, run_command, run_main, typed, write_json
from parts.scoring import check_ids, read_by_id

# --------------------------------------------------------------------------------------------------
# ScienceQA and LLaVA-Bench


@dataclass(frozen=True)
class PublishedScienceQA:
    labels: str                          # folder with the official problems.json, pid_splits.json
    answers: str                         # the released result file, or JSON lines
    json: str = None                     # a file for the unrounded numbers


def read_results(path):
    """({id: text}, {id: index} as stored, if they are) of a result file or of JSON lines.

    A result file is {"outputs": {id: text}, "results": {id: index}}.
    """
    if '"question_id"' in read_text(path)[:1000]:
        return {pid: row["text"] for pid, row in read_by_id(path, "text").items()}, {}
    file = read_value(path)
    outputs = typed(file.get("outputs"), dict, f"{path}: outputs")
    results = typed(file.get("results", {}), dict, f"{path}: results")
    for pid, text in outputs.items():
        typed(text, str, f"{path}: outputs of {pid}")
    for pid, index in results.items():
        typed(index, int, f"{path}: results of {pid}")
    return outputs, results


def published_scienceqa(config):
    """ScienceQA as the first scripts score it.

    What names no choice of its problem is drawn, once for the accuracy and once more for the stored
    `results`, of which the paper's table is made: where they are stored, they count. A problem
    without an answer is wrong. The released 13B run has 90.92 by them, 90.90 by what its answers
    say.
    """
    problems = scienceqa.read_problems(config.labels, "test")
    outputs, stored = read_results(config.answers)
    check_ids(config.answers, outputs, problems, partial=True)
    rng = random.Random(0)
    choices = {}
    unparsed = 0
    for pid, problem in problems.items():
        choice = scienceqa.choice_of(problem, scienceqa.letter_of(outputs.get(pid, "")))
        unparsed += choice is None
        if pid in outputs and choice in (None, -1):
            choice = rng.randrange(len(problem["choices"]))
        choices[pid] = choice
    if stored:
        choices = {pid: stored.get(pid, -1) for pid in problems}
    scores = scienceqa_scores(problems, {"ours": [choices]})
    scienceqa.print_methods(scores, (unparsed, len(problems)), TABLE_7, config.json)


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
# Short answers: the official answer processor of VQAv2, TextVQA and VizWiz

MARKS = ';/[]"{}()=+\\_-><@`,?!'
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
    corrected = {"somebody'd": "somebodyd"}
    for word in CONTRACTIONS:
        for i, sign in enumerate(word):
            if sign == "'":
                corrected[word[:i] + word[i + 1:]] = word
    return corrected


MISSPELT = misspellings()


def punctuate(text):
    """A mark goes where one of its kind has a blank beside it, or where a comma stands between
    digits; else it becomes a blank. A mistyped look-behind saves a full stop only from what follows
    it, a digit, and at most 32 of them go.
    """
    gone = re.search(r"\d,+\d", text)
    new = {}
    for mark in MARKS:
        if gone or f"{mark} " in text or f" {mark}" in text:
            new[mark] = ""
        else:
            new[mark] = " "
    return re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(new)), count=32)


@functools.cache
def normalise(text):
    """A short answer as the VQA benchmarks compare it: "Two dogs." -> "2 dogs".

    Number words become digits, articles go, contractions get their apostrophes.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = punctuate(text.replace("\n", " ").replace("\t", " ").strip())
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(MISSPELT.get(word, word) for word in words if word not in ("a", "an", "the"))


COMMANDS = {
    "scienceqa": (published_scienceqa, PublishedScienceQA),
    "llava_bench": (published_llava_bench, LLaVABench)}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
