"""Starting pretraining from published weights instead of random ones.

The discriminator takes the checkpoint's encoder and its RTD head, the generator the checkpoint's generator; under
`objective: mlm` the one network takes the encoder and the LM head it was saved with, or the checkpoint's generator if
that is as deep (an export of `mlm` keeps its LM head there). What a checkpoint has none of stays as it was drawn, and
the log says so:

| missing         | instead                                                                          |
|-----------------|----------------------------------------------------------------------------------|
| generator       | the encoder's lowest layers with all that is below them and E_D; its head fresh  |
| RTD or LM head  | fresh                                                                            |
| position table  | fresh; `transformers` has no place for it, so most checkpoints lost theirs       |

Word embeddings (E_D: the encoder's table, E_G: the generator's):

| sharing | discriminator       | generator                                                       |
|---------|---------------------|-----------------------------------------------------------------|
| `gdes`  | E_Δ := E_D - E_G    | E_G                                                             |
| `nes`   | E_D                 | E_G                                                             |
| `es`    |                     | E_D, also where E_G differs: the discriminator is what is kept  |

Rows are taken over by id, after the vocabularies were compared; with `init.match_pieces` by piece, and pieces that the
checkpoint lacks keep the row drawn for them, with E_Δ = 0.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.hf_checkpoint import WORDS, HFCheckpoint, StoredNetwork
from model.hf_config import check_architecture, networks_to_take
from model.masked_lm import MaskedLM
from model.rtd import Discriminator, Generator, GradientDisentangledSharing, NoSharing
from pipeline.config import PretrainConfig
from pipeline.errors import UserError
from tokenizer.special import MASK_TOKEN

_DELTA = "deberta.embeddings.word_embeddings.delta"
_LM_BIAS = "lm_predictions.lm_head.bias"
_SHARED_BY_LAYERS = ("deberta.embeddings.", "deberta.encoder.rel_embeddings.", "deberta.encoder.LayerNorm.")
_OPTIONAL = ("deberta.embeddings.position_embeddings.", "lm_predictions.", "mask_predictions.")
"""Parts that a checkpoint may lack, but not in half."""

_log = logging.getLogger(__name__)


@torch.no_grad()
def warm_start_rtd(
    generator: Generator,
    discriminator: Discriminator,
    checkpoint: HFCheckpoint,
    config: PretrainConfig,
    pieces: list[str],
) -> None:
    """Put a checkpoint's weights into both networks.

    Args:
        generator: freshly drawn.
        discriminator: freshly drawn.
        checkpoint: what to start from.
        config: of the stage; `init.match_pieces` says how rows are taken over.
        pieces: the run's vocabulary in order of id; [MASK] follows.

    Raises:
        UserError: the checkpoint does not fit the networks or the vocabulary.
    """
    encoder, stored = checkpoint.encoder, checkpoint.generator
    check_architecture(config.model, networks_to_take(config, encoder, stored))
    if stored is None:
        stored = _lowest_layers(encoder, config.model.generator_num_hidden_layers)
    rows = _rows(checkpoint, (encoder, stored), config, pieces, generator)

    seen, shared = encoder.tensors[WORDS], stored.tensors[WORDS]
    own = discriminator.deberta.embeddings.word_embeddings
    tensors = {name: tensor for name, tensor in encoder.tensors.items() if name != WORDS}
    if isinstance(own, NoSharing):
        tensors[WORDS] = rows.put(own.weight, seen)
    elif isinstance(own, GradientDisentangledSharing):
        tensors[_DELTA] = rows.put(torch.zeros_like(own.delta), difference(seen, shared))
    elif not torch.equal(seen, shared):
        _log.info("warm start: es has one word table; taken from the discriminator, the generator's is left out")
        shared = seen
    _fill(generator, "generator", stored.where, _masked_lm_tensors(generator, stored, shared, rows))
    _fill(discriminator, "discriminator", encoder.where, tensors)


@torch.no_grad()
def warm_start_mlm(masked_lm: MaskedLM, checkpoint: HFCheckpoint, config: PretrainConfig, pieces: list[str]) -> None:
    """Put a checkpoint's encoder and its LM head into a masked language model, or its generator if that is as deep.

    Args and errors are those of `warm_start_rtd`.
    """
    networks = networks_to_take(config, checkpoint.encoder, checkpoint.generator)
    check_architecture(config.model, networks)
    (stored,) = networks.values()
    rows = _rows(checkpoint, (stored,), config, pieces, masked_lm)
    tensors = _masked_lm_tensors(masked_lm, stored, stored.tensors[WORDS], rows)
    _fill(masked_lm, "masked language model", stored.where, tensors)


def difference(table: Tensor, base: Tensor) -> Tensor:
    """E_Δ such that `base` + E_Δ is `table` to the last bit, wherever a float has that property.

    Rounding makes table - base miss it in rare entries: where a sum lies halfway between two floats beside a power of
    two. There a neighbour hits. Whatever is the rounded sum of `base` and some float is hit; tables that gdes exports
    are, so they come back as they were. `-(base - table)` also keeps the sign of a zero.
    """
    delta = -(base - table)
    missed = base + delta != table
    for end in (-torch.inf, torch.inf):
        near = torch.nextafter(delta[missed], torch.tensor(end))
        hit = base[missed] + near == table[missed]
        delta[missed] = torch.where(hit, near, delta[missed])
    return delta


@dataclass(frozen=True, eq=False)
class _Rows:
    """Which rows of the checkpoint's tables go where."""

    ours: Tensor | slice
    theirs: Tensor | slice

    def put(self, fresh: Tensor, stored: Tensor) -> Tensor:
        """A copy of `fresh` with the rows of `stored` in their places."""
        table = fresh.detach().clone()
        table[self.ours] = stored[self.theirs]
        return table


def _rows(
    checkpoint: HFCheckpoint,
    networks: tuple[StoredNetwork, ...],
    config: PretrainConfig,
    pieces: list[str],
    target: MaskedLM,
) -> _Rows:
    """How the checkpoint's vocabulary maps to the run's, after looking at the tables of `networks`."""
    table, rows = target.deberta.embeddings.word_embeddings.weight, len(networks[0].tensors[WORDS])
    for network in networks:
        for name, shape in ((WORDS, [rows, table.shape[1]]), (_LM_BIAS, [rows])):
            found = list(network.tensors[name].shape) if name in network.tensors else shape
            if found != shape:
                raise UserError(f"{network.where}: {name} is {found} in its weights where {shape} is needed")
    tokens = [*pieces, MASK_TOKEN]
    if config.init.match_pieces:
        return _matched(checkpoint, tokens, rows)
    _compare(checkpoint, tokens)
    if rows != len(table):
        raise UserError(
            f"{checkpoint.where} has word embeddings of {rows} rows and this run of {len(table)}: set "
            f"pretrain.model.vocab_size to {rows}, or pretrain.init.match_pieces: true for another vocabulary"
        )
    return _Rows(slice(None), slice(None))


def _compare(checkpoint: HFCheckpoint, tokens: list[str]) -> None:
    """Check that every id of the run means the same to the checkpoint."""
    if checkpoint.pieces is None:
        _log.info("warm start: %s has no tokenizer: of its vocabulary only the size was checked", checkpoint.where)
        return
    for token_id, token in enumerate(tokens):
        if (theirs := checkpoint.pieces.get(token_id)) != token:
            raise UserError(
                f"id {token_id} is {token!r} in this run's vocabulary and {theirs!r} in {checkpoint.where}: set "
                "pretrain.init.match_pieces: true to take embeddings over by piece, or use the checkpoint's vocabulary"
            )


def _matched(checkpoint: HFCheckpoint, tokens: list[str], rows: int) -> _Rows:
    """The rows of all tokens that both vocabularies have."""
    if checkpoint.pieces is None:
        raise UserError(
            f"{checkpoint.where} has no tokenizer for pretrain.init.match_pieces: put its spm.model or tokenizer.json "
            "there, or set match_pieces: false if the vocabularies are the same"
        )
    # Of tokens that were added beyond the table, or under a name that a piece has already, none has a row to take.
    known = {piece: token_id for token_id, piece in sorted(checkpoint.pieces.items(), reverse=True) if token_id < rows}
    pairs = [(ours, known[token]) for ours, token in enumerate(tokens) if token in known]
    _log.info("warm start: %s of %s pieces taken over, the others start fresh", f"{len(pairs):,}", f"{len(tokens):,}")
    ours, theirs = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return _Rows(ours, theirs)


def _lowest_layers(encoder: StoredNetwork, depth: int) -> StoredNetwork:
    """A generator's body out of the encoder: its first layers and everything that all layers share, without heads."""
    wanted = (*_SHARED_BY_LAYERS, *(f"deberta.encoder.layer.{number}." for number in range(depth)))
    kept = {
        name: tensor
        for name, tensor in encoder.tensors.items()
        if name.startswith(wanted) and not name.startswith(_OPTIONAL)
    }
    _log.info("warm start: no generator there: its body is made of the discriminator's lowest %d layers", depth)
    return StoredNetwork(encoder.where, encoder.config, kept)


def _masked_lm_tensors(network: MaskedLM, stored: StoredNetwork, words: Tensor, rows: _Rows) -> dict[str, Tensor]:
    """What a masked language model takes from a stored network, with `words` for its word table."""
    tensors = {**stored.tensors, WORDS: rows.put(network.deberta.embeddings.word_embeddings.weight, words)}
    if _LM_BIAS in tensors:
        tensors[_LM_BIAS] = rows.put(network.lm_predictions.lm_head.bias, tensors[_LM_BIAS])
    return tensors


def _fill(network: nn.Module, called: str, where: str, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into a network by name, and say what it did not get.

    Raises:
        UserError: a tensor is missing that is not part of an absent head or position table, or has another shape.
    """
    own = network.state_dict()
    fresh = {part: {name for name in own if name.startswith(part)} for part in _OPTIONAL}
    fresh = {part: names for part, names in fresh.items() if names and not names & tensors.keys()}
    missing = sorted(own.keys() - tensors.keys() - set().union(*fresh.values()))
    if missing:
        raise UserError(f"{where}: its weights lack {', '.join(missing[:3])} ({len(missing)} in all); get it again")
    taken = sorted(own.keys() & tensors.keys())
    for name in taken:
        if own[name].shape != tensors[name].shape:
            raise UserError(
                f"{where}: {name} is {list(tensors[name].shape)} in its weights where {list(own[name].shape)} is needed"
            )
    for name in taken:
        own[name].copy_(tensors[name])
    _log.info("warm start: %s taken from %s", called, where)
    for part in fresh:
        _log.info("warm start: %s: not there, so left as drawn: %s*", called, part)
    if unused := sorted(tensors.keys() - own.keys()):
        _log.debug("warm start: %s: of no use here: %s", called, ", ".join(unused))
