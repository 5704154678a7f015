"""Training of WordPiece and byte-level BPE tokenizers."""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_wordpiece_tokenizer(
    texts: Iterable[str], vocab_size: int = 8192, model_max_length: int = 512
) -> BertTokenizer:
    """Train a lower-casing BERT tokenizer; equal texts give equal tokenizers.

    Args:
        texts: Training texts; read once and held in memory.
        vocab_size: Maximum number of tokens, special tokens included. All characters of `texts` are
            retained, even if they are more. Texts with few different words give fewer tokens.
        model_max_length: Stored in the tokenizer, in tokens.
    """
    texts = list(texts)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    continuations: set[str] = set()
    for text in texts:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            continuations.update(word[1:])
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # The trainer numbers continuations in a random order, which also breaks ties between
        # merges. Tokens that exist from the start keep their numbers.
        special_tokens=[*_SPECIAL_TOKENS, *(f"##{character}" for character in sorted(continuations))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return BertTokenizer(vocab=dict(vocab), model_max_length=model_max_length)


# ChatML, the turn format of many models; the content stays unchanged.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, lossless on every text, with a ChatML template.

    Args:
        texts: Training texts.
        vocab_size: Maximum number of tokens, except that the 256 bytes and the special tokens are always included.
        model_max_length: Stored in the tokenizer, in tokens.
    """
    specials = ("<|pad|>", "<|im_start|>", "<|im_end|>")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(special, special=True, normalized=False) for special in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=specials[0],
        eos_token=specials[2],
        additional_special_tokens=[specials[1]],
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHATML
    return wrapped
