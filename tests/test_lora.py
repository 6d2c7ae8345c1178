"""Low-rank adapters: the arithmetic by hand, what trains, merging, resuming, and PEFT as the oracle where it is installed."""
import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

import train
from conftest import answer_logits, byte_tokenizer, tiny_clip, tiny_llava, tiny_llm
from lora import LoRA, adapters, add_adapters, base_of, dropout_on, load_adapter, merge, merged_state, save_adapter
from model import LLaVA

FAMILIES = ["llama", "mistral", "qwen2"]                  # Qwen2's q, k and v have a bias
LINEAR = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def batch(rows=3, T=24, seed=0):
    """Rows with one picture each; the second half of a row is scored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (rows, T), generator=generator)
    ids[:, 2:6], labels = 259, ids.clone()
    labels[:, :T // 2] = -100
    return {"input_ids": ids, "labels": labels, "X_v": torch.randn(rows, 3, 28, 28, generator=generator)}


def logits(model):
    return answer_logits(model, **batch())[0]


def theta_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def with_adapters(model, rank=4, alpha=8, dropout=0.0, trained=False):
    """As train.py would have it; `trained`: A, B and W are no longer what they were at the start."""
    model.set_stage(2)
    torch.manual_seed(2)
    add_adapters(model.f_phi, rank, alpha, dropout)
    if trained:
        for p in theta_of(model).values():
            p.data += 0.05 * torch.randn_like(p)
    return model


def copied(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def one_layer(rank=3, alpha=6, dropout=0.0, D_in=7, D_out=5):
    torch.manual_seed(0)
    layer = LoRA(torch.nn.Linear(D_in, D_out), rank, alpha, dropout).eval()
    torch.nn.init.normal_(layer.lora_B)
    return layer


def saved_adapter(folder, family="llama", **how):
    """(a model with trained adapters, the folder of its base, that of its adapter)"""
    model = tiny_llava(family)
    model.save_pretrained(folder / "base")
    save_adapter(with_adapters(model, trained=True, **how), folder / "adapter", str(folder / "base"))
    return model, folder / "base", folder / "adapter"


# ---------------------------------------------------------------------------------------------------------------------
# The layer


def test_an_adapter_adds_alpha_over_r_B_A_x():
    """LoRA, h = W_0 x + (alpha / r) B A x, number by number."""
    layer = one_layer()
    x = torch.randn(2, 4, 7)
    got = layer(x)
    W_0, bias, A, B = (p.tolist() for p in (layer.weight, layer.bias, layer.lora_A, layer.lora_B))
    for i in range(2):
        for t in range(4):
            row = x[i, t].tolist()
            low = [sum(a * v for a, v in zip(A[k], row)) for k in range(3)]
            for j in range(5):
                want = bias[j] + sum(w * v for w, v in zip(W_0[j], row)) + 6 / 3 * sum(b * v for b, v in zip(B[j], low))
                assert abs(got[i, t, j].item() - want) < 1e-5, f"output {j} is {got[i, t, j].item()}, by hand {want}"


def test_A_starts_uniform_and_B_zero():
    """LoRA's start as in the released runs: A kaiming-uniform with a = sqrt(5), so within 1 / sqrt(in); B zero."""
    torch.manual_seed(0)
    layer = LoRA(torch.nn.Linear(400, 30), 64, 128, 0.0)
    A, bound = layer.lora_A.detach(), 400 ** -0.5
    assert not layer.lora_B.any()
    assert 0.99 * bound < A.max() <= bound and -bound <= A.min() < -0.99 * bound
    assert abs(A.std().item() - bound / 3 ** 0.5) < 0.02 * bound, "A is not uniform over its range"


def test_dropout_thins_what_A_sees_and_nothing_else():
    """LLaVA-1.5's 0.05 is on A's input: W_0 sees all of x, and what is kept is scaled by 1 / (1 - p)."""
    layer = one_layer(dropout=0.25, D_in=400, D_out=5, rank=1)
    torch.nn.init.ones_(layer.lora_A)
    torch.nn.init.ones_(layer.lora_B)
    x = torch.ones(1000, 400)
    base = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x) - base, torch.full((1000, 5), 6.0 * 400), msg=lambda m: f"outside training: {m}")
    update = layer.train()(x) - base                      # (1000, 5), one number five times, as B is all ones
    torch.testing.assert_close(update, update[:, :1].expand(-1, 5), msg=lambda m: f"W_0 sees dropout too: {m}")
    low = update[:, 0] / 6                                # (1000,) how many of 400 were kept, each as 1 / 0.75
    assert abs(low.mean().item() - 400) < 2, "what is kept is not scaled: training sees other sizes than inference"
    assert abs((low * 0.75).std().item() - (400 * 0.25 * 0.75) ** 0.5) < 0.6, "the share that is dropped is not 0.25"


# ---------------------------------------------------------------------------------------------------------------------
# What trains


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_nothing_at_the_start(family, dtype):
    """B = 0: step 0 of LoRA is the base, bit for bit."""
    model = tiny_llava(family).to(dtype)
    inputs = batch() | {"X_v": batch()["X_v"].to(dtype)}
    before = answer_logits(model, **inputs)[0]
    after = answer_logits(with_adapters(model), **inputs)[0]
    assert torch.equal(before, after), f"off by {(before - after).abs().max()}: training would not start from the base"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_theta_is_W_and_an_adapter_on_each_linear_layer_of_f_phi_but_the_head(family, tied):
    """The released LoRA runs: every linear layer of the language model, no head, no CLIP, and the full projector."""
    model = tiny_llava(family, tied).to(torch.bfloat16)
    names = set(copied(model))
    theta = theta_of(with_adapters(model, rank=4))
    want = {f"f_phi.model.layers.{i}.{x}.lora_{m}" for i in range(2) for x in LINEAR for m in "AB"}
    assert theta.keys() == want | {"W.weight", "W.bias"}, "theta is not {W, A, B}"
    assert set(copied(model)) == names | want, "a weight of the base has another name now: checkpoints would not fit"
    assert {theta[name].dtype for name in want} == {torch.float32}, "in bf16, small steps are lost in rounding"
    assert {p.dtype for name, p in model.named_parameters() if name not in want} == {torch.bfloat16}
    assert not any(module.training for module in model.f_phi.modules()), "dropout would be on in a model that is in eval mode"
    for name, layer in adapters(model).items():
        assert layer.lora_A.shape == (4, layer.in_features) and layer.lora_B.shape == (layer.out_features, 4), name


@pytest.mark.parametrize("D, inner, layers, count", [(4096, 11008, 32, 319_815_680), (5120, 13824, 40, 500_695_040)],
                         ids=["7B", "13B"])
def test_the_recipe_on_vicuna_trains_320M_or_501M_parameters(D, inner, layers, count):
    """r 128: 128 (in + out) for q, k, v, o (D, D), gate and up (D, inner) and down (inner, D) of each layer."""
    assert count == layers * 128 * (4 * (D + D) + 3 * (D + inner))
    with torch.device("meta"):
        f_phi = LlamaForCausalLM(LlamaConfig(hidden_size=D, intermediate_size=inner, num_hidden_layers=layers,
                                             num_attention_heads=D // 128, vocab_size=32064))
    add_adapters(f_phi, rank=128, alpha=256, dropout=0.05)
    assert sum(p.numel() for p in f_phi.parameters() if p.requires_grad) == count
    assert len(adapters(f_phi)) == 7 * layers


def test_training_moves_theta_and_nothing_else():
    """Eq. (3)'s gradient reaches A, B and W; the base and CLIP stay as they are, bit for bit."""
    model = with_adapters(tiny_llava(), dropout=0.05)
    theta, before = theta_of(model), copied(model)
    optimizer = torch.optim.AdamW(theta.values(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        with dropout_on(model.f_phi, 0, step, 0):
            loss, n = model(**batch())
            (loss / n).backward()
        optimizer.step()
        losses.append(loss.item() / n)
    after = copied(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == theta.keys(), f"not trained: {theta.keys() - moved}; changed though frozen: {moved - theta.keys()}"
    assert losses[-1] < losses[0] - 0.05, f"the loss does not fall: {losses}"


def test_a_bf16_base_trains_fp32_adapters_under_autocast_and_generates_without():
    """A frozen base may be bf16: gradients of A and B are fp32, and no cast is left to the caller."""
    model = with_adapters(tiny_llava().to(torch.bfloat16), trained=True)
    model.W.float()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch())[0].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in theta_of(model).values())
    prompt = {"input_ids": batch()["input_ids"], "attention_mask": torch.ones(3, 24, dtype=torch.long),
              "X_v": batch()["X_v"].to(torch.bfloat16)}
    model.W.to(torch.bfloat16)
    assert len(model.generate(**prompt, max_new_tokens=3)) == 3


@pytest.mark.parametrize("settings", [dict(rank=0, alpha=1), dict(rank=4, alpha=0), dict(rank=4, alpha=8, dropout=1.0)])
def test_settings_that_cannot_train_are_refused(settings):
    """Rank 0 has nothing to train, alpha 0 no effect, dropout 1 no input."""
    with pytest.raises(ValueError, match="rank .* alpha .* dropout"):
        add_adapters(tiny_llm(), **settings)
    with pytest.raises(AssertionError, match="already"):
        add_adapters(with_adapters(tiny_llava()).f_phi, 4, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout and resuming


def loss_with(model, *seed):
    model.zero_grad()
    with dropout_on(model.f_phi, *seed):
        loss, _ = model(**batch())
        loss.backward()
    return loss.item(), [p.grad.clone() for p in theta_of(model).values()]


def test_dropout_is_a_function_of_its_seed_and_off_outside():
    """A run resumes exactly because masks depend on (seed, step, rank); what is outside training sees no dropout at all."""
    model, plain = (with_adapters(tiny_llava(), trained=True, dropout=p) for p in (0.3, 0.0))
    torch.rand(5)                                         # the state of the global generator does not matter
    (a, a_grads), (other_step, _), (other_rank, _), (b, b_grads) = (loss_with(model, *s)
                                                                   for s in ((7, 0, 0), (7, 1, 0), (7, 0, 1), (7, 0, 0)))
    assert a == b and all(torch.equal(x, y) for x, y in zip(a_grads, b_grads)), "the same seed gives other masks"
    assert len({a, other_step, other_rank}) == 3, "another step or rank gives the same masks"
    assert torch.equal(logits(model), logits(plain)), "dropout is on outside training"
    with pytest.raises(RuntimeError), dropout_on(model.f_phi, 0):
        raise RuntimeError
    assert torch.equal(logits(model), logits(plain)), "dropout stays on after an error"


def test_without_adapters_nothing_is_seeded():
    """`dropout_on` stands in the loop of every run; one without adapters is what it was."""
    f_phi, state = tiny_llm(), torch.get_rng_state()
    with dropout_on(f_phi, 1, 2, 3):
        assert torch.equal(torch.get_rng_state(), state)


def run_steps(first, last, folder, resume=False):
    """Steps `first` to `last` of a training run as train.py has them, saved at their end by train.py's own functions."""
    model = with_adapters(tiny_llava(), dropout=0.1)
    theta, config, scaler = theta_of(model), train.Config(), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.AdamW(theta.values(), lr=1e-3, weight_decay=0.0)
    for p in theta.values():
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    if resume:
        assert train.load_state(str(folder), config, theta, optimizer, scaler, 0) == first
    for step in range(first, last):
        optimizer.zero_grad()
        with dropout_on(model.f_phi, config.seed, step, 0):
            model(**batch(seed=step))[0].backward()
        optimizer.step()
    train.save_state(str(folder), last, config, theta, optimizer, scaler, 0)
    return copied(model)


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path):
    """Exact resume with dropout on: A, B and W are saved by name, the masks are a function of the step."""
    want = run_steps(0, 5, tmp_path / "whole")
    run_steps(0, 2, tmp_path / "cut")
    got = run_steps(2, 5, tmp_path / "cut", resume=True)
    for name in want:
        assert torch.equal(got[name], want[name]), f"{name} differs by {(got[name] - want[name]).abs().max()} after a resume"
    state = load_file(tmp_path / "cut" / "step_00000005" / "part_00000.safetensors")
    assert "theta/f_phi.model.layers.1.mlp.up_proj.lora_A" in state
    assert not any(name.endswith("up_proj.weight") for name in state), "what is frozen is saved, too"


# ---------------------------------------------------------------------------------------------------------------------
# Merging


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_unmerged_logits_agree(family, tied, tmp_path):
    """W_0 + (alpha / r) B A is a plain checkpoint: for us, from its folder, and for transformers."""
    plain = tiny_llava(family, tied)
    for layer in plain.f_phi.modules():                   # a new Qwen2's are zero, so that losing them would not show
        if getattr(layer, "bias", None) is not None:
            torch.nn.init.normal_(layer.bias, std=0.2)
    model = with_adapters(copy.deepcopy(plain), trained=True)
    plain.W.load_state_dict(model.W.state_dict())
    unmerged, state = logits(model), {k: v.clone() for k, v in merged_state(model, model.state_dict()).items()}
    assert (unmerged - logits(plain)).abs().max() > 0.5, "the adapters do nothing, so that this test says nothing"
    assert torch.equal(logits(model), unmerged), "merged_state changed the model that trains on"
    merge(model.f_phi)
    assert model.state_dict().keys() == plain.state_dict().keys() and not adapters(model)
    assert {name: type(m) for name, m in model.named_modules()} == {name: type(m) for name, m in plain.named_modules()}
    torch.testing.assert_close(logits(model), unmerged, atol=1e-5, rtol=1e-5)
    assert state.keys() == model.state_dict().keys() and model.tied == tied
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items()), "merged_state is not what merge makes"
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LLaVA.from_pretrained(tmp_path)), unmerged, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(transformers_logits(AutoModelForImageTextToText.from_pretrained(tmp_path)), unmerged,
                               atol=1e-5, rtol=1e-5)


def transformers_logits(model):
    """The logits that predict the scored tokens, of a LlavaForConditionalGeneration (or of PEFT around it)."""
    inputs = batch()
    out = model.eval()(input_ids=inputs["input_ids"], pixel_values=inputs["X_v"], attention_mask=torch.ones(3, 24)).logits
    return out[:, :-1][inputs["labels"][:, 1:] != -100]


def test_a_merge_in_bf16_rounds_once():
    """W_0 is bf16, A and B are fp32: the sum is made in fp32, so that it is the nearest bf16 number."""
    layer = one_layer(D_in=64, D_out=64)
    layer.weight.data = layer.weight.data.to(torch.bfloat16)
    want = (layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()).to(torch.bfloat16)
    got = layer.merged(layer.weight, layer.lora_A, layer.lora_B)
    assert got.dtype == torch.bfloat16 and (got != want).float().mean() < 0.001, "more than ties are rounded to other numbers"


# ---------------------------------------------------------------------------------------------------------------------
# The adapter folder


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_its_base_is_the_model_that_was_saved(family, tmp_path):
    """Base and adapter, two folders: every bit of A, B and W comes back, and the settings do."""
    model, base, adapter = saved_adapter(tmp_path, family, dropout=0.05)
    assert base_of(adapter) == str(base)
    loaded = load_adapter(LLaVA.from_pretrained(base_of(adapter)), adapter)
    assert copied(loaded).keys() == copied(model).keys()
    for name, p in copied(model).items():
        assert torch.equal(copied(loaded)[name], p), f"{name} is not what was saved"
    for ours, theirs in zip(adapters(model).values(), adapters(loaded).values()):
        assert (ours.alpha, ours.scale, ours.dropout) == (theirs.alpha, theirs.scale, theirs.dropout) == (8, 2, 0.05)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_names_modules_of_transformers_LLaVA(family, tmp_path):
    """PEFT's names: base_model.model, then a module of LlavaForConditionalGeneration; its pattern finds f_phi's alone."""
    _, base, adapter = saved_adapter(tmp_path, family)
    config, state = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / "adapter_model.safetensors")
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"], config["bias"]) == (str(base), 4, 8, "none")
    modules = dict(AutoModelForImageTextToText.from_pretrained(base).named_modules())
    targets = {name for name in modules if re.fullmatch(config["target_modules"], name)}
    want = {f"base_model.model.{name}.lora_{x}.weight" for name in targets for x in "AB"}
    want |= {f"base_model.model.model.multi_modal_projector.linear_{i}.{x}" for i in (1, 2) for x in ("weight", "bias")}
    assert len(targets) == 14 and state.keys() == want
    for name in targets:
        A, B = (state[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert (B @ A).shape == modules[name].weight.shape, f"{name}: an adapter of another shape"


def message_of(error, *words):
    assert all(word in str(error.value) for word in words), f"the message should name {words}: {error.value}"
    assert "\n" not in str(error.value) and len(str(error.value)) < 700, f"not one line: {error.value}"


def test_an_adapter_without_its_base_is_refused(tmp_path):
    """An adapter alone is no model; the message says which base it wants, and where to write that it lies elsewhere."""
    _, base, adapter = saved_adapter(tmp_path)
    base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError) as error:
        base_of(adapter)
    message_of(error, str(adapter), str(base), "base_model_name_or_path", "merged")
    with pytest.raises(FileNotFoundError) as error:
        base_of(tmp_path / "moved")
    message_of(error, str(tmp_path / "moved"), "adapter_config.json", "--lora_rank")


def test_an_adapter_on_another_model_is_refused(tmp_path):
    """A base of other shapes, or with layers more or fewer: what does not fit is named, and the base to pass."""
    _, base, adapter = saved_adapter(tmp_path)
    wider = tiny_llm()
    wider.model.layers[1].mlp.up_proj = torch.nn.Linear(48, 104, bias=False)
    shallow = tiny_llm()
    shallow.model.layers = shallow.model.layers[:1]
    for f_phi, key in ((wider, "layers.1.mlp.up_proj.lora_B"), (shallow, "layers.1.mlp.down_proj.lora_A")):
        with pytest.raises(ValueError) as error:
            load_adapter(LLaVA(tiny_clip(), f_phi, byte_tokenizer()), adapter)
        message_of(error, str(adapter), str(base), key)


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 4}}, {"peft_type": "LOHA"},
                                    {"modules_to_save": None}])
def test_an_adapter_of_another_kind_is_refused(change, tmp_path):
    """PEFT scales such adapters in another way; read as plain LoRA they would be another model, silently."""
    _, base, adapter = saved_adapter(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError) as error:
        load_adapter(LLaVA.from_pretrained(base), adapter)
    message_of(error, "adapter_config.json", *change, str(*change.values()))


def test_an_adapter_whose_projector_is_not_W_is_refused(tmp_path):
    """A linear W is `linear_1 = W, linear_2 = I`; PEFT would train linear_2 too, and then W is not one linear layer."""
    _, base, adapter = saved_adapter(tmp_path)
    state = load_file(adapter / "adapter_model.safetensors")
    key = next(k for k in state if k.endswith("linear_2.weight"))
    save_file(state | {key: 2 * state[key]}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="linear_2"):
        load_adapter(LLaVA.from_pretrained(base), adapter)


# ---------------------------------------------------------------------------------------------------------------------
# PEFT, the oracle


def randomised(peft_model):
    torch.manual_seed(4)
    for name, p in peft_model.named_parameters():
        if p.requires_grad and "linear_2" not in name:
            p.data += 0.05 * torch.randn_like(p)
    return peft_model


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_our_adapter_as_we_do(family, tmp_path):
    """PeftModel on transformers' LLaVA of the base: the same logits with adapters, merged by PEFT, and in `generate`."""
    peft = pytest.importorskip("peft")
    model, base, adapter = saved_adapter(tmp_path, family)
    theirs = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    torch.testing.assert_close(transformers_logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    inputs = {"input_ids": batch()["input_ids"], "attention_mask": torch.ones(3, 24, dtype=torch.long)}
    ids = theirs.generate(**inputs, pixel_values=batch()["X_v"], max_new_tokens=6, do_sample=False, suppress_tokens=[259])
    assert [model.to_text(row) for row in ids[:, 24:].tolist()] == model.generate(**inputs, X_v=batch()["X_v"],
                                                                                 max_new_tokens=6)
    torch.testing.assert_close(transformers_logits(theirs.merge_and_unload()), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_and_train_pefts_adapter_as_peft_does(family, tmp_path):
    """The other direction: PEFT's folder on our model; the same names, logits, loss and gradients."""
    peft = pytest.importorskip("peft")
    _, base, adapter = saved_adapter(tmp_path, family)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=settings["target_modules"], task_type="CAUSAL_LM",
                             modules_to_save=["multi_modal_projector"])
    theirs = randomised(peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(base), config))
    theirs.save_pretrained(tmp_path / "theirs")
    want, got = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "theirs", adapter))
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}, "our names are not PEFT's"
    ours = load_adapter(LLaVA.from_pretrained(base_of(tmp_path / "theirs")), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), transformers_logits(theirs), atol=1e-5, rtol=1e-5)
    ours(**batch())[0].backward()
    inputs = batch()
    torch.nn.functional.cross_entropy(transformers_logits(theirs), inputs["labels"][:, 1:][inputs["labels"][:, 1:] != -100],
                                      reduction="sum").backward()
    grads = {name.removeprefix("base_model.model.model.language_model.").removesuffix(".default.weight"): p.grad
             for name, p in theirs.named_parameters() if "lora_" in name}
    mine = {name.removeprefix("f_phi.model."): p.grad for name, p in theta_of(ours).items() if "lora_" in name}
    assert grads.keys() == mine.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(mine[name], grad, atol=1e-4, rtol=1e-4, msg=lambda m: f"the gradient of {name}: {m}")
