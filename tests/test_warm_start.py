"""Pretraining starts from published weights: what `transformers` saved is what our networks then compute with."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiny_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from support import tree
from tiny_hub import (
    GENERATOR_LAYERS,
    LAYERS,
    ROWS,
    SHARINGS,
    WORDS,
    add_tokenizer,
    batch,
    drawn,
    hidden_states,
    hidden_states_of,
    published,
    run_pieces,
    save_as_bin,
    saved,
    settings,
    started,
)
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, DebertaV2ForMaskedLM, DebertaV2ForSequenceClassification

from model.hf_checkpoint import read_checkpoint
from model.masked_lm import MaskedLM
from model.rtd import Discriminator, Generator
from model.warm_start import difference, warm_start_mlm
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.execute import run_stages
from pipeline.stage import identities, stage_folder
from tokenizer.huggingface import tokenizer_files


def store_sharded(folder: Path) -> Any:
    network = saved(folder)
    shutil.rmtree(folder)
    network.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    return network


def store_bin(folder: Path) -> Any:
    network = saved(folder, DebertaV2ForSequenceClassification)
    save_as_bin(folder, network.state_dict())
    return network


def store_half(folder: Path) -> Any:
    network = saved(folder)
    network.half().save_pretrained(folder)
    return network.float()


STORES: dict[str, Callable[[Path], Any]] = {
    "body": saved,
    "classifier": lambda folder: saved(folder, DebertaV2ForSequenceClassification),
    "legacy_masked_lm": lambda folder: saved(folder, DebertaV2ForMaskedLM),
    "masked_lm": lambda folder: saved(folder, DebertaV2ForMaskedLM, legacy=False),
    "sharded": store_sharded,
    "bin": store_bin,
    "float16": store_half,
}


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("store", STORES)
def test_discriminator_computes_what_transformers_does(tmp_path: Path, store: str, sharing: str) -> None:
    network = STORES[store](tmp_path / "hub")
    ours = hidden_states(*started(settings(tmp_path, embedding_sharing=sharing), tmp_path / "hub"))
    assert (ours - hidden_states_of(network)).abs().max() < 1e-5


def test_safetensors_is_read_where_both_formats_are(tmp_path: Path) -> None:
    network = saved(tmp_path / "hub")
    torch.save({WORDS: torch.zeros(1)}, tmp_path / "hub" / "pytorch_model.bin")
    ours = hidden_states(*started(settings(tmp_path), tmp_path / "hub"))
    assert (ours - hidden_states_of(network)).abs().max() < 1e-5


@pytest.mark.parametrize("sharing", SHARINGS)
@torch.no_grad()
def test_missing_generator_is_the_discriminators_lowest_layers(
    tmp_path: Path, sharing: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    network = saved(tmp_path / "hub")
    config = settings(tmp_path, embedding_sharing=sharing)
    generator, discriminator = started(config, tmp_path / "hub")
    ids, mask = batch()
    lower = network(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[GENERATOR_LAYERS]
    assert (generator.deberta(ids, mask) - lower)[mask.bool()].abs().max() < 1e-5
    if sharing == "gdes":
        assert not discriminator.state_dict()["deberta.embeddings.word_embeddings.delta"].any()
    assert "made of the discriminator's lowest 2 layers" in caplog.text
    assert "no tokenizer: of its vocabulary only the size was checked" in caplog.text
    # Everything is either taken from the checkpoint or said to be as it was drawn.
    fresh = {"generator": set[str](), "discriminator": set[str]()}
    for network_name, _, part in (line.split(": ", 1)[1].split(": ") for line in caplog.messages if "as drawn" in line):
        fresh[network_name].add(part.removesuffix("*"))
    assert fresh == {
        "generator": {"deberta.embeddings.position_embeddings.", "lm_predictions."},
        "discriminator": {"mask_predictions."},
    }
    before = dict(zip(fresh, drawn(config), strict=True))
    for called, after in {"generator": generator, "discriminator": discriminator}.items():
        for name, tensor in before[called].state_dict().items():
            kept = torch.equal(tensor, after.state_dict()[name])
            trivial = name.endswith(("bias", "LayerNorm.weight", "delta"))  # alike in every fresh network
            assert trivial or kept == name.startswith(tuple(fresh[called])), name


@pytest.mark.parametrize("legacy", [True, False])
@torch.no_grad()
def test_masked_lm_continues_as_transformers_filled_masks(tmp_path: Path, legacy: bool) -> None:
    network = saved(tmp_path / "hub", DebertaV2ForMaskedLM, legacy=legacy)
    head = network.cls.predictions if legacy else network.lm_predictions.lm_head
    head.bias.normal_(generator=torch.Generator().manual_seed(2))
    network.save_pretrained(tmp_path / "hub")
    add_tokenizer(tmp_path / "hub")
    config = settings(tmp_path, objective="mlm", model={**tiny_model.ARCHITECTURE, "enhanced_mask_decoder": False})
    ours = MaskedLM(config.pretrain.model, LAYERS, ROWS, tiny_model.PIECES).eval()
    warm_start_mlm(ours, read_checkpoint(str(tmp_path / "hub"), {}), config.pretrain, run_pieces())
    ids, mask = batch()
    masked = torch.tensor([[3, 9], [5, 7]])
    ids = ids.scatter(1, masked, tiny_model.PIECES)
    states = ours.lm_predictions.lm_head(ours.masked_states(ids, mask, masked))
    logits = states @ ours.deberta.embeddings.word_embeddings.weight.T + ours.lm_predictions.lm_head.bias
    theirs = network(input_ids=ids, attention_mask=mask).logits
    assert (logits - torch.take_along_dim(theirs, masked[..., None], 1)).abs().max() < 1e-4


def test_masked_lm_takes_an_encoder_without_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    network = saved(tmp_path / "hub")
    config = settings(tmp_path, objective="mlm")
    ours = MaskedLM(config.pretrain.model, LAYERS, ROWS, tiny_model.PIECES).eval()
    warm_start_mlm(ours, read_checkpoint(str(tmp_path / "hub"), {}), config.pretrain, run_pieces())
    ids, mask = batch()
    assert (ours.deberta(ids, mask)[mask.bool()] - hidden_states_of(network)).abs().max() < 1e-5
    for part in ("lm_predictions.", "deberta.embeddings.position_embeddings."):
        assert f"masked language model: not there, so left as drawn: {part}*" in caplog.text


def test_masked_lm_takes_the_position_table_that_microsoft_keeps(tmp_path: Path) -> None:
    config = settings(tmp_path, objective="mlm")
    ours = MaskedLM(config.pretrain.model, LAYERS, ROWS, tiny_model.PIECES)
    warm_start_mlm(ours, read_checkpoint(str(published(tmp_path)), {}), config.pretrain, run_pieces())
    assert torch.equal(ours.state_dict()["deberta.embeddings.position_embeddings.weight"], torch.ones(160, 32))


def test_tensors_without_use_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    saved(tmp_path / "hub", DebertaV2ForSequenceClassification)
    started(settings(tmp_path), tmp_path / "hub")
    assert caplog.text.count("ignored classifier.bias, classifier.weight, pooler.dense.bias, pooler.dense.weight") == 1
    started(settings(tmp_path), published(tmp_path / "microsoft"))
    assert caplog.text.count("discriminator: of no use here: deberta.embeddings.position_embeddings.weight") == 1


class TestRoundTrip:
    """What is exported comes back as it was, also through `transformers`."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("sharing", SHARINGS)
    def test_export_transformers_import_export_gives_equal_bytes(
        self, tmp_path: Path, sharing: str, dtype: str
    ) -> None:
        sections = {"pretrain": {"embedding_sharing": sharing}, "export": {"dtype": dtype}}
        before = tiny_model.config(tmp_path / "before", **sections)
        first = exported(before, *with_hard_cases(*tiny_model.networks(before)))
        through = tmp_path / "through"
        shutil.copytree(first, through)
        for kind, folder in ((AutoModel, ""), (AutoModelForMaskedLM, "generator")):
            for name in ("config.json", "model.safetensors"):
                (through / folder / name).unlink()
            kind.from_pretrained(first / folder).save_pretrained(through / folder)
        after = tiny_model.config(tmp_path / "after", **sections)
        expected, found = tree(first), tree(exported(after, *started(after, through)))
        del expected["MANIFEST.json"], found["MANIFEST.json"]  # names the bytes of the stage that was exported
        assert found == expected

    def test_every_rounded_sum_comes_back(self) -> None:
        """Also where the subtraction is inexact: halfway cases beside powers of two, cancellation, tiny and huge."""
        rng = torch.Generator().manual_seed(5)
        bits = torch.randint(-(2**31), 2**31, (2, 400_000), generator=rng).int().view(torch.float32)
        scale = torch.logspace(-30, 30, 400_000)
        near = torch.randn(2, 400_000, generator=rng) * scale
        cancelling = torch.stack([near[0], -near[0] * (1 + 1e-6 * near[1].sign())])
        hard = torch.stack(halfway(100_000))
        for base, added in (bits, near, cancelling, hard, torch.tensor([[0.0, -0.0, -0.0], [-0.0, 0.0, -0.0]])):
            finite = base.isfinite() & added.isfinite() & (base + added).isfinite()
            table = (base + added)[finite]
            again = base[finite] + difference(table, base[finite])
            whole = (base[finite] - table).isfinite()
            assert torch.equal(again[whole].view(torch.int32), table[whole].view(torch.int32))
        base, added = halfway(100)
        assert not torch.equal(base + (base + added - base), base + added)  # what plain subtraction would give

    @given(*[st.floats(-(2.0**126), 2.0**126, width=32)] * 2)
    def test_any_rounded_sum_comes_back(self, base: float, added: float) -> None:
        shared = torch.tensor([base])
        table = shared + torch.tensor([added])
        assert torch.equal((shared + difference(table, shared)).view(torch.int32), table.view(torch.int32))


def halfway(count: int) -> tuple[Tensor, Tensor]:
    """Pairs with base + (table - base) != table: their sum, and then the difference, is halfway between two floats."""
    ulp = 2.0**-23
    even = torch.arange(0, 2 * count, 2).double()
    base, added = even * ulp + ulp / 2, -(1 + (even + 1) * ulp)
    return base.float(), added.float()


@torch.no_grad()
def with_hard_cases(generator: Generator, discriminator: Discriminator) -> tuple[Generator, Discriminator]:
    """Put sums into the word tables that are hard to undo."""
    words = discriminator.deberta.embeddings.word_embeddings.state_dict()
    if "delta" in words:
        base, added = (part.view(-1, 32) for part in halfway(320))
        generator.deberta.embeddings.word_embeddings.weight[10:20] = base
        words["delta"][10:20] = added
        words["delta"][20:30] = -generator.deberta.embeddings.word_embeddings.weight[20:30] * (1 + 1e-6)
        words["delta"][30:40] *= 1e-9
        generator.deberta.embeddings.word_embeddings.weight[40:50] *= 1e-9
    return generator, discriminator


def exported(config: Config, generator: Generator, discriminator: Discriminator) -> Path:
    """The export of these networks."""
    networks = {"generator": generator, "discriminator": discriminator}
    files = {f"{name}.safetensors": save(dict(network.state_dict())) for name, network in networks.items()}
    tiny_model.commit_pretrained(config, files)
    run_stages(config, ["export"])
    return Path(stage_folder(config, identities(config, "export")["export"]).path())


@pytest.mark.parametrize("sharing", SHARINGS)
def test_microsofts_layout(tmp_path: Path, sharing: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    hub = published(tmp_path)
    generator, discriminator = started(settings(tmp_path, embedding_sharing=sharing), hub)
    network = AutoModel.from_pretrained(hub)
    with torch.no_grad():  # what is left there beside the delta is a step behind
        stored = torch.load(hub / "pytorch_model.generator.bin", weights_only=True)
        network.embeddings.word_embeddings.weight.copy_(
            stored["deberta.embeddings.word_embeddings.weight"]
            + torch.load(hub / "pytorch_model.bin")["deberta.embeddings.word_embeddings._weight"]
        )
    assert (hidden_states(generator, discriminator) - hidden_states_of(network)).abs().max() < 1e-5
    taken = generator.state_dict()
    same = {name for name in taken if torch.equal(taken[name], stored[name])}
    assert set(taken) - same == ({f"deberta.{WORDS}"} if sharing == "es" else set())
    assert torch.equal(
        discriminator.mask_predictions.dense.weight, drawn(settings(tmp_path), 8)[1].mask_predictions.dense.weight
    )
    assert "as drawn" not in caplog.text
    assert ("the generator's is left out" in caplog.text) == (sharing == "es")


def test_embedding_delta_alone_is_refused(tmp_path: Path) -> None:
    hub = published(tmp_path)
    tensors = torch.load(hub / "pytorch_model.bin")
    del tensors["deberta.embeddings.word_embeddings.weight"]
    save_as_bin(hub, tensors)
    started(settings(tmp_path), hub)
    (hub / "pytorch_model.generator.bin").unlink()
    with pytest.raises(UserError, match=r"pytorch_model.bin: holds the embedding delta word_embeddings._weight, but"):
        started(settings(tmp_path), hub)


class TestVocabulary:
    """Rows belong to pieces: ids are compared, or rows are moved."""

    @staticmethod
    def other_tokenizer() -> dict[str, bytes]:
        """A vocabulary of another size over a part of the text."""
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(tiny_model.sentences()[:300]), model_writer=model, vocab_size=700,
            model_type="unigram", normalization_rule_name="identity", num_threads=1, minloglevel=2,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
        )  # fmt: skip
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces = [(processor.id_to_piece(number), processor.get_score(number)) for number in range(len(processor))]
        return {"spm.model": model.getvalue(), **tokenizer_files(pieces)}

    @pytest.mark.parametrize("kept", [["spm.model"], ["tokenizer.json"], ["spm.model", "added_tokens.json"]])
    def test_same_pieces_are_accepted(self, tmp_path: Path, kept: list[str]) -> None:
        saved(tmp_path / "hub")
        add_tokenizer(tmp_path / "hub", {name: tiny_model.tokenizer()[name] for name in kept})
        started(settings(tmp_path), tmp_path / "hub")

    @pytest.mark.parametrize("kept", ["spm.model", "tokenizer.json"])
    def test_other_pieces_are_refused(self, tmp_path: Path, kept: str) -> None:
        saved(tmp_path / "hub")
        other = self.other_tokenizer()
        add_tokenizer(tmp_path / "hub", {kept: other[kept]})
        with pytest.raises(UserError) as refusal:
            started(settings(tmp_path), tmp_path / "hub")
        ours = [*run_pieces(), "[MASK]"]
        theirs = [piece for piece, _ in json.loads(other["tokenizer.json"])["model"]["vocab"]]
        place = next(number for number, piece in enumerate(theirs) if piece != ours[number])
        assert f"id {place} is {ours[place]!r} in this run's vocabulary and {theirs[place]!r} in" in str(refusal.value)
        assert "pretrain.init.match_pieces: true" in str(refusal.value)

    def test_mask_token_elsewhere_is_refused(self, tmp_path: Path) -> None:
        saved(tmp_path / "hub")
        add_tokenizer(tmp_path / "hub", {"spm.model": tiny_model.tokenizer()["spm.model"]})
        (tmp_path / "hub" / "added_tokens.json").write_text('{"[MASK]": 1203}')
        with pytest.raises(UserError, match=r"id 1200 is '\[MASK\]' in this run's vocabulary and None in"):
            started(settings(tmp_path), tmp_path / "hub")

    def test_other_number_of_rows_is_refused(self, tmp_path: Path) -> None:
        saved(tmp_path / "hub", vocab_size=1234)
        with pytest.raises(UserError, match=r"rows and this run of 1280: set pretrain.model.vocab_size to 1234, or"):
            started(settings(tmp_path), tmp_path / "hub")

    @pytest.mark.parametrize("sharing", SHARINGS)
    @torch.no_grad()
    def test_matching_moves_rows_by_piece(self, tmp_path: Path, sharing: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        rows, other = 768, self.other_tokenizer()
        network = saved(tmp_path / "hub", vocab_size=rows)
        masked_lm = saved(tmp_path / "hub" / "generator", DebertaV2ForMaskedLM, 2, legacy=False, vocab_size=rows)
        masked_lm.lm_predictions.lm_head.bias.normal_(generator=torch.Generator().manual_seed(2))
        masked_lm.save_pretrained(tmp_path / "hub" / "generator")
        add_tokenizer(tmp_path / "hub", other)
        config = settings(
            tmp_path, embedding_sharing=sharing, init={"checkpoint": str(tmp_path / "hub"), "match_pieces": True}
        )
        generator, discriminator = started(config, tmp_path / "hub")
        fresh_generator, fresh_discriminator = drawn(config)
        shared, fresh_shared = (each.deberta.embeddings.word_embeddings.weight for each in (generator, fresh_generator))
        seen, fresh_seen = discriminator.word_table(shared), fresh_discriminator.word_table(fresh_shared)
        bias = generator.lm_predictions.lm_head.bias
        theirs = {piece: row for row, (piece, _) in enumerate(json.loads(other["tokenizer.json"])["model"]["vocab"])}
        theirs["[MASK]"] = len(theirs)
        tokens, taken = [*run_pieces(), "[MASK]"], 0
        expected = masked_lm.deberta.embeddings.word_embeddings.weight
        e_d = network.embeddings.word_embeddings.weight
        for row in range(ROWS):
            source = theirs.get(tokens[row]) if row < len(tokens) else None
            if source is None:
                assert torch.equal(shared[row], fresh_shared[row])
                assert torch.equal(seen[row], fresh_seen[row])
                assert bias[row] == 0
            else:
                taken += 1
                assert torch.equal(shared[row], e_d[source] if sharing == "es" else expected[source])
                assert (seen[row] - e_d[source]).abs().max() < 1e-6
                assert bias[row] == masked_lm.lm_predictions.lm_head.bias[source]
        assert 100 < taken < len(tokens)
        assert f"{taken:,} of {len(tokens):,} pieces taken over" in caplog.text

    def test_matching_needs_a_tokenizer(self, tmp_path: Path) -> None:
        saved(tmp_path / "hub")
        config = settings(tmp_path, init={"checkpoint": "x", "match_pieces": True})
        with pytest.raises(UserError, match=r"hub has no tokenizer for pretrain.init.match_pieces: put its spm.model"):
            started(config, tmp_path / "hub")

    @pytest.mark.parametrize("name", ["spm.model", "tokenizer.json", "added_tokens.json"])
    @pytest.mark.parametrize("data", [b"\xff\x00 rubbish", b'{"model": {"vocab": {"a": 1}}, "[MASK]": []}'])
    def test_damaged_tokenizer_is_refused(self, tmp_path: Path, name: str, data: bytes) -> None:
        saved(tmp_path / "hub")
        add_tokenizer(tmp_path / "hub", {name: data})
        if name == "added_tokens.json":
            add_tokenizer(tmp_path / "hub", {"spm.model": tiny_model.tokenizer()["spm.model"]})
        with pytest.raises(UserError, match=r"hub/\S+: not (the vocabulary of|a JSON)"):
            started(settings(tmp_path), tmp_path / "hub")
