"""What the model sees (data.py): templates, ids and labels, the image's place, truncation."""
import itertools
import json
import random
import re

import pytest
import sentencepiece
from conftest import byte_tokenizer, chat, messages_of, noise
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AddedToken,
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from data import arrange, encode, encode_within, render, sample_of
from parts.files import IGNORE, IMAGE
from parts.templates import TEMPLATES, chat_template, check_template, template_for
from parts.views import view_of


def text_of(turns, template):
    return "".join(text for text, _ in render(turns, TEMPLATES[template]))


def tags(turns):
    return sum(turn["value"].count(IMAGE) for turn in turns)


def scored_runs(labels):
    """[(start, stop)] of each run of scored positions."""
    scored = [False, *(label != IGNORE for label in labels), False]
    edges = [i for i in range(len(labels) + 1) if scored[i] != scored[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


# -----------------------------------------------------------------------------
# Templates (Table 2)

V0 = ("A chat between a curious human and an artificial intelligence assistant. The assistant "
      "gives helpful, detailed, and polite answers to the human's questions.")
L2 = ("You are a helpful language and vision assistant. You are able to understand the visual "
      "content that the user provides, and assist the user with a variety of tasks using natural "
      "language.")
NO_THINK = ("<|im_start|>system\n## Metadata\n\nReasoning Mode: /no_think\n\n## Custom "
            "Instructions\n\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face."
            "\n\n")
HEAD_3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
Q = "<image>\nWhat is this?"
RENDERED = {  # the prompt of one open turn, and what a finished first and an open second turn add
    "llava_v0": (f"{V0}###Human: {Q}###Assistant:", " A cat.###Human: Why?###Assistant:"),
    "vicuna_v1": (f"{V0.replace('human', 'user')} USER: {Q} ASSISTANT:",
                  " A cat.</s>USER: Why? ASSISTANT:"),
    "llava_llama_2": (f"[INST] <<SYS>>\n{L2}\n<</SYS>>\n\n{Q} [/INST]",
                      " A cat. </s><s>[INST] Why? [/INST]"),
    "mistral_instruct": (f"[INST] {Q} [/INST]", " A cat. </s>[INST] Why? [/INST]"),
    "chatml_direct": (
        f"<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n{Q}<|im_end|>"
        "<|im_start|>assistant\n",
        "A cat.<|im_end|><|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"),
    "qwen_1_5": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{Q}<|im_end|>\n<|im_start|>assistant\n",
        "A cat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"),
    "llama_3": (
        f"{HEAD_3.format('system')}{L2}<|eot_id|>{HEAD_3.format('user')}{Q}<|eot_id|>"
        f"{HEAD_3.format('assistant')}",
        f"A cat.<|eot_id|>{HEAD_3.format('user')}Why?<|eot_id|>{HEAD_3.format('assistant')}"),
    # with enable_thinking=False, its empty thought also in front of the first answer
    "qwen_3": (
        f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "A cat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n"),
    # with enable_thinking=False, without its two lines of dates
    "smollm_3": (
        f"{NO_THINK}<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n",
        "A cat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n"),
    "gemma": (f"<start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n",
              "A cat.<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n"
              "<start_of_turn>model\n"),
    "phi_3": (f"<|user|>{Q}<|end|><|assistant|>", "A cat.<|end|><|user|>Why?<|end|><|assistant|>"),
    "phi_4": (
        f"<|im_start|>user<|im_sep|>{Q}<|im_end|><|im_start|>assistant<|im_sep|>",
        "A cat.<|im_end|><|im_start|>user<|im_sep|>Why?<|im_end|><|im_start|>assistant<|im_sep|>"),
    "plain": ("<image>", "A cat.\n"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_renders_the_published_text(template):
    """Table 2 and the released prompts: character for character, or released checkpoints see text
    they never saw."""
    one, more = RENDERED[template]
    assert text_of(chat(Q), template) == one
    assert text_of(chat(Q, "A cat.", "Why?"), template) == one + more, "the second turn is off"
    blanks = chat(f" {Q}\n", "\n A cat. ", "Why? ")
    assert text_of(blanks, template) == one + more, "outer blanks leak in"


@pytest.mark.parametrize("picture", [None, noise()], ids=["text", "parts"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_chat_template_of_a_checkpoint_renders_what_we_train_on(template, picture):
    """Ours, Sec. 4.2: an engine that applies `chat_template` must show the model the text that it
    was trained on."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template(TEMPLATES[template], tokenizer)
    for first in ("<image>\nWhat is 'this', \"{x}\" \\n or {{ 7 * 7 }}?",
                  "Was ist das, größer?\n<image>", "<image>\n<image>\nBoth? 🐈"):
        turns = chat(first, " A cat\n\n{% raw %}. ", "\tWhy?\n")
        for n in (1, 2, 3):              # a prompt, a finished conversation, a second prompt
            text = tokenizer.apply_chat_template(messages_of(turns[:n], picture), tokenize=False,
                                                 add_generation_prompt=n != 2)
            assert text == text_of(turns[:n], template), f"{n} turns are not what training showed"


def test_the_chat_template_refuses_a_system_message():
    """Table 2: X_system-message is part of the template; another one would silently be lost."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template(TEMPLATES["vicuna_v1"], tokenizer)
    with pytest.raises(Exception, match="system message of this model is fixed"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be rude."}], tokenize=False)


def test_each_language_model_gets_the_template_that_it_knows():
    """Ours: the template is chosen from config and tokenizer, never from a name."""
    plain, llama_2 = byte_tokenizer(), byte_tokenizer()
    llama_2.chat_template = "{{ '<<SYS>>' }}"
    usual = ("<unk>", "<s>", "</s>")
    chatml = byte_tokenizer((*usual, "<|im_start|>", "<|im_end|>"))
    llama_3 = byte_tokenizer((*usual, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    for config, tokenizer, name in (
            (LlamaConfig(), plain, "vicuna_v1"), (MistralConfig(), plain, "mistral_instruct"),
            (Qwen2Config(), chatml, "qwen_1_5"), (LlamaConfig(), chatml, "chatml_direct"),
            (LlamaConfig(), llama_2, "llava_llama_2"), (LlamaConfig(), llama_3, "llama_3")):
        assert template_for(config, tokenizer).name == name, (
            f"{config.model_type} would be trained on a foreign template")
        check_template(template_for(config, tokenizer), tokenizer)


@pytest.mark.parametrize("name, missing", [
    ("vicuna_v1", "</s>"), ("mistral_instruct", "</s>"), ("llava_llama_2", "<s>"),
    ("chatml_direct", "<|im_end|>"), ("gemma", "<start_of_turn>"), ("qwen_3", "<think>"),
    ("phi_4", "<|im_sep|>")])
def test_a_template_whose_stop_is_no_token_is_refused(name, missing):
    """Sec. 4.2: STOP as plain text would never end an answer, nor start one; the message says which
    templates would do."""
    have = [t for t in ("<s>", "</s>", "<|im_start|>", "<|im_end|>") if t != missing]
    vocabulary = {t: i for i, t in enumerate(["a", *have])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])))
    needs = re.escape(f"template {name} needs the token {missing}")
    with pytest.raises(ValueError, match=needs) as error:
        check_template(TEMPLATES[name], tokenizer)
    fit = str(error.value).split("--template ")[1]
    assert name not in fit and "llava_v0" in fit, f"the advice is wrong: {fit}"
    check_template(TEMPLATES["llava_v0"], tokenizer)


# -----------------------------------------------------------------------------
# The released code's ids and labels (golden vectors)

LLAMA = {
    319: "▁A", 13563: "▁chat", 1546: "▁between", 263: "▁a", 12758: "▁curious", 1404: "▁user",
    322: "▁and", 385: "▁an", 23116: "▁artificial", 21082: "▁intelligence", 20255: "▁assistant",
    29889: ".", 450: "▁The", 4076: "▁gives", 8444: "▁helpful", 29892: ",", 13173: "▁detailed",
    1248: "▁pol", 568: "ite", 6089: "▁answers", 304: "▁to", 278: "▁the", 29915: "'", 29879: "s",
    5155: "▁questions", 3148: "▁US", 11889: "USER", 1001: "ER", 29901: ":", 29871: "▁",
    5618: "What", 1724: "▁What", 338: "▁is", 445: "▁this", 29973: "?", 1799: "SS", 9047: "IST",
    13566: "ANT", 6635: "▁cat", 3750: "▁Why", 739: "▁It", 756: "▁has", 22827: "▁ears", 373: "▁on",
    1775: "▁mat", 518: "▁[", 25580: "INST", 29962: "]", 29914: "/", 29961: "[", 6778: ">>",
    29941: "3", 30919: "你", 31076: "好", 15043: "▁Hello", 1243: "▁test",
}


def llama_tokenizer(legacy):
    """LLaMA's 32,000 entries where every piece of the vectors stands at its true id. The other ids
    hold single characters, the prefixes through which byte-pair merges reach the pieces (words
    first, then word endings), filler."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocab |= {piece: i for i, piece in LLAMA.items()}
    words = sorted(LLAMA.values(), key=lambda piece: (not piece.startswith("▁"), piece != "USER"))
    merges = list(dict.fromkeys((word[:n], word[n]) for word in words for n in range(1, len(word))))
    needed = dict.fromkeys([*map(chr, range(33, 127)), *(a + b for a, b in merges)])
    free = (i for i in range(32000) if i >= 259 and i not in LLAMA)
    vocab |= {piece: next(free) for piece in needed if piece not in vocab}
    vocab |= {f"filler {i}": i for i in free}
    assert sorted(vocab.values()) == list(range(32000))
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    return tokenizer


def golden(template, *turns, legacy=False):
    """(ids with -200 for the image, [(position, token), ...] of what is scored)."""
    tokenizer = llama_tokenizer(legacy)
    turns = chat(*turns)
    ids, labels = encode(render(turns, TEMPLATES[template]), tokenizer, [1] * tags(turns))
    scored = [(i, tokenizer.convert_ids_to_tokens(label))
              for i, label in enumerate(labels) if label != IGNORE]
    return [-200 if i == 32000 else i for i in ids], scored


HEAD = [1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255,
        4076, 8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155,
        29889, 3148, 1001, 29901]
TAIL_1 = [319, 1799, 9047, 13566, 29901, 319, 6635, 29889, 2]
USER = {True: [3148, 1001, 29901], False: [11889, 29901]}
TAIL_2 = [3750, 29973, 319, 1799, 9047, 13566, 29901, 739, 756, 22827, 29889, 2]
A1, A2 = ["▁A", "▁cat", ".", "</s>"], ["▁It", "▁has", "▁ears", ".", "</s>"]
TWO_ANSWERS = ("A cat.", "Why?", "It has ears.")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("question, ids, first", [
    ("<image>\nWhat is this?", [29871, -200, 29871, 13, 5618, 338, 445, 29973], 47),
    ("What is this?", [1724, 338, 445, 29973], 43)])
def test_vicuna_ids_and_labels_are_the_released_ones(question, ids, first, legacy):
    """Table 2 and the released tokenisation: split at <image>, a lone blank on either side; the
    answers and </s> scored. Text alone is one piece, so no blank of its own before `What`."""
    found, scored = golden("vicuna_v1", question, *TWO_ANSWERS, legacy=legacy)
    assert found == [*HEAD, *ids, *TAIL_1, *USER[legacy], *TAIL_2], (
        "released checkpoints were trained on other ids than these")
    second = first + len(A1) + len(USER[legacy]) + 7
    places = [*range(first, first + 4), *range(second, second + 5)]
    assert scored == list(zip(places, A1 + A2, strict=True))


@pytest.mark.parametrize("legacy", [True, False])
def test_the_other_golden_vectors_of_the_llama_vocabulary_hold(legacy):
    """Released stage 1 (caption and newline, no </s>), the [INST] formats (a blank before </s>),
    digits and CJK."""
    ids, scored = golden("plain", IMAGE, "a cat on a mat", legacy=legacy)
    assert ids == [1, -200, 263, 6635, 373, 263, 1775, 13], "stage 1 has not the released ids"
    assert [place for place, _ in scored] == [2, 3, 4, 5, 6, 7], "caption and newline are scored"
    inst = [518, 25580, 29962]
    body = [-200, 29871, 13, 5618, 338, 445, 29973, 518, 29914, 25580, 29962, 319, 6635, 29889,
            29871, 2]
    again = [518 if legacy else 29961, 25580, 29962, 3750, 29973, 518, 29914, 25580, 29962, 739,
             756, 22827, 29889, 29871, 2]
    answers = [*A1[:-1], "▁", "</s>", *A2[:-1], "▁", "</s>"]
    ids, scored = golden("mistral_instruct", Q, *TWO_ANSWERS, legacy=legacy)
    assert ids == [1, *inst, 29871, *body, *again]
    assert [token for _, token in scored] == answers
    ids, scored = golden("llava_llama_2", Q, *TWO_ANSWERS, legacy=legacy)
    tail = [6778, 13, 13, *body, 1, *again]
    assert ids[:4] == [1, *inst] and ids[-len(tail):] == tail
    assert [token for _, token in scored] == answers
    for question, answer, want in (("1 + 2?", "3", ["▁", "3", "</s>"]),
                                   ("Hello?", "你好", ["▁", "你", "好", "</s>"])):
        _, scored = golden("vicuna_v1", question, answer, legacy=legacy)
        assert [token for _, token in scored] == want
    hello = llama_tokenizer(legacy)("Hello this is a test").input_ids
    assert hello == [1, 15043, 445, 338, 263, 1243]


# -----------------------------------------------------------------------------
# Labels under every kind of tokenizer

PIECES = [
    "a cat", "The dog", "sits", "on the mat.", "x", " ", "  ", "\n", "\n\n", "\t", "3", "12345",
    "3.14", "%", "C#", "#", "##", "###", "</s>", "<s>", " ASSISTANT: ", "USER: ", "ASSISTANT:",
    "Human: ", "###Human: ", "[/INST]", "[INST] ", "<|im_end|>", "<|im_start|>", "{}", "{0}",
    "{{ 7 * 7 }}", "'s", '"', "\\", ":", ": ", ".", ",", "!", "?", "(", ")", "é", "e\u0301", "ß",
    "你好", "。", "日本語", "שלום", "🐈", "👩\u200d👩\u200d👧", "🇩🇪", "\u00a0", "\u3000",
    "\u200b", "<im", "age>", "</", "<", ">"]


def random_chat(rng, rounds):
    """Questions with 0 to 2 images anywhere; questions and answers of anything, separators of every
    template included."""
    texts = []
    for _ in range(rounds):
        question, answer = "".join(rng.choices(PIECES, k=rng.randint(1, 8))), ""
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            at = rng.randint(0, len(question))
            tag = rng.choice([IMAGE, f"{IMAGE}\n", f"\n{IMAGE}"])
            question = question[:at] + tag + question[at:]
        while not answer.strip() or IMAGE in answer:
            answer = "".join(rng.choices(PIECES, k=rng.randint(1, 8)))
        texts += [question if question.strip() else "Why?", answer]
    return chat(*texts)


CORPUS = [text_of(random_chat(random.Random(i), 2), t).replace(IMAGE, "")
          for i in range(60) for t in TEMPLATES]
CORPUS += [text_of(chat("What is this?", "A cat.", "Why?", "The dog"), t) for t in TEMPLATES] * 20
SPECIALS = ["<unk>", "<s>", "</s>"]


def bpe(use_regex):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return backend


def unigram():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False, prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(CORPUS[::4], trainers.UnigramTrainer(
        vocab_size=800, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False,
        initial_alphabet=sorted({c for text in PIECES + CORPUS for c in text})))
    return backend


def sentencepiece_bpe(folder):
    """A bare tokenizer.model, as Vicuna's repositories ship it, through AutoTokenizer."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), vocab_size=700,
        model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    LlamaConfig().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["bytes", "byte-level BPE", "BPE over whole texts",
                                        "unigram over whole texts", "sentencepiece BPE"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        made = byte_tokenizer()
    elif request.param == "sentencepiece BPE":
        made = sentencepiece_bpe(tmp_path_factory.mktemp("spm"))
    else:
        is_unigram = request.param.startswith("unigram")
        backend = unigram() if is_unigram else bpe(request.param == "byte-level BPE")
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)])
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    for token in ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
                  "<|eot_id|>", "<|end|>", "<end_of_turn>", IMAGE):
        made.add_tokens([AddedToken(token, special=True, normalized=False)])
    return made


@pytest.fixture(scope="module")
def encoded(tokenizer):
    """200 random conversations over all templates: (template, turns, ids, labels). `plain` is for
    one caption."""
    rng, out = random.Random(1), []
    for template in itertools.islice(itertools.cycle(TEMPLATES.values()), 200):
        turns = random_chat(rng, 1 if template.name == "plain" else rng.randint(1, 6))
        ids, labels = encode(render(turns, template), tokenizer, [4] * tags(turns))
        out.append((template, turns, ids, labels))
    return out


def test_exactly_the_answers_and_stop_are_scored_under_every_tokenizer(tokenizer, encoded):
    """Sec. 4.2, Eq. (3), Table 2 (green): what the scored labels spell is each answer and STOP, and
    nothing else is scored."""
    x = tokenizer("x", add_special_tokens=False).input_ids
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    # sentencepiece: texts start with a blank
    blank = tokenizer.decode(x + x, clean_up_tokenization_spaces=False) == "x x"
    for template, turns, ids, labels in encoded:
        assert all(label in (i, IGNORE) for i, label in zip(ids, labels, strict=True)), "shifted"
        assert ids.count(image_id) == 4 * tags(turns), "an image has not its N placeholders"
        answers = [turn["value"].strip() for turn in turns[1::2]]
        for (start, stop), answer in zip(scored_runs(labels), answers, strict=True):
            spelled = tokenizer.decode(x + labels[start:stop], clean_up_tokenization_spaces=False)
            want = template.answer.format(answer) + template.STOP
            starts = template.name == "plain" and not want.startswith(("<s>", "</s>", "<|im_"))
            assert spelled == "x" + " " * (blank and starts) + want, template.name


def test_a_sampling_prompt_has_the_ids_that_training_had_before_the_answer(tokenizer, encoded):
    """Sec. 4.2: X_instruct^t is the same sequence in training and sampling, or the model is asked
    what it never learned."""
    picture = Image.new("RGB", (2, 2))
    for template, turns, ids, labels in encoded:
        for i, (start, _) in enumerate(scored_runs(labels)):
            before = turns[: 2 * i + 1]
            pictures = [("a.png", picture)] * tags(before)
            sample = sample_of(before, pictures, tokenizer, template, view_of("crop", 28, 14))
            assert sample["input_ids"] == ids[:start], f"{template.name}: answer {i} of {turns}"


def test_images_become_their_own_number_of_placeholders_in_order():
    """Sec. 4.1: the k-th <image> is the k-th picture's N tokens, unscored, also where pictures
    differ in tokens."""
    tokenizer = byte_tokenizer()
    segments = [(IMAGE * 2, False), ("b", True), (f"c{IMAGE}", False)]
    ids, labels = encode(segments, tokenizer, [2, 1, 3])
    image, b, c = tokenizer.convert_tokens_to_ids([IMAGE, "b", "c"])
    assert ids == [image] * 3 + [b, c] + [image] * 3 and labels == [IGNORE] * 3 + [b] + [IGNORE] * 4


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_prompt_whose_tags_and_pictures_disagree_is_an_error_that_counts_them(pictures):
    """Sec. 4.1: each <image> needs one picture; anything else would splice features into the wrong
    place."""
    given = [("a.png", Image.new("RGB", (2, 2)))] * pictures
    with pytest.raises(ValueError, match=f"{pictures} pictures"):
        sample_of(chat("<image>\nWhat?"), given, byte_tokenizer(), TEMPLATES["vicuna_v1"],
                  view_of("crop", 28, 14))


def test_limits_in_a_tokenizer_file_neither_cut_nor_pad_a_sample():
    """Ours: some tokenizer.json carry a truncation or padding of their own; a chunk shortened by it
    would lose its answer."""
    tokenizer = byte_tokenizer(("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))
    tokenizer.bos_token = None           # as Qwen's
    segments = render(chat("<image>\nWhat?", "A cat."), TEMPLATES["chatml_direct"])
    want = encode(segments, tokenizer, [3])
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert encode(segments, tokenizer, [3]) == want, "the file's own limit cut or padded the sample"


# -----------------------------------------------------------------------------
# The image's place, Eq. (2)


def test_the_image_stands_first_or_last_in_turn_1_half_the_time():
    """Eq. (2): X_instruct^1 is [X_q, X_v] or [X_v, X_q], at random; later turns are X_q."""
    turns = chat("What\n<image> is this?", "A cat.", "<image>\nAnd this?", "A dog.", "Why?", "So.")
    drawn = [arrange(turns, "random", random.Random(i)) for i in range(2000)]
    firsts = [d[0]["value"] for d in drawn]
    assert set(firsts) == {"<image>\nWhat\n is this?", "What\n is this?\n<image>"}
    assert 900 < sum(f.startswith(IMAGE) for f in firsts) < 1100, "the draw of Eq. (2) is not fair"
    assert all(d[1:] == turns[1:] for d in drawn), "Eq. (2) moves the image in turn 1 only"
    assert turns[0]["value"] == "What\n<image> is this?", "the record itself was changed"


def test_image_first_and_as_written_do_what_they_say():
    """The released code: every lone <image> leads its turn; as_written: nothing moves; several
    images never move."""
    turns = chat("a <image> b", "A.", "c\n<image>", "B.", "<image> d <image>", "C.")
    first = [t["value"] for t in arrange(turns, "first", random.Random(0))]
    assert first == ["<image>\na  b", "A.", "<image>\nc", "B.", "<image> d <image>", "C."]
    assert arrange(turns, "as_written", random.Random(0)) == turns
    several = chat("<image> x <image>", "A.", "Why?", "B.")
    assert all(arrange(several, "random", random.Random(i)) == several for i in range(20))


@pytest.mark.parametrize("position", ["random", "first", "as_written"])
def test_stage_1_draws_a_question_where_the_human_turn_is_only_an_image(position):
    """Sec. 4.2: for an image X_v a question X_q is sampled that asks to describe it briefly; X_a is
    the caption."""
    caption = chat("<image>", "A cat.")
    drawn = {arrange(caption, position, random.Random(i), ["Q1?", "Q2?"])[0]["value"]
             for i in range(200)}
    orders = {"random": ["<image>\n{}", "{}\n<image>"], "first": ["<image>\n{}"],
              "as_written": ["<image>\n{}"]}[position]
    assert drawn == {order.format(q) for order in orders for q in ("Q1?", "Q2?")}
    own = arrange(chat("<image>\nMine?", "A cat."), position, random.Random(0), ["Q1?"])[0]["value"]
    assert "Mine?" in own and "Q1?" not in own, "a question of one's own was replaced"


# -----------------------------------------------------------------------------
# Truncation


@pytest.mark.parametrize("template", ["llava_v0", "vicuna_v1"])
def test_a_long_conversation_loses_whole_trailing_turns_and_no_more_than_needed(template):
    """Ours (the released code cuts tokens): each kept answer ends in its STOP, and an image is
    never cut."""
    tokenizer, template, N = byte_tokenizer(), TEMPLATES[template], 9
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    turns = chat("<image>\nWhat?", "A cat.", "Why?", "It has ears. " * 3, "<image>\nAnd this?",
                 "A dog.", "Why?", "It barks.")
    lengths = [len(encode(render(turns[:n], template), tokenizer, [N] * tags(turns[:n]))[0])
               for n in (2, 4, 6, 8)]
    for limit in range(lengths[0], lengths[-1] + 2):
        ids, labels, kept = encode_within(turns, template, tokenizer, [N] * tags(turns), limit)
        n = sum(length <= limit for length in lengths)
        assert kept == turns[:2 * n] and len(ids) == lengths[n - 1], f"{n} answers fit {limit}"
        assert ids.count(image_id) == N * tags(kept), "an image was cut"
        assert tokenizer.decode([i for i in labels if i != IGNORE]).endswith(template.STOP), (
            "the last answer lost its STOP")
    message = (f"{lengths[0]} tokens (9 of them visual) with a single answer left, "
               f"the limit is {lengths[0] - 1}")
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_within(turns, template, tokenizer, [N] * tags(turns), lengths[0] - 1)
