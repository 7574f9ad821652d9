"""What a run is: one frozen, validated `Config`, a section a stage.

Every field is part of its stage's fingerprint unless it is declared with `operational(...)`: those say how and where
a stage runs (workers, paths, logging) and never change a byte of what it writes. `fingerprint_slice` is that rule in
code. Reading YAML, presets and `--set` overrides is `pipeline.configfile`'s job.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


def operational(default: Any = ..., description: str = "", alias: str | None = None) -> Any:
    """Declare a field that changes how a stage runs but not what it writes; it stays out of the fingerprint."""
    return Field(default, description=description, alias=alias, json_schema_extra={"fingerprinted": False})


class Section(BaseModel):
    """Base of every config model: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), serialize_by_alias=True
    )


class LanguageIdConfig(Section):
    """Veto on documents that are surely in another language than their file's name says."""

    enabled: bool = Field(False, description="identify languages; those the model does not know are never dropped")
    min_probability: Fraction = Field(0.8, description="drop where another language is at least so probable")
    thresholds: dict[str, Fraction] = Field(
        default_factory=dict, description="min_probability of single languages, by the file's language"
    )


class CorpusConfig(Section):
    """Raw text to clean, deduplicated, hash-ordered Arrow shards."""

    inputs: tuple[str, ...] = operational(
        (), "globs of input files (any fsspec URL); language = name up to its first dot"
    )
    languages: tuple[str, ...] | None = Field(
        None, description="use only these languages; null = all that the inputs hold"
    )
    text_key: str = Field("text", min_length=1, description="key or column of the text in .jsonl and .parquet inputs")
    shard_mb: Annotated[float, Field(gt=0.0, le=1024.0)] = Field(
        128.0, description="size of one shard in MB of text, before duplicates are dropped"
    )
    fix_mojibake: bool = Field(True, description="repair text that was decoded in a wrong encoding")
    min_chars: Annotated[int, Field(ge=0)] = Field(1, description="documents with fewer characters are dropped")
    max_chars: PositiveInt = Field(10_000_000, description="documents with more characters are dropped")
    max_repeated_line_share: Fraction | None = Field(
        None, description="drop where more of the text is repeated lines; null = 0.4; 1 = keep all"
    )
    max_symbol_share: Fraction | None = Field(
        None, description="drop where more characters are neither letters nor digits; null = by script; 1 = keep all"
    )
    language_id: LanguageIdConfig = LanguageIdConfig()
    exclude: tuple[str, ...] = operational(
        (), "globs of evaluation files (.tsv, .jsonl, .txt, compressed too); documents with their sentences are dropped"
    )
    dedup: Literal["exact", "none"] = Field("exact", description="drop documents whose cleaned text occurred before")
    dedup_paragraphs: bool = Field(False, description="remove paragraphs that occurred before in the language")
    near_duplicates: Annotated[float, Field(ge=0.5, lt=1.0)] | None = Field(
        None, description="drop near-duplicates of at least this Jaccard similarity of their shingles; null = keep them"
    )
    copies_across_languages: Literal["keep", "drop"] = Field(
        "keep", description="drop: a text in several languages' files stays in the one with the most text"
    )
    chunk_mb: PositiveFloat = operational(32.0, "MB of raw text in one unit of work; does not show in the shards")
    keep_chunks: bool = operational(False, "keep the intermediate chunks after the stage is committed")
    workers: PositiveInt | None = operational(None, "local worker processes; null = one a core for large inputs")
    stall_minutes: PositiveFloat = operational(
        30.0, "end a run, of tokens too, in which no part was published for so long"
    )


class VocabConfig(Section):
    """SentencePiece unigram vocabulary from a language-balanced sample."""

    size: Annotated[int, Field(ge=64, le=1_000_000)] = Field(
        250_000, description="pieces wanted; fewer come out where the sample does not support so many"
    )
    alpha: Fraction = Field(0.3, description="language share of the sample is proportional to (bytes of text) ** alpha")
    sample_mb: PositiveFloat = Field(1024.0, description="text the vocabulary is trained on, in MB over all languages")
    character_coverage: Annotated[float, Field(ge=0.9, le=1.0)] = Field(
        0.9999, description="share of characters that get a piece of their own; the rest becomes [UNK]"
    )
    num_threads: PositiveInt = Field(2, description="trainer threads; SentencePiece writes them into the model's bytes")
    from_: str | None = operational(
        None, "a SentencePiece model to use instead of training one; null = train", alias="from"
    )
    compare: tuple[str, ...] = operational(
        (), "other tokenizers to measure beside this one: SentencePiece models or tokenizer.json files"
    )


class TokensConfig(Section):
    """Shards to rows of token ids."""

    max_seq_len: Annotated[int, Field(ge=8, le=65_535)] = Field(
        512, description="tokens in one row, special ones included"
    )
    packing: Literal["documents", "stream"] = Field(
        "documents",
        description="documents: whole documents side by side in a row; stream: one continuous text, cut anywhere",
    )
    validation_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = Field(
        0.005, description="share of documents held out, chosen by content hash"
    )
    workers: PositiveInt | None = operational(None, "local worker processes; null = one a core for large inputs")


class ModelConfig(Section):
    """Architecture of generator and discriminator, in transformers' names; defaults are mDeBERTaV3-base."""

    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 3072
    generator_num_hidden_layers: PositiveInt = Field(6, description="the generator is as wide and half as deep")
    hidden_dropout_prob: Fraction = 0.1
    attention_probs_dropout_prob: Fraction = 0.1
    max_position_embeddings: PositiveInt = Field(512, description="longest distance the relative positions tell apart")
    position_buckets: Annotated[int, Field(ge=2)] = 256
    layer_norm_eps: PositiveFloat = 1e-7
    initializer_range: PositiveFloat = 0.02
    enhanced_mask_decoder: bool = Field(
        True, description="decode masked tokens with absolute positions; false gives a generator transformers can use"
    )
    vocab_size: PositiveInt | None = Field(
        None, description="rows of the embedding table; null = pieces and [MASK], rounded up to a multiple of 128"
    )

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class LauncherConfig(Section):
    """How `mdeberta run` starts the training processes of this machine; other launchers heed only `stall_minutes`."""

    processes: PositiveInt = operational(1, "training processes on this machine, usually one a GPU")
    threads: PositiveInt | None = operational(
        None, "CPU threads a process; null = OMP_NUM_THREADS, or cores divided by processes"
    )
    stall_minutes: PositiveFloat = operational(
        30.0, "a run in which no step ends for so long is ended; set it above the longest validation or compilation"
    )


class DiscriminatorConfig(Section):
    """How the discriminator's own engine differs from the generator's under decoupled updates; null = as it does."""

    learning_rate: PositiveFloat | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    schedule: Literal["linear", "cosine"] | None = None
    max_grad_norm: PositiveFloat | None = None


class SpikesConfig(Section):
    """What to do when the loss jumps: go back to a checkpoint and leave out the samples read since."""

    factor: Annotated[float, Field(gt=1.0)] | None = Field(
        None, description="a step whose loss exceeds the running mean so many times is a spike; null = look for none"
    )
    window_steps: PositiveInt = Field(200, description="reach of the running mean; no step before is a spike")
    rollback_every: PositiveInt = Field(
        1000, description="go back to the last multiple of so many steps; pretrain.checkpoint_every has to divide it"
    )
    max_rollbacks: PositiveInt = Field(5, description="the run ends at the spike after so many")


class InitConfig(Section):
    """Weights to start from instead of random ones."""

    checkpoint: str | None = operational(
        None,
        "directory or URL (on the hub: hf://OWNER/NAME) of a Hugging Face DeBERTa-v2/v3 model; null = random weights",
    )
    match_pieces: bool = Field(
        False, description="take word embeddings over by piece, for a checkpoint with another vocabulary"
    )

    @model_validator(mode="after")
    def _has_a_source(self) -> InitConfig:
        if self.match_pieces and self.checkpoint is None:
            raise ValueError("match_pieces says how to read a checkpoint: name one with pretrain.init.checkpoint")
        return self


class PretrainConfig(Section):
    """Replaced-token detection, or the masked language modelling it is compared with, on DeepSpeed ZeRO."""

    objective: Literal["rtd", "mlm"] = Field(
        "rtd", description="rtd: generator and discriminator; mlm: one masked language model as deep as the latter"
    )
    embedding_sharing: Literal["gdes", "nes", "es"] = Field("gdes", description="what rtd's two networks share")
    updates: Literal["decoupled", "joint"] | None = Field(
        None, description="one optimiser step for each network or one for both; null = decoupled, and joint under es"
    )
    model: ModelConfig = ModelConfig()
    init: InitConfig = InitConfig()
    steps: PositiveInt = 500_000
    global_batch: PositiveInt = Field(8192, description="rows in one optimiser step over all processes")
    micro_batch: PositiveInt = operational(8, "rows a process computes at once")
    alpha: Fraction = Field(
        0.3, description="language share of the batches is proportional to (training tokens) ** alpha"
    )
    seed: int = 42
    mask_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    masking: Literal["uniform", "windowed"] = Field(
        "uniform", description="uniform: every token alike; windowed: as the published code, which spares the row's end"
    )
    max_ngram: PositiveInt = Field(3, description="under mlm, up to so many neighbouring words are masked together")
    temperature: PositiveFloat = Field(1.0, description="of the generator's samples")
    discriminator_weight: PositiveFloat = Field(
        50.0,
        description="lambda: 50 in the paper, 10 in the published code; "
        "when decoupled it acts through clipping and epsilon alone",
    )
    learning_rate: PositiveFloat = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 10_000
    schedule: Literal["linear", "cosine"] = Field("linear", description="how the rate falls to 0 after the warm-up")
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    batch_warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="the rows of a step grow from batch_warmup_rows to global_batch over so many steps"
    )
    batch_warmup_rows: PositiveInt | None = Field(
        None, description="rows of the first step, a divisor of global_batch; null = an eighth of it"
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.98
    adam_epsilon: PositiveFloat = 1e-6
    max_grad_norm: PositiveFloat = 1.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = operational(
        1,
        "what DeepSpeed partitions: 1 optimiser state, 2 also gradients, 3 also weights; a run may go on with another",
    )
    offload_optimizer: bool = operational(False, "keep optimiser state and master weights in the hosts' memory")
    deepspeed: str | None = operational(
        None, "JSON file or URL with more of DeepSpeed's own configuration, merged into the generated one"
    )
    attention: Literal["auto", "eager", "fused"] = operational(
        "auto", "fused: kernels for GPUs; eager: plain torch; auto: fused in half precision on a GPU"
    )
    compile: bool | None = operational(
        None, "compile each layer with torch.compile; null = on GPUs, but for ZeRO stage 3"
    )
    checkpoint_activations: bool = operational(
        False, "compute each layer again in the backward pass instead of keeping what is within it"
    )
    max_skipped_steps: PositiveInt = operational(
        20, "steps in a row whose gradient is not finite (they are skipped) after which the run ends"
    )
    spikes: SpikesConfig = SpikesConfig()
    validate_every: PositiveInt = Field(1000, description="steps between two measurements on held-out rows")
    validation_rows: PositiveInt = Field(256, description="held-out rows measured, spread over the languages")
    checkpoint_every: PositiveInt = operational(1000, "steps between two checkpoints")
    keep_checkpoints: PositiveInt = operational(2, "newest checkpoints kept")
    keep_every: PositiveInt | None = operational(
        None, "checkpoints at multiples of so many steps are kept for ever; null = none"
    )
    log_every: PositiveInt = Field(1, description="steps between two lines of metrics.jsonl and losses.jsonl")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = operational(
        ("tensorboard",), "where else the metrics go; wandb and trackio have to be installed"
    )
    tracker_project: str = operational("mdeberta", "project of the run in wandb and trackio")
    launcher: LauncherConfig = operational(LauncherConfig())

    @model_validator(mode="after")
    def _combination_works(self) -> PretrainConfig:
        if self.embedding_sharing == "es" and self.updates == "decoupled":
            raise ValueError(
                "embedding_sharing es needs updates joint: one table cannot take two separate optimiser steps"
            )
        if self.objective == "mlm" and self.masking == "windowed":
            raise ValueError(
                "masking windowed is the published code's choice for rtd; objective mlm masks runs of words"
            )
        key = "num_hidden_layers" if self.objective == "mlm" else "generator_num_hidden_layers"
        if self.model.enhanced_mask_decoder and getattr(self.model, key) < 2:
            raise ValueError(f"model.enhanced_mask_decoder needs model.{key} >= 2")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile: true and zero_stage 3: compiled layers cannot gather their weights; use stage 2")
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        return self

    @model_validator(mode="after")
    def _steps_fit(self) -> PretrainConfig:
        if self.global_batch % self.first_batch:
            raise ValueError(
                f"batch_warmup_rows {self.first_batch} does not divide global_batch {self.global_batch}: "
                "the batch grows by so many rows at a time"
            )
        if self.spikes.factor and self.spikes.rollback_every % self.checkpoint_every:
            raise ValueError(
                f"spikes.rollback_every {self.spikes.rollback_every} is not a multiple of checkpoint_every "
                f"{self.checkpoint_every}: there has to be a checkpoint to go back to"
            )
        if self.joint and self.discriminator != DiscriminatorConfig(learning_rate=self.discriminator.learning_rate):
            raise ValueError(
                "a joint optimiser has one schedule and one clipping: of discriminator only learning_rate counts"
            )
        return self

    @property
    def first_batch(self) -> int:
        """Rows of the first step."""
        if not self.batch_warmup_steps:
            return self.global_batch
        return self.batch_warmup_rows or max(1, self.global_batch // 8)

    @property
    def joint(self) -> bool:
        """Whether one optimiser updates both networks."""
        return self.updates == "joint" or self.embedding_sharing == "es"


class ExportConfig(Section):
    """Checkpoint to a directory that transformers loads."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    model_name: str = Field("mdeberta-v3", description="title of the model card")


class XnliConfig(Section):
    """Fine-tune the exported discriminator on NLI pairs and score every language."""

    data: tuple[str, ...] = operational(
        (), "globs of evaluation files: XNLI-1.0 TSV, or premise TAB hypothesis TAB label"
    )
    train: tuple[str, ...] = operational((), "globs of training files in the same formats")
    mode: Literal["zero_shot", "translate_train_all"] = Field(
        "zero_shot", description="train on English pairs only, or on those of every language"
    )
    epochs: PositiveFloat = 3.0
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 2e-5
    warmup_fraction: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    max_seq_len: PositiveInt = 256
    seed: int = 42
    precision: Literal["fp32", "bf16"] = "fp32"
    max_train_pairs: PositiveInt | None = Field(None, description="train on the first n pairs of a seeded shuffle")
    max_eval_pairs: PositiveInt | None = Field(None, description="score the first n pairs of each language")


class Config(Section):
    """A whole run. `work_dir` and `storage_options` say where it lives and enter no fingerprint."""

    work_dir: str = operational(..., "directory or URL that receives every stage's output")
    storage_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        exclude=True,
        repr=False,
        description="fsspec options by protocol, for example s3: {endpoint_url: ...}; never written anywhere",
        json_schema_extra={"fingerprinted": False},
    )
    corpus: CorpusConfig = CorpusConfig()
    vocab: VocabConfig = VocabConfig()
    tokens: TokensConfig = TokensConfig()
    pretrain: PretrainConfig = PretrainConfig()
    export: ExportConfig = ExportConfig()
    xnli: XnliConfig = XnliConfig()

    @model_validator(mode="after")
    def _lengths_fit(self) -> Config:
        if self.pretrain.model.max_position_embeddings < self.tokens.max_seq_len:
            raise ValueError(
                f"pretrain.model.max_position_embeddings {self.pretrain.model.max_position_embeddings} is less than "
                f"tokens.max_seq_len {self.tokens.max_seq_len}: raise it to the length of the rows"
            )
        return self


def fingerprint_slice(section: Section) -> dict[str, Any]:
    """The section's fields that change what its stage writes, as plain JSON values."""
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("fingerprinted") is False:
            continue
        value = getattr(section, name)
        kept[name] = fingerprint_slice(value) if isinstance(value, Section) else _plain(value)
    return kept


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
