"""Every kind of language model beside every kind of vision tower, as train.py puts them together.

transformers is the oracle: its model from the folder that ours saved, its processor there, its
generate. Tokenizers are tiny ones of each family's own class, with that family's special tokens.
"""
import itertools
import json
import os
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import (
    FORKS,
    assert_same_model,
    batch_from,
    chat,
    messages_of,
    noise,
    open_ranks,
    processor_pixels,
    sample_from,
    save_parts,
    tiny_clip,
    tiny_llm,
    tiny_siglip,
)
from tokenizers import pre_tokenizers
from transformers import AddedToken, AutoModelForCausalLM, AutoProcessor

from model import LLaVA
from parts.decoders import check_language_model
from parts.engine import Engine
from parts.files import IGNORE, IMAGE, write_json
from parts.ranks import ANSWERING, Machine
from parts.templates import TEMPLATES, choose_template
from parts.views import set_view

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
    tokenizer = transformers.Qwen2Tokenizer(
        **words, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = "{{ enable_thinking }}"
    with_tokens(tokenizer, "<|im_start|>", "<|im_end|>")
    return with_tokens(tokenizer, "<think>", "</think>", special=False)


def gemma():
    """Gemma's: sentencepiece's pieces without a blank in front, <bos>."""
    words = vocabulary(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], PIECES, "▁", "\n")
    return with_tokens(transformers.GemmaTokenizer(**words), "<start_of_turn>", "<end_of_turn>")


def phi_3():
    """Phi-3's: LLaMA's, no <s>; its special tokens swallow what is blank behind them."""
    words = vocabulary(["<unk>", "<s>", "</s>"], PIECES, "▁", "\n")
    tokenizer = transformers.LlamaTokenizer(
        **words, eos_token="<|endoftext|>", pad_token="<|endoftext|>", add_bos_token=False)
    return with_tokens(tokenizer, "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>",
                       rstrip=True)


def phi_4(*words):
    """Phi-4's: bytes, no <s>; its special tokens swallow what is blank on both sides."""
    tokenizer = transformers.GPT2Tokenizer(**vocabulary(["<|endoftext|>"], BYTES, "Ġ", "Ċ"))
    return with_tokens(tokenizer, *words, lstrip=True, rstrip=True)


def llama():
    words = vocabulary(["<unk>", "<s>", "</s>"], PIECES, "▁", "\n")
    return transformers.LlamaTokenizer(**words, add_bos_token=True)


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
PAIRS = [(family, tower, ["auto", "anyres"][(i + j) % 2]) for i, family in enumerate(FAMILIES)
         for j, tower in enumerate(TOWERS)]      # each of both sees squares and tiles


def make(folder, family, tower="clip", aspect="auto"):
    """The model of a family and a tower as train.py makes it."""
    kind, tokenizer, _, more = FAMILIES[family]
    tokenizer = tokenizer()
    llm = tiny_llm(kind, vocab_size=len(tokenizer), **more)      # full: <image> makes it grow
    llm.generation_config.eos_token_id = llm.config.eos_token_id = tokenizer.eos_token_id
    save_parts(folder, llm, tokenizer, TOWERS[tower]())
    torch.manual_seed(3)
    model = LLaVA.from_parts(str(folder / "clip"), str(folder / "llm")).eval()
    torch.nn.init.normal_(model.W.weight, std=0.5)
    set_view(model, aspect)
    model.meta["template"] = choose_template("auto", model).name
    return model


PICTURE = noise()
CHATS = [[f"{IMAGE}\nWhat is this?", "A cat.", "Why?", "It has\n\n ears."], ["Hello?", "Yes"],
         [f"What?\n{IMAGE}", "Two  things."]]


def sample(model, texts):
    return sample_from(model, texts, [PICTURE] * texts[0].count(IMAGE))


# -----------------------------------------------------------------------------
# What each pair must do


@pytest.mark.parametrize("family, tower, aspect", PAIRS)
def test_logits_loss_gradients_and_answers_are_those_of_transformers(
        family, tower, aspect, tmp_path):
    """Sec. 4.1: windows, tied heads, norms of queries and keys, Gemma's scaled word embeddings
    (H_v is not scaled), layers without positions, partial and long rotary positions."""
    ours = make(tmp_path, family, tower, aspect)
    ours.save_pretrained(tmp_path / "saved")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    batch = batch_from(ours, [sample(ours, texts) for texts in CHATS])
    pixels = processor_pixels(tmp_path / "saved", [PICTURE] * 2)
    assert_same_model(ours, theirs, batch, pixels, atol=1e-4)
    mine = dict(ours.f_phi.base_model.named_parameters()) | {"W": ours.W.weight}
    others = dict(theirs.model.language_model.named_parameters())
    others["W"] = theirs.model.multi_modal_projector.linear_1.weight
    for name, p in mine.items():
        torch.testing.assert_close(p.grad, others[name].grad, atol=1e-5, rtol=1e-3, msg=name)

    for texts in ([CHATS[0][0]], CHATS[0][:3], ["Hi."]):
        prompt = batch_from(ours, [sample(ours, texts)], side="left")
        pixels = processor_pixels(tmp_path / "saved", [PICTURE] * texts[0].count(IMAGE))
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
    model = make(tmp_path, family)
    tokenizer = model.tokenizer
    template = TEMPLATES[FAMILIES[family].template]
    assert model.meta["template"] == template.name
    assert tokenizer.convert_tokens_to_ids(template.STOP) in model.eos_ids
    model.save_pretrained(tmp_path / "saved")
    assert LLaVA.from_pretrained(tmp_path / "saved").eos_ids == model.eos_ids
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    for texts in CHATS:
        whole = sample(model, texts)
        pairs = list(zip(whole["input_ids"], whole["labels"], strict=True))
        runs = [[i for i, _ in run] for scored, run in
                itertools.groupby(pairs, lambda pair: pair[1] != IGNORE) if scored]
        answers = [template.answer.format(x) + template.STOP for x in texts[1::2]]
        spelled = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
        assert [x.strip() for x in spelled] == [x.strip() for x in answers]
        messages = messages_of(chat(*texts), PICTURE)
        for n in range(1, len(texts) + 1, 2):
            ids = sample(model, texts[:n])["input_ids"]
            assert whole["input_ids"][:len(ids)] == ids, "training has other ids than sampling"
            theirs = processor.apply_chat_template(
                messages[:n], add_generation_prompt=True, tokenize=True, return_dict=True)
            assert theirs["input_ids"][0] == ids


def two_losses(folder, machine):
    """The loss of Eq. (3), and that behind one step of gradient descent."""
    model = LLaVA.from_pretrained(folder)
    batch = batch_from(model, [sample(model, texts) for texts in CHATS[:2]])
    theta = machine.place(model, "all")
    losses = []
    for _ in range(2):
        loss, count = model(**machine.to_device(batch))
        (loss / count).backward()
        torch.optim.SGD(theta.values(), lr=1e-2).step()
        losses.append(loss.item() / count)
    return losses


def be_rank(rank, environment, folder):
    os.environ |= environment
    machine = Machine("cpu", "fp32", shard=True)
    losses = {family: two_losses(folder / family, machine) for family in FAMILIES}
    write_json(str(folder / f"{rank}.json"), losses)
    machine.finish()


@pytest.mark.slow
def test_two_ranks_with_shards_train_each_family_as_one_process(tmp_path):
    """FSDP2 over gloo, decoder layers run again: also where word embeddings are the head, too."""
    for family in FAMILIES:
        (tmp_path / "parts" / family).mkdir(parents=True)
        make(tmp_path / "parts" / family, family).save_pretrained(tmp_path / family)
    _store, environments = open_ranks(2)
    ranks = [FORKS.Process(target=be_rank, args=(rank, environment, tmp_path))
             for rank, environment in enumerate(environments)]
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
# What does not fit

SMALL = dict(vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=12, bos_token_id=1,
             eos_token_id=2, pad_token_id=0)


@pytest.mark.parametrize("config, words", [
    (transformers.Gemma2Config(**SMALL), "gemma2 is not .* soft cap"),
    (transformers.CohereConfig(**SMALL), "cohere is not .* scale"),
    (transformers.GraniteConfig(**SMALL, logits_scaling=8.0), "granite is not .* scale"),
    (transformers.PhiConfig(**SMALL), "type phi lacks .* lm_head without bias"),
    (transformers.GPT2Config(vocab_size=320, n_embd=48, n_layer=1, n_head=4),
     "type gpt2 lacks model.layers"),
    (transformers.Gemma3Config(text_config=SMALL, vision_config=dict(
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
    gemma_2 = AutoModelForCausalLM.from_config(transformers.Gemma2Config(**SMALL))
    folder = save_parts(tmp_path, gemma_2)
    with pytest.raises(ValueError, match=f"--llm {folder / 'llm'}: gemma2 is not"):
        LLaVA.from_parts(str(folder / "clip"), str(folder / "llm"))


def test_a_kind_that_nobody_tried_works_where_it_is_laid_out_as_llama():
    """"Any causal one with a plain linear head": OLMo 2 has norms in other places."""
    config = {key: value for key, value in SMALL.items() if key != "head_dim"}
    check_language_model(AutoModelForCausalLM.from_config(transformers.Olmo2Config(**config)).eval())
