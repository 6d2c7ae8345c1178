"""How it is trained (Sec. 4.2): recipes, the loss over ranks and accumulation, kills, guards."""
import dataclasses
import fcntl
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    byte_tokenizer,
    chat,
    killed_when,
    lines,
    run_ranks,
    run_script,
    save_parts,
    scripted_llm,
    start_script,
    tiny_clip,
    tiny_llm,
    torchrun,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

import data as data_module
import train
from model import LLaVA
from parts import checkpoints, lora
from parts.files import write_json
from parts.ranks import Machine, Optimizer, fused_forward, groups_of, share_of
from parts.run import Run, check_moves, fingerprints, tokens_that_fit

# Learning rates at which 8 steps visibly move what trains. AdamW's first steps are nearly
# lr * sign(gradient), which would blow up rounding where a gradient is about 0.
STAGE = {1: ["--stage", "1", "--lr", "2e-2"],
         2: ["--stage", "2", "--init", "none", "--lr", "1e-3"]}
NEXT = ["--recipe", "toy-next", "--val_samples", "4"]    # two layers, tiles, and g trains
STAGE["NeXT"] = [*STAGE[2], *NEXT, "--save_every", "4", "--keep", "2"]
LORA = ["--lora_rank", "4"]


@pytest.fixture(scope="module")
def flags(parts, chats):
    """flags(out, ...): a command line that trains 8 steps on 17 samples of `chats`: 4 full steps of
    4 samples and one of a single sample an epoch. What is given after `out` wins."""
    def command(out, *more):
        paths = ["--data", f"{chats}/chat.json=17", "--images", chats / "images", "--out", out]
        init = dict(zip(more, more[1:], strict=False)).get("--init", "none")
        if init == "none":
            paths += ["--vision", parts / "clip", "--llm", parts / "llm"]
        rest = ["--template", "llava_v0", "--global_batch_size", 4, "--epochs", 2,
                "--max_steps", 8, "--workers", 0]
        return [str(word) for word in [*paths, *rest, *more]]
    return command


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """straight(stage): the folder of a run in one process, without accumulation or interruption."""
    done = {}

    def run(stage):
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp("straight") / "out"
            assert train.main(flags(done[stage], *STAGE[stage])) == 0
        return done[stage]
    return run


def build(argv):
    """What `train.train` builds before its loop: machine, model, theta, Conversations, Steps."""
    config, _ = checkpoints.inherit(*train.resolve(argv))
    machine = Machine(config.device, config.dtype, config.shard)
    model, theta, template, view = train.build_model(config, machine)
    data, lengths, train_on, held_out, _ = train.build_data(config, machine, model, template, view)
    steps = data_module.Steps(data, train_on, lengths, config.global_batch_size,
                              config.micro_batch_tokens)
    return machine, model, theta, data, steps, held_out


def losses(out):
    """{step: [every loss that the log has for it]}; a resumed run may have done a step twice."""
    found = {}
    for record in lines(out / "log.jsonl"):
        if "loss" in record:
            found.setdefault(record["step"], []).append(record["loss"])
    return found


def assert_equal_runs(out, reference, tolerance=0.0):
    """The same losses by step and the same final weights, up to `tolerance` (0: bit for bit)."""
    got, want = losses(out), losses(reference)
    assert got.keys() == want.keys()
    for step, values in got.items():
        for value in values:
            assert abs(value - want[step][0]) <= tolerance, f"step {step}: another loss"
    got, want = load_file(out / "model.safetensors"), load_file(reference / "model.safetensors")
    assert got.keys() == want.keys()
    for name in want:
        difference = (got[name].float() - want[name].float()).abs().max().item()
        assert difference <= tolerance, f"the final {name} differs by {difference}"


# -----------------------------------------------------------------------------
# The command line


def resolve(*argv):
    return train.resolve([str(word) for word in argv])[0]


def test_typed_flags_win_over_the_recipe_and_the_recipe_over_the_defaults():
    """Default < recipe < typed, each with its provenance."""
    config, origin = train.resolve(["--lr", "1e-5", "--skip_bad", "--data", "a.json", "b.json"])
    assert (config.lr, origin["lr"], config.skip_bad) == (1e-5, "command line", True)
    assert config.data == ["a.json", "b.json"]
    assert resolve("--llm", "x").template == "auto", "the recipe's is for the recipe's llm"
    assert resolve("--llm", "x", "--template", "llava_v0").template == "llava_v0"
    assert (config.global_batch_size, origin["global_batch_size"]) == (128, "recipe")
    assert (config.seed, origin["seed"], config.out) == (42, "default", "out/stage1")


@pytest.mark.parametrize("argv", ["--max_step 3", "--stage 3", "--lr fast", "--lr_W 1e-5"])
def test_a_mistyped_flag_is_an_error(argv, capsys):
    """No abbreviations, no unknown flags or values; what only a recipe says is no flag, so that
    there are 34."""
    with pytest.raises(SystemExit):
        train.resolve(argv.split())
    assert argv.split()[0] in capsys.readouterr().err
    assert len(dataclasses.fields(train.Config)) - len(train.Config.NOT_FLAGS) <= 34


@pytest.mark.parametrize("recipe, stage, epochs, lr, batch, template", [
    ("llava-7b", 1, 1, 2e-3, 128, "llava_v0"), ("llava-13b", 2, 3, 2e-5, 32, "llava_v0"),
    ("scienceqa-13b", 2, 12, 2e-5, 32, "llava_v0"), ("llava-1.5-7b", 1, 1, 1e-3, 256, "plain"),
    ("llava-1.5-13b", 2, 1, 2e-5, 128, "vicuna_v1"),
    ("llava-next-mistral-7b", 2, 1, 2e-5, 128, "mistral_instruct")])
def test_the_recipes_are_the_published_ones(recipe, stage, epochs, lr, batch, template):
    """Sec. 4.2 and its training details, Diss. Sec. 4.3 and 4.7, and the released scripts."""
    config = resolve("--recipe", recipe, "--stage", stage, "--init", "none")
    found = config.epochs, config.lr, config.global_batch_size, config.template
    assert found == (epochs, lr, batch, template)


def test_the_defaults_are_the_papers_and_the_family_differs_from_them():
    """CLIP ViT-L/14, its features before the last layer, Eq. (2)'s random place of the picture."""
    ours = resolve()
    assert (ours.vision, ours.feature_layer) == ("openai/clip-vit-large-patch14", -2)
    assert (ours.projector, ours.image_position, ours.lr_g) == ("linear", "random", None)
    adapters = resolve("--recipe", "llava-1.5-7b-lora", "--stage", 2, "--init", "x")
    assert (adapters.lr, adapters.lr_W, adapters.lora_rank) == (2e-4, 2e-5, 128)
    near = resolve("--recipe", "llava-next-yi-34b", "--stage", 2, "--init", "none")
    assert (near.aspect, near.lr_g, near.max_length) == ("anyres", 2e-6, 4096)


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_every_recipe_is_a_whole_configuration_in_both_stages(recipe):
    """W has one shape through both stages; stage 1 sees squares, with a frozen g."""
    one = resolve("--recipe", recipe)
    two = resolve("--recipe", recipe, "--stage", 2, "--init", "none", "--lora_rank", 0)
    assert (one.projector, one.vision, one.llm) == (two.projector, two.vision, two.llm)
    assert one.data and two.data and one.aspect == "auto" and one.lr_g is None


@pytest.mark.parametrize("argv, words", [
    ([], "--init out/stage1.*--init none"), (["--init", "x", "--llm", "y"], "--llm do nothing"),
    (["--stage", "1", "--lora_rank", "4"], "--lora_rank does nothing in stage 1"),
    (["--init", "none", "--lora_rank", "4"], "--lora_rank trains W and adapters alone"),
    (["--init", "none", "--dtype", "nf4"], "--dtype nf4 holds .* --stage 2 --lora_rank"),
    (["--init", "x", *LORA, "--dtype", "nf4", "--shard"], "--dtype nf4 is not sharded"),
    (["--init", "none", "--keep", "0"], "--keep 0: a number is needed, 1 or more"),
    (["--init", "none", "--lr", "nan"], "--lr nan")])
def test_stage_2_without_a_checkpoint_and_flags_without_effect_are_refused(argv, words):
    """Sec. 4.2: stage 2 continues from stage 1; without it only by asking."""
    with pytest.raises(ValueError, match=words):
        resolve("--stage", 2, *argv)


def test_the_learning_rate_warms_up_linearly_and_ends_in_a_cosine():
    """Training details: 3% linear warm-up, cosine decay. The first step trains, too."""
    lr = [train.lr_at(step, 1000) for step in range(1000)]
    rises = [b - a for a, b in zip(lr[:30], lr[1:30], strict=False)]
    assert lr[0] > 0 and max(rises) - min(rises) < 1e-12
    assert lr[30] == max(lr) == 1 and lr[515] == pytest.approx(0.5)
    assert sorted(lr[30:], reverse=True) == lr[30:] and 0 < lr[-1] < 1e-5


def test_a_batch_size_that_cannot_be_kept_is_refused_with_ones_that_can():
    """The promise: ranks x a rank's share is the global batch size."""
    assert (share_of(128, 8), share_of(5, 1)) == (16, 5)
    with pytest.raises(ValueError, match="a multiple of 4, e.g. 8"):
        share_of(6, 4)


@pytest.mark.parametrize("budget, ranks, n", [
    (1, 1, 5), (300, 1, 32), (300, 3, 31), (2000, 2, 8), (10 ** 6, 4, 30)])
def test_a_micro_batch_keeps_to_its_tokens_and_all_ranks_have_as_many(budget, ranks, n):
    """Each sample once, unscored copies aside; with its padding within the budget, or alone; and
    as few as can be: no two neighbours would fit together."""
    rng = np.random.default_rng(n)
    lengths = rng.integers(20, 200, 100)
    batch = rng.choice(100, n, replace=False)
    shares = [data_module.micro_batches(batch, lengths, 7, budget, ranks, rank)
              for rank in range(ranks)]
    assert len({tuple(map(len, share)) for share in shares}) == 1, "a rank would wait for ever"
    groups = [group for share in shares for group in share]
    assert sorted(i for group in groups for i, _, scored in group if scored) == sorted(batch)
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i, _, _ in group) <= budget
    for one, two in itertools.pairwise(shares[-1]):
        assert (len(one) + 1) * lengths[two[0][0]] > budget


def test_the_budget_of_tokens_changes_nothing_but_memory(flags, straight, tmp_path):
    """The loss is divided by the answer tokens of the whole batch, however it is cut up."""
    train.main(flags(tmp_path / "out", *STAGE[1], "--micro_batch_tokens", 1))
    assert_equal_runs(tmp_path / "out", straight(1), 1e-5)


# -----------------------------------------------------------------------------
# The loss and its gradient


def test_a_step_is_transformers_loss_and_gradient(flags, tmp_path):
    """Eq. (3) through the real collate, Steps and accumulation, with several images, with text
    alone and with the short last batch, against LlavaForConditionalGeneration."""
    argv = flags(tmp_path / "out", *STAGE[2])
    machine, model, theta, _, at_once, _ = build(argv)
    steps = build([*argv, "--micro_batch_tokens", "600"])[4]
    model.save_pretrained(tmp_path / "hf")
    oracle = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    pairs = {"W": (model.W.weight, oracle.model.multi_modal_projector.linear_1.weight),
             "the head": (model.f_phi.lm_head.weight, oracle.lm_head.weight),
             "the embedding": (model.f_phi.get_input_embeddings().weight,
                               oracle.model.language_model.embed_tokens.weight)}
    trained = [p for name, p in oracle.named_parameters()
               if "vision_tower" not in name and "linear_2" not in name]
    optimizer = Optimizer([{"params": list(theta.values()), "peak": 0.0}], machine)
    optimizer.set_lr(0)
    for step in (0, 2, 4):
        [batch] = at_once[step]
        n_answer = train.count_answer_tokens([batch])
        loss, found_norm = train.update(model, steps[step], machine, optimizer, n_answer)
        oracle.zero_grad()
        X_v = batch["X_v"] if batch["images"] else None
        want = oracle(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                      labels=batch["labels"], pixel_values=X_v).loss
        want.backward()
        assert loss == pytest.approx(want.item(), abs=1e-5), "another loss than transformers'"
        for name, (ours, theirs) in pairs.items():
            grad = torch.zeros_like(ours) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(ours.grad, grad, atol=1e-5, rtol=0, msg=name)
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        assert found_norm == pytest.approx(norm.item(), abs=1e-5)
    assert len(steps[0]) > 1 == len(steps[4]), "accumulation or the short batch is gone"


@pytest.mark.slow
def test_two_ranks_train_as_one(flags, straight, tmp_path):
    """Real processes, gloo: steps of text alone, too, and a last batch that is filled up. Of stage
    2, see the rank that is killed below."""
    argv = flags(tmp_path / "out", *STAGE[1], "--micro_batch_tokens", 1)
    run_ranks(tmp_path, 2, "train.py", *argv)
    assert_equal_runs(tmp_path / "out", straight(1), 1e-5)


LOADING = """
import sys, threading, time
import train
from parts.ranks import Machine

def held():                              # by this process alone, in MB: not what is mapped
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024

def watch():
    while True:
        peaks.append(held())
        time.sleep(0.001)

config, _ = train.resolve(sys.argv[1:])
machine = Machine("cpu", "fp32", shard=True)
peaks = [held()]
threading.Thread(target=watch, daemon=True).start()
_, theta, _, _ = train.build_model(config, machine)
size = 4 * sum(p.numel() for p in theta.values()) / 2 ** 20
machine.print0(f"peak {max(peaks) - peaks[0]:.0f} of {size:.0f} MB")
machine.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize("init", ["none", "stage1"])
def test_a_rank_that_shards_never_holds_the_whole_model(init, flags, tmp_path):
    """Two gloo processes: each holds its half in fp32, and a layer at a time. Eight whole copies of
    7B in fp32 would be 216 GB of a machine's memory."""
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=320, hidden_size=512, intermediate_size=2048, num_hidden_layers=24,
        num_attention_heads=8, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    parts = save_parts(tmp_path, llm.to(torch.bfloat16))
    argv = flags(tmp_path / "out", *STAGE[2], "--vision", parts / "clip", "--llm", parts / "llm")
    if init == "stage1":
        LLaVA.from_parts(str(parts / "clip"), str(parts / "llm")).save_pretrained(tmp_path / "one")
        argv = flags(tmp_path / "out", *STAGE[2], "--init", tmp_path / "one")
    (tmp_path / "loading.py").write_text(LOADING)
    shown = run_ranks(tmp_path, 2, str(tmp_path / "loading.py"), *argv)
    peak, whole = map(int, re.search(r"peak (\d+) of (\d+) MB", shown).groups())
    assert whole > 250 and peak < 0.8 * whole, shown[-500:]


@pytest.mark.slow
def test_shards_train_as_one_process_and_any_number_of_ranks_goes_on(flags, straight, tmp_path):
    """FSDP2 over 3 processes, with g, equals one process. Its state of step 2, a file a process,
    goes on under one, and under two whose layers run again in the backward pass."""
    batches = ["--global_batch_size", 6, "--micro_batch_tokens", 1]
    steps = ["--max_steps", 4, "--save_every", 2]
    argv = flags(tmp_path / "three", *STAGE["NeXT"], *batches, *steps, "--shard")
    run_ranks(tmp_path, 3, "train.py", *argv)
    assert train.main(flags(tmp_path / "one", *STAGE["NeXT"], *batches, *steps)) == 0
    assert_equal_runs(tmp_path / "three", tmp_path / "one", 1e-5)
    state = tmp_path / "three" / "train_state/step_00000002"
    sizes = [path.stat().st_size for path in sorted(state.glob("*.distcp"))]
    assert len(sizes) == 3 and max(sizes) < 1.5 * min(sizes), "a rank wrote what others hold"
    for ranks in (1, 2):
        out = tmp_path / f"ranks_{ranks}"
        shutil.copytree(state, out / "train_state" / state.name)
        more = ["--shard", "--checkpoint_activations", "all"] if ranks == 2 else []
        argv = flags(out, *STAGE["NeXT"], *steps, "--resume", *batches[:2], *more)
        run_ranks(tmp_path, ranks, "train.py", *argv)
        got, want = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "one"))
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("what", [
    ["--checkpoint_activations", "every_2"], pytest.param(["--shard"], marks=pytest.mark.slow),
    pytest.param(["--compile"], marks=pytest.mark.slow)])
def test_what_saves_memory_or_time_changes_nothing(what, flags, straight, tmp_path):
    """Shards on one device, layers that run again or are compiled. LoRA's dropout has the same
    masks the second time; compiled code draws others."""
    adapters = [] if what == ["--compile"] else LORA
    argv = [*STAGE[2], "--init", straight(1), *adapters, "--max_steps", 3]
    assert train.main(flags(tmp_path / "plain", *argv)) == 0
    assert train.main(flags(tmp_path / "out", *argv, *what)) == 0
    assert_equal_runs(tmp_path / "out", tmp_path / "plain", 1e-5)


@pytest.mark.slow
def test_the_residual_stream_is_in_the_compute_dtype_sharded_or_not(flags, tmp_path):
    """OFFICIAL: as under DeepSpeed. That of f_phi, and of g where it trains; one loss to 1%."""
    sums, streams = [], []
    for more in ([], ["--shard"]):
        argv = flags(tmp_path / "out", *STAGE["NeXT"], "--dtype", "bf16", *more)
        machine, model, _, _, steps, _ = build(argv)
        layers = [*model.f_phi.base_model.layers, *model.g.encoder.layers[:model.n_used_layers]]
        for layer in layers:
            layer.register_forward_pre_hook(lambda layer, inputs: streams.append(inputs[0].dtype))
            layer.register_forward_hook(lambda layer, inputs, h: streams.append(h.dtype))
        with machine.forward(model), torch.no_grad():
            sums.append(model(**machine.to_device(steps[0][0]))[0].item())
        machine.finish()
    assert streams == 4 * len(layers) * [torch.bfloat16], streams
    assert sums[0] == pytest.approx(sums[1], rel=1e-2)


def test_a_dry_run_measures_the_longest_samples_and_writes_nothing(flags, tmp_path, capsys):
    """--dry_run: two real steps, what they took, and the tokens that fit at once."""
    assert train.main(flags(tmp_path / "out", *STAGE[2], "--dry_run")) == 0
    shown = capsys.readouterr().out
    steps = re.findall(r"^(\d+) tokens at once: \d\.\d\d GB at the peak", shown, re.MULTILINE)
    [fitting] = re.findall(r"^take --micro_batch_tokens (\d+)$", shown, re.MULTILINE)
    one, four = map(int, steps)
    assert four == 4 * one == int(fitting), "all of a step fits"
    assert not (tmp_path / "out").exists()


def test_what_fits_is_on_the_line_through_two_measurements():
    """500 bytes and 2 a token; where not even the least fits, nothing is advised."""
    assert tokens_that_fit({100: 700, 400: 1300}, 2500) == 1000
    assert tokens_that_fit({100: 700, 400: 1300}, 900) == 200
    assert tokens_that_fit({100: 700}, 600) == tokens_that_fit({}, 600) == 0
    assert tokens_that_fit({100: 700}, 800) == 100


def test_a_fused_loss_is_the_same_sum(flags, tmp_path):
    """--kernels liger takes the head's weight, hidden states and targets; here torch does. Where
    there is no CUDA, it is refused."""
    argv = flags(tmp_path / "out", *STAGE[2])
    machine, model, _, _, steps, _ = build(argv)
    batch = machine.to_device(steps[0][0])
    wanted, n = model(**batch)

    def torchs(weight, h, targets):
        return F.cross_entropy(F.linear(h, weight).float(), targets, reduction="sum")
    model.forward = fused_forward(model, torchs)
    found, as_many = model(**batch)
    assert found.item() == pytest.approx(wanted.item()) and n == as_many
    with pytest.raises(ValueError, match="--kernels liger: they are CUDA's, not cpu's"):
        train.main([*argv, "--kernels", "liger"])


def test_stage_1_trains_only_W_and_stage_2_also_phi(straight, parts):
    """Sec. 4.2: theta = {W}, then {W, phi}; g is frozen in both. Bit for bit, in the folders."""
    start = LLaVA.from_parts(str(parts / "clip"), str(parts / "llm"))
    for stage, trained in ((1, {"W"}), (2, {"W", "f_phi"})):
        end = LLaVA.from_pretrained(straight(stage))
        for part in ("g", "W", "f_phi"):
            pairs = zip(getattr(start, part).parameters(), getattr(end, part).parameters(),
                        strict=True)
            moved = [not torch.equal(a, b) for a, b in pairs]
            assert all(moved) if part in trained else not any(moved), f"stage {stage}: {part}"
    meta = LLaVA.from_pretrained(straight(2)).meta
    assert (meta["init"], meta["stage"], meta["steps"]) == ("none", 2, 8)


def test_stage_2_starts_from_the_W_of_stage_1(flags, tmp_path):
    """Sec. 4.2: W is updated from where stage 1 left it. A stage 1 of captions alone, whose
    template knows no questions, is gone on with in that of the language model."""
    one, two = tmp_path / "1", tmp_path / "2"
    train.main(flags(one, *STAGE[1], "--max_steps", 1, "--template", "plain"))
    train.main(flags(two, "--stage", 2, "--init", one, "--lr", "1e-6", "--max_steps", 1,
                     "--template", "auto"))
    before, after = LLaVA.from_pretrained(one), LLaVA.from_pretrained(two)
    assert 0 < (before.W.weight - after.W.weight).abs().max() < 1e-5
    assert after.meta["init"] == str(one) and after.meta["template"] != "plain"


# -----------------------------------------------------------------------------
# Kills


def log_size(out):
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_a_killed_run_goes_on_bit_for_bit(flags, straight, tmp_path):
    """SIGKILL, then --resume: losses and weights of an uninterrupted run. A last line of the log
    that the kill tore is cut off."""
    out = tmp_path / "out"
    argv = flags(out, *STAGE[1], "--save_every", 3)
    assert killed_when(lambda: log_size(out) >= 5, tmp_path, argv), "it ended before the kill"
    assert not (out / "model.safetensors").exists() and (out / "train_state").exists()
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 7, "loss": 6.')
    assert train.main([*argv, "--resume"]) == 0
    assert_equal_runs(out, straight(1))


def test_a_kill_behind_a_state_loses_no_validation(flags, chats, tmp_path):
    """Its record is there before the state is; and no more states stay than --keep."""
    out = tmp_path / "out"
    more = ["--data", chats / "chat.json", "--val_samples", 15, "--save_every", 2, "--max_steps", 6]
    argv = flags(out, *STAGE[2], *more)
    state = out / "train_state" / "step_00000002"
    assert killed_when(state.exists, tmp_path, argv), "it ended before the kill"
    shutil.copytree(state, state.with_name("step_00000001"))
    assert train.main([*argv, "--resume"]) == 0
    assert os.listdir(out / "train_state") == ["step_00000006"]
    train.main(flags(tmp_path / "whole", *STAGE[2], *more))
    found, want = ([(record["step"], record["val_loss"]) for record in lines(folder / "log.jsonl")
                    if "val_loss" in record] for folder in (out, tmp_path / "whole"))
    assert [step for step, _ in want] == [2, 4, 6] and set(found) == set(want)


def test_a_state_is_what_training_had_come_to_while_it_goes_on(flags, tmp_path):
    """It is written beside training, from a copy: no rank waits for the disk."""
    argv = [*flags(tmp_path / "out", *STAGE[1]), "--resume"]
    config = train.resolve(argv)[0]
    machine, model, theta, _, _, _ = build(argv)
    optimizer = Optimizer([{"params": list(theta.values()), "peak": 0.0}], machine)
    run = Run(config, machine)
    run.watch(model, theta, optimizer, 0)
    W = model.W.weight.detach().clone()
    run.step = 2
    with torch.no_grad():
        run.save_state()
        model.W.weight.zero_()
        run.finish_state()
    assert run.resume() == 3 and torch.equal(model.W.weight, W)


@pytest.mark.slow
def test_kills_at_any_moment_even_while_saving_lose_nothing(flags, straight, tmp_path):
    """States are written under a temporary name and renamed."""
    out = tmp_path / "out"
    rng = random.Random(0)
    argv = [*flags(out, *STAGE[2], "--save_every", 1), "--resume"]
    writing = out / "train_state" / "writing"
    kills = torn = 0
    for _ in range(5):
        goal = log_size(out) + 1
        kills += killed_when(lambda goal=goal: log_size(out) >= goal and writing.exists(),
                             tmp_path, argv, rng.choice([0, 0.02, 0.1]))
        torn += writing.exists()
    assert kills >= 4 and torn, f"{kills} kills, {torn} while saving: the test tests too little"
    assert train.main(argv) == 0
    assert_equal_runs(out, straight(2))
    assert os.listdir(out / "train_state") == ["step_00000008"], "what is outdated stays on disk"


@pytest.mark.slow
def test_a_rank_that_is_killed_comes_back_with_torchruns_restart(flags, straight, tmp_path):
    """torchrun --max-restarts starts all ranks again: they go on from the last state."""
    out = tmp_path / "out"
    state = out / "train_state" / "step_00000003"

    def kill_one(process):
        while not state.exists() and process.poll() is None:
            time.sleep(0.001)
        children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
        ranks = [p for p in children if "train.py" in open(f"/proc/{p}/cmdline").read()]
        os.kill(int(ranks[-1]), signal.SIGKILL)
    argv = flags(out, *STAGE[2], "--save_every", 3)
    shown = torchrun(2, argv, "--max-restarts=1", meanwhile=kill_one)
    assert "resuming at step 3" in shown, shown[-3000:]
    assert_equal_runs(out, straight(2), 1e-5)


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_and_names_its_samples(flags, chats, tmp_path):
    """A picture that is gone in the middle of the run: no rank waits for the one that stops."""
    folder, out = shutil.copytree(chats, tmp_path / "chats"), tmp_path / "out"

    def remove(process):
        while log_size(out) < 2 and process.poll() is None:
            time.sleep(0.001)
        shutil.rmtree(folder / "images")
    argv = flags(out, *STAGE[2], "--images", folder / "images", "--epochs", 900,
                 "--max_steps", 4000)
    shown = torchrun(2, argv, code=1, meanwhile=remove)
    assert re.search(r"chat.json\[\d+\] \(id chat_\d+\)", shown), shown[-3000:]


@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_scheduler_and_ctrl_c_save_and_say_how_to_go_on(number, flags, straight, tmp_path):
    """A signal to the run and its data workers: the step is finished and saved, the exit code is
    128 and the signal's, and the resumed run is bit for bit the uninterrupted one. While it runs,
    nobody else writes to its folder."""
    out = tmp_path / "out"
    argv = flags(out, *STAGE[2], "--workers", 1)
    process = start_script(tmp_path, "train.py", *argv, fifo=True)
    with open(tmp_path / "output") as output:
        if hasattr(fcntl, "F_SETPIPE_SZ"):   # so little fits that it cannot end before the signal
            fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, 1)
        shown = [output.readline()]
        while shown[-1] and not shown[-1].startswith("step      1/8"):
            shown.append(output.readline())
        with pytest.raises(ValueError, match="another process"):
            train.main([*argv, "--resume"])
        os.killpg(process.pid, number)
        shown.append(output.read())
    process.join(60)
    shown = "".join(shown)
    assert process.exitcode == 128 + number, shown[-2000:]
    assert re.search(r"stopped after step \d; .*--resume", shown) and "Traceback" not in shown
    assert not (out / "model.safetensors").exists(), "it ended before the signal: nothing is tested"
    assert train.main([*argv, "--resume"]) == 0
    assert_equal_runs(out, straight(2))


def test_a_used_folder_other_flags_and_other_data_are_refused(flags, chats, tmp_path):
    """A run is never mixed up with another one."""
    copy = tmp_path / "chat.json"
    text = (chats / "chat.json").read_text()
    copy.write_text(text)
    argv = flags(tmp_path / "out", *STAGE[1], "--max_steps", 1, "--data", copy)
    train.main(argv)
    with pytest.raises(ValueError, match="holds a run already: --resume"):
        train.main(argv)
    with pytest.raises(ValueError, match=r"other flags: --lr 0.001 \(was .*\), --seed 7 \(was"):
        train.main([*argv, "--resume", "--lr", "0.001", "--seed", "7"])
    assert train.main([*argv, "--resume", "--save_every", "7", "--micro_batch_tokens", "9"]) == 0
    copy.write_text(text.replace("green.", "taupe."))
    with pytest.raises(ValueError, match="the data are not those"):
        train.main([*argv, "--resume"])
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        train.main(flags(tmp_path / "file", *STAGE[1]))


def damage(state, how):
    """Do to a state what a disk, a copy that was cut off, or an editor does."""
    part = state / how.split()[-1]
    if how.startswith("no"):
        part.unlink()
    elif how.startswith("zeroed"):
        content = bytearray(part.read_bytes())
        content[len(content) // 2:] = bytes(len(content) - len(content) // 2)
        part.write_bytes(content)
    else:
        part.write_text(json.dumps(lines(part)[0] | {"step": "8"}))


@pytest.mark.parametrize("how, says", [
    ("no __0_0.distcp", "is damaged: __0_0.distcp"), ("no .metadata", "is damaged: .metadata"),
    ("zeroed __0_0.distcp", "is damaged: __0_0.distcp"),
    ("no state.json", "state.json"), ("zeroed state.json", "state.json"),
    ("wrong state.json", "state.json: step: '8' where a whole number belongs")])
def test_a_damaged_state_is_named(how, says, flags, straight, tmp_path):
    """A part that is missing or zeroed would go on with other weights, and exit status 0."""
    shutil.copytree(straight(1), tmp_path / "out")
    damage(tmp_path / "out" / "train_state" / "step_00000008", how)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(says)):
        train.main([*flags(tmp_path / "out", *STAGE[1]), "--resume"])


def test_a_device_that_is_not_there_is_named():
    """torch says it with a traceback of its own."""
    with pytest.raises(ValueError, match="--device mps: torch finds none"):
        Machine("mps")


def test_frozen_weights_that_changed_under_the_same_path_are_noticed(flags, parts, tmp_path):
    """A resumed stage 1 would go on with another g or f_phi than it began with."""
    folder = shutil.copytree(parts, tmp_path / "parts")
    argv = flags(tmp_path / "out", *STAGE[1], "--vision", folder / "clip", "--llm", folder / "llm",
                 "--max_steps", 1)
    train.main(argv)
    for name, part in (("llm", "f_phi"), ("clip", "g")):         # g's change is named first
        weights = load_file(folder / name / "model.safetensors")
        weights[next(name for name in weights if "layers.1" in name)].view(-1)[0] += 1
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"other weights in {part}"):
            train.main([*argv, "--resume"])


# -----------------------------------------------------------------------------
# Guards


@pytest.fixture
def one_answer(tmp_path):
    """Samples which are all answered "ok"."""
    turns = chat("<image>\nIs it?", "ok")
    write_json(tmp_path / "ok.json", [{"id": f"ok_{i}", "image": "0_0.tiff", "conversations": turns}
                                      for i in range(8)])
    return tmp_path / "ok.json"


def broken_llm(what):
    """A language model whose loss or gradient is not to be trained on."""
    if what == "zero":                   # it knows the one answer of the data by heart
        return scripted_llm(": ok##")
    llm = tiny_llm()
    with torch.no_grad():
        if what == "nan":
            llm.model.layers[1].mlp.up_proj.weight.fill_(3e38)
        if what == "overflow":           # equal logits, but a gradient too large to be squared
            llm.model.norm.weight.mul_(1e-25)
            llm.lm_head.weight.mul_(1e25)
    return llm


@pytest.mark.parametrize("stage, what, reason", [
    (2, "nan", "the loss is nan"), (2, "overflow", "the loss is .*, the gradient's norm inf"),
    (1, "zero", "the loss is 0.0")])
def test_a_step_that_teaches_nothing_stops(stage, what, reason, one_answer, flags, tmp_path):
    """With the reason, the samples' ids and one of them as the model saw it; nothing is saved."""
    folder = save_parts(tmp_path, broken_llm(what))
    argv = flags(tmp_path / "out", *STAGE[stage], "--llm", folder / "llm", "--vision",
                 folder / "clip", "--data", one_answer)
    with pytest.raises(ValueError, match=f"step 0: {reason}") as error:
        train.main(argv)
    message = str(error.value)
    assert len(set(re.findall(r"ok\.json\[\d\] \(id ok_\d\)", message))) == 4, message
    assert "llava_v0" in message and "« ok###»" in message
    assert not list((tmp_path / "out").glob("train_state/step*"))


def test_bad_data_is_listed_before_step_0_and_counted_when_left_out(flags, chats, tmp_path, capsys):
    """Each bad sample with file, index and id; --skip_bad leaves them out, and says so."""
    records = json.loads((chats / "chat.json").read_text())
    bad = [{"id": "tags", "image": "0_0.tiff", "conversations": chat("<image><image>", "Yes.")},
           {"id": "gone", "image": "gone.png", "conversations": chat("<image>", "Yes.")},
           {"id": "long", "conversations": chat("Well?" * 500, "Yes.")}]
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(records[:8] + bad))
    argv = flags(tmp_path / "out", *STAGE[1], "--data", path, "--max_steps", 1)
    with pytest.raises(ValueError, match="3 of 11 samples are bad") as error:
        train.main(argv)
    for index, record in enumerate(bad, 8):
        assert f"mixed.json[{index}] (id {record['id']}): " in str(error.value)
    assert train.main([*argv, "--skip_bad"]) == 0
    assert "3 bad" in capsys.readouterr().out, "left out without a word"
    path.write_text(json.dumps(bad))
    with pytest.raises(ValueError, match="0 good samples"):
        train.main(flags(tmp_path / "none", *STAGE[1], "--data", path, "--skip_bad"))


def test_samples_beyond_the_language_models_context_are_refused(flags, tmp_path):
    """max_position_embeddings is 512 here: longer samples would train on garbage."""
    write_json(tmp_path / "long.json", 4 * [{"conversations": chat("Why? " * 100, "So.")}])
    with pytest.raises(ValueError, match="512"):
        train.main(flags(tmp_path / "out", *STAGE[2], "--data", tmp_path / "long.json"))


@pytest.mark.parametrize("flag", ["--llm", "--vision", "--init", "--data", "--images"])
def test_a_folder_that_does_not_exist_is_named(flag, flags, tmp_path):
    """What a user typed and is not there: no traceback and no advice about a network."""
    init = ["--init", "none"] if flag != "--init" else []
    argv = flags(tmp_path / "out", "--stage", 2, *init, flag, tmp_path / "nowhere")
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        train.main(argv)


def test_the_first_step_reveals_what_thawed_and_what_is_stuck(llava):
    """Sec. 4.2's freezing: what is frozen is bit-identical, what trains has moved; also where as
    many bits went up as down, of which the sum stays the same."""
    theta = llava.set_stage(1)
    for p in theta.values():
        p.grad = torch.ones_like(p)
    norm = llava.f_phi.model.norm.weight
    with torch.no_grad():
        norm.uniform_(1.1, 1.9)
        before = fingerprints(llava)
        with pytest.raises(AssertionError, match="did not move.*W"):
            check_moves(before, llava, theta, math.inf)
        for p in theta.values():
            p.add_(1e-6)
        check_moves(before, llava, theta, math.inf)
        norm.view(torch.int32).add_(torch.tensor([140, -140]).repeat(len(norm) // 2))
    with pytest.raises(AssertionError, match="frozen parameters changed.*norm.weight"):
        check_moves(before, llava, theta, math.inf)


def test_the_first_step_may_be_too_small_to_move_a_large_weight(flags, tmp_path):
    """The paper's stage 2 warms up over 445 steps: its first step is 4.5e-8, less than half the
    distance between two fp32 numbers at 1.8. That is rounding, not a frozen parameter."""
    llm = tiny_llm()
    torch.nn.init.constant_(llm.model.norm.weight, 1.8)
    folder = save_parts(tmp_path, llm)
    argv = flags(tmp_path / "out", *STAGE[2], "--llm", folder / "llm", "--lr", "9e-8")
    assert train.main([*argv, "--max_steps", "1"]) == 0


# -----------------------------------------------------------------------------
# Saving


def test_an_output_that_cannot_be_written_ends_the_run_before_step_0(flags, tmp_path):
    """A full disk: for the model (480 kB), or for the training state (900 kB). The same command
    works when there is room again, for nothing half is left."""
    argv = flags(tmp_path / "out", *STAGE[2], "--max_steps", 1)
    for limit in (100_000, 700_000):
        code, shown = run_script(tmp_path, "train.py", *argv, file_size=limit)
        assert code == 1 and re.search("error: .*File too large.*make room", shown), shown[-900:]
        assert "| loss" not in shown, "it trained although it cannot save"
        assert os.listdir(tmp_path / "out") == ["lock"]
    assert train.main(argv) == 0


def test_a_checkpoint_that_cannot_be_written_at_the_end_leaves_the_last_state(flags, straight,
                                                                              tmp_path):
    """The disk is full by then: one line says so, no half checkpoint is left, --resume saves it.
    A file is in the way of the folder that is written to first."""
    out = tmp_path / "out"
    argv = flags(out, *STAGE[1])
    process = start_script(tmp_path, "train.py", *argv)
    while process.is_alive() and not log_size(out):
        time.sleep(0.001)
    (out / "writing").touch()
    process.join()
    shown = (tmp_path / "output").read_text()
    assert process.exitcode == 1 and "left is step_00000008: make room, then --resume" in shown
    assert not list(out.glob("*.safetensors")) and not (out / "config.json").exists()
    (out / "writing").unlink()
    assert train.main([*argv, "--resume"]) == 0
    assert_equal_runs(out, straight(1))
    assert train.main([*argv, "--resume"]) == 0, "a finished run cannot be asked for again"


def test_a_run_shows_logs_and_plots_what_it_does(flags, tmp_path, capsys):
    """The banner in its order, a record a step and a validation, a plot; the last validation is
    what the saved checkpoint gives on samples that were not trained on."""
    out = tmp_path / "out"
    argv = flags(out, *STAGE[2], "--val_samples", 5, "--save_every", 4, "--micro_batch_tokens", 300)
    assert train.main([*argv, "--max_steps", "6"]) == 0
    shown = capsys.readouterr().out
    place = 0
    for pattern in (r"^lr +0\.001 +command line$", r"^seed +42 +default$", r"^  g .* 0 +float32$",
                    r"^  W +1,584 +1,584 +float32$", r"17 samples.*, 0 bad",
                    r"samples train, .* held out", r"^batch: 4 over 1 ranks; 3 steps",
                    r"^A chat between a curious human .*###Human: ", r"###Assistant:« It is .*###»",
                    r"^step +0/6 \| loss +\d"):
        found = re.compile(pattern, re.MULTILINE).search(shown, place)
        assert found, f"{pattern!r} is missing, or not in its place:\n{shown[:4000]}"
        place = found.start()
    log = lines(out / "log.jsonl")
    steps = [record for record in log if "loss" in record]
    assert [record["step"] for record in steps] == list(range(6))
    assert steps[0].keys() == {"step", "loss", "lr", "grad_norm", "seconds", "tokens", "images",
                               "answer_tokens"}
    with Image.open(out / "loss.png") as picture:
        assert picture.width > 300 and len(picture.getcolors(1 << 20)) > 2, "an empty plot"

    validations = [record for record in log if "val_loss" in record]
    assert [record["step"] for record in validations] == [4, 6]
    _, _, _, data, plan, held_out = build(argv)
    assert len(held_out) == 5 and not set(held_out) & set(plan.indices)
    model = LLaVA.from_pretrained(out)
    batch = data_module.collate([data.sample(int(i)) for i in held_out], data.view)
    with torch.no_grad():
        loss, n = model(**Machine("cpu").to_device(batch))
    assert validations[-1]["val_loss"] == pytest.approx(loss.item() / n, abs=1e-5)
    assert len(validations[-1]["answers"]) == 3


# -----------------------------------------------------------------------------
# Number formats, and the family


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_trains_fp32_weights(dtype, flags, tmp_path):
    """Computing and the saved folder are in half precision, theta in fp32."""
    argv = flags(tmp_path / "out", *STAGE[2], "--dtype", dtype)
    assert {p.dtype for p in build(argv)[2].values()} == {torch.float32}
    train.main(argv)
    loss = losses(tmp_path / "out")
    assert loss[7][0] < 0.8 * loss[0][0]
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {half}


def test_fp16_steps_that_overflow_are_skipped_and_the_log_stays_readable(flags, tmp_path):
    """The loss is scaled up, too far at first: such a step is left out and the scale halved."""
    llm = tiny_llm()
    with torch.no_grad():                # equal logits, but gradients of some hundreds
        llm.model.norm.weight.mul_(1e-3)
        llm.lm_head.weight.mul_(1e3)
    folder = save_parts(tmp_path, llm)
    argv = flags(tmp_path / "out", *STAGE[2], "--llm", folder / "llm", "--dtype", "fp16",
                 "--max_steps", 2, "--global_batch_size", 2)
    assert train.main(argv) == 0
    log = lines(tmp_path / "out" / "log.jsonl")
    assert [record["grad_norm"] for record in log] == [None, None], "no step overflowed"
    assert "Infinity" not in (tmp_path / "out" / "log.jsonl").read_text()


def test_another_feature_layer_is_used_and_stored(flags, straight, tmp_path):
    """Table 8: Z_v from the last layer (-1); stage 2 must go on with the same, and the same W."""
    out = tmp_path / "out"
    train.main(flags(out, *STAGE[1], "--feature_layer", -1, "--max_steps", 1))
    assert losses(out)[0] != losses(straight(1))[0]
    for init, flag, says in ((out, "--stage", "feature_layer -1: take --feature_layer -1"),
                             (straight(1), "--projector", "take --projector linear")):
        value = {"--stage": 2, "--projector": "mlp2x_gelu"}[flag]
        with pytest.raises(ValueError, match=says):
            train.main(flags(tmp_path / "two", "--stage", 2, "--init", init, flag, value))


TWO_LAYERS = ["--projector", "mlp2x_gelu", "--aspect"]
FAMILY = {"pad": [*TWO_LAYERS, "pad"], "hd": [*TWO_LAYERS, "hd_tiles"], "anyres": NEXT,
          "LoRA": LORA, "4_bits": [*LORA, "--dtype", "nf4"]}


@pytest.mark.slow
@pytest.mark.parametrize("what", FAMILY)
def test_the_family_trains_and_resumes_bit_for_bit(what, flags, straight, tmp_path):
    """Two layers, tiles, a vision tower that trains, adapters with dropout, beside 4 bits, too."""
    init = straight(1) if what == "LoRA" else "none"
    if what == "4_bits":
        pytest.importorskip("bitsandbytes")
        wide = tiny_llm(hidden_size=64, intermediate_size=128)       # a multiple of its blocks
        init = tmp_path / "base"
        LLaVA(tiny_clip(), wide, byte_tokenizer(), meta={"stage": 1}).save_pretrained(init)
    argv = [*STAGE[2], "--init", init, *FAMILY[what], "--max_steps", 4, "--save_every", 2,
            "--keep", 2]
    assert train.main(flags(tmp_path / "whole", *argv)) == 0
    state = "train_state/step_00000002"
    shutil.copytree(tmp_path / "whole" / state, tmp_path / "cut" / state)
    assert train.main(flags(tmp_path / "cut", *argv, "--resume")) == 0
    want = losses(tmp_path / "whole")
    assert losses(tmp_path / "cut") == {step: want[step] for step in (2, 3)}
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_each_part_trains_at_its_own_rate(flags, straight, parts, tmp_path):
    """NeXT's vision tower at 5e-5 in the toy, LoRA's W at a tenth of the adapters' rate: AdamW's
    first step moves by its rate, here half of the peak."""
    train.main(flags(tmp_path / "out", *STAGE[2], *NEXT, "--max_steps", 1))
    start = LLaVA.from_parts(str(parts / "clip"), str(parts / "llm"))
    end = LLaVA.from_pretrained(tmp_path / "out")
    for part, rate in (("g", 5e-5), ("f_phi", 1e-3)):
        pairs = zip(getattr(start, part).parameters(), getattr(end, part).parameters(), strict=True)
        moved = max((a - b).abs().max().item() for a, b in pairs)
        assert moved == pytest.approx(rate / 2, rel=0.02), f"{part} does not train at {rate}"
    groups = groups_of({"W.weight": 1, "f_phi.x": 2}, {"W": 2e-5, "g": None, "f_phi": 2e-4})
    assert [(group["params"], group["peak"]) for group in groups] == [([1], 2e-5), ([2], 2e-4)]


def test_adapters_leave_a_merged_checkpoint_and_an_adapter(flags, straight, tmp_path):
    """LLaVA-1.5's LoRA: a whole model, and beside it the adapters. They go with W alone."""
    argv = [*STAGE[2], "--init", straight(1), *LORA]
    train.main(flags(tmp_path / "out", *argv, "--max_steps", 1))
    assert not lora.adapters(LLaVA.from_pretrained(tmp_path / "out").f_phi)
    LLaVA.from_pretrained(tmp_path / "out" / "adapter")
    with pytest.raises(ValueError, match="--lora_rank"):
        train.main(flags(tmp_path / "no", *argv, "--aspect", "anyres"))


def test_a_finished_checkpoint_brings_its_own_ways(flags, tmp_path, capsys):
    """Fine-tuning goes on with the checkpoint's features, projector, aspect and canvases, whatever
    the recipe says of a new model; what is typed wins. A recipe's stage 2 applies to a stage 1."""
    argv = [*STAGE[2], "--projector", "mlp2x_gelu", "--max_steps", 1, "--feature_layer", -1]
    train.main(flags(tmp_path / "next", *argv, "--aspect", "anyres"))
    path = tmp_path / "next" / "config.json"
    config = json.loads(path.read_text())
    config["minllava"]["tiling"]["pinpoints"] = [[28, 84]]
    path.write_text(json.dumps(config))
    capsys.readouterr()
    start = [*STAGE[2], "--max_steps", 1, "--init", tmp_path / "next"]
    train.main(flags(tmp_path / "again", *start, "--recipe", "toy", "--val_samples", 2))
    shown = capsys.readouterr().out
    for setting in ("aspect +anyres", "projector +mlp2x_gelu", "feature_layer +-1"):
        assert re.search(rf"{setting} +checkpoint", shown)
    assert LLaVA.from_pretrained(tmp_path / "again").meta["tiling"]["pinpoints"] == [[28, 84]]
    model = build(flags(tmp_path / "pad", *start, "--aspect", "pad"))[1]
    assert model.meta["aspect"] == "pad" and model.newline is None


def test_a_rate_or_a_length_of_0_is_not_the_default(flags, parts, tmp_path):
    """What a user typed counts, 0 as well: no step is taken, or nothing moves."""
    want = LLaVA.from_parts(str(parts / "clip"), str(parts / "llm")).f_phi.state_dict()
    for argv, n in ((["--max_steps", 0], 0), (["--lr", 0, "--max_steps", 1], 1)):
        out = tmp_path / str(n)
        train.main(flags(out, *STAGE[2], *argv))
        assert log_size(out) == n
        got = LLaVA.from_pretrained(out).f_phi.state_dict()
        assert all(torch.equal(got[name], p) for name, p in want.items())


# -----------------------------------------------------------------------------
# --track: nothing leaves a run unless it is asked for


def test_tensorboard_gets_the_numbers_of_the_log(flags, tmp_path):
    """Its event file, read back by its own reader, says what log.jsonl says."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    argv = flags(tmp_path / "out", *STAGE[1], "--val_samples", 3, "--max_steps", 3)
    assert train.main([*argv, "--track", "tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "out"))
    events.Reload()
    log = lines(tmp_path / "out" / "log.jsonl")
    for key in ("loss", "lr", "tokens", "val_loss"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        want = [(record["step"], record[key]) for record in log if key in record]
        assert [step for step, _ in found] == [step for step, _ in want] and want
        assert [value for _, value in found] == pytest.approx([value for _, value in want])


def test_wandb_gets_the_numbers_of_the_log_and_is_finished(flags, tmp_path, monkeypatch):
    """A stand-in keeps what a run tells its library: init, each record by step, finish."""
    told = []

    def init(project, name, config):
        told.append((project, name, config["lr"]))
        return SimpleNamespace(log=lambda numbers, step: told.append((step, numbers)),
                               finish=lambda: told.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    argv = flags(tmp_path / "out", *STAGE[1], "--val_samples", 3, "--max_steps", 2)
    assert train.main([*argv, "--track", "wandb"]) == 0
    log = lines(tmp_path / "out" / "log.jsonl")
    want = [(record.pop("step"), {key: value for key, value in record.items() if key != "answers"})
            for record in log]
    assert told == [("minllava", str(tmp_path / "out"), 2e-2), *want, "finish"]
    assert [step for step, _ in want] == [0, 1, 2]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_step_0(name, flags, tmp_path):
    """And what to install."""
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ValueError, match=f"--track needs {name}: pip install {name}"):
        train.main([*flags(tmp_path / "out", *STAGE[1]), "--track", name])
