"""A tokenizer of a few words, for the vocabulary of 50 that the tiny models have."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "yes", "no", "maybe"]
_SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0, 1 and 2 are the beginning, the end and padding, as in `tiny_models`."""
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, "user", "assistant", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
