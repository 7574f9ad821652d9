"""A tiny pretrained checkpoint with a real tokenizer, committed as the stages vocab and pretrain would leave it."""

from __future__ import annotations

import io
import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save
from torch import nn

from model.rtd import Discriminator, Generator
from pipeline.config import Config
from pipeline.stage import StageRun, identities, stage_folder
from pipeline.stages import STAGES
from tokenizer.huggingface import tokenizer_files
from tokenizer.special import CLS_ID, PAD_ID, SEP_ID, SPECIAL_PIECES, UNK_ID

DEMO_CORPUS = Path(__file__).parents[1] / "pipeline" / "demo" / "corpus"
PIECES = 1200
LANGUAGES = ["de", "en", "ru", "sw", "zh-Hans"]
ARCHITECTURE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "generator_num_hidden_layers": 2,
    "max_position_embeddings": 160,
    "position_buckets": 16,
}


@cache
def sentences() -> list[str]:
    """Real sentences in five scripts and languages."""
    found: list[str] = []
    for language in LANGUAGES:
        text = lzma.decompress((DEMO_CORPUS / f"{language}.txt.xz").read_bytes()).decode()
        found += [line[:300] for line in text.split("\n") if line][:150]
    return found


@cache
def tokenizer() -> dict[str, bytes]:
    """The files of a vocabulary with the project's layout of ids."""
    model = io.BytesIO()
    pad, cls, sep, unk = SPECIAL_PIECES
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_writer=model, vocab_size=PIECES, model_type="unigram",
        normalization_rule_name="identity", character_coverage=0.98, num_threads=1, minloglevel=2,
        pad_id=PAD_ID, bos_id=CLS_ID, eos_id=SEP_ID, unk_id=UNK_ID,
        pad_piece=pad, bos_piece=cls, eos_piece=sep, unk_piece=unk,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(processor))]
    return {"spm.model": model.getvalue(), **tokenizer_files(pieces)}


def config(work_dir: Path, **sections: dict[str, Any]) -> Config:
    """A config whose corpus input is one small file beside the work directory; `sections` are added to it."""
    work_dir.mkdir(parents=True, exist_ok=True)
    corpus = work_dir / "en.txt"
    corpus.write_text("Some text.\n", encoding="utf-8")
    tree = {"work_dir": str(work_dir / "runs"), "corpus": {"inputs": [str(corpus)]}, "tokens": {"max_seq_len": 128}}
    sections.setdefault("pretrain", {})
    sections["pretrain"] = {"model": ARCHITECTURE, **sections["pretrain"]}
    return Config.model_validate(tree | sections)


def commit(settings: Config, stage: str, files: dict[str, bytes], stats: dict[str, Any]) -> None:
    """Commit files as a stage's output without running the stages upstream of it."""
    identity = identities(settings, stage)[stage]
    run = StageRun(STAGES[stage], settings, identity, stage_folder(settings, identity), {})
    for path, data in files.items():
        run.parts.publish_bytes(path, data)
    run.commit(stats)


def networks(settings: Config) -> tuple[Generator, Discriminator]:
    """Both networks, with every parameter moved away from where it starts, so that one left out shows."""
    training, rows = settings.pretrain, vocab_rows()
    rng = torch.Generator().manual_seed(7)
    both = (
        Generator(training.model, rows, PIECES, rng),
        Discriminator(training.model, rows, training.embedding_sharing, rng),
    )
    for network in both:
        _shake(network, rng)
    return both


@torch.no_grad()
def _shake(network: nn.Module, rng: torch.Generator) -> None:
    network.eval()
    for parameter in network.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=rng)


def vocab_rows() -> int:
    """Pieces and [MASK], rounded up to a multiple of 128."""
    return -(-(PIECES + 1) // 128) * 128


def commit_pretrained(settings: Config, replaced: dict[str, bytes] | None = None) -> tuple[Generator, Discriminator]:
    """Commit the stages that export reads, with some files replaced; returns the networks that are in them."""
    generator, discriminator = networks(settings)
    record = {
        "model": settings.pretrain.model.model_dump(),
        "vocab_rows": vocab_rows(),
        "mask_id": PIECES,
        "objective": settings.pretrain.objective,
        "embedding_sharing": settings.pretrain.embedding_sharing,
        "max_seq_len": settings.tokens.max_seq_len,
        "step": settings.pretrain.steps,
    }
    losses: list[dict[str, float]] = [
        {"step": 1, "generator_loss": 7.1, "discriminator_loss": 0.69, "validation_generator_loss": 7.3},
        {"step": 2, "generator_loss": 6.5, "discriminator_loss": 0.4321},
    ]
    commit(settings, "vocab", tokenizer(), {"pieces": PIECES, "languages": {name: {} for name in LANGUAGES}})
    files = {
        "generator.safetensors": save(dict(generator.state_dict())),
        "discriminator.safetensors": save(dict(discriminator.state_dict())),
        "model.json": json.dumps(record).encode(),
        "losses.jsonl": "".join(json.dumps(line) + "\n" for line in losses).encode(),
    }
    commit(settings, "pretrain", files | (replaced or {}), {})
    return generator, discriminator
