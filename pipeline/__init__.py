"""The foundation, the corpus stage and the command line. Data flows one way through six stages:

    corpus -> vocab -> tokens -> pretrain -> export -> xnli

Reading order: `config` (what a run is), `manifest` and `stage` (the contract every stage keeps), `storage` (how a file
comes to be), then `sources`, `text` and `corpus` for the first stage. The stages vocab and tokens are in the package
`tokenizer`, the other three in `model`; `stages` lists all six in one table.
"""
