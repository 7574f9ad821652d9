"""Which chart shows which counts: functions from the statistics of the stages to figures.

Of vocab and of the tokens that training saw, also the tables.

Steel is a plain amount; the other colours tell what the legend says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipeline.page import Figure, Panel, Table, count, share, size
from pipeline.plots import Axis, Column, Mark, RowChart, key, linear, logarithmic, percent

MOST_REASONS = 5
_REASON_COLOURS = ("sky", "vermilion", "purple", "amber", "green")


# ------------------------------------------------------------------------------------------------ corpus, vocab, tokens


def corpus_figure(languages: dict[str, dict[str, Any]]) -> Figure:
    """Text and documents of every language, and what became of the documents that went in."""
    names = by_size({name: counts["text_bytes"] for name, counts in languages.items()})
    ranked = ranked_reasons(languages.values())
    colours = dict(zip(ranked[:MOST_REASONS], _REASON_COLOURS, strict=False))
    fates = [_fate(name, languages[name], colours) for name in names]
    columns = [
        _bars("text kept", "bytes", names, {name: languages[name]["text_bytes"] for name in names}),
        _bars("documents kept", "", names, {name: languages[name]["kept"] for name in names}),
        Column(Axis("documents read", "%", 0, 1, write=percent), fates),
    ]
    legend = [(key("bar", colour), reason) for reason, colour in colours.items()]
    legend += [(key("bar", "ink"), "other reasons")] if len(ranked) > MOST_REASONS else []
    return Figure(
        "What each language brings, and what becomes of it.",
        "Languages in order of their text. Every document that is read is kept, dropped by a rule, or rejected as "
        "unreadable; the bars of the third measure stack these outcomes.",
        _panels(RowChart("Corpus by language", names, columns)),
        [*legend, (key("bar", "pale"), "kept")],
    )


def reasons(counts: dict[str, Any]) -> Counter[str]:
    """Documents that were not kept, by outcome and reason."""
    pairs = [(outcome, counts.get(outcome, {})) for outcome in ("dropped", "rejected")]
    return Counter({f"{outcome}: {words(name)}": n for outcome, found in pairs for name, n in found.items() if n})


def ranked_reasons(counts: Iterable[dict[str, Any]]) -> list[str]:
    """Every reason that occurs, the most frequent first."""
    total: Counter[str] = Counter()
    for entry in counts:
        total.update(reasons(entry))
    return sorted(total, key=lambda reason: (-total[reason], reason))


def _fate(name: str, counts: dict[str, Any], colours: dict[str, str]) -> list[Mark]:
    """One stacked bar over all documents of a language; reasons without a colour of their own share one segment."""
    read = counts["documents_in"]
    if not read:
        return []
    found = reasons(counts)
    segments = [(reason, found[reason], colour) for reason, colour in colours.items()]
    segments.append(("other reasons", sum(n for reason, n in found.items() if reason not in colours), "ink"))
    segments.append(("kept", counts["kept"], "pale"))
    marks, start = [], 0
    for reason, number, colour in segments:
        if number:
            tip = f"{name}, {reason}: {number:,} of {read:,} documents"
            marks.append(Mark("bar", colour, (start + number) / read, start / read, tip))
        start += number
    return marks


def vocab_figure(languages: dict[str, dict[str, Any]], sampling: dict[str, dict[str, float]]) -> Figure:
    """Sampling shares before and after alpha, fertility and the rate of unknown pieces."""
    names = by_size({name: shares["share_before"] for name, shares in sampling.items()})
    parts = [part for name in names for part in sampling[name].values()]
    fertility = [languages[name]["fertility"] for name in names]
    unknown = [languages[name]["unknown_rate"] for name in names]
    moves = [_move(name, sampling[name]) for name in names]
    cuts = [_fertility(name, languages[name]) for name in names]
    gaps = [_stem("blue", rate, f"{name}: {rate:.4%}") for name, rate in zip(names, unknown, strict=True)]
    columns = [
        Column(logarithmic("share of text", "%", parts, write=percent), moves),
        Column(linear("fertility", "pieces", fertility, zero=True), cuts),
        Column(linear("unknown pieces", "%", unknown, write=percent, zero=True), gaps),
    ]
    legend = [
        (key("ring", "ink"), "share of the corpus"),
        (key("dot", "blue"), "share of the sample; pieces a word"),
        (key("dot", "amber"), "pieces a character, for scripts without spaces"),
    ]
    return Figure(
        "What the vocabulary is trained on, and how it serves each language.",
        "Languages in order of their text. Smoothing with alpha moves each share from ring to dot. Fertility is "
        "how finely the vocabulary cuts a language; what no piece covers becomes an unknown one.",
        _panels(RowChart("Vocabulary by language", names, columns)),
        legend if any(languages[name]["unit"] != "word" for name in names) else legend[:2],
    )


def _fertility(name: str, counts: dict[str, Any]) -> list[Mark]:
    colour = "blue" if counts["unit"] == "word" else "amber"
    return _stem(colour, counts["fertility"], f"{name}: {counts['fertility']} pieces a {counts['unit']}")


def _stem(colour: str, value: float, tip: str, start: float = 0.0) -> list[Mark]:
    return [Mark("rule", "faint", value, start), Mark("dot", colour, value, tip=tip)]


def _move(name: str, shares: dict[str, float]) -> list[Mark]:
    before, after = shares["share_before"], shares.get("share_after")
    if after is None:  # a vocabulary that was trained elsewhere
        return [Mark("ring", "ink", before, tip=f"{name}: {before:.4%} of the corpus")]
    tip = f"{name}: {before:.4%} of the corpus, {after:.4%} of the sample"
    ends = [Mark("ring", "ink", before, tip=tip), Mark("dot", "blue", after, tip=tip)]
    return [Mark("rule", "faint", before, after), *ends]


def vocab_tables(stats: dict[str, Any]) -> list[Table]:
    """The languages in numbers, the pieces by script, and other tokenizers beside this vocabulary."""
    order = by_size({name: shares["share_before"] for name, shares in stats["sampling"].items()})
    rows = [_vocab_row(name, stats["languages"][name], stats["sampling"][name]) for name in order]
    headings = ["Language", "Share of corpus", "Share of sample", "Sample", "Pieces", "Per", "Unknown", "Bytes a piece"]
    return [
        Table("Vocabulary by language", headings, rows),
        *_scripts_table(stats, order),
        *_compared_table(stats, order),
    ]


def _vocab_row(name: str, counts: dict[str, Any], shares: dict[str, float]) -> list[str]:
    sampled = "share_after" in shares
    return [
        name,
        share(shares["share_before"], 4),
        share(shares["share_after"], 4) if sampled else "–",
        size(counts["sample_bytes"]) if sampled else "–",
        f"{counts['fertility']:.3f}",
        f"a {counts['unit']}",
        share(counts["unknown_rate"], 4),
        f"{counts['bytes_per_token']:.3f}",
    ]


def _scripts_table(stats: dict[str, Any], order: list[str]) -> list[Table]:
    """Pieces of each script, and the languages that are mostly written in it."""
    scripts: dict[str, int] = stats.get("scripts", {})
    used: dict[str, list[str]] = {}
    for name in order:
        used.setdefault(stats["languages"][name].get("script", ""), []).append(name)
    total = sum(scripts.values())
    rows = [
        [words(script), " ".join(used.get(script, [])), count(scripts[script]), share(scripts[script] / total)]
        for script in by_size(scripts)
    ]
    return [Table("Pieces by script", ["Script", "Languages", "Pieces", "Share"], rows, texts=2)] if rows else []


def _compared_table(stats: dict[str, Any], order: list[str]) -> list[Table]:
    """The same measures of every tokenizer on the same text, side by side."""
    others: dict[str, dict[str, Any]] = stats.get("compared", {})
    vocabularies = {"this run": stats["languages"], **others}
    measures: dict[str, Callable[[dict[str, Any]], str]] = {
        "Pieces": lambda counts: f"{counts['fertility']:.3f}",
        "Unknown": lambda counts: share(counts["unknown_rate"], 4),
        "Bytes a piece": lambda counts: f"{counts['bytes_per_token']:.3f}",
    }
    headings = [f"{measure}: {name}" for measure in measures for name in vocabularies]
    rows = [
        [
            name,
            f"a {stats['languages'][name]['unit']}",
            *(write(found[name]) for write in measures.values() for found in vocabularies.values()),
        ]
        for name in order
    ]
    return [Table("Tokenizers side by side", ["Language", "Per", *headings], rows, texts=2)] if others else []


def tokens_figure(languages: dict[str, dict[str, Any]], passes: dict[str, float]) -> Figure:
    """Training tokens, how full the rows are, and how often training passes over each language."""
    tokens = {name: counts["train"]["tokens"] for name, counts in languages.items()}
    names = by_size(tokens)
    fills = [_fill(name, languages[name]["fill"]) for name in names]
    often = [_passes(name, passes[name]) if name in passes else [] for name in names]
    columns = [
        _bars("training tokens", "", names, tokens),
        Column(Axis("rows filled", "%", 0, 1, write=percent), fills),
        Column(logarithmic("passes in training", "", [1.0, *passes.values()]), often, 1.0),
    ]
    return Figure(
        "Rows of tokens, and how often training sees them.",
        "Languages in order of their tokens. What fills no row is padding. Passes: how many times the configured run "
        "sees each row, given its steps, its batch and its alpha.",
        _panels(RowChart("Tokens by language", names, columns)),
        [(key("reference", "ink"), "every row once")],
    )


def _fill(name: str, fill: float) -> list[Mark]:
    return [Mark("bar", "steel", fill, tip=f"{name}: {fill:.2%}")]


def _passes(name: str, number: float) -> list[Mark]:
    return _stem("blue", number, f"{name}: {number:,.4g} passes", start=1.0)


def passes_in_training(tokens: dict[str, int], rows: dict[str, int], alpha: float, rows_drawn: int) -> dict[str, float]:
    """How often each language's rows are seen when languages are drawn with p proportional to tokens ** alpha."""
    weights = {name: float(number) ** alpha for name, number in tokens.items() if rows[name]}
    total = sum(weights.values())
    return {name: rows_drawn * weight / total / rows[name] for name, weight in weights.items()}


# ------------------------------------------------------------------------------------------------------------- pretrain


def shares_aimed_at(tokens: dict[str, int], passes: dict[str, float]) -> dict[str, float]:
    """Each language's share of the tokens that training sees, when its rows are passed over so often."""
    seen = {name: tokens[name] * often for name, often in passes.items()}
    return {name: number / sum(seen.values()) for name, number in seen.items()}


def seen_figure(seen: dict[str, int], aimed: dict[str, float]) -> Figure:
    """The tokens of each language that training saw, and their share beside the one aimed at."""
    names, total = by_size(seen), sum(seen.values())
    shares = {name: number / total for name, number in seen.items()}
    columns = [
        _bars("tokens seen", "", names, seen),
        Column(
            logarithmic("share of them", "%", [*shares.values(), *aimed.values()], write=percent),
            [_seen(name, shares[name], aimed.get(name)) for name in names],
        ),
    ]
    legend = [(key("ring", "ink"), "share aimed at"), (key("dot", "blue"), "share so far")]
    return Figure(
        "What training has seen of each language.",
        "Padding is no token. Languages are drawn in proportion to their tokens to the power of alpha; how full "
        "their rows are makes the share of tokens aimed at.",
        _panels(RowChart("Tokens seen by language", names, columns)),
        legend if aimed else legend[1:],
    )


def _seen(name: str, share: float, aimed: float | None) -> list[Mark]:
    dot = Mark("dot", "blue", share, tip=f"{name}: {share:.4%} of the tokens seen")
    return [Mark("ring", "ink", aimed, tip=f"{name}: {aimed:.4%} aimed at"), dot] if aimed else [dot]


def seen_table(seen: dict[str, int], aimed: dict[str, float]) -> Table:
    """The same in numbers."""
    total = sum(seen.values())
    rows = [
        [name, count(seen[name]), share(seen[name] / total, 4), share(aimed[name], 4) if name in aimed else "–"]
        for name in by_size(seen)
    ]
    headings = ["Language", "Tokens seen", "Share", "Share aimed at"]
    return Table("Tokens seen by language", headings, rows, ["all", count(total), "", ""])


# ----------------------------------------------------------------------------------------------------------------- xnli


def xnli_figure(languages: dict[str, dict[str, Any]], average: float, chance: float) -> Figure:
    """Accuracy of every language with its confidence interval, the average and chance."""
    names = by_size({name: scores["accuracy"] for name, scores in languages.items()})
    marks = [_score(name, languages[name]["accuracy"], *languages[name]["interval_95"]) for name in names]
    marks.append([Mark("ring", "vermilion", average, tip=f"average: {average:.2%}")])
    ends = [end for name in names for end in languages[name]["interval_95"]]
    column = Column(linear("accuracy", "%", [chance, *ends], write=percent), marks, chance)
    legend = [
        (key("dot", "blue"), "accuracy and its 95 % interval"),
        (key("ring", "vermilion"), "average of the languages"),
        (key("reference", "ink"), f"chance, {100 * chance:.1f} %"),
    ]
    chart = RowChart("XNLI accuracy", [*names, "average"], [column], row=20)
    return Figure("XNLI accuracy.", "Languages in order of their score.", _panels(chart), legend)


def _score(name: str, accuracy: float, low: float, high: float) -> list[Mark]:
    tip = f"{name}: {accuracy:.2%}, interval {low:.2%} to {high:.2%}"
    return [Mark("rule", "blue", high, low), Mark("dot", "blue", accuracy, tip=tip)]


# ---------------------------------------------------------------------------------------------------------- small parts


def words(name: str) -> str:
    """A snake_case name as words."""
    return name.replace("_", " ")


def by_size(values: Mapping[str, float]) -> list[str]:
    """The names, those of the largest values first, equal ones in alphabetical order."""
    return sorted(values, key=lambda name: (-values[name], name))


def _bars(label: str, unit: str, names: Sequence[str], values: dict[str, int]) -> Column:
    """Bars on a logarithmic scale; nothing is drawn for zero."""
    tips = {name: f"{name}: {values[name]:,} {unit or label}" for name in names}
    rows = [[Mark("bar", "steel", values[name], tip=tips[name])] if values[name] else [] for name in names]
    return Column(logarithmic(label, unit, list(values.values())), rows)


def _panels(chart: RowChart) -> list[Panel]:
    return [Panel(svg) for svg in chart.panels()]
