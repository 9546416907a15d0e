"""A WordPiece tokenizer of 200 entries, built in memory, for tests that need no real vocabulary."""

from __future__ import annotations

import re
import string

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.decoders import WordPiece as WordPieceDecoder
from transformers import PreTrainedTokenizerFast

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = re.findall(
    r"\w+",
    """
    the a an of to in is are was be it this that for with and or not on at by from as return
    returns value values name names file files list string number object function class
    module method argument given true false none if else when each first last one two new
    old all any more most good bad great film movie plot story happy sad cat dog bird fish
    tree house runs eats sees likes big small red blue green fast slow data model word text
    line read write open close get set key error type call
    """,
)

VOCAB_SIZE = 200


def tiny_tokenizer(
    *, padding_side: str = "right", model_max_length: int = 128
) -> PreTrainedTokenizerFast:
    """Return a lower-casing BERT-style tokenizer: ids < 200, ``[CLS] a [SEP] b [SEP]``, pad id 0.

    Any ASCII word can be spelled from single characters, so no ASCII text becomes ``[UNK]``.
    """
    characters = string.ascii_lowercase + string.digits
    pieces = [*_SPECIAL, *characters, *(f"##{c}" for c in characters), *".,:;!?'()-_", *_WORDS]
    tokens = list(dict.fromkeys(pieces))[:VOCAB_SIZE]
    tokens += [f"[unused{i}]" for i in range(VOCAB_SIZE - len(tokens))]
    vocab = {token: i for i, token in enumerate(tokens)}

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        padding_side=padding_side,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
