"""``README.md`` of an exported folder: how the model was trained, its template and stop ids, how to load it."""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from align.models.exported_files import Chat

NAME = "README.md"


def policy(origin: str, chat: Chat, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], trust: bool) -> str:
    """The page of a causal language model whose responses end with ``stop_ids``. ``origin``: how the model was made."""
    stops = ", ".join(f"{id} {tokenizer.convert_ids_to_tokens(id)!r}" for id in stop_ids)
    return f"""# Language model

{origin}

- Chat template: `chat_template.jinja`{_date_in_words(chat)}.
- Stop ids: {stops}. They are `eos_token_id` of `generation_config.json`, which transformers and vLLM read.

```python
{_imports("AutoModelForCausalLM", chat)}
tokenizer = {chat.loader}.from_pretrained("."{_trust(trust)})  # this folder
model = AutoModelForCausalLM.from_pretrained("."{_trust(trust)})
messages = [{{"role": "user", "content": "Name a prime number."}}]
prompt = tokenizer.apply_chat_template({_arguments("messages", chat)}, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
ids = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=512)
print(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
```
"""


def reward(origin: str, chat: Chat, tokenizer: PreTrainedTokenizerBase, pads: bool, weighted: bool, trust: bool) -> str:
    """The page of a sequence classifier. ``pads``: config and tokenizer have a padding token, so batches work;
    ``weighted``: the score is the sum of attributes weighted by ``align_reward.json``."""
    end = json.dumps(tokenizer.convert_ids_to_tokens(chat.end_id), ensure_ascii=False)
    rendered = f"tokenizer.apply_chat_template({_arguments('conversation', chat)}, tokenize=False)"
    text = {"cut": f"{rendered}.rpartition({end})[0] + {end}", "append": f"{rendered} + {end}", "all": rendered}
    score = "outputs[:, 0]"
    if weighted:
        score = "sum(w * outputs[:, model.config.label2id[name]] for name, w in weights.items())"
    ids = 'tokenizer({}, add_special_tokens=False, return_tensors="pt"{})'
    if pads:
        batch = f"""batch = {ids.format("texts", ', padding=True, padding_side="right"')}
outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits"""
    else:
        batch = f"""batches = [{ids.format("text", "")} for text in texts]
outputs = torch.cat([model(input_ids=batch.input_ids).logits for batch in batches])"""
    weights = 'weights = json.load(open("align_reward.json"))["weights"]\n' if weighted else ""
    modules = [name for name, used in (("json", weighted), ("torch", not pads)) if used]
    return f"""# Reward model

{origin}

- Chat template: `chat_template.jinja`{_date_in_words(chat)}.
- {_end_in_words(chat, end)}
- {_padding_in_words(tokenizer, pads)}

```python
{"".join(f"import {name}{chr(10)}" for name in modules)}{_imports("AutoModelForSequenceClassification", chat)}
tokenizer = {chat.loader}.from_pretrained("."{_trust(trust)})  # this folder
model = AutoModelForSequenceClassification.from_pretrained("."{_trust(trust)}).eval()
messages = [{{"role": "user", "content": "2 + 2?"}}, {{"role": "assistant", "content": "4"}}]
{weights}texts = [{text[chat.end]} for conversation in [messages]]
{batch}
scores = {score}
```
"""


def _imports(model: str, chat: Chat) -> str:
    return f"from transformers import {', '.join(sorted((model, chat.loader)))}"


def _trust(trust: bool) -> str:
    return ", trust_remote_code=True" if trust else ""


def _arguments(messages: str, chat: Chat) -> str:
    return messages if chat.date is None else f"{messages}, date_string={json.dumps(chat.date, ensure_ascii=False)}"


def _date_in_words(chat: Chat) -> str:
    return "" if chat.date is None else f", rendered with `date_string` {json.dumps(chat.date, ensure_ascii=False)}"


def _end_in_words(chat: Chat, end: str) -> str:
    score = f"The score is read at the last token, {end} ({chat.end_id})"
    rest = {
        "cut": "cut off what the template writes after it, or the score is another number",
        "append": "the template does not write it, so append it",
        "all": "the template writes it",
    }
    return f"{score}: {rest[chat.end]}."


def _padding_in_words(tokenizer: PreTrainedTokenizerBase, pads: bool) -> str:
    if pads:
        return (
            f"Padding token: `{tokenizer.pad_token}` ({tokenizer.pad_token_id}), never the last of a conversation. Pad "
            "on the right; a model with learned positions (GPT-2) needs `position_ids` with left padding."
        )
    return (
        "There is no padding token: the tokenizer has no token to spare, the embedding no free row, and transformers "
        "would score the token before the end if the end padded. Score conversations one by one, as below."
    )
