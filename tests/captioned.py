"""A text encoder of kilobytes, captioned pictures, and a text-to-image model that reads them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (255, 255, 255)}
SHAPES = ("square", "bar", "dot")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *COLOURS, *SHAPES, "small", "large")
WIDTH = 12
MODEL = [
    "backbone=pixart_emoji",
    "data=emoji64",
    "backbone.config.num_attention_heads=2",
    "backbone.config.attention_head_dim=8",
    "backbone.config.cross_attention_dim=16",
    f"backbone.config.caption_channels={WIDTH}",
    "backbone.config.num_layers=3",
    "backbone.config.sample_size=16",
    "backbone.config.patch_size=4",
    "data.image_size=16",
    "data.text.tokens=6",
]


def tiny_encoder(folder: Path, seed: int = 0) -> Path:
    """A BERT of one layer with a word tokenizer, in the layout of the hub."""
    torch.manual_seed(seed)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).eval().save_pretrained(folder)
    return folder


def captioned_parquet(folder: Path, n: int = 48, held_out: int = 8) -> Path:
    """Two splits of coloured shapes of 16x16 with captions such as "red bar"."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "caption": Value("string")})
    for split, first, count in (("train", 0, n), ("validation", n, held_out)):
        rows: dict[str, list[Any]] = {"image": [], "caption": []}
        for i in range(first, first + count):
            colour, shape = list(COLOURS)[i % 3], SHAPES[i // 3 % 3]
            pixels = np.full((16, 16, 3), 255, dtype=np.uint8)
            height, width = {"square": (10, 10), "bar": (3, 14), "dot": (4, 4)}[shape]
            top, left = 1 + i % 3, 1
            pixels[top : top + height, left : left + width] = COLOURS[colour]
            buffer = io.BytesIO()
            Pictures.fromarray(pixels).save(buffer, "PNG")
            rows["image"].append({"bytes": buffer.getvalue(), "path": None})
            rows["caption"].append(f"{colour} {shape}")
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder
