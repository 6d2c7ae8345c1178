"""What is measured is what is said: FLOPs and memory against torch's own counters, equal losses before any time."""
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import bench
import train
from conftest import tiny_llava
from cost import Longest, Setting, estimate, flops_of, kept, plan
from data import IGNORE
from images import view_of


def run(capsys, *argv):
    bench.main([str(a) for a in argv])
    return capsys.readouterr().out


def batch_of(model, B, text, answers, squares=1):
    """B rows of equal length without padding: a picture, `text` tokens, the last `answers` scored."""
    ids = torch.randint(3, 200, (B, model.N * squares + text))
    ids[:, :model.N * squares] = model.image_id
    labels = torch.full_like(ids, IGNORE)
    labels[:, -answers:] = ids[:, -answers:]
    return {"input_ids": ids, "labels": labels, "X_v": torch.randn(B * squares, 3, model.view.size, model.view.size)}


def keeper(model):
    """A hook for what autograd keeps, and the storages that it has seen, but for those of the weights."""
    own, seen = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(t):
        if (key := t.untyped_storage()._cdata) not in own:
            seen.setdefault(key, t.untyped_storage())
        return t
    return keep, seen


@pytest.mark.parametrize("stage, train_g", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_flops_are_those_that_torch_counts(stage, train_g, projector):
    """Matrix products of linear layers, by torch's counter. Attention is left out: the counter does not know causality."""
    model = tiny_llava(projector=projector)
    model.set_stage(stage, train_g)
    batch = batch_of(model, 3, text=20, answers=6)
    with FlopCounterMode(display=False) as counter:
        model(**batch)[0].backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    T, text = batch["input_ids"].shape[1], model.f_phi.config
    attention = 3 * 2 * text.num_hidden_layers * text.hidden_size * 3 * T ** 2
    n, passes_g = model.N + 1, 3 if train_g else 1
    attention_g = 3 * passes_g * 4 * n ** 2 * model.g.config.hidden_size * model.used_layers
    ours = flops_of(model, [T] * 3, 18, 3 * model.N, 3) - attention - attention_g
    assert ours == counted, "MFU would be of other FLOPs than the model's"


@pytest.mark.parametrize("aspect", ["crop", "anyres"])
@pytest.mark.parametrize("stage, lr_g", [(1, None), (2, None), (2, 1e-6)])
def test_activations_are_counted_without_computing_them(aspect, stage, lr_g):
    """The tensors that autograd keeps in a real step, by their storages, against those of the run without data."""
    real = tiny_llava(projector="mlp2x_gelu")
    config = train.Config(stage=stage, lr_g=lr_g, projector="mlp2x_gelu")
    setting = Setting(real.g.config, real.f_phi.config, real.tokenizer, view_of(aspect, 28, 14), config, torch.float32)
    real.look(setting.view)
    real.set_stage(stage, lr_g is not None)
    longest, size = Longest(70, 9, [(50, 30)]), (50, 30)
    squares = real.view.tiling.plan(*size).pictures if real.view.tiling else 1
    pictures = real.view.tokens(*size)
    (keep, seen), before_head = keeper(real), []
    batch = batch_of(real, 2, 70, 9, 0)
    batch["input_ids"][:, :pictures] = real.image_id
    batch |= {"X_v": torch.randn(2 * squares, 3, 28, 28), "sizes": [size] * 2}

    real.f_phi.get_output_embeddings().register_forward_pre_hook(lambda *_: before_head.append(dict(seen)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss, _ = real(**batch)
    want = sum(s.nbytes() for s in before_head[0].values())
    with FakeTensorMode():
        counted = kept(setting.model(), 2, longest, torch.float32)
    got = sum(n for part, n in counted.items() if part not in ("input", "head"))
    assert abs(got / want - 1) < 0.03, f"{got} bytes are counted, {want} are kept (ids, masks and the splice are not counted)"


@pytest.mark.slow
def test_compiled_layers_keep_less():
    """What normalisation, rotation and SiLU make of what is kept anyway is made again in the backward pass."""
    numbers = {}
    for compiled in (False, True):
        model = tiny_llava()
        model.set_stage(2)
        train.place(model, train.Config(compile=compiled), train.Machine(0, 1, torch.device("cpu"), torch.float32, ""))
        keep, seen = keeper(model)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss, _ = model(**batch_of(model, 4, text=60, answers=6))
        numbers[compiled] = sum(s.nbytes() for s in seen.values())
    assert numbers[True] < 0.65 * numbers[False], numbers


def test_memory_is_divided_among_ranks_and_saved_by_recomputation():
    """Weights, gradients and moments: 16 bytes a number that trains, on all ranks together; a layer that runs again keeps its
    input alone."""
    model = tiny_llava()
    one = Setting(model.g.config, model.f_phi.config, model.tokenizer, model.view, train.Config(stage=2), torch.float32)
    four = one._replace(config=train.Config(stage=2, shard=True), ranks=4)
    need, needs = (estimate(s, Longest(60, 10, [(28, 28)])) for s in (one, four))
    trains = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("g."))
    whole_g = 4 * sum(p.numel() for p in model.g.parameters())
    for parts, ranks in ((need(2, 0), 1), (needs(2, 0), 4)):
        static = parts["weights"] - whole_g + parts["gradients"] + parts["AdamW's moments"]
        assert static == 16 * trains / ranks
    plain, every_2, every_layer = (need(4, every)["activations"] for every in (0, 2, 1))
    assert plain > every_layer > every_2, "of two layers, all keep two inputs and run one again, every_2 keep one of each"
    assert need(8, 0)["activations"] == 2 * plain, "activations do not grow with the micro-batch"
    lines = plan(need, 8, sum(need(4, 0).values()) / 0.9)
    assert lines[-1] == "take --micro_batch_size 4 --checkpoint_activations none", "\n".join(lines)
    assert plan(need, 8, 1000)[-1].startswith("nothing fits")


def test_both_orders_hold_the_same_samples():
    """A contest is fair where the samples are the same; what is bucketed has little padding."""
    args = bench.Config(size="toy", features=False, global_batch_size=8, micro_batch_size=4, repeats=3)
    model = bench.build(args, "cpu")
    batches = bench.batches_of(model, args)[bench.WARM:]
    rows = {order: sorted(b["input_ids"][i][b["attention_mask"][i].bool()].tolist() for batch in batches for b in batch[order]
                          for i in range(4)) for order in ("bucketed", "random")}
    assert rows["bucketed"] == rows["random"] and len(rows["random"]) == 24
    padding = {order: 1 - np.divide(*np.sum([bench.count(batch[order]) for batch in batches], 0)[1:]) for order in rows}
    assert padding["bucketed"] < 0.05 < padding["random"], padding


def test_a_fast_device_waits_for_data_and_a_slow_one_does_not(monkeypatch):
    """The loader is train.py's own; two pictures a step."""
    Image.new("RGB", (640, 480), "red").save(file := io.BytesIO(), "JPEG")
    share = {}
    for rate in (10, 1_000_000):
        monkeypatch.setattr(bench, "RATE", rate)
        share[rate] = bench.waiting(file, 224, workers=1, micro=2, steps=14)
    assert share[10] < 0.2 < 0.8 < share[1_000_000], share


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_contest_is_of_equal_losses(stage, capsys, monkeypatch):
    """Ours, with each lever, and transformers' model give one loss; one that does not is not timed."""
    argv = ["train", "--size", "toy", "--stage", stage, "--global_batch_size", 4, "--repeats", 1, "--no-compile", "--levers"]
    shown = run(capsys, *argv)
    assert all(re.search(rf"^{name} .* 1\.00|^{name} .* \d\.\d\d \(", shown, re.MULTILINE)
               for name in ("ours", "ours, all logits", "transformers loop")), shown
    honest = bench.careful_loop
    monkeypatch.setattr(bench, "careful_loop", lambda *a: (lambda step: lambda batch: 1.01 * step(batch))(honest(*a)))
    with pytest.raises(AssertionError, match="transformers loop: loss"):
        run(capsys, *argv)


def test_answers_are_equal_to_transformers_tokens(capsys):
    """bench.py generate and g, whose times are of equal tokens and equal features."""
    shown = run(capsys, "generate", "--size", "toy", "--repeats", 1, "--new_tokens", 5, "--micro_batch_size", 2)
    assert len(re.findall("equal tokens", shown)) == 2, shown
    assert "equal features" in run(capsys, "g", "--size", "toy", "--repeats", 1)


def test_packing_fills_rows_first_fit():
    """Greedy packing, against which bucketed batches were measured: 9, then 5 + 4, then 3 in rows of 10."""
    assert bench.packed(np.array([5, 9, 3, 4]), 10, 4) == pytest.approx(1 - 21 / 30)
    assert bench.packed(np.array([5, 9, 3, 4]), 10, 2) == pytest.approx(1 - 21 / 30)
    assert bench.packed(np.array([5, 5, 5, 5]), 10, 4) == 0


@pytest.mark.parametrize("argv, words", [([], "train | memory"), (["run"], "train | memory"),
                                         (["train", "--global_batch_size", "6", "--micro_batch_size", "4"], "does not divide"),
                                         (["train", "--peer", "nowhere"], "a checkout of nanoVLM")])
def test_a_bench_that_cannot_be_run_is_refused(argv, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        bench.main(argv)
