"""Tiny real models and tokenizers, built from configs in the process: no download, no mock."""
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AddedToken, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM)

from model import IMAGE, LLaVA

torch.set_num_threads(2)


def byte_tokenizer(specials=("<unk>", "<s>", "</s>")):
    """One id a byte behind the specials: any text has ids, and every id has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*specials, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                        pad_token="<unk>")
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in (*specials, IMAGE)])
    return tokenizer


def tiny_clip(image_size=28, seed=0):
    """ViT with the shape of CLIP ViT-L/14: 14-pixel patches, 28 px -> N = 4 visual tokens."""
    torch.manual_seed(seed)
    return CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                                            num_attention_heads=2, image_size=image_size, patch_size=14)).eval()


FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def tiny_llm(family="llama", tied=False, vocab_size=320, seed=0, **more):
    config, model = FAMILIES[family]
    torch.manual_seed(seed)
    return model(config(vocab_size=vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
                        tie_word_embeddings=tied, **more)).eval()


def tiny_llava(family="llama", tied=False, **more):
    model = LLaVA(tiny_clip(), tiny_llm(family, tied), byte_tokenizer(), **more)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.W.weight, std=0.5)
    return model.eval()


@pytest.fixture
def llava():
    return tiny_llava()
