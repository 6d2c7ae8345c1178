"""
What one would run otherwise, as steps that bench.py can time: transformers' LlavaForConditionalGeneration in the loop that a
careful user would write, the same in HF Trainer, and nanoVLM. All start from our checkpoint's weights, and learn at rate 0.
"""
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from data import IGNORE


def count(micros):
    """(answer tokens, real tokens, padded tokens) of some micro-batches."""
    return tuple(sum(b[k].numel() if k == "input_ids" else (b[k] != nothing).sum().item() for b in micros)
                 for k, nothing in (("labels", IGNORE), ("attention_mask", 0), ("input_ids", None)))


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Given(torch.nn.Module):
    """A vision tower for transformers' model that hands on the features which stand in the pixels' place."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, Z_v, **_):
        with_cls = F.pad(Z_v, (0, 0, 1, 0))
        return SimpleNamespace(hidden_states=(with_cls,) * 3, last_hidden_state=with_cls)


def transformers_model(folder, args, machine, tower):
    """transformers' model from our checkpoint: what trains in fp32, what is frozen in the compute dtype."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(machine.device).train()
    if args.features:
        model.model.vision_tower = tower
    model.requires_grad_(args.stage == 2)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    for p in model.parameters():
        p.data = p.data if p.requires_grad else p.data.to(machine.dtype)
    if args.checkpoint_activations != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def inputs_of(b, device):
    return {k: b[k].to(device) for k in ("input_ids", "attention_mask", "labels")} | {"pixel_values": b["X_v"].to(device)}


def loop(optimizer, loss_of):
    """A step over a batch's padded micro-batches in random order; loss_of(micro-batch, answers of the batch) is one's share."""
    def step(batch):
        n_answer, total = count(batch["random"])[0], 0.0
        optimizer.zero_grad()
        for b in batch["random"]:
            loss = loss_of(b, n_answer)
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total
    return step


def careful_loop(model, args, machine):
    """transformers' model with AdamW and the right normalisation over the batch."""
    def loss_of(b, n_answer):
        with machine.autocast():
            return model(**inputs_of(b, machine.device), num_items_in_batch=n_answer, use_cache=False).loss
    return loop(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0), loss_of)


def nanovlm(folder, args, machine):
    """nanoVLM's model from a checkout (--peer) with our weights, in the step of its train.py: labels are shifted in the data,
    and the loss is a micro-batch's mean, here weighed so that the sum is the mean of the step."""
    sys.path.insert(0, args.peer)
    from models.config import VLMConfig
    from models.language_model import LanguageModel
    from models.vision_language_model import VisionLanguageModel
    hf = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    text, W = hf.config.text_config, hf.model.multi_modal_projector.linear_1
    model = VisionLanguageModel.__new__(VisionLanguageModel)                 # its __init__ would build, and load, other parts
    torch.nn.Module.__init__(model)
    model.decoder = LanguageModel(VLMConfig(
        lm_hidden_dim=text.hidden_size, lm_inter_dim=text.intermediate_size, lm_rms_eps=text.rms_norm_eps,
        lm_re_base=text.rope_parameters["rope_theta"], lm_max_position_embeddings=text.max_position_embeddings,
        lm_vocab_size=text.vocab_size, lm_n_heads=text.num_attention_heads, lm_n_kv_heads=text.num_key_value_heads,
        lm_n_blocks=text.num_hidden_layers, lm_tie_weights=text.tie_word_embeddings))
    names = (("layers.", "blocks."), ("self_attn.", "attn."), ("o_proj", "out_proj"), ("post_attention_layernorm", "norm2"),
             ("input_layernorm", "norm1"), ("embed_tokens", "token_embedding"))
    state = {"head.weight": hf.lm_head.weight}
    for name, weight in hf.model.language_model.state_dict().items():
        for theirs, its in names:
            name = name.replace(theirs, its)
        state[name] = weight
    left_out, unknown = model.decoder.load_state_dict(state, strict=False)
    assert not unknown and all("inv_freq" in name for name in left_out), (left_out, unknown)
    model.vision_encoder, model.MP = torch.nn.Identity(), W
    model.tokenizer = SimpleNamespace(image_token_id=hf.config.image_token_id)
    model.to(machine.device).train()
    model.decoder.requires_grad_(args.stage == 2)

    def loss_of(b, n_answer):
        inputs = inputs_of(b, machine.device)
        targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)
        with machine.autocast():
            _, loss = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], targets)
        return loss * (count([b])[0] / n_answer)
    return loop(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0), loss_of)


def trainer(model, args, machine, batches, before):
    """The same in HF Trainer, which does all its steps in one call: `before` lets the others go first at each. Returns (losses,
    seconds)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    losses, times, k = [0.0] * len(batches), [], len(batches[0]["random"])

    class Clock(TrainerCallback):
        def on_step_begin(self, arguments, state, control, **_):
            before(state.global_step)
            times.append(wait(machine.device))

        def on_step_end(self, *_, **__):
            times[-1] = wait(machine.device) - times[-1]

    class Watched(Trainer):
        def training_step(self, *arguments, **more):
            loss = super().training_step(*arguments, **more)
            losses[self.state.global_step] += loss.item()
            return loss

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (inputs_of(b, "cpu") for batch in batches for b in batch["random"])

    with tempfile.TemporaryDirectory() as folder:
        Watched(model=model, train_dataset=Batches(), data_collator=lambda samples: samples[0], callbacks=[Clock],
                args=TrainingArguments(
                    folder, per_device_train_batch_size=1, gradient_accumulation_steps=k, max_steps=len(batches),
                    learning_rate=0.0, lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], save_strategy="no",
                    logging_strategy="no", disable_tqdm=True, use_cpu=machine.device.type == "cpu",
                    bf16=machine.dtype == torch.bfloat16, fp16=machine.dtype == torch.float16)).train()
    return losses, times
