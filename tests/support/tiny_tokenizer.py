"""A byte-level BPE tokenizer small enough to train while a test waits."""

from __future__ import annotations

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Llama 3's way of splitting words: the strictest of the patterns in use about digits and line ends.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = [
    "The shipment of 240 crates left Rotterdam on 12 March; it's due in Oslo within 9 days.\n\n",
    "Each record names a sender, a receiver and a weight:  1,250 kg, for instance.\n",
    "  def total(weights):\n      return sum(weights)  # in kg\n",
]


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """299 tokens (id 0 is BOS, id 298 a special token): fits the vocabulary of the tiny models."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=298,
        special_tokens=["<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )


def ids(text: str) -> tuple[int, ...]:
    """A text's tokens, without BOS."""
    return tuple(tiny_tokenizer().encode(text, add_special_tokens=False))
