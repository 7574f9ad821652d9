"""The stages `vocab` and `tokens`: from clean text to rows of token ids. Read in this order:

- documents.py: reads the corpus stage's shards
- sample.py: a language-balanced sample of them, as quotas and sentences
- special.py: the ids of [PAD] [CLS] [SEP] [UNK] [MASK]
- scripts.py: the Unicode script of characters
- aggregate.py: sentences to counted segments, which no piece crosses
- seeds.py: the substrings of segments that are worth starting from
- unigram.py: SentencePiece's training on segments and seeds; wire.py: its models as protocol buffers
- scores.py: rounds the scores, so that every reader finds the same pieces
- train.py: the stage vocab, the training in a process of its own (child.py)
- foreign.py: a vocabulary that was trained elsewhere, instead of one of our own
- huggingface.py: the files from which transformers loads the same tokenizer
- pieces.py: text to flat arrays of ids
- words.py: at which pieces words begin
- fertility.py: how well the vocabulary fits each language; compared.py: and other tokenizers
- pack.py: ids to rows of exactly max_seq_len
- encode.py: the stage tokens, one Beam element a shard
"""
