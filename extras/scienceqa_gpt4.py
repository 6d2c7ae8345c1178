"""
ScienceQA with a text-only expert, GPT-4 in the paper (Sec. 5.2, the last rows of Table 7).

    python -m extras.scienceqa_gpt4 answer --labels data/scienceqa --out gpt4.jsonl
    python -m extras.scienceqa_gpt4 judge --labels data/scienceqa --answers ours.jsonl \\
        --second gpt4.jsonl --out verdicts.jsonl
    python eval.py score scienceqa --labels data/scienceqa --answers ours.jsonl \\
        --second gpt4.jsonl --requery verdicts.jsonl

    answer   two solved problems, a problem --> the expert's reasons and letter, or that it has none
    judge    a problem on which the two differ, both outcomes --> the expert's own final letter

`eval.py` makes the ensembles of these files: the complement takes ours where the expert names no
letter, the judge takes the verdict where the two differ.
"""
import random
from dataclasses import dataclass

from parts import client, scienceqa
from parts.client import Endpoint, Request
from parts.files import PROMPTS, check_least, run_command, run_main, write_lines
from parts.replies import content_of
from parts.scoring import replies_for

FOLDER = PROMPTS / "scienceqa"


@dataclass(frozen=True, kw_only=True)
class Ask(Endpoint):
    labels: str                # folder with the official problems.json, pid_splits.json
    out: str                   # JSON lines to write; OUT.raw keeps what is paid
    model: str = "gpt-4"       # the paper's; any chat model that the endpoint has
    temperature: float = 0.0   # OURS: the paper does not say
    split: str = "test"        # of pid_splits.json
    format: str = "QCM-LEA"    # lecture and explanation before the answer, as ours is asked


@dataclass(frozen=True, kw_only=True)
class AskAlone(Ask):
    shots: int = 2             # solved problems of `train` before each; the paper has two
    seed: int = 0              # of which they are

    def __post_init__(self):
        super().__post_init__()
        check_least(self, shots=0)


@dataclass(frozen=True, kw_only=True)
class AskAgain(Ask):
    answers: str               # ours: JSON lines of question_id, text
    second: str                # the expert's


def solved_problems(config):
    """[(question, answer), ...] of `train`, without pictures; the expert reads them first.

    OURS: the paper does not say which two it took. Theirs may have had pictures, too.
    """
    problems = scienceqa.read_problems(config.labels, "train")
    readable = [pid for pid, problem in problems.items() if not problem["image"]]
    if len(readable) < config.shots:
        raise ValueError(f"{config.labels}: --shots {config.shots} needs as many problems without "
                         f"a picture in train, which has {len(readable)}")
    chosen = random.Random(config.seed).sample(readable, config.shots)
    return [scienceqa.science_turn(problems[pid], config.format) for pid in chosen]


def questions_of(problems, config):
    """{id: question}: what the expert reads of each problem."""
    return {pid: scienceqa.science_turn(problem, config.format)[0]
            for pid, problem in problems.items()}


def ask_expert(kind, questions, shots, config):
    """Ask each of {id: question} and write the answers; an interrupted run goes on."""
    system = (FOLDER / "system_message.txt").read_text().strip()
    requests = {pid: Request(pid, kind, client.request_body(
        config, client.chat_messages(system, shots, question)))
        for pid, question in questions.items()}
    if client.is_preview(list(requests.values()), config):
        return
    replies = replies_for(list(requests.values()), config.out, config)
    texts = {pid: content_of(replies[request.key]) for pid, request in requests.items()}
    write_lines(config.out, [
        {"question_id": pid, "prompt": questions[pid], "text": text, "model_id": config.model}
        for pid, text in texts.items()])
    unnamed = sum(scienceqa.letter_of(text) is None for text in texts.values())
    print(f"{config.out}: {len(texts)} answers, {unnamed} of them name no option")


def ask_alone(config):
    """The expert alone: its answers to all problems, from their text."""
    problems = scienceqa.read_problems(config.labels, config.split)
    ask_expert("answer", questions_of(problems, config), solved_problems(config), config)


def ask_again(config):
    """The expert as the judge: its own answer where the two differ, given both outcomes.

    OURS: prompts/scienceqa/requery.txt; the paper's words for asking again are not known.
    """
    problems = scienceqa.read_problems(config.labels, config.split)
    prompt = (FOLDER / "requery.txt").read_text().strip()
    ours = scienceqa.read_texts(config.answers, problems)
    theirs = scienceqa.read_texts(config.second, problems)
    questions = {}
    for pid, question in questions_of(problems, config).items():
        first = ours[pid]
        second = theirs[pid]
        if scienceqa.letter_of(first) != scienceqa.letter_of(second):
            questions[pid] = prompt.format(question=question, first=first, second=second)
    ask_expert("judge", questions, [], config)


COMMANDS = {"answer": (ask_alone, AskAlone), "judge": (ask_again, AskAgain)}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
