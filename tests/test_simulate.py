"""Steps that compute nothing (extras/simulate.py) need as much, and count as much, as real ones."""
import dataclasses

import pytest
import torch
from conftest import byte_tokenizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

from extras import simulate
from model import LLaVA
from parts.ranks import Machine, Optimizer, groups_of
from parts.towers import CLIPTower
from parts.views import set_view
from train import count_answer_tokens, update

D, MLP, LAYERS, V, T, A, B = 256, 512, 4, 512, 256, 64, 4
ATTENTION = 4 * T * T * D * LAYERS       # FLOPs of a sample's, forward
CONFIG = simulate.Simulation(ranks=1, micro_batch_tokens=T * B, length=T, answers=A)


def build(config, settings):
    """A LLaVA of that small shape, with a CLIP of one layer that runs."""
    torch.manual_seed(0)
    g = CLIPTower(CLIPVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=2, image_size=28, patch_size=14))
    f_phi = LlamaForCausalLM(LlamaConfig(
        hidden_size=D, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=4,
        vocab_size=V))
    model = LLaVA(g, f_phi, byte_tokenizer())
    view = set_view(model, "crop")
    model.set_stage(config.stage)
    return model, view


def measured(config):
    """(bytes at the peak, FLOPs without attention) of a real step on the CPU, by torch's profiler
    of its allocator, and its counter, which knows the CPU's attention for none."""
    machine = Machine("cpu", "bf16")
    model, view = build(config, None)
    theta = machine.place(model, config.checkpoint_activations)
    optimizer = Optimizer(groups_of(theta, {"W": 1e-5, "f_phi": 1e-5}), machine)
    optimizer.set_lr(1.0)
    batches = [simulate.batch_of(model, view, config)] * config.micro_batches
    tensors = [*model.parameters(), *batches[0].values()]
    tensors += [moment for state in optimizer.adamw.state.values() for moment in state.values()]
    before = sum(t.nbytes for t in tensors if torch.is_tensor(t))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        update(model, batches, machine, optimizer, count_answer_tokens(batches))
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    with FlopCounterMode(display=False) as counter:
        update(model, batches, machine, optimizer, count_answer_tokens(batches))
    return before + peak, counter.get_total_flops()


@pytest.mark.parametrize("changes", [{"stage": 1}, {}, {"checkpoint_activations": "all"}])
def test_a_simulated_step_needs_what_a_real_one_does(changes):
    """Against torch's allocator and counter in a real step on the CPU."""
    config = dataclasses.replace(CONFIG, **changes)
    peak, flops, tokens = simulate.simulate(config, None, build)
    real_peak, real_flops = measured(config)
    assert tokens == 2 * B * T
    assert peak == pytest.approx(real_peak, rel=0.1)
    passes = 4.5 if config.checkpoint_activations == "all" else 3.5
    assert flops - 2 * B * ATTENTION * passes == pytest.approx(real_flops, rel=0.01)


def test_shards_need_less_than_a_whole_model():
    """Of 4 ranks, each holds a quarter of 16 bytes a parameter."""
    whole, _, _ = simulate.simulate(CONFIG, None, build)
    shard, _, _ = simulate.simulate(dataclasses.replace(CONFIG, ranks=4), None, build)
    parameters = sum(p.numel() for p in build(CONFIG, None)[0].f_phi.parameters())
    assert 0.5 < (whole - shard) / (16 * parameters * 3 / 4) < 1.5


def test_the_recipes_shapes_are_those_of_their_language_models(capsys):
    """7B has 6.74 billion parameters; a step's line says that it is simulated."""
    simulate.main("step --recipe llava-7b --stage 1 --ranks 1 --length 300 --micro_batch_tokens 1 "
                  "--micro_batches 1".split())
    shown = capsys.readouterr().out
    assert shown.startswith("SIMULATED")
    gigabytes = float(shown.split(" GB")[0].split()[-1])
    assert 13.5 + 0.6 < gigabytes < 17, "7B and CLIP in bf16, and a sample"


def test_without_torchs_private_hooks_nothing_is_simulated(monkeypatch):
    """They may be gone in another torch: a line says so, and what to do."""
    monkeypatch.setattr(simulate, "FakeTensorMode", None)
    with pytest.raises(ValueError, match="lacks the private hooks.*--dry_run measures"):
        simulate.main(["step"])
