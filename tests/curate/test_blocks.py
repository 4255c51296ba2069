"""The blocks of a curation: languages, personal data, filters by language, URLs, and benchmark n-grams."""

import gzip
import json
import random
import runpy
import time
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="pip install megagap[curate]")

from datatrove.data import Document
from datatrove.pipeline.decont import NGramsDecontFilter

from megagap.curate.contamination import (
    BenchmarkIndexer,
    Ngrams,
    benchmark_files,
    decontamination_config,
    require_clean,
)
from megagap.curate.filters import quality_filter
from megagap.curate.language import identify, language_filter
from megagap.curate.pii import mask
from megagap.curate.urls import url_filter
from megagap.curate.words import PlainWords, word_tokenizer
from megagap.errors import ConfigError, DataError
from tests.token_files import FRENCH

ROOT = Path(__file__).parents[2]

SENTENCES = {
    "en": "When it was late, they went to the house which had been built by the river, and there was nobody in it.",
    "fr": FRENCH,
    "de": "Als es spät war, gingen sie zu dem Haus, das am Fluss gebaut worden war, und es war niemand in ihm.",
    "es": "Cuando se hizo tarde, fueron a la casa que estaba junto al río y no había nadie en ella ni en las otras.",
    "it": "Quando era tardi andarono alla casa che era stata costruita sul fiume, e non c'era nessuno nella stanza.",
    "pt": "Quando já era tarde, foram para a casa que ficava junto ao rio, mas não havia ninguém nela nem nas outras.",
    "nl": "Toen het laat was gingen ze naar het huis dat aan de rivier was gebouwd, maar er was niemand in de kamer.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_is_told_by_its_function_words(language: str) -> None:
    scores = identify(SENTENCES[language])
    assert max(scores, key=scores.__getitem__) == language
    assert 0.65 < scores[language] <= 1 and sum(scores.values()) <= 1.0001


@pytest.mark.parametrize("text", ["", "1 2 3", "int main(int argc, char **argv) { return argc; }", "你好，世界"])
def test_what_is_no_prose_has_no_language(text: str) -> None:
    assert max(identify(text).values()) < 0.65


def test_the_language_filter_keeps_what_it_is_told_to_and_names_the_rest() -> None:
    chosen = language_filter("", ["fr"], 0.65)
    french, german = Document(SENTENCES["fr"], "0"), Document(SENTENCES["de"], "1")
    assert chosen.filter(french) is True and chosen.filter(german) == (False, "de")
    assert chosen.filter(Document("x = 1", "2")) == (False, "unknown")
    assert french.metadata["language"] == "fr" and french.metadata["language_score"] > 0.65


def test_a_language_that_function_words_do_not_know_is_refused_with_what_to_fetch() -> None:
    with pytest.raises(ConfigError, match=r"language\.keep has pl(.|\n)*lid\.176\.bin"):
        language_filter("", ["fr", "pl"], 0.65)


def test_a_missing_language_model_is_refused_with_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*lid\.176\.bin(.|\n)*fetch https://"):
        language_filter(str(tmp_path / "lid.176.bin"), ["fr"], 0.65)


def test_a_file_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("fasttext", reason="pip install fasttext-numpy2-wheel")
    (tmp_path / "lid.bin").write_bytes(b"no model at all")
    with pytest.raises(DataError, match=r"lid\.bin is no fastText model(.|\n)*fetch https://"):
        language_filter(str(tmp_path / "lid.bin"), ["fr"], 0.65)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jean.dupont@laposte.net today", "write to email@example.com today"),
        ("ask user@example.com", "ask user@example.com"),
        ("appelez le 06 12 34 56 78.", "appelez le <PHONE>."),
        ("appelez le +33 6 12 34 56 78", "appelez le <PHONE>"),
        ("call (555) 123-4567 or +44 20 7946 0958", "call <PHONE> or <PHONE>"),
        ("digits 0123456789 and 2024-01-31", "digits 0123456789 and 2024-01-31"),
        ("IBAN FR76 3000 6000 0112 3456 7890 189", "IBAN <IBAN>"),
        ("IBAN FR76 3000 6000 0112 3456 7890 188", "IBAN FR76 3000 6000 0112 3456 7890 188"),
        ("card 4111 1111 1111 1111", "card <CARD>"),
        ("card 4111 1111 1111 1112", "card 4111 1111 1111 1112"),
        ("NIR 2 55 08 14 168 025 38", "NIR <NIR>"),
        ("NIR 2 55 08 14 168 025 39", "NIR 2 55 08 14 168 025 39"),
        ("host 81.2.69.160, not 192.168.1.1 or 1.2.3.4.5", "host 192.0.2.1, not 192.168.1.1 or 1.2.3.4.5"),
        ("prénom.nom@société.fr, d'info@mairie.fr", "email@example.com, d'email@example.com"),
        ("(o.b+news@mail.co.uk) or mailto:a@x.org?to=b", "(email@example.com) or mailto:email@example.com?to=b"),
        ("react@18.2.0, user@localhost, a@b", "react@18.2.0, user@localhost, a@b"),
        ("06\u00a012\u00a034\u00a056\u00a078, 01\u202f23\u202f45\u202f67\u202f89", "<PHONE>, <PHONE>"),
        ("Tél.01.45.67.89.01, 01/45/67/89/01, 0033 1 45 67 89 01", "Tél.<PHONE>, <PHONE>, <PHONE>"),
        ("Téléphone : 0612345678, fax 0145678901", "Téléphone : <PHONE>, fax <PHONE>"),
        ("La Réunion : 0262 12 34 56; Belgique : +32 2 513 45 67", "La Réunion : <PHONE>; Belgique : <PHONE>"),
        ("1-800-555-0199, (415)555-2671, 415.555.2671, +14155552671", "<PHONE>, <PHONE>, <PHONE>, <PHONE>"),
        ("020 7946 0958, 07700 900123, (0161) 496 0000", "<PHONE>, <PHONE>, <PHONE>"),
        ("+44 (0)20 7946 0958, +34 612 345 678, +49 30 901820", "<PHONE>, <PHONE>, <PHONE>"),
        ("+10 000 000 000, +20 500 000, pages 100-200-3000", "+10 000 000 000, +20 500 000, pages 100-200-3000"),
        ("IBAN FR76\u00a03000\u00a06000\u00a00112\u00a03456\u00a07890\u00a0189", "IBAN <IBAN>"),
        ("[2a00:1450:4007:80e::200e]:443, 2001:67c::77.", "[2001:db8::1]:443, 2001:db8::1."),
        ("fe80::1, 12:34:56, std::vector, 2001:db8::7", "fe80::1, 12:34:56, std::vector, 2001:db8::7"),
        ("11.8.4.1. Installing version 1.2.3.4", "11.8.4.1. Installing version 1.2.3.4"),
    ],
)  # fmt: skip
def test_personal_data_is_masked_and_what_only_looks_like_it_is_not(text: str, expected: str) -> None:
    assert mask(text) == expected


@pytest.mark.parametrize("piece", ["iVBORw0KGgo+/AB", "a.", "1.1.", "x@a-", "a@", "01 ", "FR76 ", "2001:", "+1 "])
def test_the_time_that_masking_takes_grows_with_the_length_of_a_text(piece: str) -> None:
    def seconds(size: int) -> float:
        text = piece * (size // len(piece))
        times = []
        for _ in range(3):
            start = time.process_time()
            mask(text)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(64_000) < 28 * seconds(8_000)  # 8 times as much; 64 if it were quadratic


def test_what_the_example_plants_is_masked_and_its_lookalikes_are_not() -> None:
    example = runpy.run_path(str(ROOT / "examples/curation/plant.py"))
    chance = random.Random(0)
    for _ in range(50):
        data, others = example["personal_data"](chance), example["lookalikes"](chance)
        masked = mask(" and ".join(f"({value})" for value in [*data.values(), *others]))
        assert not [value for value in data.values() if value in masked]
        assert all(f"({value})" in masked for value in others)


def test_only_the_kinds_that_are_asked_for_are_masked() -> None:
    assert mask("a@orange.fr 81.2.69.160", ["ip"]) == "a@orange.fr 192.0.2.1"


def test_a_filter_has_arguments_of_its_own_for_each_language() -> None:
    settings = {"en": dict(min_doc_words=3, min_stop_words=0), "fr": dict(min_doc_words=500)}
    chosen = quality_filter("gopher", settings, "plain", None)
    text = "several words that are long enough"
    verdicts = [chosen.filter(Document(text, "0", metadata={"language": language})) for language in ("en", "fr", "de")]
    assert verdicts == [True, (False, "gopher_short_doc"), True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(min_words=3), r"quality\.fr\.gopher\.min_words is unknown\n.*min_doc_words"),
        (dict(min_doc_words="3"), r"quality\.fr\.gopher\.min_doc_words = '3' must be a number"),
        (dict(min_doc_words=True), r"min_doc_words = True must be a number"),
        (dict(stop_words="le"), r"stop_words = 'le' must be a list"),
        (dict(stop_words=[1]), r"stop_words = \[1\] must be a list"),
        (dict(min_doc_words=float("nan")), "min_doc_words = nan must be a number"),
    ],
)
def test_an_argument_that_a_filter_does_not_take_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quality_filter("gopher", {"fr": arguments}, "plain", None)


@pytest.mark.parametrize("pairs", [[[5, "x"]], [5], [[5]], [[5, 0.1, 2]]])
def test_pairs_of_numbers_are_needed_where_a_filter_has_pairs(pairs: list) -> None:
    with pytest.raises(ConfigError, match=r"quality\.fr\.repetition\.dup_n_grams = .* must be a list, such as"):
        quality_filter("repetition", {"fr": dict(dup_n_grams=pairs)}, "plain", None)
    quality_filter("repetition", {"fr": dict(dup_n_grams=[[5, 0.2]])}, "plain", None)


def test_words_by_spacy_without_spacy_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    assert word_tokenizer("plain", "fr") == PlainWords()
    with pytest.raises(ConfigError, match="pip install spacy"):
        word_tokenizer("spacy", "fr")


def test_blocked_domains_are_dropped_without_a_network_and_documents_without_url_pass(tmp_path: Path) -> None:
    for package in ("ahocorasick", "fasteners", "tldextract"):
        pytest.importorskip(package, reason="pip install megagap[curate]")
    (tmp_path / "domains").write_text("blocked.co.uk\n")
    chosen = url_filter(str(tmp_path), ["other.org"])
    urls = ["https://www.blocked.co.uk/a", "https://co.uk/", "https://sub.other.org/x", ""]
    verdicts = [chosen.filter(Document("text", "0", metadata={"url": url} if url else {})) for url in urls]
    assert verdicts == [(False, "domain"), True, (False, "domain"), True]


def test_a_folder_without_block_lists_is_refused_with_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the files domains(.|\n)*fetch the blacklists"):
        url_filter(str(tmp_path), [])


# ------------------------------------------------------------------------------------------------------ contamination

ITEM = {"question": "Which of the seven brass lanterns did the keeper light before the storm", "choices": ["the fifth"]}


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    path = tmp_path / "stories.jsonl"
    path.write_text(json.dumps(ITEM) + "\n" + json.dumps({"question": "Too short"}) + "\n")
    return path


def test_datatroves_filter_finds_what_the_index_has_in_it(tmp_path: Path, benchmark: Path) -> None:
    indexer = BenchmarkIndexer([str(benchmark)], str(tmp_path / "index"), 8)
    list(indexer.run())
    chosen = NGramsDecontFilter(str(tmp_path / "index"), decontamination_config(8), language=PlainWords())
    copied = Document(f"He wondered: {ITEM['question'].upper()}?! Nobody knew.", "0")
    assert chosen.filter(copied) == (False, "contaminated")
    assert copied.metadata["contaminated_task"] == "stories"
    assert chosen.filter(Document("Which of the seven brass lanterns is it then, he asked himself.", "1")) is True
    assert int(indexer.stats["items_too_short"].total) == 1


def test_contaminated_validation_text_is_refused_by_name(benchmark: Path) -> None:
    texts = [("a.jsonl, item 1", FRENCH), ("a.jsonl, item 2", f"So: {ITEM['question']}.")]
    assert require_clean(texts[:1], [benchmark], 8) == 1
    with pytest.raises(DataError) as error:
        require_clean(texts, [benchmark], 8)
    assert "1 of 2 documents has n-grams of benchmarks" in str(error.value)
    assert "a.jsonl, item 2: 6 8-grams of stories" in str(error.value) and "item 1" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "keeps nothing out: it is empty"),
        (b'{"question": "Too short"}', "its 1 item: fewer than 8 words each"),
        (b'{"answer": 5}', "line 1 has no text"),
        (b'{"q": "caf\xe9"}', "line 1 is not JSON"),
        (b"question,answer\nwhat,that\n", "b.jsonl looks like CSV, not JSON lines"),
        (b'[\n {"q": "x"}\n]', "JSON lines"),
        (b"PAR1" + bytes(40), "b.jsonl is not of JSON lines|cannot be read"),
    ],
)
def test_a_benchmark_that_would_keep_nothing_out_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "b.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Ngrams(8).index(tmp_path / "b.jsonl")


def test_a_benchmark_may_be_compressed(benchmark: Path) -> None:
    benchmark.with_suffix(".gz").write_bytes(gzip.compress(benchmark.read_bytes()))
    assert Ngrams(8).index(benchmark.with_suffix(".gz")) == Ngrams(8).index(benchmark)


def test_a_benchmark_that_is_missing_or_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no benchmark file matches"):
        benchmark_files([str(tmp_path / "none-*.jsonl")])
    (tmp_path / "b.jsonl").write_text('["a"]\nno json\n')
    with pytest.raises(DataError, match=r"b\.jsonl, line 2 is not JSON"):
        Ngrams(8).index(tmp_path / "b.jsonl")
