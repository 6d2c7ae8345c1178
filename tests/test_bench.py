"""What is measured is what is said (extras/bench.py): the same samples, equal losses and tokens."""
import re

import numpy as np
import pytest
from conftest import run_script

from extras import bench


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    bench.random_llava(bench.Config(size="toy")).save_pretrained(folder)
    return str(folder)


def small(**changes):
    return bench.complete(bench.Config(**{
        "size": "toy", "global_batch_size": 4, "micro_batch_size": 2, "repeats": 2, "seed": 1,
        "compile": False, "device": "cpu"} | changes))


def test_both_orders_hold_the_same_samples():
    """A contest is fair where the samples are the same; what is bucketed has little padding."""
    config = small(global_batch_size=8, micro_batch_size=4, repeats=3)
    batches = bench.draw_batches(bench.random_llava(config), config)[bench.WARM:]
    rows, padding = {}, {}
    for order in ("bucketed", "random"):
        micros = [b for batch in batches for b in batch[order]]
        masks = [b["attention_mask"].bool() for b in micros]
        rows[order] = sorted(ids[mask].tolist() for b, m in zip(micros, masks, strict=True)
                             for ids, mask in zip(b["input_ids"], m, strict=True))
        real = sum(mask.sum().item() for mask in masks)
        padding[order] = 1 - real / sum(mask.numel() for mask in masks)
    assert rows["bucketed"] == rows["random"] and len(rows["random"]) == 24
    assert padding["bucketed"] < 0.05 < padding["random"], padding


@pytest.mark.parametrize("stage", [1, 2])
def test_our_steps_with_every_lever_and_transformers_have_one_loss(stage, weights):
    """A step that does not compute the same is not timed."""
    config = small(stage=stage)
    rounds = range(bench.WARM, bench.WARM + config.repeats)
    ours = bench.our_training(config, weights)
    theirs = bench.their_training(config, weights)
    want = bench.mean_loss([ours("", k) for k in rounds])
    assert bench.mean_loss([theirs("", k) for k in rounds]) == pytest.approx(want, rel=1e-5)
    for way in bench.LEVERS:
        found = bench.mean_loss([ours(way, k) for k in rounds])
        assert found == pytest.approx(want, rel=1e-5), way


def test_given_features_are_what_both_models_take_for_those_of_g(tmp_path, monkeypatch):
    """Where g is not run, its features stand in the place of the pixels, for all contestants."""
    tiny = dict(bench.SIZES["toy"], num_hidden_layers=2)
    monkeypatch.setitem(bench.SIZES, "135m", tiny)
    config = small(size="135m", global_batch_size=2, micro_batch_size=2, repeats=1)
    bench.random_llava(config).save_pretrained(tmp_path)
    ours = bench.our_training(config, str(tmp_path))("", 2)
    theirs = bench.their_training(config, str(tmp_path))("", 2)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["real"] == theirs["real"] > 2 * 256


def test_answers_are_transformers_tokens(weights):
    """The times of `generate` are of equal tokens."""
    config = small(new_tokens=6)
    ours, theirs = bench.our_answers(config, weights), bench.their_answers(config, weights)
    for n in (1, 2):
        found, want = ours(n, 0), theirs(n, 0)
        assert [list(ids) for ids in found["ids"]] == want["ids"] and len(want["ids"]) == n
        assert found["seconds"] > 0 and len(want["ids"][0]) == 6


@pytest.mark.slow
def test_two_checkouts_take_turns_in_processes_of_their_own(tmp_path):
    """--beside DIR: here this very checkout; an unequal loss would stop it before any time."""
    flags = ["--size", "toy", "--global_batch_size", 4, "--repeats", 2, "--no-compile",
             "--beside", bench.ROOT]
    code, printed = run_script(tmp_path, "extras.bench", "train", *flags)
    assert code == 0, printed[-2000:]
    for row in ("ours", "beside", "transformers"):
        assert re.search(rf"^{row} .* \d\.\d\d \(\d\.\d\d to \d+\.\d\d\)$", printed, re.M), printed
        assert re.search(rf"^peak memory, {row}: \d\.\d\d GB", printed, re.M), printed


def test_a_contestant_that_fails_is_no_endless_wait(weights, capfd):
    """Its own error is on the terminal, and ours says which one it was."""
    with pytest.raises(ValueError, match="failed; its error stands above"):
        bench.Contestant(bench.ROOT, {"command": "train", "contestant": "nobody"})
    assert "KeyError: 'nobody'" in capfd.readouterr().err


def test_padding_counts_what_fills_up_the_rows():
    """Batches of 3 and 5, and of 4 and 4 tokens: 2 of 18 places are empty."""
    lengths = np.array([3, 5, 4, 4])
    assert bench.padding_of(lengths, [[0, 1], [2, 3]]) == pytest.approx(2 / 18)


@pytest.mark.parametrize("argv, words", [
    ([], "no command given"), (["run"], "run is no command"), (["train", "--repeats", "0"], "1 or"),
    (["train", "--global_batch_size", "6", "--micro_batch_size", "4"], "does not divide")])
def test_a_bench_that_cannot_be_run_is_refused(argv, words):
    """What was typed, and what may be."""
    with pytest.raises(ValueError, match=words):
        bench.main(argv)
