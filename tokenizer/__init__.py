"""The stages `vocab` and `tokens`: from clean text to rows of token ids. Read in this order:

- documents.py: reads the corpus stage's shards
- sample.py: a language-balanced sample of them, as quotas and sentences
- special.py: the ids of [PAD] [CLS] [SEP] [UNK] [MASK]
- train.py: the stage vocab, SentencePiece unigram in a process of its own (child.py)
- scores.py: rounds the scores, so that every reader finds the same pieces
- huggingface.py: the files from which transformers loads the same tokenizer
- pieces.py: text to flat arrays of ids
- words.py: at which pieces words begin
- fertility.py: how well the vocabulary fits each language
- pack.py: ids to rows of exactly max_seq_len
- encode.py: the stage tokens, one Beam element a shard
"""
