"""Tiny random backbones, each with a real tokenizer of its own family, built offline in a fraction of a second."""

import functools
import json
import random
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    BertTokenizer,
    DebertaV2Tokenizer,
    DistilBertTokenizer,
    ElectraTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

FAMILIES: tuple[str, ...] = ("bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert")

MAX_LENGTH = 128
VOCAB_SIZE = 256
BYTE_LEVEL_VOCAB_SIZE = 320  # all 256 bytes and a few merges

_DETERMINERS = ["the", "every", "another", "my"]
_ADJECTIVES = [
    "amber",
    "brave",
    "crooked",
    "dusty",
    "eager",
    "frozen",
    "gentle",
    "hollow",
    "jagged",
    "quiet",
    "silver",
    "tiny",
    "velvet",
    "wild",
    "young",
]
_NOUNS = [
    "anchor",
    "bridge",
    "carpenter",
    "dancer",
    "engine",
    "falcon",
    "garden",
    "harbor",
    "juggler",
    "lantern",
    "mountain",
    "puzzle",
    "river",
]
_VERBS = [
    "arrives",
    "blossoms",
    "crumbles",
    "drifts",
    "explodes",
    "flickers",
    "glitters",
    "hesitates",
    "returns",
    "vanishes",
    "wanders",
]
_ADVERBS = [
    "again",
    "boldly",
    "calmly",
    "daily",
    "everywhere",
    "freely",
    "gladly",
    "quickly",
    "rarely",
    "softly",
    "together",
    "unexpectedly",
]
# english: off
_PREPOSITIONS = ["above", "behind", "beside", "beyond", "inside", "near", "under", "without"]
# english: on


def _sentence(rng: random.Random, length: int) -> str:
    """A more or less grammatical sentence of exactly `length` words (4 or more)."""

    def clause() -> list[str]:
        return [rng.choice(_DETERMINERS), rng.choice(_NOUNS), rng.choice(_VERBS), rng.choice(_ADVERBS)]

    extensions = {
        1: lambda: [rng.choice(_ADVERBS)],
        2: lambda: ["in", str(rng.randint(1700, 2030))],
        3: lambda: [rng.choice(_PREPOSITIONS), rng.choice(_DETERMINERS), rng.choice(_NOUNS)],
        4: lambda: [rng.choice(_PREPOSITIONS), rng.choice(_DETERMINERS), rng.choice(_ADJECTIVES), rng.choice(_NOUNS)],
        5: lambda: [rng.choice(("while", "because", "until")), *clause()],
    }
    words = clause()
    while missing := length - len(words):
        words[-1] += rng.choice(("", "", ","))
        words += extensions[rng.randint(1, min(missing, 5))]()
    return " ".join(words).capitalize() + rng.choice(".!?")


def _corpus(size: int) -> list[str]:
    rng = random.Random(0)
    return [_sentence(rng, length=4 + index % 37) for index in range(size)]


CORPUS: list[str] = _corpus(200)


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A config 32 wide and 2 layers deep (ModernBERT: 3) without any dropout, for the family's `tiny_tokenizer`.

    Only the special token ids that real checkpoints of the family carry are set.
    """
    tokenizer = tiny_tokenizer(family)
    settings: dict[str, Any] = {name: 0.0 for name in AutoConfig.for_model(family).to_dict() if "dropout" in name}
    settings |= {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_dim" if family == "distilbert" else "intermediate_size": 64,
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": tokenizer.pad_token_id,
    }
    match family:
        case "roberta":
            # Its positions start after the padding index, 1.
            settings["max_position_embeddings"] += tokenizer.pad_token_id + 1
            settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        case "electra":
            settings["embedding_size"] = 16
        case "deberta-v2":
            # As in DeBERTa-v3: relative positions alone, no token types.
            settings |= {
                "type_vocab_size": 0,
                "relative_attention": True,
                "position_biased_input": False,
                "pos_att_type": ["p2c", "c2p"],
                "position_buckets": 16,
                "norm_rel_ebd": "layer_norm",
                "share_att_key": True,
            }
        case "modernbert":
            # One global layer, then two whose window is narrow enough to matter on short texts.
            settings |= {"num_hidden_layers": 3, "global_attn_every_n_layers": 3, "local_attention": 8}
            settings |= dict.fromkeys(("bos_token_id", "cls_token_id"), tokenizer.cls_token_id)
            settings |= dict.fromkeys(("eos_token_id", "sep_token_id"), tokenizer.sep_token_id)
    return AutoConfig.for_model(family, **(settings | overrides))


@functools.cache
def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The family's own tokenizer, trained on `CORPUS`; one shared instance, so do not modify it."""
    match family:
        case "bert":
            return BertTokenizer(_wordpiece_vocab(), model_max_length=MAX_LENGTH)
        case "distilbert":
            return DistilBertTokenizer(_wordpiece_vocab(), model_max_length=MAX_LENGTH)
        case "electra":
            return ElectraTokenizer(_wordpiece_vocab(), model_max_length=MAX_LENGTH)
        case "roberta":
            model = _model(_byte_level_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))
            return RobertaTokenizer(
                model["vocab"],
                [tuple(merge) for merge in model["merges"]],
                mask_token=AddedToken("<mask>", lstrip=True, special=True),
                model_max_length=MAX_LENGTH,
            )
        case "deberta-v2":
            return DebertaV2Tokenizer(_unigram_vocab(), model_max_length=MAX_LENGTH)
        case "modernbert":
            return _modernbert_tokenizer()
    raise ValueError(f"Unknown family {family!r}; choose from {', '.join(FAMILIES)}.")


def _model(tokenizer: Tokenizer) -> dict[str, Any]:
    """The serialized model of a tokenizer: its vocabulary and, for BPE, its merges."""
    return json.loads(tokenizer.to_str())["model"]


def _wordpiece_vocab() -> dict[str, int]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    characters = string.ascii_lowercase + string.digits
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCAB_SIZE,
        # The trainer meets continuation characters in a random order, on which the merges then depend, unless they
        # have their places already. Having them all also keeps alphanumeric ASCII text free of [UNK].
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"##{character}" for character in characters)],
        initial_alphabet=[*characters, *string.punctuation],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _model(tokenizer)["vocab"]


def _byte_level_bpe(special_tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_LEVEL_VOCAB_SIZE,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _unigram_vocab() -> list[tuple[str, float]]:
    """Pieces and scores, special tokens first; without [MASK], which DeBERTa-v3 too adds after the vocabulary."""
    special_tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special_tokens,
        unk_token="[UNK]",
        initial_alphabet=[*string.ascii_letters, *string.digits, *string.punctuation],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Rare characters get their scores in an order that differs from run to run, so all characters share one score.
    pieces = [
        (piece, round(score, 6) if len(piece) > 1 else -20.0)
        for piece, score in _model(tokenizer)["vocab"]
        if piece not in special_tokens
    ]
    return [(token, 0.0) for token in special_tokens] + sorted(pieces, key=lambda piece: (-piece[1], piece[0]))


def _modernbert_tokenizer() -> PreTrainedTokenizerFast:
    """As in the released checkpoints: a plain backend without a class of its own, special tokens after the others."""
    tokenizer = _byte_level_bpe(special_tokens=[])
    tokenizer.normalizer = normalizers.NFC()
    mask = AddedToken("[MASK]", lstrip=True, special=True)
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]", mask])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token=mask,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=MAX_LENGTH,
    )


def save_tiny_encoder(
    family: str,
    directory: str | Path,
    head: Literal["mlm"] | None = None,
    seed: int = 0,
    std: float | None = None,
) -> str:
    """Save a random encoder, bare or with its MLM head, and its tokenizer to `directory`; return that as a string.

    With `std`, every parameter is drawn anew from N(0, std), or from N(1, std) if it scales a layer norm: unlike the
    default weights, those tell layers, positions and biases apart in the output.
    """
    auto_class = AutoModelForMaskedLM if head == "mlm" else AutoModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(tiny_config(family))
        if std is not None:
            _reinit(model, std)
    model.save_pretrained(directory)
    tiny_tokenizer(family).save_pretrained(directory)
    return str(directory)


@torch.no_grad()
def _reinit(model: nn.Module, std: float) -> None:
    for parameter in model.parameters():
        parameter.normal_(std=std)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight += 1.0


def write_lines(path: str | Path, lines: Iterable[str]) -> Path:
    """Write one line of text per item and return the path."""
    path = Path(path)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
