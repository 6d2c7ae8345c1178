"""How it is trained (Sec. 4.2, "Training"): recipes, the loss over ranks and accumulation, kills, guards, the banner."""
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import data as data_module
import sample
import train
from conftest import ROOT, answer_logits, run_script, save_parts, scripted_llm, start_script, tiny_llm
from lora import base_of, load_adapter
from model import IGNORE, LLaVA
from records import brief_instructions, image_names
from sharding import read_state, write_state

# Learning rates at which 20 steps visibly move what trains. AdamW's first steps are nearly lr * sign(gradient), which
# would blow up rounding where a gradient is about 0; measured at these rates, orders of summation differ by 2e-6 at most.
STAGE = {1: ["--stage", "1", "--lr", "2e-2"], 2: ["--stage", "2", "--init", "none", "--lr", "1e-3"]}
STAGE["NeXT"] = [*STAGE[2], "--projector", "mlp2x_gelu", "--aspect", "anyres", "--lr_g", "1e-4", "--val_samples", "4",
                 "--eval_every", "10"]


@pytest.fixture(scope="module")
def flags(parts, chats):
    """flags(out, ...): a command line that trains on `chats` in steps of 4 samples, 10 full ones and one of a single
    sample an epoch; what is given after `out` is appended, so it wins."""
    def command(out, *more):
        paths = ["--data", chats / "chat.json", "--images", chats / "images", "--out", out]
        if dict(zip(more, more[1:])).get("--init", "none") == "none":        # the last one wins
            paths += ["--vision", parts / "clip", "--llm", parts / "llm"]
        rest = ["--template", "llava_v0", "--global_batch_size", 4, "--epochs", 2, "--max_steps", 20, "--workers", 0]
        return [str(x) for x in [*paths, *rest, *more]]
    return command


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """straight(stage): the folder of a run of 20 steps in one process, without accumulation or interruption."""
    done = {}

    def run(stage):
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp("straight") / "out"
            assert train.main(flags(done[stage], *STAGE[stage])) == 0
        return done[stage]
    return run


def build(argv, world_size=1):
    """Everything that `main` builds before its loop: config, machine, model, theta, Conversations, one Steps per rank."""
    config, _ = train.brought(*train.resolve(argv))
    machine = train.start(config)
    model, theta, template = train.build_model(config, machine)
    data, lengths, train_on, held_out, _ = train.build_data(config, machine, model, template)
    micro, _ = train.accumulation(config, world_size)
    steps = [data_module.Steps(data, train_on, lengths, config.global_batch_size, micro, world_size, rank)
             for rank in range(world_size)]
    return config, machine, model, theta, data, steps, held_out


def records(out):
    """log.jsonl, every line of it whole and strict JSON."""
    def refuse(constant):
        raise AssertionError(f"log.jsonl holds {constant}, which is not JSON: other readers stop there")
    return [json.loads(line, parse_constant=refuse) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    """{step: [every loss that the log has for it]}; a resumed run may have done a step twice."""
    found = {}
    for record in records(out):
        if "loss" in record:
            found.setdefault(record["step"], []).append(record["loss"])
    return found


def assert_equal_runs(out, reference, tolerance=0.0, what=""):
    """The same losses by step and the same final weights, up to `tolerance` (0: bit for bit)."""
    got, want = losses(out), losses(reference)
    assert got.keys() == want.keys(), f"{what}: steps {sorted(got)} were logged, not {sorted(want)}"
    for step, values in got.items():
        for value in values:
            assert abs(value - want[step][0]) <= tolerance, f"{what}: the loss of step {step} is {value}, not {want[step][0]}"
    got, want = load_file(out / "model.safetensors"), load_file(reference / "model.safetensors")
    assert got.keys() == want.keys()
    for name in want:
        difference = (got[name] - want[name]).abs().max().item()
        assert difference <= tolerance, f"{what}: the final {name} differs by {difference}"


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_typed_flags_win_over_the_recipe_and_the_recipe_over_the_defaults():
    """The precedence of the command line: default < recipe < typed, each with its provenance."""
    config, origin = train.resolve(["--lr", "1e-5", "--no-stage1_question", "--skip_bad", "--data", "a.json", "b.json"])
    assert (config.lr, origin["lr"]) == (1e-5, "command line"), "a typed flag does not win over the recipe"
    assert (config.data, origin["data"]) == (["a.json", "b.json"], "command line")
    assert (config.stage1_question, config.skip_bad) == (False, True), "--flag and --no-flag do not set a boolean"
    assert (config.global_batch_size, origin["global_batch_size"]) == (128, "recipe")
    assert (config.seed, origin["seed"]) == (train.Config.seed, "default")
    assert config.out == "out/stage1", "stage 1 would be written where nobody looks for it"


@pytest.mark.parametrize("argv", ["--max_step 3", "--resum", "--llama x", "--stage 3", "--template llava", "--recipe x",
                                  "--lr fast", "--resume yes", "--data", "extra"])
def test_a_mistyped_flag_is_an_error(argv, capsys):
    """No abbreviations, no unknown flags or values: what is not understood is never ignored."""
    with pytest.raises(SystemExit) as stop:
        train.resolve(argv.split())
    assert stop.value.code == 2, f"{argv!r} was not refused as a usage error"
    assert argv.split()[0].lstrip("-") in capsys.readouterr().err, "the message does not show what was typed"


@pytest.mark.parametrize("recipe, llm", [("llava-7b", "vicuna-7b"), ("llava-13b", "vicuna-13b")])
@pytest.mark.parametrize("stage, epochs, lr, batch", [(1, 1, 2e-3, 128), (2, 3, 2e-5, 32)])
def test_the_defaults_are_the_papers(recipe, llm, stage, epochs, lr, batch):
    """Sec. 4.2 and its training details: 1 epoch at 2e-3 with batch 128, then 3 epochs at 2e-5 with batch 32, 3% warm-up;
    the image's place of Eq. (2) at random; Table 2's form of text; CLIP ViT-L/14 and Vicuna."""
    config, _ = train.resolve(["--recipe", recipe, "--stage", str(stage), "--init", "none"])
    assert (config.epochs, config.lr, config.global_batch_size) == (epochs, lr, batch), "not the paper's schedule"
    assert (config.warmup_ratio, config.template, config.image_position) == (0.03, "llava_v0", "random")
    assert (config.feature_layer, config.stage1_question, config.val_samples) == (-2, True, 0)
    assert config.vision == "openai/clip-vit-large-patch14" and llm in config.llm
    assert train.resolve([])[0].recipe == "llava-7b", "the defaults do not run the paper"


def test_stage_2_needs_a_checkpoint_of_stage_1():
    """Sec. 4.2: stage 2 continues from the W of stage 1; without it only by asking (--init none)."""
    with pytest.raises(ValueError, match="--init out/stage1.*--init none"):
        train.resolve(["--stage", "2"])
    assert train.resolve(["--stage", "2", "--init", "none"])[0].init == "none"


def test_another_language_model_brings_its_own_template():
    """The recipe's template belongs to the recipe's language model; a typed template wins all the same."""
    assert train.resolve(["--llm", "x"])[0].template == "auto", "another model would be trained in Vicuna's format"
    assert train.resolve(["--llm", "x", "--template", "llava_v0"])[0].template == "llava_v0"


def test_the_learning_rate_warms_up_linearly_and_ends_in_a_cosine():
    """Training details: 3% linear warm-up, cosine decay. The first step is above 0, so it trains."""
    config, _ = train.resolve([])
    lr = [train.lr_at(step, 1000, config) for step in range(1000)]
    rises = [b - a for a, b in zip(lr, lr[1:30])]
    assert lr[0] > 0, "the first step would change nothing"
    assert max(rises) - min(rises) < 1e-12, "the warm-up is not linear"
    assert lr[30] == max(lr) == config.lr, "the peak is not --lr, or not at the end of 3% of the steps"
    assert lr[515] == pytest.approx(config.lr / 2), "half-way down, a cosine is at half of its peak"
    assert all(a > b for a, b in zip(lr[30:], lr[31:])) and 0 < lr[-1] < 1e-5 * config.lr
    for total in (1, 2, 3):
        assert all(0 < train.lr_at(step, total, config) <= config.lr for step in range(total)), f"a run of {total} steps"


def test_a_batch_size_that_cannot_be_kept_is_refused_with_ones_that_can():
    """The global batch size is a promise: ranks x micro-batch x accumulation is equal to it, or the run does not start."""
    config = lambda G, micro: train.resolve(["--global_batch_size", str(G), "--micro_batch_size", str(micro)])[0]
    for G, world_size, micro in [(128, 8, 16), (128, 8, 4), (32, 8, 4), (32, 1, 4), (6, 3, 16), (5, 1, 5)]:
        size, steps = train.accumulation(config(G, micro), world_size)
        assert world_size * size * steps == G and size <= micro, f"{G} samples became {world_size} x {size} x {steps}"
    with pytest.raises(ValueError) as error:
        train.accumulation(config(6, 1), 4)
    proposed = [int(n) for n in re.findall(r"\d+", str(error.value).partition("e.g.")[2])]
    assert proposed == [4, 8], "the message should propose the nearest multiples of the ranks"
    with pytest.raises(ValueError) as error:
        train.accumulation(config(12, 4), 2)
    proposed = [int(n) for n in re.findall(r"\d+", str(error.value).partition("--micro_batch_size")[2])]
    assert proposed == [1, 2, 3, 6], "the message should propose every size that divides a rank's share"
    for size in proposed:
        assert train.accumulation(config(12, size), 2)[0] == size


# ---------------------------------------------------------------------------------------------------------------------
# The loss and its gradient


def test_a_step_is_transformers_loss_and_gradient(flags, tmp_path):
    """Eq. (3) through the real collate, Steps and accumulation: loss, gradients and gradient norm of steps with several
    images, with text alone among them, and of the short last one, against LlavaForConditionalGeneration."""
    argv = flags(tmp_path / "out", *STAGE[2])
    _, machine, model, theta, _, (whole,), _ = build(argv)
    steps = build([*argv, "--micro_batch_size", "2"])[5][0]
    model.save_pretrained(tmp_path / "hf")
    oracle = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    ours = {"W": model.W.weight, "the embedding": model.f_phi.get_input_embeddings().weight,
            "the head": model.f_phi.lm_head.weight, "layer 0's q": model.f_phi.model.layers[0].self_attn.q_proj.weight}
    theirs = {"W": oracle.model.multi_modal_projector.linear_1.weight, "the head": oracle.lm_head.weight,
              "the embedding": oracle.model.language_model.embed_tokens.weight,
              "layer 0's q": oracle.model.language_model.layers[0].self_attn.q_proj.weight}
    trained = [p for n, p in oracle.named_parameters() if "vision_tower" not in n and "linear_2" not in n]
    optimizer, scaler = torch.optim.SGD(theta.values(), lr=0), torch.amp.GradScaler("cpu", enabled=False)
    for step in (0, 4, 10):
        [batch], micro = whole[step], steps[step]
        n_answer = (batch["labels"] != IGNORE).sum().item()
        loss, norm = train.backward(model, micro, theta, optimizer, scaler, machine, n_answer)
        oracle.zero_grad()
        want = oracle(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"],
                      pixel_values=batch["X_v"] if len(batch["X_v"]) else None).loss
        want.backward()
        assert loss == pytest.approx(want.item(), abs=1e-5), f"step {step}: another loss than Eq. (3) in transformers"
        for name in ours:
            grad = torch.zeros_like(ours[name]) if theirs[name].grad is None else theirs[name].grad    # W, in a step of text
            difference = (ours[name].grad - grad).abs().max().item()
            assert difference < 1e-5, f"step {step}: the gradient of {name} differs from transformers' by {difference}"
        want_norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]).item()
        assert norm == pytest.approx(want_norm, abs=1e-5), f"step {step}: the watched gradient norm is not that of theta"
    assert len(steps[4]) == 2 and len(steps[10]) == 1, "the case of accumulation or the short last batch is gone"


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_does_not_change_training(stage, micro_batch_size, flags, straight, tmp_path):
    """The loss is divided by the answer tokens of the global batch (Eq. (3)): 4 samples at once, 2 x 2 or 4 x 1 are one run."""
    train.main(flags(tmp_path / "out", *STAGE[stage], "--micro_batch_size", micro_batch_size))
    assert_equal_runs(tmp_path / "out", straight(stage), 1e-5, f"stage {stage}, micro-batches of {micro_batch_size}")


def torchrun(ranks, argv, *options, code=0, meanwhile=lambda process: None):
    """What `torchrun` over so many processes shows; it must end, with that exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]
    process = subprocess.Popen([*command, f"{ROOT}/train.py", *argv], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        meanwhile(process)
        shown, _ = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)            # torchrun takes its processes with it
        pytest.fail(f"the processes of torchrun do not end:\n{process.communicate()[0][-5000:]}")
    assert process.returncode == code, f"torchrun ended with {process.returncode}:\n{shown[-5000:]}"
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, "NeXT"])
def test_two_processes_train_as_one(stage, flags, straight, tmp_path):
    """`torchrun` over 2 real processes, with accumulation, equals one process in loss and weights: also where one rank
    has pictures and the other only text, and at the short last batch of the epoch. Both processes end."""
    argv = flags(tmp_path / "out", *STAGE[stage], "--micro_batch_size", 1)
    ranks = build(argv, world_size=2)[5]
    images = [[sum(len(batch["X_v"]) for batch in rank[step]) for rank in ranks] for step in range(20)]
    assert any(min(n) == 0 < max(n) for n in images), "no step has a rank with text alone beside one with pictures"
    assert len(ranks[0].indices) % 4 == 1 and ranks[0].per_epoch < 20, "no short last batch is among the steps"
    shown = torchrun(2, argv)
    assert "4 = 2 ranks x 1 samples x 2 accumulated" in shown
    assert shown.count("theta (stage") == 1, "every rank prints the banner"
    assert_equal_runs(tmp_path / "out", straight(stage), 1e-5, f"stage {stage} on 2 processes")


@pytest.mark.slow
def test_shards_train_as_one_and_go_on_under_any_number(flags, straight, tmp_path):
    """FSDP2 over 4 processes, g in shards, too, equals one process that holds everything; its state of step 10 goes on under
    one process without shards, and under two with them, whose layers run again in the backward pass."""
    argv = flags(tmp_path / "four", *STAGE["NeXT"], "--save_every", 10, "--keep", 2)
    torchrun(4, [*argv, "--shard"])
    assert_equal_runs(tmp_path / "four", straight("NeXT"), 1e-5, "4 sharded processes")
    got, want = ([r for r in records(out) if "val_loss" in r] for out in (tmp_path / "four", straight("NeXT")))
    assert [r["answers"] for r in got] == [r["answers"] for r in want] and len(got) == 2
    assert [r["val_loss"] for r in got] == pytest.approx([r["val_loss"] for r in want], abs=1e-5)
    states = tmp_path / "four" / "train_state"
    assert sorted(os.listdir(states)) == ["step_00000010", "step_00000020"]
    for out in ("one", "two"):
        shutil.copytree(states / "step_00000010", tmp_path / out / "train_state" / "step_00000010")
        argv = flags(tmp_path / out, *STAGE["NeXT"], "--resume")
        if out == "one":
            assert train.main(argv) == 0
        else:
            torchrun(2, [*argv, "--shard", "--checkpoint_activations", "all"])
        got, want = (load_file(folder / "model.safetensors") for folder in (tmp_path / out, straight("NeXT")))
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-5, msg=lambda m: f"{out}, {name}: {m}")


@pytest.mark.parametrize("what", [["--shard"], ["--checkpoint_activations", "every_2"],
                                  pytest.param(["--compile"], marks=pytest.mark.slow)])
def test_what_saves_memory_or_time_changes_nothing(what, flags, straight, tmp_path):
    """Shards on one device, layers that run again, layers that are compiled. LoRA with dropout, whose masks must be the same
    the second time; compiled code draws others."""
    argv = [*STAGE[2], "--init", straight(1), *FAMILY["LoRA"] * (what != ["--compile"]), "--max_steps", 3]
    assert train.main(flags(tmp_path / "plain", *argv)) == 0
    code, shown = run_script(tmp_path, "train.py", *flags(tmp_path / "out", *argv, *what))
    assert code == 0, shown[-3000:]
    assert_equal_runs(tmp_path / "out", tmp_path / "plain", 1e-5, " ".join(what))


@pytest.mark.parametrize("more", [[], ["--shard", "--checkpoint_activations", "all"], ["--lora_rank", 4]])
def test_a_dry_run_says_what_the_longest_samples_need_and_writes_nothing(more, flags, straight, tmp_path, capsys):
    """--dry_run: one step on the longest samples, memory by part, and the flags that fit into --memory."""
    argv = flags(tmp_path / "out", "--stage", 2, "--init", straight(1), "--dry_run", *more)
    code, shown = run_script(tmp_path, "train.py", *argv)
    assert code == 0, shown[-2000:]
    _, _, model, theta, data, steps, _ = build([a for a in argv if a not in ("--shard", "--dry_run")])
    tokens, where = re.search(r"4 samples at once, the longest (.+): (\d+) tokens", shown).groups()[::-1]
    assert int(tokens) == steps[0].lengths.max() and where == data.records.where(int(steps[0].lengths.argmax()))
    parts = {name: float(n) for name, n in re.findall(r"^  (\D+?) +(\d+\.\d\d) GB", shown, re.MULTILINE)}
    assert {"weights", "gradients", "AdamW's moments", "activations", "logits", "together", "measured"} < set(parts)
    assert parts["together"] < parts["measured"], "less was measured than was counted"
    assert re.search(r"^take --micro_batch_size 4 --checkpoint_activations none$", shown, re.MULTILINE), shown[-2000:]
    assert not (tmp_path / "out").exists(), "a dry run wrote something"
    if not more:
        assert train.main([*argv, "--memory", "1e-6"]) == 0
        assert "nothing fits: --shard over more devices" in capsys.readouterr().out


def test_stage_1_trains_only_W_and_stage_2_also_phi(straight, parts):
    """Sec. 4.2: theta = {W} in stage 1, {W, phi} in stage 2; g is frozen in both. Bit for bit, in the folders."""
    start = LLaVA.from_parts(str(parts / "clip"), str(parts / "llm"))
    for stage, trained in ((1, {"W"}), (2, {"W", "f_phi"})):
        end = LLaVA.from_pretrained(straight(stage))
        for part in ("g", "W", "f_phi"):
            pairs = list(zip(getattr(start, part).parameters(), getattr(end, part).parameters()))
            moved = [not torch.equal(a, b) for a, b in pairs]
            assert all(moved) if part in trained else not any(moved), f"stage {stage}: {sum(moved)} parameters of {part} moved"


def test_stage_2_starts_from_the_W_of_stage_1(flags, straight, tmp_path):
    """Sec. 4.2: both the projector's weights and the language model's are updated from where stage 1 left them."""
    train.main(flags(tmp_path / "out", "--stage", 2, "--init", straight(1), "--lr", "1e-6", "--max_steps", 1))
    before, after = LLaVA.from_pretrained(straight(1)), LLaVA.from_pretrained(tmp_path / "out")
    difference = (before.W.weight - after.W.weight).abs().max().item()
    assert 0 < difference < 1e-5, f"W moved by {difference} in one step of 5e-7: it did not start from stage 1's"
    assert after.meta["init"] == str(straight(1)), "the checkpoint does not say what it started from"


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def killed_when(condition, folder, argv, delay=0.0):
    """Start a run, SIGKILL it `delay` seconds after `condition` became true; False if the run ended before."""
    process = start_script(folder, "train.py", *argv)
    while process.is_alive() and not condition():
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), (folder / "output").read_text()
    return process.exitcode != 0


def log_size(out):
    return (out / "log.jsonl").read_bytes().count(b"\n") if (out / "log.jsonl").exists() else 0


@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(stage, flags, straight, tmp_path):
    """A run is a function of its flags: SIGKILL, then --resume, gives the losses and the weights of an uninterrupted run.
    A last line of the log that was torn by the kill is cut off."""
    out = tmp_path / "out"
    argv = flags(out, *STAGE[stage], "--save_every", 3)
    assert killed_when(lambda: log_size(out) >= 7, tmp_path, argv), "the run ended before it was killed"
    assert not (out / "model.safetensors").exists() and (out / "train_state").exists()
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 7, "loss": 6.')
    assert train.main([*argv, "--resume"]) == 0
    assert_equal_runs(out, straight(stage), what=f"stage {stage}, killed and resumed")


@pytest.mark.slow
def test_kills_at_any_moment_even_while_saving_lose_nothing(flags, straight, tmp_path):
    """A state is written under a temporary name and renamed: after SIGKILLs at random moments of a run that saves after
    every step, some of them in the middle of saving, the result is still bit for bit that of an uninterrupted run."""
    out, rng = tmp_path / "out", random.Random(0)
    argv, writing = flags(out, *STAGE[2], "--save_every", 1), out / "train_state" / "writing"
    kills = torn = 0
    for attempt in range(6):
        goal = log_size(out) + rng.randrange(1, 4)
        if attempt % 2:
            killed = killed_when(lambda: log_size(out) >= goal, tmp_path, [*argv, "--resume"], rng.random() * 0.05)
        else:
            killed = killed_when(lambda: log_size(out) >= goal and writing.exists(), tmp_path, [*argv, "--resume"])
        kills, torn = kills + killed, torn + writing.exists()
    assert kills == 6 and torn, f"{kills} of 6 runs were killed, {torn} of them while saving: the test tests too little"
    assert train.main([*argv, "--resume"]) == 0
    assert_equal_runs(out, straight(2), what="after 6 kills")
    assert os.listdir(out / "train_state") == ["step_00000020"], "what was half written or is outdated stays on the disk"


@pytest.mark.slow
def test_a_rank_that_is_killed_comes_back_with_torchruns_restart(flags, straight, tmp_path):
    """torchrun --max-restarts starts all ranks again, with the same command: they go on from the last state."""
    out = tmp_path / "out"

    def kill_one(process):
        while log_size(out) < 7 and process.poll() is None:
            time.sleep(0.001)
        children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
        ranks = [pid for pid in children if "train.py" in open(f"/proc/{pid}/cmdline").read()]
        os.kill(int(ranks[-1]), signal.SIGKILL)
    shown = torchrun(2, flags(out, *STAGE[2], "--save_every", 3), "--max-restarts=1", meanwhile=kill_one)
    assert re.search(r"resume +True +torchrun", shown) and "resuming at step" in shown, shown[-3000:]
    assert_equal_runs(out, straight(2), 1e-5, "a rank was killed")


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_and_names_its_samples(flags, chats, tmp_path):
    """A picture that is gone in the middle of the run: no rank waits for the one that cannot go on."""
    folder, out = shutil.copytree(chats, tmp_path / "chats"), tmp_path / "out"

    def remove(process):
        while log_size(out) < 2 and process.poll() is None:
            time.sleep(0.001)
        shutil.rmtree(folder / "images")
        remove.at = time.monotonic()
    argv = flags(out, *STAGE[2], "--images", folder / "images", "--epochs", 900, "--max_steps", 9000)
    shown = torchrun(2, argv, code=1, meanwhile=remove)
    assert time.monotonic() - remove.at < 60
    assert re.search(r"error: .*chat.json\[\d+\] \(id chat_\d+\).*No such file", shown), shown[-3000:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_scheduler_save_and_say_how_to_go_on(number, flags, straight, tmp_path):
    """SIGINT to the run and its data workers, as a terminal sends it, or SIGTERM before a machine is taken away: the step is
    finished and saved, the exit code is 128 and the signal's, and the resumed run is bit for bit the uninterrupted one. While
    it runs, nobody else writes to its folder."""
    out, folder = tmp_path / "out", tmp_path
    argv = flags(out, *STAGE[2], "--workers", 1)
    process = start_script(folder, "train.py", *argv, fifo=True)
    with open(folder / "output") as output:
        if hasattr(fcntl, "F_SETPIPE_SZ"):                # so little fits that the run cannot end before the signal
            fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, 1)
        shown = []
        while not shown or shown[-1] and not shown[-1].startswith("step      3/20"):
            shown.append(output.readline())
        with pytest.raises(ValueError, match="another run writes there"):
            train.main([*argv, "--resume"])
        os.killpg(process.pid, number)
        shown.append(output.read())
    process.join(60)
    shown = "".join(shown)
    assert process.exitcode == 128 + number, f"exit code {process.exitcode} after {number}:\n{shown[-2000:]}"
    assert re.search(r"stopped after step \d+; .*--resume", shown), f"it does not say how to go on:\n{shown[-500:]}"
    assert "Traceback" not in shown, shown[-3000:]
    assert not (out / "model.safetensors").exists(), "the run ended before the signal: nothing was tested"
    assert train.main([*argv, "--resume"]) == 0
    assert_equal_runs(out, straight(2), what=f"stopped by {number} and resumed")


def test_resume_before_there_is_a_state_starts_at_step_0(flags, straight, tmp_path, capsys):
    """The same command with --resume can be repeated from the first start on, also if a kill came before the first state."""
    argv = flags(tmp_path / "out", *STAGE[1])
    train.main([*argv, "--resume"])
    assert_equal_runs(tmp_path / "out", straight(1), what="--resume on an empty folder")
    capsys.readouterr()
    assert train.main([*argv, "--resume"]) == 0, "resuming a finished run fails"
    assert_equal_runs(tmp_path / "out", straight(1), what="--resume of a finished run")
    assert "step      0/20" not in capsys.readouterr().out, "a finished run was trained again"


def test_a_used_folder_other_flags_and_other_data_are_refused(flags, chats, tmp_path):
    """A run is never mixed up with another one: not without --resume, not under other flags, not on other data."""
    out, copy = tmp_path / "out", tmp_path / "chat.json"
    copy.write_text((chats / "chat.json").read_text())
    argv = flags(out, *STAGE[1], "--max_steps", 1, "--data", copy)
    train.main(argv)
    with pytest.raises(ValueError, match="holds a run already: --resume"):
        train.main(argv)
    for flag, value in (("--lr", "0.001"), ("--seed", "7"), ("--max_steps", "2"), ("--global_batch_size", "8"),
                        ("--image_position", "first"), ("--data", str(chats / "chat.json"))):
        with pytest.raises(ValueError, match=rf"other flags: {flag} .*{re.escape(value)}.* \(was .*\)$"):
            train.main([*argv, "--resume", flag, value])
    assert train.main([*argv, "--resume", "--save_every", "7", "--micro_batch_size", "2"]) == 0
    for before, after, what in (("What is 3.0?", "What was 3.0?", "a longer question"), ("green.", "taupe.", "another answer")):
        text = (chats / "chat.json").read_text()
        assert before in text
        copy.write_text(text.replace(before, after))
        with pytest.raises(ValueError, match="the data are not those") as error:
            train.main([*argv, "--resume"])
        assert str(out) in str(error.value), f"{what}: the message does not say which run"


# ---------------------------------------------------------------------------------------------------------------------
# Guards


@pytest.fixture(scope="module")
def broken(tmp_path_factory, parts):
    """broken(what): a language model whose loss or gradient is not to be trained on; real weights, no mock."""
    def make(what):
        llm, folder = tiny_llm(), tmp_path_factory.mktemp("broken")
        with torch.no_grad():
            if what == "nan":
                llm.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
            if what == "overflow":                        # equal logits, but the gradient of the norm is too large to square
                llm.model.norm.weight.mul_(1e-25)
                llm.lm_head.weight.mul_(1e25)
            if what == "zero":                            # it knows the one answer of the data by heart
                llm = scripted_llm(": ok##")
        return save_parts(folder, llm)
    return make


@pytest.fixture(scope="module")
def one_answer(chats, tmp_path_factory):
    """Samples which are all answered "ok"."""
    path = tmp_path_factory.mktemp("ok") / "ok.json"
    turns = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "ok"}]
    path.write_text(json.dumps([{"id": f"ok_{i}", "image": "0_0.tiff", "conversations": turns} for i in range(8)]))
    return path


@pytest.mark.parametrize("stage, what, reason", [(1, "nan", "the loss is nan"), (2, "nan", "the loss is nan"),
                                                 (2, "overflow", "the gradient's norm is inf"), (1, "zero", "the loss is 0.0")])
def test_a_step_that_teaches_nothing_stops_the_run(stage, what, reason, broken, one_answer, flags, tmp_path):
    """A loss that is zero or not finite, or such a gradient, stops the run at its step: with the reason, the samples'
    ids and one of them as the model saw it. Nothing is trained on it and no state is saved."""
    folder = broken(what)
    argv = flags(tmp_path / "out", *STAGE[stage], "--llm", folder / "llm", "--vision", folder / "clip", "--data", one_answer)
    with pytest.raises(ValueError) as error:
        train.main(argv)
    message = str(error.value)
    assert message.startswith(f"step 0: {reason}"), message
    assert len(set(re.findall(r"ok\.json\[\d\] \(id ok_\d\)", message))) == 4, f"the step's samples are not named: {message}"
    assert "llava_v0" in message and "« ok###»" in message, "the message does not show what was scored"
    assert not list((tmp_path / "out").glob("train_state/step*")), "a state was saved after a broken step"


def test_a_step_without_scored_tokens_stops_the_run(flags, tmp_path):
    """Eq. (3) is a sum over answer tokens; a step without any is refused. The check of the data excludes it, so the guard
    is called on a real batch whose labels are taken away."""
    _, machine, _, _, data, (steps,), _ = build(flags(tmp_path / "out", *STAGE[1]))
    micro = steps[0]
    for batch in micro:
        batch["labels"].fill_(IGNORE)
    train.stop_on(False, machine, 3, "nothing", micro, data)
    with pytest.raises(ValueError, match=r"step 3: 0 of 9 tokens are scored.*chat\.json\[\d+\] \(id chat_\d+\)"):
        train.stop_on(True, machine, 3, "0 of 9 tokens are scored", micro, data)


def test_bad_data_is_listed_before_step_0_and_counted_when_left_out(flags, chats, tmp_path, capsys):
    """All data is checked before step 0; each bad sample with file, index and id. --skip_bad leaves them out, and says so."""
    records = json.loads((chats / "chat.json").read_text())
    picture = (chats / "images" / "0_0.tiff").read_bytes()
    (chats / "images" / "torn.tiff").write_bytes(picture[:len(picture) // 2])
    gpt = {"from": "gpt", "value": "Yes."}
    bad = [{"id": "tags", "image": "0_0.tiff", "conversations": [{"from": "human", "value": "<image><image>"}, gpt]},
           {"id": "gone", "image": "gone.png", "conversations": [{"from": "human", "value": "<image>"}, gpt]},
           {"id": "torn", "image": "torn.tiff", "conversations": [{"from": "human", "value": "<image>"}, gpt]},
           {"id": "open", "conversations": [{"from": "human", "value": "Well?"}]},
           {"id": "long", "conversations": [{"from": "human", "value": "Well?" * 500}, gpt]}]
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(records[:8] + bad))
    argv = flags(tmp_path / "out", *STAGE[1], "--data", path, "--max_steps", 1)
    with pytest.raises(ValueError) as error:
        train.main(argv)
    for index, record in enumerate(bad, 8):
        named = f"mixed.json[{index}] (id {record['id']}): " in str(error.value)
        assert named, f"{record['id']} is not reported: {error.value}"
    assert "5 of 13 samples are bad" in str(error.value) and "step      0" not in capsys.readouterr().out
    assert train.main([*argv, "--skip_bad"]) == 0, "nothing but the bad samples stood in the way"
    banner = capsys.readouterr().out
    assert "13 samples, 5 bad and left out" in banner and "mixed.json[9] (id gone)" in banner, "left out without a word"
    path.write_text(json.dumps(bad))
    with pytest.raises(ValueError, match="0 good samples"):
        train.main(flags(tmp_path / "none", *STAGE[1], "--data", path, "--skip_bad"))


def test_a_sample_that_fits_once_fits_in_every_epoch(flags, tmp_path):
    """Stage 1 draws its question anew in each epoch (Sec. 4.2), and questions differ in length: what was found to fit
    before step 0 must not stop the run hours later."""
    path = tmp_path / "text.json"
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A grey square."}]
    path.write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 4))
    argv = flags(tmp_path / "out", *STAGE[1], "--data", path, "--images", tmp_path, "--epochs", 8, "--max_steps", 8)
    data = build(argv)[4]
    tokens = [[len(data.encoded(i, epoch)[0]) for i in range(4)] for epoch in range(8)]
    assert max(map(max, tokens)) > max(tokens[0]), "every later epoch's draws are as short as the first's: nothing is tested"
    assert train.main([*argv, "--max_length", str(max(tokens[0]))]) == 0


def test_samples_beyond_the_language_models_context_are_refused(flags, tmp_path):
    """A language model was never trained on positions beyond max_position_embeddings (512 here): longer samples would
    train on garbage without anybody being told."""
    path = tmp_path / "long.json"
    turns = [{"from": "human", "value": "Why? " * 100}, {"from": "gpt", "value": "So."}]
    path.write_text(json.dumps([{"id": "long", "conversations": turns}] * 4))
    with pytest.raises(ValueError, match="512"):
        train.main(flags(tmp_path / "out", *STAGE[2], "--data", path, "--max_steps", 1))


def test_moves_that_cancel_are_seen(llava):
    """Half of a norm's weights go up by a first step and half go down: the sum of their bits stays the same."""
    weight = llava.f_phi.model.norm.weight
    with torch.no_grad():
        weight.uniform_(1.1, 1.9)
        before = train.fingerprints(llava)
        weight.view(torch.int32).add_(torch.tensor([140, -140]).repeat(len(weight) // 2))
    after = train.fingerprints(llava)
    assert [name for name in before if before[name] != after[name]] == ["f_phi.model.norm.weight"]


def test_the_first_step_reveals_what_thawed_and_what_is_stuck(llava):
    """Sec. 4.2's freezing, checked after the first real step: what is frozen is bit-identical, what trains has moved."""
    theta = llava.set_stage(1)
    for p in theta.values():
        p.grad = torch.ones_like(p)
    before = train.fingerprints(llava)
    with pytest.raises(AssertionError, match="did not move.*W"):
        train.check_first_step(before, llava, theta)
    with torch.no_grad():
        for p in theta.values():
            p.add_(1e-6)
    train.check_first_step(before, llava, theta)
    with torch.no_grad():
        next(llava.g.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(AssertionError, match="frozen parameters changed.*g\\."):
        train.check_first_step(before, llava, theta)


def test_the_first_step_may_be_too_small_to_move_a_large_weight(flags, tmp_path):
    """The paper's stage 2 warms up over 445 steps: its first step is 4.5e-8, less than half the distance between two fp32
    numbers from 1 to 2, where the weights of a trained model's last norm are. That is rounding, not a frozen parameter."""
    llm = tiny_llm()
    torch.nn.init.constant_(llm.model.norm.weight, 1.8)
    folder = save_parts(tmp_path, llm)
    argv = flags(tmp_path / "out", "--stage", 2, "--init", "none", "--llm", folder / "llm", "--lr", "9e-8", "--max_steps", 1)
    assert train.main(argv) == 0


def test_moves_that_add_up_to_nothing_are_still_moves(llava):
    """A fingerprint tells every change of a parameter. From weights of 1.0, one first step of AdamW up is half as many
    fp32 numbers as one down: twice as many ups as downs must not look like a parameter that stands still."""
    llava.g.requires_grad_(False)
    weight = llava.f_phi.model.norm.weight
    before = train.fingerprints(llava)
    with torch.no_grad():
        weight[:32] += 2e-3
        weight[32:] -= 2e-3
    after = train.fingerprints(llava)
    assert len(weight) == 48 and before != after, "48 weights moved by 2e-3 and have the same fingerprint"


# ---------------------------------------------------------------------------------------------------------------------
# Saving is rehearsed


@pytest.mark.parametrize("limit, what", [(100_000, "the model"), (550_000, "AdamW's moments")])
def test_an_output_that_cannot_be_written_ends_the_run_before_step_0(limit, what, flags, tmp_path):
    """Saving is exercised before step 0: where the file system refuses the model (480 kB) or the largest file of the
    training state (590 kB of moments), a real process ends before it has trained, and the folder is free for another try."""
    argv = flags(tmp_path / "out", *STAGE[2], "--max_steps", 3)
    code, shown = run_script(tmp_path, "train.py", *argv, file_size=limit)
    assert code == 1, f"exit code {code} where {what} cannot be written"
    assert "File too large" in shown, f"the reason is not shown: {shown[-500:]}"
    assert "step      0" not in shown, f"the run trained although {what} cannot be written"
    assert train.main(argv) == 0, "the same command fails when there is room again"


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path):
    """A disk that is full or closed in the middle of a run: one line says so, and what is kept; here a file is in the way."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p])
    write_state(tmp_path, 1, {}, {"p": p}, optimizer)
    (tmp_path / "writing").touch()
    with pytest.raises(ValueError, match="step_00000002 cannot be written .*; kept is step_00000001: make room, then --resume"):
        write_state(tmp_path, 2, {}, {"p": p}, optimizer)
    (tmp_path / "writing").unlink()
    assert os.listdir(tmp_path) == ["step_00000001"]
    read_state(tmp_path / "step_00000001", {"p": p}, optimizer)


def test_a_tokenizer_that_cannot_be_saved_ends_the_run_before_step_0(flags, tmp_path):
    """Saving is exercised with everything that the last step will write, the tokenizer included."""
    out = tmp_path / "out"
    (out / "rehearsal" / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(Exception, match="tokenizer.json|directory"):
        train.main(flags(out, *STAGE[1]))
    assert not (out / "log.jsonl").exists(), "the run trained although its tokenizer cannot be written"


# ---------------------------------------------------------------------------------------------------------------------
# What a run prints and leaves


@pytest.fixture(scope="module")
def watched(flags, tmp_path_factory):
    """(folder, printed text) of a run with 5 samples held out."""
    out, folder = tmp_path_factory.mktemp("watched") / "out", tmp_path_factory.mktemp("watched")
    code, shown = run_script(folder, "train.py", *flags(out, *STAGE[2], "--val_samples", 5, "--eval_every", 10,
                                                        "--max_steps", 15, "--micro_batch_size", 2))
    assert code == 0, shown
    return out, shown


def test_the_banner_shows_what_will_be_trained_on_what(watched, chats):
    """Before step 0, in this order: configuration with provenance, theta, batch arithmetic, data counts, and one sample
    with its scored tokens marked (Table 2 on one's own terminal)."""
    shown = watched[1]
    order = [r"^lr +0\.001 +command line$", r"^warmup_ratio +0\.03 +default$", r"^theta \(stage 2\)",
             r"^  g .* frozen +float32$", r"^  W +1,584 +yes +float32$", r"^  f_phi .* yes +float32$",
             r"^batch: 4 = 1 ranks x 2 samples x 2 accumulated; 9 steps an epoch, 15 in all$",
             r"^data: 41 samples, 0 bad and left out, 5 held out$", r"^ +\d+ images; \d+ tokens .*, \d+ scored",
             r"^one sample, template llava_v0", r"^A chat between a curious human .*###Human: ", r"###Assistant:« It is .*###»",
             r"^step +0/15 \| loss +\d", r"^ +held out: loss"]
    at = 0
    for pattern in order:
        found = re.compile(pattern, re.MULTILINE).search(shown, at)
        assert found, f"{pattern!r} is missing, or stands before what should precede it:\n{shown[:4000]}"
        at = found.start()
    images = sum(len(image_names(r)) for r in json.loads((chats / "chat.json").read_text()))
    assert f" {images} images;" in shown, f"the banner counts other images than the {images} of the data"
    assert "[4 x <image>]" in shown, "the rendered sample does not show how many tokens an image is"


def test_the_log_and_the_plot_are_left_in_the_folder(watched):
    """log.jsonl has a record a step and one a validation; loss.png is a picture of them."""
    out, _ = watched
    log = records(out)
    steps, validations = [r for r in log if "loss" in r], [r for r in log if "val_loss" in r]
    assert [r["step"] for r in steps] == list(range(15)), "steps are missing in the log, or logged twice"
    for record in steps:
        assert record.keys() == {"step", "loss", "lr", "grad_norm", "seconds", "tokens", "images", "answer_tokens"}
        assert all(math.isfinite(value) for value in record.values())
    assert sum(r["answer_tokens"] for r in steps[:9]) < sum(r["tokens"] for r in steps[:9])
    assert [r["step"] for r in validations] == [10, 15], "validation is not every 10 steps and at the end"
    with Image.open(out / "loss.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 300 and len(picture.getcolors(1 << 20)) > 2, "an empty plot"


def test_validation_is_the_loss_and_three_answers_on_samples_that_are_not_trained_on(watched, flags, chats):
    """--val_samples: held out of training; the last record is what the saved checkpoint gives for them."""
    out, _ = watched
    record = [r for r in records(out) if "val_loss" in r][-1]
    _, _, _, _, data, (steps,), held_out = build(flags(out, *STAGE[2], "--val_samples", 5))
    assert len(held_out) == 5 and not set(held_out) & set(steps.indices), "a held-out sample is trained on"
    model = LLaVA.from_pretrained(out)
    with torch.no_grad():
        batch = data_module.collate([data[0, int(i), True] for i in held_out])
        loss, n = model(batch["input_ids"], batch["labels"], batch["X_v"])
    assert record["val_loss"] == pytest.approx(loss.item() / n, abs=1e-5), "not the loss of the held-out samples"
    chat = {f"chat.json[{i}] (id {r['id']})": r for i, r in enumerate(json.loads((chats / "chat.json").read_text()))}
    assert len(record["answers"]) == 3
    for answer, i in zip(record["answers"], held_out):
        assert answer["truth"] == chat[answer["id"]]["conversations"][1]["value"], "the truth is another sample's"
        question, _ = data.question(int(i))
        batch = data_module.collate([question], side="left")
        want = model.generate(batch["input_ids"], batch["attention_mask"], batch["X_v"], stop=["###"], max_new_tokens=64)[0]
        assert answer["answer"] == want, "the logged answer is not the model's"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_trains_fp32_weights(dtype, flags, tmp_path):
    """Mixed precision: computing and the saved folder in half precision, theta and AdamW's moments in fp32."""
    out = tmp_path / "out"
    train.main(flags(out, *STAGE[2], "--dtype", dtype, "--max_steps", 6, "--global_batch_size", 2, "--warmup_ratio", 0))
    loss = losses(out)
    assert loss[5][0] < 0.8 * loss[0][0], f"the loss does not fall: {loss}"
    [state] = (out / "train_state").iterdir()
    kinds = {t.dtype for t in load_file(state / "part_00000.safetensors").values()}
    assert kinds == {torch.float32}, f"theta and moments are kept in {kinds}: small updates would be lost"
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {half}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(half)[6:]


def test_fp16_steps_that_overflow_are_skipped_and_the_log_stays_readable(flags, tmp_path):
    """The loss is scaled up for fp16, too far at first: such a step is left out and the scale halved. log.jsonl stays JSON."""
    llm = tiny_llm()
    with torch.no_grad():                                # equal logits, but gradients of some hundreds behind the head
        llm.model.norm.weight.mul_(1e-3)
        llm.lm_head.weight.mul_(1e3)
    folder, out = save_parts(tmp_path, llm), tmp_path / "out"
    train.main(flags(out, *STAGE[2], "--llm", folder / "llm", "--dtype", "fp16", "--max_steps", 2, "--global_batch_size", 2))
    state = load_file(out / "train_state/step_00000002/part_00000.safetensors")
    moments = [value for name, value in state.items() if not name.startswith("theta/")]
    assert not any(m.any() for m in moments), "no step overflowed: nothing was tested"
    assert sorted(losses(out)) == [0, 1]


def test_another_feature_layer_is_used_and_stored(flags, straight, tmp_path):
    """Table 8: Z_v from the last layer (-1) rather than from the one before it (-2); stage 2 must go on with the same."""
    out = tmp_path / "out"
    train.main(flags(out, *STAGE[1], "--feature_layer", -1, "--max_steps", 1))
    assert losses(out)[0] != losses(straight(1))[0], "--feature_layer changes nothing"
    assert json.loads((out / "config.json").read_text())["vision_feature_layer"] == -1, "transformers would use another layer"
    assert LLaVA.from_pretrained(out).feature_layer == -1
    with pytest.raises(ValueError, match="feature_layer -1"):
        train.main(flags(tmp_path / "two", "--stage", 2, "--init", out))


@pytest.mark.parametrize("question", [True, False])
def test_stage_1_asks_for_a_brief_caption_or_with_a_flag_for_nothing(question, flags, chats, tmp_path, capsys):
    """Sec. 4.2: X_q is a brief instruction drawn at random. --no-stage1_question is the released code: image, caption,
    newline; the checkpoint stores which it was."""
    path, out = tmp_path / "captions.json", tmp_path / "out"
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a red thing"}]
    path.write_text(json.dumps([{"id": str(i), "image": "0_0.tiff", "conversations": turns} for i in range(8)]))
    form = "--stage1_question" if question else "--no-stage1_question"
    train.main(flags(out, *STAGE[1], "--data", path, "--max_steps", 1, form))
    sample = re.search(r"^one sample.*?:\n(.*?)^step", capsys.readouterr().out, re.MULTILINE | re.DOTALL)[1]
    asked = [q for q in brief_instructions() if q in sample]
    meta = json.loads((out / "config.json").read_text())["minllava"]
    if question:
        assert len(asked) == 1 and "« a red thing###»" in sample and meta["template"] == "llava_v0"
    else:
        assert not asked and "[4 x <image>]«a red thing\n»" in sample and meta["template"] == "plain"
    assert meta["stage"] == 1, "sample.py cannot know that it talks to a stage-1 checkpoint"


def test_init_none_starts_with_a_new_W(straight, parts):
    """Table 8: stage 2 without stage 1. The checkpoint says so."""
    meta = LLaVA.from_pretrained(straight(2)).meta
    assert (meta["init"], meta["stage"], meta["steps"]) == ("none", 2, 20)
    assert (meta["vision"], meta["llm"]) == (str(parts / "clip"), str(parts / "llm"))


@pytest.mark.parametrize("flag", ["--llm", "--vision", "--init", "--data", "--images"])
def test_a_folder_that_does_not_exist_is_named(flag, flags, tmp_path):
    """What a user typed and is not there: one line with the flag's value, no traceback and no advice about a network."""
    argv = flags(tmp_path / "out", "--stage", 2, *(["--init", "none"] if flag != "--init" else []), flag, tmp_path / "nowhere")
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        train.main(argv)


# ---------------------------------------------------------------------------------------------------------------------
# The family: what later systems change

MLP = ["--projector", "mlp2x_gelu"]
FAMILY = {"pad": [*MLP, "--aspect", "pad"], "anyres": [*MLP, "--aspect", "anyres", "--lr_g", "1e-3"],
          "hd": [*MLP, "--aspect", "hd", "--no-global_picture"], "LoRA": ["--lora_rank", "4", "--lora_dropout", "0.3"]}


@pytest.mark.slow
@pytest.mark.parametrize("what", FAMILY)
def test_the_family_trains_and_resumes_bit_for_bit(what, flags, straight, tmp_path, monkeypatch):
    """Two layers, tiles, a vision tower that trains, adapters with dropout: each is a run that can be cut and goes on."""
    init = straight(1) if what == "LoRA" else "none"
    argv = [*STAGE[2], "--init", init, *FAMILY[what], "--max_steps", 6, "--save_every", 3]
    assert train.main(flags(tmp_path / "whole", *argv)) == 0
    save = train.save_state

    def save_and_die(folder, step, *rest):
        save(folder, step, *rest)
        if step == 3:
            raise SystemExit("the machine went down")
    monkeypatch.setattr(train, "save_state", save_and_die)
    with pytest.raises(SystemExit, match="went down"):
        train.main(flags(tmp_path / "cut", *argv))
    monkeypatch.undo()
    assert train.main(flags(tmp_path / "cut", *argv, "--resume")) == 0
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole", what=what)


def test_each_part_trains_at_its_own_rate(flags, tmp_path, monkeypatch):
    """LLaVA-NeXT's vision tower at 2e-6, LLaVA-1.5's LoRA with W at 2e-5: the first step of AdamW moves by its rate."""
    before = {}
    check = train.check_first_step

    def look(fingerprints, model, theta, lr):
        before["moved"] = {name: (p - start).abs().max().item() for (name, p), start in zip(theta.items(), before["start"])}
        check(fingerprints, model, theta, lr)
    build_model = train.build_model

    def build(config, machine):
        model, theta, template = build_model(config, machine)
        before["start"] = [p.detach().clone() for p in theta.values()]
        return model, theta, template
    monkeypatch.setattr(train, "check_first_step", look), monkeypatch.setattr(train, "build_model", build)
    train.main(flags(tmp_path / "out", *STAGE[2], *FAMILY["anyres"], "--lr", "1e-3", "--lr_W", "1e-2", "--lr_g", "1e-4",
                     "--warmup_ratio", "0", "--max_steps", "1"))
    for part, rate in (("g.", 1e-4), ("W.", 1e-2), ("f_phi.", 1e-3), ("newline", 1e-3)):
        moved = max(m for name, m in before["moved"].items() if name.startswith(part))
        assert moved == pytest.approx(rate, rel=0.02), f"{part} moved by {moved}"
    assert not any("layers.2." in name or "post_layernorm" in name for name in before["moved"]), "these have no part in Z_v"


def test_adapters_leave_a_merged_checkpoint_and_an_adapter(flags, straight, tmp_path, capsys):
    """LLaVA-1.5's LoRA: the folder is a whole model; beside it lie the adapters alone, which give the same on their base."""
    train.main(flags(tmp_path / "out", *STAGE[2], "--init", straight(1), *FAMILY["LoRA"], "--max_steps", 3))
    assert re.search(r"f_phi +[\d,]+ +[\d,]+ of them +float32", capsys.readouterr().out), "the theta table hides the adapters"
    merged, base = LLaVA.from_pretrained(tmp_path / "out"), LLaVA.from_pretrained(base_of(tmp_path / "out" / "adapter"))
    adapted = load_adapter(base, tmp_path / "out" / "adapter")
    batch = {"input_ids": torch.randint(3, 250, (2, 12)), "labels": torch.randint(3, 250, (2, 12)),
             "X_v": torch.zeros(0, 3, 28, 28)}
    torch.testing.assert_close(answer_logits(adapted, **batch)[0], answer_logits(merged, **batch)[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="--lora_rank is for a checkpoint"):
        train.main(flags(tmp_path / "wrong", *STAGE[2], "--lora_rank", 4))
    train.main(flags(tmp_path / "tiles", *STAGE[1], "--aspect", "anyres", "--max_steps", 1))
    for more in (["--lr_g", "1e-4"], ["--aspect", "anyres"], ["--init", tmp_path / "tiles", "--aspect", "anyres"]):
        with pytest.raises(ValueError, match="--lora_rank keeps W and adapters alone"):
            train.main(flags(tmp_path / "wrong", *STAGE[2], "--init", straight(1), "--lora_rank", 4, *more))


def test_a_checkpoint_with_another_projector_is_refused(flags, straight, tmp_path):
    """--projector must be that of --init; else a trained W would silently be thrown away."""
    with pytest.raises(ValueError, match="has projector linear, not mlp2x_gelu; take --projector linear"):
        train.main(flags(tmp_path / "out", "--stage", 2, "--init", straight(1), *MLP))


def test_an_adapters_folder_is_a_model_to_talk_to(flags, straight, chats, tmp_path, capsys):
    """It has the processor and template of its own stage, not of its base, a stage 1: transformers' users and ours see the
    whole picture. Trained in tiles before, a model keeps its row ends."""
    init = [*STAGE[2], "--max_steps", 2, "--init"]
    train.main(flags(tmp_path / "pad", *init, straight(1), "--aspect", "pad", *FAMILY["LoRA"]))
    train.main(flags(tmp_path / "tiles", *STAGE[2], "--max_steps", 2, "--aspect", "anyres"))
    train.main(flags(tmp_path / "anyres", *init, tmp_path / "tiles", *FAMILY["LoRA"]))
    with pytest.raises(ValueError, match="on a checkpoint whose stage 2 was in tiles, and only there"):
        train.main(flags(tmp_path / "wrong", *init, tmp_path / "tiles", *FAMILY["LoRA"], "--aspect", "pad"))
    assert train.resolve(["--recipe", "toy-next", *map(str, init), "x", "--lora_rank", "4"])[0].lr_g is None
    for aspect in ("pad", "anyres"):
        folder = tmp_path / aspect / "adapter"
        merged, adapted = LLaVA.from_pretrained(tmp_path / aspect), LLaVA.from_pretrained(folder)
        assert adapted.meta == merged.meta and adapted.view == merged.view
        assert adapted.tokenizer.chat_template == merged.tokenizer.chat_template
        for (name, p), q in zip(merged.named_parameters(), adapted.parameters()):
            torch.testing.assert_close(q, p, atol=1e-6, rtol=1e-6, msg=lambda m: f"{aspect}, {name}: {m}")
        processor = AutoProcessor.from_pretrained(folder).image_processor
        picture = Image.new("RGB", (60, 30), (200, 0, 0))
        theirs = processor(picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(theirs.reshape(-1, 3, 28, 28), merged.view.X_v([picture]))
    ends = [LLaVA.from_pretrained(tmp_path / name).newline for name in ("tiles", "anyres", "anyres/adapter")]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    capsys.readouterr()
    sample.main(["--model", str(folder), "--image", str(next((chats / "images").iterdir())), "--question", "What?",
                 "--max_new_tokens", "2", "--temperature", "0"])
    with pytest.raises(FileNotFoundError, match="holds an adapter, which belongs to the merged checkpoint"):
        train.main(flags(tmp_path / "again", *init, folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors: no such file; copy"):
        LLaVA.from_pretrained(folder)


def test_a_finished_checkpoint_brings_its_own_ways(flags, straight, tmp_path, capsys):
    """Fine-tuning goes on in the checkpoint's tiles, with its own canvases, whatever the recipe says of a new model; what is
    typed wins. A recipe's stage 2 applies to a stage 1."""
    argv = [*STAGE[2], *MLP, "--max_steps", 1, "--feature_layer", -1]
    train.main(flags(tmp_path / "next", *argv, "--aspect", "anyres", "--anyres", "hf"))
    config = json.loads((path := tmp_path / "next" / "config.json").read_text())
    config["minllava"]["tiling"]["pinpoints"] = [[28, 84]]
    path.write_text(json.dumps(config))
    start = [*STAGE[2], "--max_steps", 1, "--init", tmp_path / "next"]
    capsys.readouterr()
    train.main(flags(tmp_path / "own", *start, "--recipe", "toy", "--max_length", 2048, "--val_samples", 2))
    out = capsys.readouterr().out
    assert re.search(r"aspect +anyres +checkpoint", out) and re.search(r"projector +mlp2x_gelu +checkpoint", out)
    assert re.search(r"feature_layer +-1 +checkpoint", out)
    model, before = (LLaVA.from_pretrained(tmp_path / name) for name in ("own", "next"))
    assert model.view == before.view and model.view.tiling.pinpoints == [[28, 84]] and model.view.tiling.rule == "hf"
    model = build(flags(tmp_path / "pad", *start, "--aspect", "pad"))[2]
    assert model.view.aspect == "pad" and model.newline is None
    model = build(flags(tmp_path / "typed", *start, "--aspect", "anyres"))[2]
    assert model.view == before.view, "the aspect was typed as it is, and its canvases were lost"
    with pytest.raises(ValueError, match=r"canvases of its own, \[\[28, 84\]\], .*leave --anyres"):
        train.main(flags(tmp_path / "wrong", *start, "--anyres", "original"))
    with pytest.raises(ValueError, match="has projector mlp2x_gelu, not linear"):
        train.main(flags(tmp_path / "wrong", *start, "--projector", "linear"))
    model = build(flags(tmp_path / "hd", "--stage", 2, "--init", straight(1), "--aspect", "hd"))[2]
    assert model.view.aspect == "hd" and model.newline is not None
    argv = ["--recipe", "toy-hd", "--stage", "2", "--init", str(straight(1))]
    assert train.brought(*train.resolve(argv))[0].aspect == "hd", "a stage 1 does not say how stage 2 looks"


@pytest.mark.parametrize("argv, words", [
    (["--lr_g", "1e-4"], "--lr_g does nothing in stage 1"), (["--lora_rank", "4"], "--lora_rank does nothing in stage 1"),
    ([*STAGE[2], "--no-stage1_question"], "--stage1_question does nothing in stage 2"),
    ([*STAGE[2], "--lora_alpha", "4"], "--lora_alpha does nothing without --lora_rank"),
    (["--stage", "2", "--init", "INIT", "--llm", "x"], "--llm does nothing with --init"),
    ([*STAGE[2], "--anyres", "hf"], "--anyres hf is a rule of aspect anyres; the aspect is crop")])
def test_a_flag_without_effect_is_refused(argv, words, flags, straight, tmp_path):
    """A typed flag that nothing reads is a mistake."""
    with pytest.raises(ValueError, match=words):
        train.main(flags(tmp_path / "out", *(straight(1) if a == "INIT" else a for a in argv)))


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_every_recipe_resolves_in_both_stages(recipe):
    """A row of the table is a whole configuration; W has one shape through both stages."""
    one, _ = train.resolve(["--recipe", recipe, "--stage", "1"])
    two, _ = train.resolve(["--recipe", recipe, "--stage", "2", "--init", "none"])
    assert one.projector == two.projector and one.vision == two.vision and one.llm == two.llm and one.data and two.data
    assert one.aspect == "crop" and one.lr_g is None, "stage 1 looks at squares, with a frozen g"


def test_the_recipes_of_the_family_are_the_published_ones():
    """Diss. Sec. 4.3 and 4.7, and the released scripts: batch 256 at 1e-3, then 128 at 2e-5; LoRA 2e-4; g at 2e-6."""
    def of(recipe, stage):
        return train.resolve(["--recipe", recipe, "--stage", str(stage), "--init", "none"])[0]
    one, two, lora, hd, near = of("llava-1.5-7b", 1), of("llava-1.5-7b", 2), of("llava-1.5-7b-lora", 2), of(
        "llava-1.5-hd-13b", 2), of("llava-next-mistral-7b", 2)
    assert (one.lr, one.global_batch_size, one.epochs, one.stage1_question, one.template) == (1e-3, 256, 1, False, "vicuna_v1")
    assert (two.lr, two.global_batch_size, two.epochs, two.aspect, two.projector) == (2e-5, 128, 1, "pad", "mlp2x_gelu")
    assert (lora.lr, lora.lr_W, lora.lora_rank, lora.lora_alpha, lora.lora_dropout) == (2e-4, 2e-5, 128, 256, 0.05)
    assert (hd.aspect, hd.vision) == ("hd", "openai/clip-vit-large-patch14")
    assert (near.aspect, near.lr_g, near.max_length, near.template) == ("anyres", 2e-6, 4096, "mistral_instruct")
    sqa = of("scienceqa-13b", 2)
    assert (sqa.epochs, sqa.lr, sqa.global_batch_size) == (12, 2e-5, 32)
