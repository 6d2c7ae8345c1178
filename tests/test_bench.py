"""What is measured is what is said (extras/bench.py): the same samples, equal losses and tokens."""
import re

import numpy as np
import pytest

from extras import bench


def small(**changes):
    return bench.Config(**{"size": "toy", "global_batch_size": 4, "micro_batch_size": 2,
                           "repeats": 2, "compile": False, "device": "cpu"} | changes)


def test_both_orders_hold_the_same_samples():
    """A contest is fair where the samples are the same; in training's order little is padded."""
    config = small(global_batch_size=8, micro_batch_size=4, repeats=3)
    model = bench.random_llava(config)
    rows, padding = [], []
    for in_order in (True, False):
        batches = bench.draw_batches(model, config, in_order)
        micros = [micro for batch in batches[bench.WARM:] for micro in batch]
        masks = [micro["attention_mask"].bool() for micro in micros]
        rows.append(sorted(ids[mask].tolist() for micro, m in zip(micros, masks, strict=True)
                           for ids, mask in zip(micro["input_ids"], m, strict=True)))
        real = sum(mask.sum().item() for mask in masks)
        padding.append(1 - real / sum(mask.numel() for mask in masks))
    assert rows[0] == rows[1] and len(rows[0]) == 24
    assert padding[0] < 0.05 < padding[1], padding


@pytest.mark.parametrize("stage", [1, 2])
def test_our_steps_and_transformers_have_one_loss(stage, tmp_path):
    """A step that does not compute the same is not timed."""
    config = small(stage=stage)
    bench.random_llava(config).save_pretrained(tmp_path)
    losses = []
    for prepare in (bench.our_training, bench.their_training):
        turn = prepare(config, str(tmp_path))
        replies = [turn(k) for k in range(bench.WARM, bench.WARM + config.repeats)]
        losses.append(bench.mean_loss(bench.to_arrays(replies)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_answers_are_transformers_tokens(tmp_path):
    """The times of `generate` are of equal tokens."""
    config = small(new_tokens=6)
    bench.random_llava(config).save_pretrained(tmp_path)
    ours, theirs = (prepare(config, str(tmp_path))(0)
                    for prepare in (bench.our_answers, bench.their_answers))
    assert [list(ids) for ids in ours["ids"]] == theirs["ids"] and len(theirs["ids"]) == 2
    assert ours["first"] > 0 and len(theirs["ids"][0]) == 6


@pytest.mark.slow
def test_the_two_take_turns_in_processes_of_their_own(capfd):
    """The command, as typed; an unequal loss would stop it before any time."""
    bench.main("train --size toy --global_batch_size 4 --repeats 2 --no-compile".split())
    printed = capfd.readouterr().out
    for row in ("ours", "transformers"):
        assert re.search(rf"^{row} .* \d\.\d\d \(\d\.\d\d to \d+\.\d\d\)$", printed, re.M), printed


def test_training_pads_less_than_a_fiftieth():
    """The batches that `data` counts are those of data.micro_batches: their samples, not others."""
    assert bench.padding_of(np.array([3, 5, 4, 4]), [[0, 1], [2, 3]]) == pytest.approx(2 / 18)
    rng = np.random.default_rng(0)
    _, lengths = bench.draw_epoch("135m", 2, 256, rng, n=12_800)
    plan = bench.plan_epoch(lengths, 128, 0, 0)
    batches = bench.batches_of_ranks(plan, lengths, 8192, 2)
    assert sorted(np.concatenate(batches).tolist()) == list(range(12_800))
    assert 0 < bench.padding_of(lengths, batches) < 0.02
