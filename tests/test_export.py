"""What `transformers` makes of an exported checkpoint: nothing missing, nothing unexpected, our numbers."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiny_model
import torch
import yaml
from safetensors.torch import load_file, save, save_file
from support import tree
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import model.export
from model.masked_lm import MaskedLM
from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.execute import run_stages
from pipeline.stage import PartStore, identities, stage_folder

SHARINGS = ["gdes", "nes", "es"]
TEXTS = ["The house is on the hill.", "Дом стоит на холме, и он очень большой.", "短", "Das Haus steht auf dem Berg."]


class Exported:
    """A finished export and the networks it was made of."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self.settings: Config = tiny_model.config(folder, **sections)
        self.generator, self.discriminator = tiny_model.commit_pretrained(self.settings)
        run_stages(self.settings, ["export"])
        self.path = export_path(self.settings)


def export_path(settings: Config) -> Path:
    """Where the export of a config lies."""
    return Path(stage_folder(settings, identities(settings, "export")["export"]).path())


@pytest.fixture(scope="module", params=SHARINGS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp(request.param), pretrain={"embedding_sharing": request.param})


@pytest.fixture(scope="module")
def plain_bf16(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Without the enhanced mask decoder, in bfloat16."""
    model = {**tiny_model.ARCHITECTURE, "enhanced_mask_decoder": False}
    return Exported(tmp_path_factory.mktemp("plain"), pretrain={"model": model}, export={"dtype": "bfloat16"})


def load(kind: Any, path: Path, **options: Any) -> Any:
    """Load a model and check that its directory holds exactly its weights."""
    model, report = kind.from_pretrained(path, output_loading_info=True, local_files_only=True, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def batch(length: int) -> tuple[Tensor, Tensor]:
    """Random ids [3, length] and their mask: a full row, a padded one and a nearly empty one."""
    ids = torch.randint(4, tiny_model.PIECES, (3, length), generator=torch.Generator().manual_seed(length))
    lengths = torch.tensor([length, length - length // 3, 2])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return ids * mask, mask


@pytest.mark.parametrize("length", [8, 128, 150])
@torch.no_grad()
def test_auto_model_computes_our_hidden_states(exported: Exported, length: int) -> None:
    ids, mask = batch(length)
    model = load(AutoModel, exported.path)
    ours = exported.discriminator.deberta(ids, mask, exported.generator.word_rows(ids))
    theirs = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert (ours - theirs)[mask.bool()].abs().max() < 1e-5


def test_word_table_is_folded(exported: Exported) -> None:
    table = load_file(exported.path / "model.safetensors")["embeddings.word_embeddings.weight"]
    shared = exported.generator.state_dict()["deberta.embeddings.word_embeddings.weight"]
    own = {name: t for name, t in exported.discriminator.state_dict().items() if "word_embeddings" in name}
    expected = {"gdes": lambda: shared + own.popitem()[1], "nes": lambda: own.popitem()[1], "es": lambda: shared}
    assert torch.equal(table, expected[exported.settings.pretrain.embedding_sharing]())


def test_generator_loads_as_masked_language_model(exported: Exported) -> None:
    model = load(AutoModelForMaskedLM, exported.path / "generator")
    ours = exported.generator.state_dict()
    theirs = model.state_dict()
    positions = load_file(exported.path / "generator" / "position_embeddings.safetensors")
    assert theirs.keys() | positions.keys() == ours.keys()
    assert all(torch.equal(tensor, {**theirs, **positions}[name]) for name, tensor in ours.items())


@torch.no_grad()
def test_generator_without_enhanced_decoder_fills_masks_as_ours(plain_bf16: Exported) -> None:
    assert not (plain_bf16.path / "generator" / "position_embeddings.safetensors").exists()
    model = load(AutoModelForMaskedLM, plain_bf16.path / "generator", dtype=torch.float32)
    ours = deepcopy(plain_bf16.generator).bfloat16().float()
    ids, mask = batch(24)
    masked = torch.tensor([[3, 9], [5, 7], [1, -1]])
    ids = ids.scatter(1, masked.clamp(min=0), tiny_model.PIECES)
    states = ours.lm_predictions.lm_head(ours.masked_states(ids, mask, masked))
    expected = states @ ours.deberta.embeddings.word_embeddings.weight.T + ours.lm_predictions.lm_head.bias
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert all(
        (logits[b, masked[b, k]] - expected[b, k]).abs().max() < 1e-4 for b, k in ((0, 0), (0, 1), (1, 0), (1, 1))
    )


@torch.no_grad()
def test_a_masked_language_model_is_published_as_encoder_and_as_itself(tmp_path: Path) -> None:
    settings = tiny_model.config(tmp_path, pretrain={"objective": "mlm"})
    model, rows = settings.pretrain.model, tiny_model.vocab_rows()
    trained = MaskedLM(model, model.num_hidden_layers, rows, tiny_model.PIECES, torch.Generator().manual_seed(1)).eval()
    tiny_model.commit_pretrained(settings, {"generator.safetensors": save(dict(trained.state_dict()))})
    run_stages(settings, ["export"])
    path = export_path(settings)
    ids, mask = batch(30)
    ours = trained.deberta(ids, mask)
    for found in (load(AutoModel, path), load(AutoModelForMaskedLM, path / "generator").deberta):
        assert (found(input_ids=ids, attention_mask=mask).last_hidden_state - ours)[mask.bool()].abs().max() < 1e-5
    assert (path / "generator" / "position_embeddings.safetensors").exists()
    assert not (path / "rtd_head.safetensors").exists()
    card = (path / "README.md").read_text()
    assert "masked language modelling of 15%" in card
    assert "discriminator" not in card.split("## At the end")[0] and "rtd_head" not in card


def test_rtd_head_is_kept(exported: Exported) -> None:
    head = load_file(exported.path / "rtd_head.safetensors")
    assert sorted(head) == sorted(
        f"mask_predictions.{part}.{kind}"
        for part in ("LayerNorm", "classifier", "dense")
        for kind in ("bias", "weight")
    )
    ours = exported.discriminator.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in head.items())


def test_bfloat16_rounds_every_weight_once(plain_bf16: Exported) -> None:
    model = load(AutoModel, plain_bf16.path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    shared = plain_bf16.generator.deberta.embeddings.word_embeddings.weight
    folded = plain_bf16.discriminator.word_table(shared)
    assert torch.equal(model.embeddings.word_embeddings.weight, folded.bfloat16())


@pytest.mark.parametrize("folder", ["", "generator"])
def test_tokenizer_gives_sentencepiece_ids(exported: Exported, folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported.path / folder, local_files_only=True)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(exported.path / folder / "spm.model"))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [1, *pieces.encode(text), 2]
    assert tokenizer.mask_token_id == tiny_model.PIECES
    assert tokenizer.model_max_length == exported.settings.tokens.max_seq_len


def test_new_heads_are_the_only_new_weights(exported: Exported) -> None:
    _, report = AutoModelForSequenceClassification.from_pretrained(exported.path, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"pooler", "classifier"}
    assert not report["unexpected_keys"]


def test_config_leaves_no_architecture_to_defaults(exported: Exported) -> None:
    config = json.loads((exported.path / "config.json").read_text())
    model = AutoModel.from_pretrained(exported.path)
    assert config["vocab_size"] == tiny_model.vocab_rows()
    for name in ("relative_attention", "share_att_key", "position_buckets", "norm_rel_ebd", "position_biased_input"):
        assert getattr(model.config, name) == config[name]
    declared = set(model.config.to_dict()) - {"transformers_version"}
    architecture = {name for name in declared if re.search("size|layers|heads|posi|att|embd|legacy|act$|eps", name)}
    assert architecture - {"output_attentions", "chunk_size_feed_forward"} <= config.keys()


def test_card_has_metadata_and_the_facts(exported: Exported) -> None:
    card = (exported.path / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["language"] == ["de", "en", "ru", "sw", "zh"]
    assert metadata["library_name"] == "transformers"
    for fact in (
        "500,000",
        "8,192",
        exported.settings.pretrain.embedding_sharing.upper(),
        "0.4321",
        "7.3000",
        "fill-mask",
    ):
        assert fact in card


def test_same_checkpoint_gives_same_bytes(tmp_path: Path) -> None:
    first, second = Exported(tmp_path / "a"), Exported(tmp_path / "b")
    assert tree(first.path) == tree(second.path)
    assert not list(first.path.rglob("*.bin")) + list(first.path.rglob("*.pt"))


def test_export_goes_on_from_the_parts_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Exported(tmp_path / "whole")
    settings = tiny_model.config(tmp_path / "killed")
    tiny_model.commit_pretrained(settings)
    publish, published = model.export._publish, []

    def dying_publish(parts: PartStore, path: str, *content: Any) -> None:
        if len(published) == 6:
            raise KeyboardInterrupt
        published.append(path)
        publish(parts, path, *content)

    monkeypatch.setattr(model.export, "_publish", dying_publish)
    with pytest.raises(KeyboardInterrupt):
        run_stages(settings, ["export"])
    half_done = published.copy()
    published[:] = ["after the restart"] * 7
    run_stages(settings, ["export"])
    assert not set(half_done) & set(published)
    assert tree(export_path(settings)) == tree(whole.path)


@pytest.mark.parametrize("damage", ["other_size", "hostile_header"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, damage: str) -> None:
    settings = tiny_model.config(tmp_path)
    discriminator = tiny_model.networks(settings)[1]
    small = tmp_path / "small.safetensors"
    save_file({name: tensor[:1].clone() for name, tensor in discriminator.state_dict().items()}, small)
    data = small.read_bytes() if damage == "other_size" else (2**63).to_bytes(8, "little") + b"{}"
    tiny_model.commit_pretrained(settings, {"discriminator.safetensors": data})
    with pytest.raises(PipelineError, match=r"discriminator.safetensors: not the weights"):
        run_stages(settings, ["export"])
