"""Every kind of language model beside every kind of vision tower, as train.py puts them together.

transformers is the oracle: its model from the folder that ours saved, its processor there, its
generate. Tokenizers are tiny ones of each family's own class, with that family's special tokens.
"""
import itertools
import json
import os
import random
import re
import socket
from typing import NamedTuple

import pytest
import torch
from conftest import (
    FORKS,
    ROOT,
    answer_logits,
    save_parts,
    tiny_clip,
    tiny_llm,
    tiny_siglip,
)
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    GemmaTokenizer,
    GPT2Config,
    GPT2Tokenizer,
    GraniteConfig,
    LlamaTokenizer,
    Olmo2Config,
    PhiConfig,
    Qwen2Tokenizer,
)

import sample
import train
from data import collate, render, sample_of
from model import LLaVA
from parts.checkpoints import load_tokenizer, read_tokenizer
from parts.decoders import Fast, check_language_model
from parts.engine import Engine
from parts.files import IGNORE, IMAGE, write_json
from parts.lora import adapters, add_adapters, merge_adapters
from parts.pictures import load_image
from parts.ranks import ANSWERING, TRAINING, Machine
from parts.templates import choose_template
from parts.views import set_view
from toy import world

# -----------------------------------------------------------------------------
# The two tables

MERGES = [("\n", "\n"), ("?", "\n"), (" ", "A"), (" ", "c"), (" c", "a"), (" ca", "t"), ("W", "h")]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PIECES = [f"<0x{i:02X}>" for i in range(256)] + [chr(i) for i in range(33, 127)] + ["▁", "\n"]
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 256, "short_factor": [1.0] * 3,
            "long_factor": [4.0] * 3}


def vocabulary(specials, alphabet, blank, newline):
    """A tiny vocabulary and its merges, in the alphabet of a kind of tokenizer."""
    merges = [tuple(x.replace(" ", blank).replace("\n", newline) for x in pair) for pair in MERGES]
    words = [*specials, *alphabet, *("".join(pair) for pair in merges)]
    return {"vocab": {word: i for i, word in enumerate(words)}, "merges": merges}


def with_tokens(tokenizer, *words, special=True, **more):
    for word in words:
        tokenizer.add_tokens([AddedToken(word, special=special, normalized=False, **more)])
    return tokenizer


def chatml_thinks():
    """Qwen3's and SmolLM3's: bytes, no <s>, thoughts between two tokens that are not special."""
    words = vocabulary(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], BYTES, "Ġ", "Ċ")
    tokenizer = Qwen2Tokenizer(**words, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = "{{ enable_thinking }}"
    with_tokens(tokenizer, "<|im_start|>", "<|im_end|>")
    return with_tokens(tokenizer, "<think>", "</think>", special=False)


def gemma():
    """Gemma's: sentencepiece's pieces without a blank in front, <bos>."""
    words = vocabulary(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], PIECES, "▁", "\n")
    return with_tokens(GemmaTokenizer(**words), "<start_of_turn>", "<end_of_turn>")


def phi_3():
    """Phi-3's: LLaMA's, no <s>; its special tokens swallow what is blank behind them."""
    words = vocabulary(["<unk>", "<s>", "</s>"], PIECES, "▁", "\n")
    tokenizer = LlamaTokenizer(**words, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                               add_bos_token=False)
    return with_tokens(tokenizer, "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>",
                       rstrip=True)


def phi_4(*words):
    """Phi-4's: bytes, no <s>; its special tokens swallow what is blank on both sides."""
    tokenizer = GPT2Tokenizer(**vocabulary(["<|endoftext|>"], BYTES, "Ġ", "Ċ"))
    return with_tokens(tokenizer, *words, lstrip=True, rstrip=True)


def llama():
    words = vocabulary(["<unk>", "<s>", "</s>"], PIECES, "▁", "\n")
    return LlamaTokenizer(**words, add_bos_token=True)


class Family(NamedTuple):
    """A kind of language model: conftest's name, its tokenizer, --template auto, its config."""
    kind: str
    tokenizer: object
    template: str
    more: dict


FAMILIES = {
    "llama": Family("llama", llama, "vicuna_v1", {}),
    "qwen3": Family("qwen3", chatml_thinks, "qwen_3", {"tied": True, "head_dim": 16}),
    "smollm3": Family("smollm3", chatml_thinks, "smollm_3",
                      {"tied": True, "no_rope_layers": [1, 0]}),
    "gemma3": Family("gemma3", gemma, "gemma", {
        "tied": True, "head_dim": 16, "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 9}),
    "phi3": Family("phi3", phi_3, "phi_3", {"sliding_window": 12}),
    "phi4": Family("phi3", lambda: phi_4("<|im_start|>", "<|im_sep|>", "<|im_end|>"), "phi_4", {}),
    "phi4-mini": Family("phi3", lambda: phi_4("<|user|>", "<|assistant|>", "<|end|>"), "phi_3",
                        {"tied": True, "rope_parameters": LONGROPE,
                         "original_max_position_embeddings": 256}),
}
TOWERS = {"clip": tiny_clip, "siglip": tiny_siglip}
PAIRS = list(itertools.product(FAMILIES, TOWERS))


def make(folder, family, tower="clip", aspect="auto"):
    """The model of a family and a tower as train.py makes it, its template, and its view."""
    kind, tokenizer, _, more = FAMILIES[family]
    tokenizer = tokenizer()
    llm = tiny_llm(kind, vocab_size=len(tokenizer), **more)      # full: <image> makes it grow
    llm.generation_config.eos_token_id = llm.config.eos_token_id = tokenizer.eos_token_id
    save_parts(folder, llm, tokenizer, TOWERS[tower]())
    torch.manual_seed(3)
    model = LLaVA.from_parts(str(folder / "clip"), str(folder / "llm")).eval()
    torch.nn.init.normal_(model.W.weight, std=0.5)
    template = choose_template("auto", model)
    view = set_view(model, aspect)
    model.meta |= {"template": template.name, **view.meta}
    return model, template, view


PICTURE = Image.effect_noise((40, 30), 90).convert("RGB")
CHATS = [[f"{IMAGE}\nWhat is this?", "A cat.", "Why?", "It has\n\n ears."], ["Hello?", "Yes"],
         [f"What?\n{IMAGE}", "Two  things."]]


def samples_of(model, template, view, chats):
    found = []
    for texts in chats:
        turns = [{"from": ("human", "gpt")[i % 2], "value": x} for i, x in enumerate(texts)]
        pictures = [("a.png", PICTURE)] * texts[0].count(IMAGE)
        found.append(sample_of(turns, pictures, model.tokenizer, template, view))
    return found


def pixels_of(folder, n):
    processor = AutoProcessor.from_pretrained(folder).image_processor
    return dict(processor([PICTURE] * n, return_tensors="pt"))


# -----------------------------------------------------------------------------
# What each pair must do


@pytest.mark.parametrize("aspect", ["auto", "anyres"])
@pytest.mark.parametrize("family, tower", PAIRS)
def test_logits_loss_gradients_and_answers_are_those_of_transformers(
        family, tower, aspect, tmp_path):
    """Sec. 4.1: windows, tied heads, norms of queries and keys, Gemma's scaled word embeddings
    (H_v is not scaled), layers without positions, partial and long rotary positions."""
    ours, template, view = make(tmp_path, family, tower, aspect)
    ours.save_pretrained(tmp_path / "saved")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    batch = collate(samples_of(ours, template, view, CHATS), view)
    inputs = {name: batch[name] for name in TRAINING}
    out = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                 labels=batch["labels"], **pixels_of(tmp_path / "saved", 2))
    want = out.logits[:, :-1][batch["labels"][:, 1:] != IGNORE]
    torch.testing.assert_close(answer_logits(ours, **inputs)[0], want, atol=1e-4, rtol=1e-4)
    loss, count = ours(**inputs)
    torch.testing.assert_close(loss / count, out.loss, atol=1e-5, rtol=1e-5)
    (loss / count).backward()
    out.loss.backward()
    mine = dict(ours.f_phi.base_model.named_parameters()) | {"W": ours.W.weight}
    others = dict(theirs.model.language_model.named_parameters())
    others["W"] = theirs.model.multi_modal_projector.linear_1.weight
    for name, p in mine.items():
        torch.testing.assert_close(p.grad, others[name].grad, atol=1e-5, rtol=1e-3, msg=name)

    for chat in ([CHATS[0][0]], CHATS[0][:3], ["Hi."]):
        prompt = collate(samples_of(ours, template, view, [chat]), view, side="left")
        pixels = pixels_of(tmp_path / "saved", 1) if IMAGE in chat[0] else {}
        ids = theirs.generate(
            input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], **pixels,
            max_new_tokens=16, do_sample=False, suppress_tokens=[ours.image_id])
        want = ours.to_text(ids[0, prompt["input_ids"].shape[1]:].tolist())
        asked = {name: prompt[name] for name in ANSWERING}
        assert ours.generate(**asked, max_new_tokens=16) == [want]
        assert Engine(ours).generate(prompt, max_new_tokens=16) == [want], "the fast one differs"


@pytest.mark.parametrize("family", FAMILIES)
def test_template_labels_and_ids_are_right_here_and_in_the_folders_processor(family, tmp_path):
    """Table 2: --template auto takes the family's own; exactly answers and STOP are scored; what a
    prompt is, transformers' processor makes of the same messages; STOP ends an answer."""
    model, template, view = make(tmp_path, family)
    tokenizer = model.tokenizer
    assert template.name == FAMILIES[family].template
    assert tokenizer.convert_tokens_to_ids(template.STOP) in model.eos_ids
    model.save_pretrained(tmp_path / "saved")
    assert LLaVA.from_pretrained(tmp_path / "saved").eos_ids == model.eos_ids
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    for chat in CHATS:
        (whole,) = samples_of(model, template, view, [chat])
        pairs = list(zip(whole["input_ids"], whole["labels"], strict=True))
        runs = [[i for i, _ in run] for scored, run in
                itertools.groupby(pairs, lambda pair: pair[1] != IGNORE) if scored]
        answers = [template.answer.format(x) + template.STOP for x in chat[1::2]]
        spelled = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
        assert [x.strip() for x in spelled] == [x.strip() for x in answers]
        messages = []
        for i, text in enumerate(chat):
            parts = [{"type": "image", "image": PICTURE} if x == IMAGE else
                     {"type": "text", "text": x} for x in re.split(f"({IMAGE})", text) if x]
            messages.append({"role": ("user", "assistant")[i % 2], "content": parts})
        for n in range(1, len(chat) + 1, 2):
            (prompt,) = samples_of(model, template, view, [chat[:n]])
            ids = prompt["input_ids"]
            assert whole["input_ids"][:len(ids)] == ids, "training has other ids than sampling"
            theirs = processor.apply_chat_template(
                messages[:n], add_generation_prompt=True, tokenize=True, return_dict=True)
            assert theirs["input_ids"][0] == ids, (
                render([{"from": "human", "value": chat[0]}], template))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_stand_on_every_linear_layer_and_merge(family, tmp_path):
    """LoRA (arXiv 2106.09685): Phi's fused qkv_proj and gate_up_proj, too; B = 0 changes no bit."""
    model, template, view = make(tmp_path, family)
    batch = collate(samples_of(model, template, view, CHATS), view)
    inputs = {name: batch[name] for name in TRAINING}
    before = answer_logits(model, **inputs)[0]
    add_adapters(model.f_phi, 4, 8)
    fused = FAMILIES[family].kind == "phi3"
    names = {name.split(".")[-1] for name in adapters(model.f_phi)}
    apart = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert names == {"o_proj", "down_proj"} | ({"qkv_proj", "gate_up_proj"} if fused else apart)
    assert torch.equal(answer_logits(model, **inputs)[0], before)
    for layer in adapters(model.f_phi).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    adapted = answer_logits(model, **inputs)[0]
    assert not torch.allclose(adapted, before, atol=0.1)
    merge_adapters(model.f_phi)
    torch.testing.assert_close(answer_logits(model, **inputs)[0], adapted, atol=1e-4, rtol=1e-4)


def two_losses(folder, machine):
    """The loss of Eq. (3), and that behind one step of gradient descent."""
    model = LLaVA.from_pretrained(folder)
    template, view = choose_template("auto", model), set_view(model, "crop")
    batch = collate(samples_of(model, template, view, CHATS[:2]), view)
    theta = machine.place(model, "all")
    losses = []
    for _ in range(2):
        loss, count = model(**machine.to_device(batch))
        (loss / count).backward()
        torch.optim.SGD(theta.values(), lr=1e-2).step()
        losses.append(loss.item() / count)
    return losses


def be_rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    machine = Machine("cpu", "fp32", shard=True)
    losses = {family: two_losses(folder / family, machine) for family in FAMILIES}
    write_json(str(folder / f"{rank}.json"), losses)
    machine.finish()


@pytest.mark.slow
def test_two_ranks_with_shards_train_each_family_as_one_process(tmp_path):
    """FSDP2 over gloo, decoder layers run again: also where word embeddings are the head, too."""
    for family in FAMILIES:
        (tmp_path / "parts" / family).mkdir(parents=True)
        make(tmp_path / "parts" / family, family)[0].save_pretrained(tmp_path / family)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = [FORKS.Process(target=be_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
    want = {family: two_losses(tmp_path / family, Machine("cpu", "fp32")) for family in FAMILIES}
    for rank in range(2):
        got = json.loads((tmp_path / f"{rank}.json").read_text())
        for family in FAMILIES:
            torch.testing.assert_close(got[family], want[family], atol=1e-5, rtol=1e-5, msg=family)


# -----------------------------------------------------------------------------
# The toy with another language model


def one_thing_each(folder, n):
    """Pictures of toy/world.py with a single thing, and what each shows."""
    rng = random.Random(0)
    truths = []
    folder.mkdir()
    for i in range(n):
        thing = world.place_thing(rng, rng.choice(world.SEEN), rng.randrange(16), world.SIDE)
        world.draw_scene(world.scene_with([thing])).save(folder / f"{i}.png")
        truths.append(f"A {thing.name}.")
    return truths


@pytest.mark.slow
def test_the_toy_with_a_new_Qwen3_trains_and_answers(tmp_path):
    """Sec. 4.2 by the commands: its two layers have never been trained, the toy's CLIP is frozen;
    on pictures it has not seen it names thing and colour, and only by seeing."""
    truths = one_thing_each(tmp_path / "images", 660)
    records = []
    for i, truth in enumerate(truths[:600]):
        turns = [sample.human_turn("What is it?", 1), {"from": "gpt", "value": truth}]
        records.append({"id": i, "image": f"{i}.png", "conversations": turns})
    write_json(str(tmp_path / "chat.json"), records)
    tokenizer = read_tokenizer(f"{ROOT}/toy/pretrained/llm")
    with_tokens(tokenizer, "<|im_start|>", "<|im_end|>")
    with_tokens(tokenizer, "<think>", "</think>", special=False)
    tokenizer.chat_template = "{{ enable_thinking }}"
    llm = tiny_llm("qwen3", tied=True, vocab_size=len(tokenizer), hidden_size=128, head_dim=32,
                   intermediate_size=256, initializer_range=0.08)
    save_parts(tmp_path, llm, tokenizer)

    flags = ["--recipe", "toy", "--data", f"{tmp_path}/chat.json", "--images",
             f"{tmp_path}/images", "--val_samples", "0"]
    assert train.main([*flags, "--stage", "1", "--llm", f"{tmp_path}/llm", "--vision",
                       f"{ROOT}/toy/pretrained/clip", "--out", f"{tmp_path}/stage1",
                       "--max_steps", "40"]) == 0
    assert train.main([*flags, "--stage", "2", "--init", f"{tmp_path}/stage1", "--out",
                       f"{tmp_path}/stage2", "--lr", "2e-3", "--epochs", "12"]) == 0
    talker = sample.Talker(sample.Config(model=f"{tmp_path}/stage2", temperature=0))
    assert talker.template.name == "qwen_3" and type(talker.engine.decoder) is Fast
    pictures = [load_image(f"{tmp_path}/images/{i}.png") for i in range(600, 660)]
    questions = [([sample.human_turn("What is it?", 1)], [picture]) for picture in pictures]
    answers = talker.answers(questions)
    right = sum(a == b for a, b in zip(answers, truths[600:], strict=True))
    shuffled = sum(a == b for a, b in zip(answers, truths[601:] + truths[600:601], strict=True))
    assert right >= 48 and shuffled <= 12, f"{right} of 60 right, {shuffled} by other pictures"


# -----------------------------------------------------------------------------
# What does not fit

SMALL = dict(vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=12, bos_token_id=1,
             eos_token_id=2, pad_token_id=0)


@pytest.mark.parametrize("config, words", [
    (Gemma2Config(**SMALL), "gemma2 is not .* soft cap"),
    (CohereConfig(**SMALL), "cohere is not .* scale"),
    (GraniteConfig(**SMALL, logits_scaling=8.0), "granite is not .* scale"),
    (PhiConfig(**SMALL), "type phi lacks .* lm_head without bias"),
    (GPT2Config(vocab_size=320, n_embd=48, n_layer=1, n_head=4), "type gpt2 lacks model.layers"),
    (Gemma3Config(text_config=SMALL, vision_config=dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)),
     "type gemma3 lacks .* Gemma 3 .text alone."),
], ids=lambda x: getattr(x, "model_type", ""))
def test_a_language_model_that_would_be_computed_otherwise_is_refused_by_name(config, words):
    """transformers' Llava and our loss know one linear head and nothing behind it."""
    f_phi = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=words):
        check_language_model(f_phi)


def test_an_encoder_and_a_folder_of_an_unfit_kind_are_refused(tmp_path):
    """Gemma 3's text with attention to both sides; the message names flag and folder."""
    with pytest.raises(ValueError, match="use_bidirectional_attention sees the words"):
        check_language_model(tiny_llm("gemma3", use_bidirectional_attention=True))
    folder = save_parts(tmp_path, AutoModelForCausalLM.from_config(Gemma2Config(**SMALL)))
    with pytest.raises(ValueError, match=f"--llm {folder / 'llm'}: gemma2 is not"):
        LLaVA.from_parts(str(folder / "clip"), str(folder / "llm"))


def test_a_kind_that_nobody_tried_works_where_it_is_laid_out_as_llama():
    """"Any causal one with a plain linear head": OLMo 2 has norms in other places."""
    config = {key: value for key, value in SMALL.items() if key != "head_dim"}
    check_language_model(AutoModelForCausalLM.from_config(Olmo2Config(**config)).eval())


@pytest.mark.parametrize("family, template, missing", [
    ("gemma3", "qwen_3", "<|im_start|>"), ("phi3", "gemma", "<start_of_turn>"),
    ("phi4", "smollm_3", "<think>"), ("qwen3", "phi_4", "<|im_sep|>")])
def test_a_template_of_another_family_is_refused_by_its_missing_token(
        family, template, missing, tmp_path):
    """As plain text such a token would start and stop nothing."""
    save_parts(tmp_path, tiny_llm(vocab_size=448), FAMILIES[family].tokenizer())
    model = LLaVA(tiny_clip(), tiny_llm(vocab_size=448), load_tokenizer(str(tmp_path / "llm")))
    needs = re.escape(f"template {template} needs the token {missing}")
    with pytest.raises(ValueError, match=needs) as caught:
        choose_template(template, model)
    assert FAMILIES[family].template in str(caught.value).split("--template ")[1]
