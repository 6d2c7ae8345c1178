"""Low-rank adapters: the arithmetic by hand, what trains, merging, folders; PEFT is the oracle."""
import copy
import json
import sys

import pytest
import torch
from conftest import answer_logits, byte_tokenizer, refused, tiny_clip, tiny_llava, tiny_llm
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from model import LLaVA
from parts.checkpoints import save_adapter
from parts.lora import LoRA, adapters, add_adapters, merge
from parts.ranks import Machine

# qwen2 has biases, qwen3 and gemma3 more norms; phi3 has fewer, wider layers
FAMILIES = pytest.mark.parametrize("family, tied", [
    ("llama", False), ("mistral", False), ("qwen2", True), ("qwen3", False), ("gemma3", True),
    ("phi3", False)])
LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
FUSED = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]


def batch(rows=3, T=24):
    """Rows with one picture each; the second half of a row is scored."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (rows, T), generator=generator)
    ids[:, 2:6] = 259
    answers = torch.arange(rows * T).view(rows, T)[:, T // 2:]
    X_v = torch.randn(rows, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "answer_index": answers.flatten(), "X_v": X_v,
            "visual_index": torch.arange(4 * rows)}


@torch.no_grad()
def logits(model):
    return answer_logits(model, **batch())[0]


def theta_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def with_adapters(model, rank=4, alpha=8, dropout=0.0, trained=False):
    """As train.py would have it; `trained`: A, B and W are no longer as at the start."""
    model.set_stage(2)
    torch.manual_seed(2)
    add_adapters(model.f_phi, rank, alpha, dropout)
    if trained:
        for p in theta_of(model).values():
            p.data += 0.05 * torch.randn_like(p)
    return model


def copied(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def saved_adapter(folder, family="llama", tied=False):
    """(a model with trained adapters, the folder of its base, that of its adapter)"""
    model = tiny_llava(family, tied)
    for layer in model.f_phi.modules():  # a new Qwen2's are zero, so losing them would not show
        if getattr(layer, "bias", None) is not None:
            torch.nn.init.normal_(layer.bias, std=0.2)
    model.save_pretrained(folder / "base")
    model.meta |= {"init": str(folder / "base"), "aspect": "crop", "tiling": None}
    with_adapters(model, trained=True, dropout=0.05)
    save_adapter(model, folder / "adapter", model.state_dict())
    return model, folder / "base", folder / "adapter"


# -----------------------------------------------------------------------------
# The layer


def test_an_adapter_adds_alpha_over_r_B_A_x():
    """LoRA, h = W_0 x + (alpha / r) B A x, number by number."""
    torch.manual_seed(0)
    layer = LoRA(torch.nn.Linear(7, 5), rank=3, alpha=6, dropout=0.0)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(7)
    W_0, bias, A, B = (p.tolist() for p in (layer.weight, layer.bias, layer.lora_A, layer.lora_B))
    low = [sum(a * v for a, v in zip(row, x.tolist(), strict=True)) for row in A]
    for j, got in enumerate(layer(x).tolist()):
        want = bias[j] + sum(w * v for w, v in zip(W_0[j], x.tolist(), strict=True))
        want += 6 / 3 * sum(b * v for b, v in zip(B[j], low, strict=True))
        assert abs(got - want) < 1e-5, f"output {j} is {got}, by hand {want}"


def test_A_starts_as_in_released_runs_and_dropout_thins_what_it_sees_alone():
    """A is uniform within 1 / sqrt(in), B zero. W_0 sees all of x; of what A sees a share p is 0
    and the rest is divided by 1 - p, so that training sees the sizes of inference."""
    torch.manual_seed(0)
    layer = LoRA(torch.nn.Linear(400, 5), rank=64, alpha=128, dropout=0.25)
    A, bound = layer.lora_A.detach(), 400 ** -0.5
    assert not layer.lora_B.any() and 0.99 * bound < A.abs().max() <= bound
    assert abs(A.std().item() - bound / 3 ** 0.5) < 0.02 * bound, "A is not uniform over its range"
    layer.lora_A.data = torch.eye(64, 400)                   # A x is the first 64 of x's numbers
    layer.lora_B.data = torch.zeros(5, 64).fill_diagonal_(1.0)
    x = torch.ones(4000, 400)
    update = (layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)) / 2
    kept = update > 0.5
    torch.testing.assert_close(update, kept / 0.75, atol=1e-5, rtol=0)
    assert abs(kept.float().mean().item() - 0.75) < 0.02, "not a share of 0.25"


# -----------------------------------------------------------------------------
# What trains


@FAMILIES
def test_theta_is_W_and_an_adapter_on_each_linear_layer_of_f_phi_but_the_head(family, tied):
    """The released LoRA runs: every linear layer of the language model, and the full projector.
    B = 0: step 0 is the base, bit for bit."""
    model = tiny_llava(family, tied).to(torch.bfloat16)
    names = set(copied(model))
    inputs = batch() | {"X_v": batch()["X_v"].to(torch.bfloat16)}
    before = answer_logits(model, **inputs)[0]
    theta = theta_of(with_adapters(model))
    assert torch.equal(before, answer_logits(model, **inputs)[0])
    linear = FUSED if family == "phi3" else LINEAR
    want = {f"f_phi.model.layers.{i}.{x}.lora_{m}" for i in range(2) for x in linear for m in "AB"}
    assert theta.keys() == want | {"W.weight", "W.bias"}, "theta is not {W, A, B}"
    assert set(copied(model)) == names | want, "a weight of the base has another name now"
    assert {theta[name].dtype for name in want} == {torch.float32}, "bf16 loses small steps"
    assert not any(module.training for module in model.f_phi.modules()), "dropout would be on"


@pytest.mark.parametrize("D, inner, layers, count", [
    (4096, 11008, 32, 319_815_680), (5120, 13824, 40, 500_695_040)], ids=["7B", "13B"])
def test_the_recipe_on_vicuna_trains_320M_or_501M_parameters(D, inner, layers, count):
    """r 128: 128 (in + out) for q, k, v, o (D, D), gate and up (D, inner), down (inner, D)."""
    assert count == layers * 128 * (4 * (D + D) + 3 * (D + inner))
    config = LlamaConfig(hidden_size=D, intermediate_size=inner, num_hidden_layers=layers,
                         num_attention_heads=D // 128, vocab_size=32064)
    with torch.device("meta"):
        f_phi = LlamaForCausalLM(config)
    add_adapters(f_phi, rank=128, alpha=256, dropout=0.05)
    assert sum(p.numel() for p in f_phi.parameters() if p.requires_grad) == count


def loss_with(model, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    loss, _ = model(**batch())
    loss.backward()                      # recomputes the logits: the masks must be the same
    return loss.item(), [p.grad.clone() for p in theta_of(model).values()]


def test_dropout_is_a_function_of_the_seed_and_off_without_gradients():
    """A run resumes exactly, for it seeds each step anew; answers and held-out losses have none."""
    model = with_adapters(tiny_llava(), trained=True, dropout=0.3)
    plain = with_adapters(tiny_llava(), trained=True)
    a, a_grads = loss_with(model, 7)
    other, _ = loss_with(model, 8)
    b, b_grads = loss_with(model, 7)
    assert a == b and all(torch.equal(x, y) for x, y in zip(a_grads, b_grads, strict=True))
    assert a != other, "another step has the same masks"
    assert torch.equal(logits(model), logits(plain))


# -----------------------------------------------------------------------------
# Merging


def transformers_logits(model):
    """The logits of the scored tokens, of a LlavaForConditionalGeneration or PEFT around it."""
    inputs = batch()
    out = model.eval()(input_ids=inputs["input_ids"], pixel_values=inputs["X_v"],
                       attention_mask=torch.ones(3, 24))
    return out.logits.flatten(0, 1)[inputs["answer_index"] - 1]


@FAMILIES
def test_merged_and_unmerged_logits_agree(family, tied, tmp_path):
    """W_0 + (alpha / r) B A is a plain checkpoint: for us, for transformers, and made of the
    adapter's folder."""
    model, base, adapter = saved_adapter(tmp_path, family, tied)
    kept = load_file(adapter / "adapter_model.safetensors")
    for name, p in theta_of(model).items():
        if "lora_" in name:
            name = name.replace("f_phi.model.", "base_model.model.model.language_model.")
            assert torch.equal(kept[f"{name}.weight"], p), f"{name} is another one in its folder"
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_dropout"] == 0.05
    want = logits(model)
    assert (want - logits(LLaVA.from_pretrained(base))).abs().max() > 0.5, "they do nothing"
    before = copied(model)
    model.save_pretrained(tmp_path)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    merged = LLaVA.from_pretrained(tmp_path)
    assert not adapters(merged)
    theirs = transformers_logits(AutoModelForImageTextToText.from_pretrained(tmp_path))
    for got in (logits(merged), logits(LLaVA.from_pretrained(adapter)), theirs):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    kept = {name: p.bfloat16() if "lora_A" in name else p.float() for name, p in kept.items()}
    save_file(kept, adapter / "adapter_model.safetensors")
    LLaVA.from_pretrained(adapter)       # of two formats: they are multiplied in fp32


def test_a_merge_in_bf16_rounds_once():
    """W_0 is bf16, A and B are fp32: the sum is made in fp32, and is the nearest bf16 number."""
    W_0, A, B = torch.randn(64, 64).bfloat16(), torch.randn(3, 64), torch.randn(64, 3)
    want = (W_0.double() + 2.0 * B.double() @ A.double()).bfloat16()
    got = merge(W_0, A, B, 2.0)
    assert got.dtype == torch.bfloat16 and (got != want).float().mean() < 0.001


# -----------------------------------------------------------------------------
# The adapter's folder


def test_an_adapter_without_its_base_or_its_weights_is_refused(tmp_path):
    """The message says which base it wants, and where to write that it lies elsewhere."""
    _, base, adapter = saved_adapter(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    with refused("adapter_model.safetensors: not a whole file"):
        LLaVA.from_pretrained(adapter)
    base.rename(tmp_path / "moved")
    with refused(adapter, base, "base_model_name_or_path", "merged"):
        LLaVA.from_pretrained(adapter)


def test_an_adapter_on_another_model_is_refused(tmp_path):
    """A base of other shapes, or with fewer layers: the message names it."""
    _, base, adapter = saved_adapter(tmp_path)
    for change in ({"intermediate_size": 104}, {"num_hidden_layers": 1}):
        LLaVA(tiny_clip(), tiny_llm(**change), byte_tokenizer()).save_pretrained(base)
        with refused(adapter, base, "an adapter of another model"):
            LLaVA.from_pretrained(adapter)


@pytest.mark.parametrize("file, change, words", [
    ("adapter_config.json", {"use_rslora": True}, ["use_rslora True"]),
    ("adapter_config.json", {"alpha_pattern": {"q_proj": 4}}, ["alpha_pattern"]),
    ("adapter_config.json", {"peft_type": "LOHA"}, ["peft_type 'LOHA'"]),
    ("adapter_config.json", {"r": "4"}, ["r: '4'", "a whole number"]),
    ("adapter_config.json", {"r": 8}, ["rank than 8", "(4, "]),
    ("adapter_config.json", {"r": -1}, ["rank -1"]),
    ("adapter_config.json", {"modules_to_save": None}, ["modules_to_save than None", "projector"]),
    ("adapter_config.json", {"lora_alpha": None}, ["lora_alpha: None", "a number"]),
    ("minllava.json", {"template": []}, ["template []"]),
    ("minllava.json", {"aspect": "anyres"}, ["'anyres'", "tiling"])])
def test_an_adapter_of_another_kind_is_refused(file, change, words, tmp_path):
    """As plain LoRA on our model it would be another one, or end in a traceback."""
    _, _, adapter = saved_adapter(tmp_path)
    settings = json.loads((adapter / file).read_text())
    (adapter / file).write_text(json.dumps(settings | change))
    with refused(adapter, *words):
        LLaVA.from_pretrained(adapter)


def test_an_adapter_whose_weights_are_not_ours_is_refused(tmp_path):
    """PEFT would train linear_2, too, and then W is not one linear layer; NaN is no weight."""
    _, _, adapter = saved_adapter(tmp_path)
    state = load_file(adapter / "adapter_model.safetensors")
    for end, factor, words in (("linear_2.weight", 2, "linear_2"), ("q_proj.lora_B.weight",
                               torch.nan, "NaN or infinite numbers in 2")):
        change = {name: factor * value for name, value in state.items() if name.endswith(end)}
        save_file(state | change, adapter / "adapter_model.safetensors")
        with refused(words):
            LLaVA.from_pretrained(adapter)


@pytest.mark.parametrize("end, new, words", [
    ("linear_1.bias", None, "are missing"),
    ("embed_tokens.weight", torch.zeros(320, 48), "are not of this model"),
    ("layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 1), "another shape")])
def test_an_adapter_is_loaded_strictly(end, new, words, tmp_path):
    """Without a part of W, with a weight that is frozen, or with an A that fits by broadcasting it
    would be another model, and nobody would know."""
    _, _, adapter = saved_adapter(tmp_path)
    path = adapter / "adapter_model.safetensors"
    state = {name: value for name, value in load_file(path).items() if not name.endswith(end)}
    if new is not None:
        state[f"base_model.model.model.language_model.{end}"] = new
    save_file(state, path)
    with refused(words, end):
        LLaVA.from_pretrained(adapter)


def test_adapters_are_merged_with_the_weights_that_they_began_with_alone(tmp_path):
    """Who writes another model to --init meanwhile is told, and not given a mixture."""
    model, base, _ = saved_adapter(tmp_path)
    other = tiny_llava()
    other.f_phi.get_input_embeddings().weight.data += 1
    other.save_pretrained(base)
    with refused(base, "other weights now"):
        model.save_pretrained(tmp_path / "out")


# -----------------------------------------------------------------------------
# PEFT, the oracle


@FAMILIES
def test_peft_reads_and_trains_our_adapter_as_we_do(family, tied, tmp_path):
    """PeftModel on transformers' LLaVA of the base: equal logits, gradients, greedy answers."""
    peft = pytest.importorskip("peft")
    model, base, adapter = saved_adapter(tmp_path, family, tied)
    theirs = AutoModelForImageTextToText.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter, is_trainable=True)
    want = transformers_logits(theirs)
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
    inputs = batch()
    for layer in adapters(model).values():
        layer.dropout = 0.0
    model(**inputs)[0].backward()
    targets = inputs["input_ids"][:, 12:].flatten()
    torch.nn.functional.cross_entropy(want, targets, reduction="sum").backward()
    mine = {name: p.grad for name, p in theta_of(model).items() if "lora_" in name}
    grads = {name.replace("base_model.model.model.language_model.", "f_phi.model.")
             .removesuffix(".default.weight"): p.grad
             for name, p in theirs.named_parameters() if "lora_" in name}
    assert grads.keys() == mine.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(mine[name], grad, atol=1e-4, rtol=1e-4)

    del inputs["answer_index"]
    mask = torch.ones(3, 24, dtype=torch.long)
    ids = theirs.generate(input_ids=inputs["input_ids"], attention_mask=mask, max_new_tokens=6,
                          pixel_values=inputs["X_v"], do_sample=False, suppress_tokens=[259])
    answers = model.generate(**inputs, attention_mask=mask, max_new_tokens=6)
    assert answers == [model.to_text(row) for row in ids[:, 24:].tolist()]


@pytest.mark.parametrize("family, layers", [("qwen2", LINEAR), ("llama", LINEAR[:3:2])])
def test_we_read_pefts_adapter_as_peft_does(family, layers, tmp_path):
    """The other direction, also of q and v alone without W: equal names and logits."""
    peft = pytest.importorskip("peft")
    _, base, adapter = saved_adapter(tmp_path, family)
    names = "|".join(name.split(".")[1] for name in layers)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=rf"model\.language_model\..*\.({names})",
        task_type="CAUSAL_LM", modules_to_save=["multi_modal_projector"] if "|o" in names else None)
    theirs = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(base), config)
    torch.manual_seed(4)
    for name, p in theirs.named_parameters():
        if p.requires_grad and "linear_2" not in name:
            p.data += 0.05 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "theirs")
    if layers == LINEAR:
        shapes = [{name: value.shape for name, value in
                   load_file(folder / "adapter_model.safetensors").items()}
                  for folder in (tmp_path / "theirs", adapter)]
        assert shapes[0] == shapes[1], "our names are not PEFT's"
    ours = LLaVA.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), transformers_logits(theirs), atol=1e-4, rtol=1e-4)


# -----------------------------------------------------------------------------
# W_0 in 4 bits


def wide_llava():
    """Every layer's input is a multiple of 64 wide, as in all real models."""
    llm = tiny_llm(hidden_size=64, intermediate_size=128)
    return LLaVA(tiny_clip(), llm, byte_tokenizer()).eval()


def test_4_bits_are_those_of_QLoRA_and_change_the_logits_little(tmp_path):
    """arXiv 2305.14314: 16 numbers, a scale for each 64 weights; gradients reach A, B and W through
    W_0, which stays; the checkpoint is the whole W_0 with A and B merged."""
    pytest.importorskip("bitsandbytes")
    plain = wide_llava()
    plain.save_pretrained(tmp_path / "base")
    model = with_adapters(copy.deepcopy(plain), trained=True)
    whole = copy.deepcopy(model)
    model.meta["init"] = str(tmp_path / "base")
    theta = Machine("cpu", "nf4").place(model)
    assert theta.keys() == theta_of(whole).keys()
    by_hand = copy.deepcopy(whole)
    for name, layer in adapters(model).items():
        W_0 = by_hand.get_submodule(name).weight
        assert (layer.weight.dtype, layer.weight.numel()) == (torch.uint8, W_0.numel() // 2)
        W_0.data = nf4_by_hand(W_0, layer.blocks.code)
    difference = (logits(model) - logits(by_hand)).abs().mean() / logits(whole).std()
    assert difference < 0.02, f"the scales are 8 bits of their own, no more: {difference}"
    (loss, n), (exact, _) = model(**batch()), whole(**batch())
    assert 1e-3 < abs(loss - exact) / n < 0.3, f"a loss of {loss / n} for {exact / n}"

    packed = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(theta.values(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss, n = model(**batch())
        (loss / n).backward()
        optimizer.step()
        losses.append(loss.item() / n)
    assert losses[-1] < losses[0] - 0.05
    moved = {name for name, p in model.named_parameters() if not torch.equal(packed[name], p)}
    assert moved == theta.keys()

    model.save_pretrained(tmp_path / "out")
    whole.load_state_dict({name: p.data for name, p in theta.items()}, strict=False)
    for folder in ("out", "out/adapter"):
        merged = LLaVA.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(merged), logits(whole), atol=1e-5, rtol=1e-5)


def nf4_by_hand(W, code):
    blocks = W.detach().view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / scales[..., None] - code).abs().argmin(-1)
    return (code[nearest] * scales).view(W.shape)


def test_4_bits_without_their_library_are_refused(monkeypatch):
    """The message says what to install, before anything is loaded."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="--dtype nf4 needs bitsandbytes: pip install"):
        Machine("cpu", "nf4")
