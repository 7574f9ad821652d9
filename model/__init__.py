"""The networks, their training and their evaluation: everything of this project that needs torch.

The recipe, each module using those above it:

| module | subject |
|---|---|
| `modules` | linear layers and dropout with faster ways on CPUs |
| `attention` | disentangled self-attention: three products, one shared relative index |
| `deberta` | the encoder body, with the names `transformers` gives its parts |
| `head` | tied projection, cross-entropy and sampling without ever holding all logits |
| `masked_lm` | DeBERTa's masked language model with its enhanced mask decoder: the generator, or the MLM baseline |
| `rtd` | generator, discriminator and the embedding sharing between them (ES, NES, GDES) |
| `flops` | how much arithmetic a token of that recipe needs |

Stage pretrain:

| module | subject |
|---|---|
| `vocabulary` | the pieces, and how many rows the tables have |
| `rng`, `order`, `masking`, `data` | which rows, in which order, masked where: arithmetic on (seed, sample number) |
| `hf_files`, `hf_checkpoint`, `hf_config`, `warm_start` | weights to start from, out of a Hugging Face directory |
| `engine`, `batch`, `update` | one DeepSpeed engine; what is computed at once and counted; one update of the networks |
| `similarity` | mean cosine of an embedding table: what pulls on it |
| `checkpoint`, `metrics`, `training` | whole checkpoints, what a run reports, the loop over its steps |
| `world`, `launch`, `pretrain` | the processes of a run, how they start, what each of them does |

Stages export and xnli:

| module | subject |
|---|---|
| `export`, `model_card` | a checkpoint to directories that `transformers` loads |
| `nli_data`, `finetune`, `xnli` | pairs, a classifier on the exported encoder, its score in every language |
"""
