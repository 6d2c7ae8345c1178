"""
Every sample and every picture, checked before step 0, so that no run stops at step 22 or trains on
garbage. `python data.py check` prints what is found; train.py refuses to start on it.
"""
import argparse
import functools
import itertools
import os

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from parts.files import IGNORE, IMAGE
from parts.pictures import check_image
from parts.templates import TEMPLATES
from parts.views import ASPECTS

# Columns of the table that `inspect_data` returns, a row for each sample.
TOKENS, SCORED, IMAGES, TURNS, DROPPED, MISSING, RENAMED = range(7)


def map_items(function, items, workers, title):
    """[function(item), ...], shared among worker processes, with a progress bar on a terminal."""
    apply = functools.partial(map_batch, function)       # to 64 items at once, in a worker
    loader = DataLoader(items, batch_size=64, num_workers=workers, collate_fn=apply)
    bar = tqdm(loader, desc=title, unit_scale=64, disable=None)
    return [result for batch in bar for result in batch]


def map_batch(function, items):
    return [function(item) for item in items]


def inspect_data(data, workers=0):
    """Check every sample of a data.Conversations and decode every picture once.

    Returns ({index: problem}, table): a row (TOKENS, SCORED, ...) for each sample. Where `data` has
    no tokenizer, tokens are 0; where a sample is bad, all is 0 but MISSING and RENAMED.
    """
    problems = {}
    images = {}                          # of each sample of good form
    for i, record in enumerate(data.records):
        problem = data.records.problem(i, record, data.folder)
        if problem:
            problems[i] = problem
        else:
            images[i] = record["image"]

    names = list(dict.fromkeys(itertools.chain(*images.values())))
    look_up = functools.partial(inspect_picture, data.folder)
    pictures = dict(zip(names, map_items(look_up, names, workers, "pictures"), strict=True))
    table = np.zeros((len(data), 7), np.int32)
    for i, names_of_sample in images.items():
        for name in names_of_sample:
            problem, *counts = pictures[name]
            table[i, MISSING:] += counts
            if problem:
                problems.setdefault(i, problem)

    good = [i for i in images if i not in problems]
    measure = functools.partial(measure_sample, data, reserved_words(data))
    measured = map_items(measure, good, workers, "samples")
    for i, (problem, row) in zip(good, measured, strict=True):
        table[i, :MISSING] = row
        if problem:
            problems[i] = problem
    return dict(sorted(problems.items())), table


def inspect_picture(folder, name):
    """(problem or None, is it missing?, has it another name?)"""
    try:
        path = check_image(folder, name)
    except (FileNotFoundError, ValueError) as error:
        return str(error), isinstance(error, FileNotFoundError), False
    return None, False, isinstance(name, str) and path != os.path.join(folder, name)


def reserved_words(data):
    """What a text must not hold, as far as template and tokenizer are known: STOP, special tokens.

    Who reads an answer back would end it there, and a model that is trained on it would, too.
    """
    words = {data.template.STOP.strip()} if data.template else set()
    if data.tokenizer:
        words.update(data.tokenizer.all_special_tokens)
        added = data.tokenizer.added_tokens_decoder.values()
        words.update(token.content for token in added if token.special)
    return words - {"", IMAGE}


def measure_sample(data, reserved, i):
    """(problem or None, the first five columns) of a sample whose form and pictures are good."""
    record = data.records[i]
    turns = record["conversations"]
    problem = text_problem(record, reserved, data.template)
    if problem:
        return problem, 0
    if data.tokenizer is None:
        return None, (0, 0, len(record["image"]), len(turns), 0)
    try:
        tokens, scored, images, fitting = data.measure(i)
    except ValueError as error:
        return str(error), 0
    return None, (tokens, scored, images, fitting, len(turns) - fitting)


def text_problem(record, reserved, template):
    """What is wrong with a sample's texts, or None: one holds some of `reserved_words`, or the
    system message is not the template's, before which it would not stand."""
    system = record["system"]
    if system and template and system.strip() not in template.first:
        return (f"its system message {system!r:.60} is not that of template {template.name}; take "
                "it out, or train with another --template")
    for n, turn in enumerate(record["conversations"]):
        found = [word for word in reserved if word in turn["value"]]
        if found:
            return (f"turn {n} ({turn['from']}) holds {min(found)!r}, a mark of the tokenizer or "
                    f"of template {template.name}; take it out, or train with another --template")
    return None


def refuse(data, problems, table, skip_bad, context):
    """Raises ValueError, with file, index and id, for data that cannot be trained on.

    skip_bad   bad samples are left out and reported, not refused
    context    tokens that the language model can read at once
    """
    if problems and not skip_bad:
        raise ValueError("\n".join([
            f"{len(problems)} of {len(data)} samples are bad (--skip_bad leaves them out):",
            *report(data, problems, table), list_problems(problems, data.records, 20)]))
    longest = table[:, TOKENS].argmax()
    if table[longest, TOKENS] > context:
        raise ValueError(f"{data.records.where(longest)}: {table[longest, TOKENS]} tokens, but the "
                         f"language model's context is {context}; --max_length {context} leaves "
                         "trailing turns out")


def hold_out(records, problems, n, seed):
    """(indices to train on, n indices held out) of the good samples."""
    good = np.array([i for i in range(len(records)) if i not in problems], int)
    held_out = np.random.default_rng(seed).permutation(good)[:n]
    is_copy = np.isin(records.texts[good], records.texts[held_out])      # of what is held out
    train_on = good[~is_copy]
    if not len(train_on):
        raise ValueError(f"{len(good)} good samples, of which --val_samples {n} would be held out; "
                         "lower it")
    return train_on, held_out


# -----------------------------------------------------------------------------
# What is found, as lines


def report(data, problems, table, stats=False):
    """A line for each source: its samples, what is bad, what is missing; `stats` adds lengths."""
    records = data.records
    lines = []
    start = 0
    for file, total, count in zip(records.files, records.totals, records.counts, strict=True):
        samples = range(start, start + count)
        start += count
        good = [i for i in samples if i not in problems]
        drawn = "" if count == total else f" drawn from {total}"
        lines.append(f"{file}: {count} samples{drawn}, {count - len(good)} bad, "
                     f"{table[samples, MISSING].sum()} images missing, "
                     f"{(table[good, IMAGES] == 0).sum()} text only")
        renamed = table[samples, RENAMED].sum()
        if renamed:
            lines[-1] += f", {renamed} found under another name"
        if stats and good:
            lines += measures(data, table[good])
    if data.template is None:
        lines += unfit_templates(records, problems)
    return lines


def unfit_templates(records, problems):
    """For data whose template is not known yet: a line for each whose STOP is in some texts."""
    samples = {template: [] for template in TEMPLATES.values() if template.STOP.strip()}
    for i, record in enumerate(records):
        if i in problems:
            continue
        for template, found in samples.items():
            if text_problem(record, {template.STOP}, template):
                found.append(i)
    return [f"--template {template.name} would refuse {len(found)} samples, which hold its "
            f"{template.STOP!r} or another system message, e.g. {records.where(found[0])}"
            for template, found in samples.items() if found]


def measures(data, rows):
    """The turns, images and lengths of some samples, and what is trimmed of them, as lines."""
    tokens, scored, images, turns, dropped = rows[:, :MISSING].T
    lines = [
        f"  answers per sample    {quantiles(turns / 2)}",
        f"  images                {images.sum()} in {(images > 0).sum()} samples"]
    if data.tokenizer:
        share = scored.sum() / tokens.sum()
        lines += [
            f"  tokens per sample     {quantiles(tokens)}   ({data.view.cost})",
            f"  scored tokens         {scored.sum()} of {tokens.sum()} ({share:.1%}), "
            f"{(scored == 0).sum()} samples without any",
            f"  trimmed at {data.max_length:<10} {(dropped > 0).sum()} samples lose "
            f"{dropped.sum() // 2} answers"]
    return lines


def quantiles(values):
    low, median, high, most = np.quantile(values, [0, 0.5, 0.95, 1])
    return f"min {low:.0f}   median {median:.0f}   95% {high:.0f}   max {most:.0f}"


def list_problems(problems, records, most=None):
    """The first `most` problems with file, index and id, a line each, and how many there are."""
    lines = [f"{records.where(i)}: {problem}" for i, problem in list(problems.items())[:most]]
    if len(lines) < len(problems):
        lines.append(f"... and {len(problems) - len(lines)} more")
    return "\n".join([*lines, f"{len(records)} samples, {len(problems)} bad"])


def show_sample(data, i, show):
    """Print sample i as training sees it. Raises ValueError for what is wrong with it."""
    if data.tokenizer is None:
        raise ValueError("show needs --model DIR or --llm DIR for the tokenizer")
    if not 0 <= i < len(data):
        raise ValueError(f"--index {i}: the file has samples 0 to {len(data) - 1}")
    where = data.records.where(i)
    record = data.records[i]
    problem = data.records.problem(i, record, data.folder)
    problem = problem or text_problem(record, reserved_words(data), data.template)
    if problem:
        raise ValueError(f"{where}: {problem}")
    sample = data.sample(i)
    ids, labels = sample["input_ids"], sample["labels"]
    names = [name for name, _ in sample["pictures"]]
    print(f"{where}, template {data.template.name}, {len(ids)} tokens, "
          f"{len(ids) - labels.count(IGNORE)} scored, images {names}")
    print(show(ids, labels, data.tokenizer))


def parse_args(argv):
    """The command line of data.py."""
    parser = argparse.ArgumentParser(description="Check, show or measure data.", allow_abbrev=False)
    add = parser.add_argument
    add("command", choices=["check", "show", "stats"])
    add("files", nargs="+", metavar="FILE",
        help="JSON, JSON lines, Parquet, tar, or a folder of them; FILE=0.5, FILE=20000: a part")
    add("--seed", type=int, default=42, help="train.py's, which decides on the parts")
    add("--images", metavar="DIR", help="folder that the image names are relative to")
    add("--model", metavar="DIR", help="checkpoint: its tokenizer, template and view")
    add("--llm", metavar="DIR|ID", help="language model: its tokenizer")
    add("--template", choices=TEMPLATES)
    add("--image_position", choices=["random", "first", "as_written"], default="random")
    add("--aspect", choices=ASPECTS, default="crop", help="how pictures are seen, without --model")
    add("--max_length", type=int, default=2048)
    add("--index", type=int, default=0, help="which sample to show")
    add("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if args.model and (args.llm or args.aspect != "crop"):
        raise ValueError("--model brings its own language model and aspect; leave --llm and "
                         "--aspect out")
    return args
