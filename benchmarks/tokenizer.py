"""A small byte-level tokenizer with a chat template, learned from the training split of pairs of people.

    python benchmarks/tokenizer.py DATA OUT [--vocabulary 2048]

DATA is a folder in HelpSteer3's layout. It reads any text in any language: what no merge covers stays bytes. The same
rows give the same tokenizer. For models that start from random weights, such as those of
recipes/reward_model/human-preference.yaml.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from align.config import DataConfig
from align.data import dataset

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def learn(data: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte pairs of the conversations and responses of the training split."""
    rows = dataset.load_dataset(DataConfig(path=str(data), bad_rows="skip")).train
    texts = [text for row in rows for text in (*(turn.content for turn in row.context), row.response1, row.response2)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TEMPLATE
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens, bytes and marks included (%(default)s)")
    arguments = parser.parse_args()
    learned = learn(arguments.data, arguments.vocabulary)
    learned.save_pretrained(arguments.out)
    print(f"wrote {arguments.out}: {len(learned)} tokens")
