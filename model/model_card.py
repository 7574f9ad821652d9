"""The README.md of an exported model: what it is, how it was trained, how to load it and what not to expect of it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from pipeline.config import ModelConfig, PretrainConfig

_SHARING = {
    "gdes": "gradient-disentangled (GDES): the discriminator adds a table of its own to the generator's word "
    "embeddings and sends no gradient into those; the sum is what is stored here",
    "nes": "none (NES): each network has word embeddings of its own",
    "es": "full (ES): both networks train one table of word embeddings",
}


@dataclass(frozen=True)
class CardFacts:
    """What the card tells; everything comes from committed stages, so equal runs give equal cards.

    `losses` holds the last value of each column of the pretrain stage's `losses.jsonl`, `parameters` how many numbers
    each file of weights has.
    """

    name: str
    languages: list[str]
    pieces: int
    steps: int
    max_seq_len: int
    model: ModelConfig
    training: PretrainConfig
    parameters: dict[str, int]
    losses: dict[str, float]
    dtype: str


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with the metadata block that model hubs read."""
    loading = _LOADING + (_RTD_HEAD if facts.training.objective == "rtd" else "")
    sections = [_metadata(facts), _introduction(facts), loading, _training(facts), _losses(facts), _limits(facts)]
    return "\n".join(sections)


def _metadata(facts: CardFacts) -> str:
    codes = sorted({re.split("[-_]", language)[0] for language in facts.languages})
    learnt = "replaced-token-detection" if facts.training.objective == "rtd" else "masked-language-modelling"
    tags = ["deberta-v2", "deberta-v3", learnt] + (["multilingual"] if len(codes) > 1 else [])
    # JSON strings are YAML strings; without quotes Norwegian would be the boolean `no`.
    return f"""---
language: {json.dumps(codes)}
library_name: transformers
pipeline_tag: feature-extraction
tags: {json.dumps(tags)}
---
"""


def _introduction(facts: CardFacts) -> str:
    languages = ", ".join(sorted(facts.languages))
    plural = "s" if len(facts.languages) > 1 else ""
    learnt = _LEARNT[facts.training.objective]
    start = "from another checkpoint" if facts.training.init.checkpoint else "from scratch"
    return f"""# {facts.name}

A DeBERTaV3 text encoder for {len(facts.languages)} language{plural}, trained {start} {learnt}.
Fine-tune it for classification, tagging, question answering or retrieval.

Languages in the training text: {languages}.

| file | what | parameters |
|---|---|---:|
{_file_rows(facts)}
Weights are {facts.dtype}. Both directories hold the same tokenizer: SentencePiece unigram, {facts.pieces:,} pieces.
"""


_LEARNT = {
    "rtd": "as a discriminator:\nit learnt to tell of every token whether a smaller generator had replaced it",
    "mlm": "as a masked language\nmodel: it learnt to fill hidden words in",
}

_FILES = {
    "model.safetensors": "the encoder",
    "rtd_head.safetensors": "its head that tells original from replaced tokens",
    "generator/model.safetensors": "the masked language model",
    "generator/position_embeddings.safetensors": "absolute positions of the generator's decoder",
}


def _file_rows(facts: CardFacts) -> str:
    return "".join(f"| `{path}` | {_FILES[path]} | {count:,} |\n" for path, count in sorted(facts.parameters.items()))


_LOADING = """## Use

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
encoder = AutoModel.from_pretrained("PATH")
states = encoder(**tokenizer("Some text.", return_tensors="pt")).last_hidden_state
```

`AutoModelForSequenceClassification`, `...ForTokenClassification` and `...ForQuestionAnswering` load the same directory
and add a new head. The masked language model is `AutoModelForMaskedLM.from_pretrained("PATH/generator")`.
"""

_RTD_HEAD = """The replaced-token head has no class in `transformers`: its logit for token i is
classifier(gelu(dense(LayerNorm(state_i + state_0)))), with the weights of `rtd_head.safetensors`.
"""


def _training(facts: CardFacts) -> str:
    training = facts.training
    rows = facts.steps * training.global_batch
    table = {
        **_networks(facts),
        "steps": f"{facts.steps:,} of {training.global_batch:,} rows",
        "tokens seen": f"{rows:,} rows of {facts.max_seq_len:,} tokens, so {rows * facts.max_seq_len:,} with padding",
        "languages in a batch": f"sampled by (tokens of the language) ** {training.alpha:g}",
        "optimiser": f"AdamW, learning rate {training.learning_rate:g}, {training.warmup_steps:,} warm-up steps, "
        f"weight decay {training.weight_decay:g}",
        "precision": training.precision,
    }
    rows_of_table = "".join(f"| {key} | {value} |\n" for key, value in table.items())
    return f"## Training\n\n| | |\n|---|---|\n{rows_of_table}"


def _networks(facts: CardFacts) -> dict[str, str]:
    """What was trained to do what."""
    model, training = facts.model, facts.training
    shape = f"{model.num_hidden_layers} layers, width {model.hidden_size}, {model.num_attention_heads} heads"
    share = f"{training.mask_fraction:.0%} of the tokens"
    if training.objective == "mlm":
        return {"objective": f"masked language modelling of {share}, in runs of whole words", "encoder": shape}
    return {
        "objective": f"replaced-token detection; the generator fills {share} in as a masked language model",
        "embedding sharing": _SHARING[training.embedding_sharing],
        "updates": "one optimiser for both networks"
        if training.joint
        else "a generator step, then a discriminator step",
        "discriminator": shape,
        "generator": f"{model.generator_num_hidden_layers} layers of the same width",
    }


_MEASURES = {
    "generator_loss": "masked language model: cross-entropy at masked tokens, in nats",
    "masked_accuracy": "masked language model: masked tokens it drew right",
    "discriminator_loss": "discriminator: binary cross-entropy a token, in nats",
    "replaced_accuracy": "discriminator: tokens judged right",
    "replaced_f1": "discriminator: F1 of finding replaced tokens",
}


def _losses(facts: CardFacts) -> str:
    rows = ""
    for key, meaning in _MEASURES.items():
        cells = [facts.losses.get(name) for name in (key, f"validation_{key}")]
        if cells != [None, None]:
            rows += f"| {meaning} | {' | '.join('' if value is None else f'{value:.4f}' for value in cells)} |\n"
    return f"## At the end of training\n\n| | last batch | held-out rows |\n|---|---:|---:|\n{rows}"


def _limits(facts: CardFacts) -> str:
    decoder = """
- The generator was trained with the enhanced mask decoder, which `transformers` does not have: it runs the last layer
  twice, with absolute positions in the query. Loaded as `AutoModelForMaskedLM` the generator has all its other weights,
  but its fill-mask answers are much worse than what it was trained to give. The position table is kept beside it.
"""
    return f"""## Limits

- It is an encoder to fine-tune, not a model that answers or writes.
- What it knows comes from the training text, with that text's errors and prejudices, and languages with little text
  are served less well. Measure it on your own task and language before relying on it.
- It was trained on at most {facts.max_seq_len:,} tokens at a time; longer inputs run, but were never seen.
- Use fp32 or bf16. The attention scores of this architecture overflow in fp16.
- Do not resize the generator's embeddings: `transformers` would resize a layer of its head instead.
- No licence is stated here; which one fits depends on the training text.
""" + (decoder.lstrip("\n") if facts.model.enhanced_mask_decoder else "")
