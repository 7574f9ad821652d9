"""The networks and their training: everything of this project that needs torch.

| module | subject |
|---|---|
| `attention` | disentangled self-attention: three products, one shared relative index |
| `deberta` | the encoder body, with the names `transformers` gives its parts |
| `head` | tied projection, cross-entropy and sampling without ever holding masked tokens x vocabulary logits |
| `rtd` | generator, discriminator and the embedding sharing between them (ES, NES, GDES): the recipe itself |
| `flops` | how much arithmetic a token of that recipe needs |

Imports go downwards in that order reversed: `rtd` uses `head` and `deberta`, `deberta` uses `attention`.
"""
