"""
Templates: how a conversation becomes text (Table 2), for the paper's Vicuna and for other models.

data.render writes a conversation in one of them, for training and for sampling alike.
"""
import json
import re
import string
from typing import NamedTuple

from parts.files import IMAGE, PROMPTS


class Template(NamedTuple):
    """How a conversation becomes text, Table 2.

    Two turns are   first X_instruct^1 reply answer(X_a^1) STOP   later X_instruct^2 reply ...
    and exactly what `answer` and STOP make is scored. In vicuna_v1:

        A chat between ... USER: <image>\\nWhat is this? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:
    """
    name: str
    first: str       # before the first instruction: X_system-message and the first role
    later: str       # before every later instruction
    reply: str       # between an instruction and its answer; a prompt ends here
    answer: str      # around X_a; a blank here is part of the answer's first token
    STOP: str        # ends an answer, and generation


ASSISTANT = "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
CURIOUS = "A chat between a curious {0} and an artificial intelligence assistant. " + ASSISTANT
LLAMA_2 = ("You are a helpful language and vision assistant. You are able to understand the visual "
           "content that the user provides, and assist the user with a variety of tasks using "
           "natural language.")
SMOLLM = ("## Metadata\n\nReasoning Mode: /no_think\n\n## Custom Instructions\n\n"
          "You are a helpful AI assistant named SmolLM, trained by Hugging Face.")
END = "<|im_end|>\n"
THINK = "<think>\n\n</think>\n"          # an empty thought: such a model then answers at once
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"

TEMPLATES = {template.name: template for template in (
    # OFFICIAL: Table 2 prints a newline after each STOP; the released conversations have none.
    # OFFICIAL: training there rendered "### Human: ...\n" and sampling "###Human: ..."; here
    # both are the latter.
    Template("llava_v0", CURIOUS.format("human") + "###Human: ", "Human: ",
             "###Assistant:", " {}", "###"),
    Template("vicuna_v1", CURIOUS.format("user") + " USER: ", "USER: ",
             " ASSISTANT:", " {}", "</s>"),
    Template("llava_llama_2", f"[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n", "<s>[INST] ",
             " [/INST]", " {} ", "</s>"),
    Template("mistral_instruct", "[INST] ", "[INST] ", " [/INST]", " {} ", "</s>"),
    Template("chatml_direct",
             "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n",
             "<|im_start|>user\n", "<|im_end|><|im_start|>assistant\n", "{}", "<|im_end|>"),
    # LLaVA-NeXT's later bases. What follows an answer's STOP stands at the head of the next turn.
    Template("qwen_1_5", f"<|im_start|>system\nYou are a helpful assistant.{END}<|im_start|>user\n",
             "\n<|im_start|>user\n", f"{END}<|im_start|>assistant\n", "{}", "<|im_end|>"),
    Template("llama_3", HEADER.format("system") + f"{LLAMA_2}<|eot_id|>" + HEADER.format("user"),
             HEADER.format("user"), "<|eot_id|>" + HEADER.format("assistant"), "{}", "<|eot_id|>"),
    # OURS, these five: what each language model was published with, without thinking. The
    # published SmolLM3 also states today's date, and Qwen3 and it lose earlier empty thoughts.
    Template("qwen_3", "<|im_start|>user\n", "\n<|im_start|>user\n",
             f"{END}<|im_start|>assistant\n{THINK}\n", "{}", "<|im_end|>"),
    Template("smollm_3", f"<|im_start|>system\n{SMOLLM}\n\n<|im_start|>user\n",
             "\n<|im_start|>user\n", f"{END}<|im_start|>assistant\n{THINK}", "{}", "<|im_end|>"),
    Template("gemma", "<start_of_turn>user\n", "\n<start_of_turn>user\n",
             "<end_of_turn>\n<start_of_turn>model\n", "{}", "<end_of_turn>"),
    # Phi-3's text has newlines, but its tokenizer drops what is blank behind such a token
    Template("phi_3", "<|user|>", "<|user|>", "<|end|><|assistant|>", "{}", "<|end|>"),
    Template("phi_4", "<|im_start|>user<|im_sep|>", "<|im_start|>user<|im_sep|>",
             "<|im_end|><|im_start|>assistant<|im_sep|>", "{}", "<|im_end|>"),
    # OFFICIAL: the released stage 1 drops the question of Sec. 4.2: image, caption, newline.
    Template("plain", "", "", "", "{}", "\n"),
)}

# Marks of chat formats. In a text that is trained on they, like a STOP, would end it too early.
TOKEN = r"<[|｜][^<>|｜]{1,40}[|｜]>|</?s>|<(?:eos|bos|unk|pad)>|<(?:end|start)_of_turn>"
MARK = rf"(?:{TOKEN}|\[/?INST\])"
HOLDS_STOP = re.compile(f"{MARK}|{re.escape(TEMPLATES['llava_v0'].STOP)}|{re.escape(IMAGE)}")


def template_for(config, tokenizer):
    """The template that a language model knows best. OURS: the paper has one model."""
    words = tokenizer.get_vocab()
    kind = config.model_type
    published = tokenizer.chat_template or ""
    fits = {                             # the first that does is taken
        "phi_4": "<|im_sep|>" in words,
        "smollm_3": kind == "smollm3",
        "qwen_3": kind == "qwen3" and "enable_thinking" in published,
        "qwen_1_5": kind.startswith("qwen") and "<|im_start|>" in words,
        "chatml_direct": "<|im_start|>" in words,
        "llama_3": "<|start_header_id|>" in words,
        "gemma": "<start_of_turn>" in words,
        "phi_3": "<|user|>" in words and "<|end|>" in words,
        "mistral_instruct": kind == "mistral",
        "llava_llama_2": "<<SYS>>" in published,
        "vicuna_v1": True,
    }
    return TEMPLATES[next(name for name in fits if fits[name])]


def missing_tokens(template, tokenizer):
    """The special tokens of a template that a tokenizer lacks: as plain text they stop nothing."""
    special = re.findall(f"{TOKEN}|</?think>", "".join(template))
    return [token for token in special if token not in tokenizer.get_vocab()]


def check_template(template, tokenizer):
    """Raises ValueError unless the tokenizer has all special tokens of the template."""
    missing = missing_tokens(template, tokenizer)
    if missing:
        fitting = [t.name for t in TEMPLATES.values() if not missing_tokens(t, tokenizer)]
        raise ValueError(f"template {template.name} needs the token {missing[0]}, which the "
                         "language model's tokenizer lacks; "
                         f"--template {' | '.join(fitting)} would fit")


def template_of(name, folder):
    """The template of --template, or else of a checkpoint folder; it is never guessed from the
    folder's name. Raises ValueError if neither says one."""
    if name not in TEMPLATES:
        raise ValueError(f"{folder}: choose a --template, {' | '.join(TEMPLATES)}")
    return TEMPLATES[name]


def choose_template(name, model):
    """The template of --template for a model.LLaVA. "auto" is what its checkpoint was trained with,
    or, where that knows no questions ("plain") or is not known, what its language model knows.
    """
    # the chat template that says what it knows is not the checkpoint's, see chat_template
    model.meta.setdefault("knows", template_for(model.f_phi.config, model.tokenizer).name)
    if name == "auto":
        name = model.meta.get("template", "plain")
        if name == "plain":
            name = model.meta["knows"]
    template = TEMPLATES[name]
    check_template(template, model.tokenizer)
    stop_at(template, model)
    return template


def stop_at(template, model):
    """STOP, where it is a token of its own, ends every answer of the model: here, and, by the
    checkpoint's generation_config.json, in other programs. Base models name another one alone."""
    i = model.tokenizer.added_tokens_encoder.get(template.STOP)
    if i is not None:
        model.f_phi.generation_config.eos_token_id = sorted(model.eos_ids | {i})


def chat_template(template, tokenizer):
    """What data.render writes in a Template, as a chat template in Jinja, for other programs.

    They take the ids of all the text at once, and add no <s>. So it is written here, for a
    tokenizer that adds it, and a blank where a text starts anew, for one that needs it.
    """
    question = "text(m.content)"
    if template.name == "plain":                         # its images alone, as in data.render
        question = "'<image>' * (text(m.content).split('<image>') | length - 1)"
    start = template.first
    if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:      # as in data.encode
        start = behind(tokenizer.bos_token, template.first, tokenizer)
    before, after = template.answer.split("{}")
    strings = template._asdict() | {
        "start": start, "before": before, "after": after, "image_line": f"{IMAGE}\n",
        "image_reply": IMAGE + template.reply, "new_line": behind(IMAGE, "\n", tokenizer),
        "new_reply": behind(IMAGE, template.reply, tokenizer)}
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in strings.items()}
    jinja = (PROMPTS / "chat_template.jinja").read_text()
    return string.Template(jinja).substitute(quoted, question=question)


def behind(token, text, tokenizer):
    """A token and a text that starts anew behind it, written so that its ids are the text's alone.

    Newer sentencepiece tokenizers put a blank before a text only where nothing at all precedes it.
    """
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    together = tokenizer(token + text, add_special_tokens=False)["input_ids"]
    return token + text if together[1:] == alone else f"{token} {text}"
