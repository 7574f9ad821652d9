"""The networks, their training and their evaluation: everything of this project that needs torch.

The recipe, each module using those above it:

| module | subject |
|---|---|
| `attention` | disentangled self-attention: three products, one shared relative index |
| `deberta` | the encoder body, with the names `transformers` gives its parts |
| `head` | tied projection, cross-entropy and sampling without ever holding all logits |
| `rtd` | generator, discriminator and the embedding sharing between them (ES, NES, GDES) |
| `flops` | how much arithmetic a token of that recipe needs |

Stage pretrain:

| module | subject |
|---|---|
| `rng`, `order`, `masking`, `data` | which rows, in which order, masked where: arithmetic on (seed, sample number) |
| `engine`, `update` | one DeepSpeed engine; one update of both networks |
| `checkpoint`, `metrics`, `training` | whole checkpoints, what a run reports, the loop over its steps |
| `world`, `launch`, `pretrain` | the processes of a run, how they start, what each of them does |

Stages export and xnli:

| module | subject |
|---|---|
| `export`, `model_card` | a checkpoint to directories that `transformers` loads |
| `nli_data`, `finetune`, `xnli` | pairs, a classifier on the exported encoder, its score in every language |
"""
