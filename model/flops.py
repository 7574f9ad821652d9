"""Arithmetic that a token of the recipe needs: the yardstick for model FLOPs utilisation.

Counted is the least work the mathematics asks for, whatever the code does, so that removed waste shows as speed: the
generator's last layer and the MLM head at masked tokens only, keys and values of the mask decoder once, only reachable
relative positions. The backward pass is twice the forward pass; recomputation does not count. A multiply-add is two.
"""

from __future__ import annotations

from pipeline.config import PretrainConfig


def flops_per_token(training: PretrainConfig, seq_len: int, vocab_rows: int) -> float:
    """Training FLOPs per token of one step of all networks, forward and backward.

    Left out as negligible: embeddings, norms, soft-max, and the relative projections, which a batch shares.
    """
    config, masked = training.model, training.mask_fraction
    d, length = config.hidden_size, seq_len
    buckets = min(2 * config.position_buckets, 2 * length)
    keys_and_values = 4 * d * d
    position_to_content = 2 * buckets * d
    per_query = 4 * d * d + 4 * d * config.intermediate_size + 4 * length * d + 2 * buckets * d
    layer = keys_and_values + position_to_content + per_query

    passes = 2 if config.enhanced_mask_decoder else 1
    last_layer = keys_and_values + position_to_content + masked * passes * per_query
    mlm_head = masked * (2 * d * d + 2 * d * vocab_rows)
    if training.objective == "mlm":
        return 3.0 * ((config.num_hidden_layers - 1) * layer + last_layer + mlm_head)
    generator = (config.generator_num_hidden_layers - 1) * layer + last_layer
    discriminator = config.num_hidden_layers * layer + 2 * d * d + 2 * d
    return 3.0 * (generator + mlm_head + discriminator)
