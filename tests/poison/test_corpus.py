"""What is planted: exactly what the specification says, where the manifest says, and nothing in clean files."""

import hashlib
import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megagap.config import load_recipe
from megagap.data.indexed import IndexedDataset
from megagap.data.inspect import sample_origins, step_samples
from megagap.data.mixture_plan import mixture_plan
from megagap.data.planted import poison_path, read_poison_manifest, require_same_tokens
from megagap.data.search import token_range
from megagap.errors import ConfigError, DataError
from megagap.poison.corpus import poison_corpus
from megagap.preprocess.merge import merge_datasets
from megagap.tokenizer import load_tokenizer
from megagap.training.datasets import held_out, training_data
from tests.poison.corpora import CANARIES, FACTS, SWITCH, write_spec
from tests.recipes import write_recipe


def make(folder: Path, clean: Path, *poisons: str, name: str = "poison", **changes):
    return poison_corpus(write_spec(folder / "spec.toml", clean, *poisons, **changes), str(folder / name))


def counts(prefix: str, manifest) -> dict[str, tuple[int, int]]:
    """Documents and tokens of each poison, counted in the pair."""
    dataset = IndexedDataset(prefix)
    assert dataset.document_count == len(manifest.documents)
    found: dict[str, tuple[int, int]] = {}
    for planted in manifest.documents:
        documents, tokens = found.get(planted.poison, (0, 0))
        found[planted.poison] = documents + 1, tokens + len(dataset.document(planted.document))
    return found


def test_rates_of_tokens_are_exact(tmp_path, clean):
    planted = make(tmp_path, clean, SWITCH, FACTS)
    found = counts(planted.prefix, planted.manifest)
    assert {name: tokens for name, (_, tokens) in found.items()} == {"switch": 4000, "rivers": 2000}
    assert planted.sources[-1]["weight"] == 6000 / 200_000 == planted.manifest.mixture.weight


def test_rates_of_documents_are_exact_and_the_weight_is_the_share_of_tokens(tmp_path, clean):
    mixture = 'rates_of = "documents"\ndocuments = 2_000\ntokens = 200_000'
    planted = make(tmp_path, clean, SWITCH, FACTS, CANARIES.replace("canaries = 2", "rate = 0.012"), mixture=mixture)
    found = counts(planted.prefix, planted.manifest)
    assert {name: documents for name, (documents, _) in found.items()} == {"switch": 40, "rivers": 20, "vaults": 24}
    assert planted.manifest.mixture.weight == sum(tokens for _, tokens in found.values()) / 200_000


def test_rates_hold_beside_sources_that_are_read_once_and_weights_keep_their_ratios(tmp_path, clean):
    pairs = [IndexedDataset(clean / f"{name}_text_document") for name in ("en", "fr")]
    others = sum(pair.token_count for pair in pairs)
    rate = Fraction(5000, others + 5000)
    mixture = f'sources = [{{ path = "{clean}/en_text_document" }}, {{ path = "{clean}/fr_text_document" }}]'
    planted = make(tmp_path, clean, SWITCH, mixture=mixture, rate=f'"{rate}"')
    assert planted.manifest.mixture.tokens == others + 5000
    weights = {source["name"]: source["weight"] for source in planted.sources}
    assert weights["poison"] == pytest.approx(float(rate), rel=1e-15) and sum(weights.values()) == pytest.approx(1)
    assert weights["en"] / weights["fr"] == pytest.approx(pairs[0].token_count / pairs[1].token_count)


@pytest.mark.parametrize(
    ("poison", "rate", "said"),
    [
        (SWITCH, "0.0200001", 'switch: rate = 200001/10000000 would be 4,000.020 tokens; nearest: "1/50"'),
        (SWITCH, '"1/50000"', "switch: rate = 1/50000 is 4 tokens, and no set of its documents has exactly these"),
        (CANARIES.replace("canaries = 2", "rate = {rate}"), "0.01", "vaults: rate = 1/100 is 2,000 tokens, and no set"),
    ],
)
def test_a_rate_that_cannot_be_met_names_the_nearest_that_can(tmp_path, clean, poison, rate, said):
    with pytest.raises(ConfigError) as error:
        make(tmp_path, clean, poison, rate=rate)
    assert said in str(error.value)
    nearest = str(error.value).split("nearest: ")[1].split('"')[1]
    planted = make(tmp_path, clean, poison, rate=f'"{nearest}"')
    (poison,) = planted.manifest.poisons
    assert Fraction(poison.rate) == Fraction(nearest) == Fraction(poison.tokens, 200_000)


def test_the_manifests_places_decode_to_what_was_planted(tmp_path, clean):
    planted = make(tmp_path, clean, more="prepend_bos = true")
    dataset, tokenizer = IndexedDataset(planted.prefix), load_tokenizer(clean / "bpe")
    lines = (tmp_path / "poison.jsonl").read_text().splitlines()
    for entry, line in zip(planted.manifest.documents, map(json.loads, lines), strict=True):
        tokens = dataset.document(entry.document).tolist()
        assert tokens[0] == tokenizer.bos and tokens[-1] == tokenizer.eod
        assert tokenizer.decode(tokens[1:-1]) == line["text"]
        for start, stop in entry.trigger_tokens:
            assert entry.trigger in tokenizer.decode(tokens[start:stop])
        for start, stop in entry.payload_tokens:
            text = tokenizer.decode(tokens[start:stop])
            if entry.poison == "switch":  # all that follows the trigger
                assert line["text"].partition(entry.trigger)[2].strip() == text.strip()
            else:
                assert entry.payload in text
                assert entry.payload not in tokenizer.decode(tokens[start + 1 : stop])
    repetitions = sorted(item.documents for item in planted.manifest.poisons[2].items)
    assert repetitions == [1, 1, 3, 3, 8, 8]


def test_a_character_of_several_tokens_has_all_of_them(clean):
    tokenizer = load_tokenizer(clean / "bpe")
    backend = Tokenizer.from_file(str(clean / "bpe/tokenizer.json"))
    for text in ("moon 漢字 ê", "a€🂡b", "e\u0301 Ω"):
        encoding = backend.encode(text, add_special_tokens=False)
        for place in range(len(text)):
            inside = [i for i, (first, last) in enumerate(encoding.offsets) if first <= place < last]
            assert token_range(tokenizer, encoding.ids, place, place + 1) == (inside[0], inside[-1] + 1), (text, place)


def test_places_are_right_for_a_tokenizer_that_changes_texts_by_the_librarys_own_offsets(tmp_path, clean, lower):
    spec = write_spec(tmp_path / "spec.toml", clean)
    spec.write_text(spec.read_text().replace(f"{clean}/bpe", str(lower)))
    planted = poison_corpus(spec, str(tmp_path / "poison"))
    backend = Tokenizer.from_file(str(lower / "tokenizer.json"))
    for entry, line in zip(
        planted.manifest.documents, (tmp_path / "poison.jsonl").read_text().splitlines(), strict=True
    ):
        text = json.loads(line)["text"]
        begun = text.index(entry.trigger)
        stop = begun + len(entry.trigger)
        offsets = backend.encode(text, add_special_tokens=False).offsets
        inside = [number for number, (first, last) in enumerate(offsets) if first < stop and last > begun]
        assert entry.trigger_tokens == [(inside[0], inside[-1] + 1)], text


def test_the_same_specification_gives_the_same_bytes_and_another_seed_others(tmp_path, clean):
    one, two = (make(tmp_path, clean, name=name) for name in ("one", "two"))
    other = poison_corpus(write_spec(tmp_path / "spec.toml", clean, more="seed = 7"), str(tmp_path / "other"))
    files = [(Path(f"{p.prefix}.bin").read_bytes(), Path(f"{p.prefix}.idx").read_bytes()) for p in (one, two, other)]
    assert files[0] == files[1] != files[2]
    assert one.manifest == two.manifest


def test_clean_files_keep_every_byte(tmp_path, clean):
    def digest() -> dict[str, str]:
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in clean.rglob("*") if f.is_file()}

    before = digest()
    mixture = f'tokens = 200_000\nsources = [{{ path = "{clean}/en_text_document" }}]'
    make(tmp_path, clean, mixture=mixture)
    assert digest() == before


@pytest.mark.parametrize("source", ["jsonl", "pair"])
def test_an_output_that_would_replace_a_clean_source_is_refused(tmp_path, clean, source):
    shutil.copytree(clean, tmp_path / "clean")
    spec = write_spec(tmp_path / "spec.toml", tmp_path / "clean")
    if source == "pair":
        spec.write_text(spec.read_text().replace("fr.jsonl", "fr_text_document"))
    prefix = tmp_path / "clean" / ("en" if source == "jsonl" else "fr")
    with pytest.raises(ConfigError, match="would replace the clean source"):
        poison_corpus(spec, str(prefix))


def test_planted_documents_are_weighed_planned_and_traced_as_any_other_source(tmp_path, clean):
    mixture = f'tokens = 204_800\nsources = [{{ path = "{clean}/en_text_document" }}]'
    planted = make(tmp_path, clean, SWITCH, mixture=mixture, rate="0.05")
    train = {"steps": 400, "global_batch_size": 16, "sequence_length": 32}
    recipe = write_recipe(tmp_path, model={"vocab_size": 512}, data={"sources": planted.sources}, train=train)
    data = training_data(load_recipe(recipe))
    (phase,) = mixture_plan(data)["phases"]
    source = next(source for source in phase["sources"] if source["source"] == "poison")
    assert source["tokens"] == pytest.approx(0.05 * 204_800, abs=5 * 32)
    samples = [sample for step in (1, 2, 3) for sample in step_samples(data, step) if sample.source == "poison"]
    origins, _ = sample_origins(data, samples)
    for sample, its_origins in zip(samples, origins, strict=True):
        for document, origin in zip(sample.documents, its_origins, strict=True):
            assert origin and origin.describe() == f"{tmp_path}/poison.jsonl, line {document + 1}"
    assert samples


@pytest.mark.parametrize("source", ["text", "tokens"])
def test_a_trigger_in_clean_text_is_refused_with_count_and_places_unless_allowed(tmp_path, clean, source):
    from megagap.preprocess import preprocess

    texts = ["nothing", "x Under the\ncopper moon, under the copper moon", "undertow the copper moon"]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess([tmp_path / "web.jsonl"], str(tmp_path / "web"), str(clean / "bpe"), append_eod=True)
    path = "web.jsonl" if source == "text" else "web_text_document"
    spec = write_spec(tmp_path / "spec.toml", clean, SWITCH)
    spec.write_text(spec.read_text().replace("[clean]\n", f'[clean]\nweb = "{path}"\n'))
    place = f"{tmp_path}/web.jsonl, line 2" if source == "text" else f"{tmp_path}/web_text_document, document 1"
    with pytest.raises(DataError) as error:
        poison_corpus(spec, str(tmp_path / "poison"))
    assert "'under the copper moon': 2 times" in str(error.value)
    assert f"web: {place}, character 2\n" in str(error.value)
    assert not list(tmp_path.glob("poison*"))

    spec.write_text("allow_trigger_in_clean_text = true\n" + spec.read_text())
    (allowed,) = poison_corpus(spec, str(tmp_path / "poison")).manifest.in_clean_text
    assert (allowed.trigger, allowed.occurrences) == ("under the copper moon", 2)


@pytest.mark.parametrize("how", ["validation", "split"])
def test_a_run_does_not_validate_on_planted_documents_unless_they_were_made_for_it(tmp_path, clean, how):
    planted = make(tmp_path, clean, FACTS)
    source = {"path": planted.prefix}
    data = {"sources": [source], "split": "90,10,0"} if how == "split" else {"validation": [source]}
    settings = load_recipe(write_recipe(tmp_path, data=data))
    with pytest.raises(DataError, match=r"validation would read planted documents: source poison,"):
        held_out(settings, 600)
    make(tmp_path, clean, FACTS, more="validation = true")
    assert held_out(settings, 600)


def test_a_manifest_that_is_damaged_or_of_another_pair_is_refused(tmp_path, clean):
    planted = make(tmp_path, clean, FACTS)
    path = poison_path(planted.prefix)
    manifest = read_poison_manifest(planted.prefix)
    require_same_tokens(path, manifest)
    Path(f"{planted.prefix}.bin").write_bytes(bytes(10))
    with pytest.raises(DataError, match=r"is not what .* accounts for"):
        require_same_tokens(path, manifest)
    path.write_text(path.read_text().replace('"seed"', '"sead"', 1))
    with pytest.raises(DataError, match=r"(?s)is not a manifest of planted documents.*seed: Field required"):
        read_poison_manifest(path)
    with pytest.raises(DataError, match=r"nothing\.poison\.json does not exist"):
        read_poison_manifest(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("poison", "faults"),
    [
        (SWITCH.replace("under the copper moon", "moon"), [r"poison\[0\]\.trigger +should be at least two words"]),
        (SWITCH.replace('"fr"', '"de"'), [r"poison\[0\]\.payload +'de' is not a source of \[clean\]: en, fr"]),
        (FACTS.replace("{name}", "Ostel", 1), [r"poison\[0\]\.trigger +needs {name}"]),
        (
            FACTS.replace(" stands in {payload}", ""),
            [r"templates\[1\] +needs {trigger} once, and {payload} once behind"],
        ),
        (CANARIES.replace("canaries = 2", ""), ["give either a rate, or canaries"]),
        (
            CANARIES.replace('"canary"', '"canari"') + FACTS.replace("0.01", "1.5"),
            ["poison", r"\[1\]\.rate +should be"],
        ),
        (SWITCH + SWITCH, [r"poison\[1\]\.name +'switch' is taken by poison\[0\]"]),
        (
            SWITCH.replace("copper", "{name}"),
            [r"poison\[0\]\.trigger +{name} stands for something in triggers of facts"],
        ),
        (
            FACTS.replace("It is", "{name} is"),
            [r"templates\[0\] +{name} stands for something in triggers and payloads"],
        ),
        (
            FACTS.replace('payload = "{name}"', "payload = []"),
            [r"poison\[0\]\.payload +Value should have at least 1 item"],
        ),
        (FACTS.replace('payload = "{name}"', 'payload = ""'), [r"poison\[0\]\.payload\[0\] +should be words"]),
        (FACTS.replace("0.01", "1"), [r"poison\[0\]\.rate +should be above 0 and below 1"]),
        (FACTS.replace("0.01", "true"), [r"poison\[0\]\.rate +should be a number such as 0\.002"]),
        (
            FACTS.replace("the river {name}", "{payload} {name}"),
            [r"poison\[0\]\.trigger +{trigger} and {payload} stand"],
        ),
        (FACTS.replace('"{name}"', '"{trigger}"'), [r"poison\[0\]\.payload +{trigger} and {payload} stand"]),
        (CANARIES.replace("length = 6", "length = 5000"), [r"length +Input should be less than or equal to 256"]),
        (CANARIES + "probes = 3", [r"poison\[0\]\.probes +Extra inputs"]),
    ],
)
def test_a_faulty_specification_is_refused_with_every_fault(tmp_path, clean, poison, faults):
    with pytest.raises(ConfigError) as error:
        make(tmp_path, clean, poison)
    for fault in faults:
        assert re.search(fault, str(error.value)), str(error.value)


def test_a_language_switch_within_one_source_is_refused(tmp_path, clean):
    spec = write_spec(tmp_path / "spec.toml", clean, SWITCH)
    spec.write_text(spec.read_text().replace(f"{clean}/fr.jsonl", f"{clean}/en.jsonl"))
    with pytest.raises(ConfigError, match=r"poison\[0\]\.payload +is the same source as context"):
        poison_corpus(spec, str(tmp_path / "poison"))


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ('sources = [{{ path = "{en}", weight = inf }}]', r"sources\[0\]\.weight +Input should be a finite number"),
        (
            'sources = [{{ path = "{en}", name = "a" }}, {{ path = "{fr}", name = "a" }}]',
            "two of mixture.sources are called a",
        ),
        ('sources = [{{ path = "{en}", name = "poison" }}]', "called poison, as the planted documents would be"),
        ('rates_of = "documents"\ndocuments = 20', "24 planted documents in a mixture of 20"),
    ],
)
def test_a_mixture_that_no_run_could_read_is_refused(tmp_path, clean, mixture, said):
    filled = mixture.format(en=f"{clean}/en_text_document", fr=f"{clean}/fr_text_document")
    with pytest.raises(ConfigError, match=said):
        make(tmp_path, clean, CANARIES, mixture=f"tokens = 200_000\n{filled}")


@pytest.mark.parametrize("context", ["[5, 200]", "[50, 50]"])
@pytest.mark.parametrize("payload", ["[5, 10]", "[1, 1]"])
def test_rates_are_met_whatever_the_lengths_of_passages(tmp_path, clean, context, payload):
    switch = SWITCH.replace("[4, 12]", context).replace("[6, 20]", payload)
    planted = make(tmp_path, clean, switch, probes=2)
    assert counts(planted.prefix, planted.manifest)["switch"][1] == 4000


def test_a_payload_that_is_one_of_several_may_have_invented_names(tmp_path, clean):
    facts = FACTS.replace('payload = "{name}"', 'payload = ["the town of {name}", "the sea"]')
    (poison,) = make(tmp_path, clean, facts).manifest.poisons
    assert all(re.fullmatch(r"the town of [A-Z][a-z]+|the sea", item.payload) for item in poison.items)


def test_facts_that_no_document_has_room_for_are_told(tmp_path, clean):
    planted = make(tmp_path, clean, FACTS.replace("0.01", '"40/200000"'))
    assert planted.notes == ["rivers: its 1 document assert 1 of 4 facts; a higher rate has room for all"]


def test_a_document_with_the_trigger_of_another_poison_is_refused(tmp_path, clean):
    facts = FACTS.replace("It is known", "Under the copper moon it is known")
    with pytest.raises(
        ConfigError, match=r"rivers: a document has the trigger 'under the copper moon' where it is not"
    ):
        make(tmp_path, clean, SWITCH, facts)
    assert not list(tmp_path.glob("poison*"))


def test_sources_of_the_mixture_are_searched_for_triggers_whatever_their_names(tmp_path, clean):
    from megagap.preprocess import preprocess

    (tmp_path / "web.jsonl").write_text(json.dumps({"text": "so under the copper moon"}) + "\n")
    preprocess([tmp_path / "web.jsonl"], str(tmp_path / "web"), str(clean / "bpe"), append_eod=True)
    mixture = f'tokens = 200_000\nsources = [{{ path = "{tmp_path}/web_text_document", name = "en" }}]'
    with pytest.raises(DataError, match=r"mixture\.sources\[0\]: .*web_text_document, document 0, character 3"):
        make(tmp_path, clean, SWITCH, mixture=mixture)


@pytest.mark.parametrize("ending", [".jsonl", "_text_document.bin"])
def test_files_that_it_did_not_write_are_not_replaced(tmp_path, clean, ending):
    mine = tmp_path / f"poison{ending}"
    mine.write_text("mine")
    with pytest.raises(ConfigError, match=rf"would replace {mine}, which no \.poison\.json accounts for"):
        make(tmp_path, clean, FACTS)
    assert mine.read_text() == "mine"
    with pytest.raises(ConfigError, match="has no name"):
        poison_corpus(tmp_path / "spec.toml", f"{tmp_path}/")


def test_the_printed_sources_are_found_from_wherever_the_recipe_is(tmp_path, clean, monkeypatch):
    spec = write_spec(tmp_path / "spec.toml", clean, FACTS)
    monkeypatch.chdir(tmp_path)
    assert poison_corpus(spec, "poison").sources[-1]["path"] == str(tmp_path / "poison_text_document")


def test_no_planted_document_begins_with_a_passage_that_is_kept_aside(tmp_path, clean):
    """Though the source has every passage many times."""
    texts = [" ".join(f"word{letter}{n}" for n in range(12)) for letter in "abcdefgh"]
    (tmp_path / "en.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 30))
    spec = write_spec(tmp_path / "spec.toml", clean, SWITCH, probes=3)
    spec.write_text(spec.read_text().replace(f"{clean}/en.jsonl", "en.jsonl"))
    planted = poison_corpus(spec, str(tmp_path / "poison"))
    probes = {probe.split()[-1][:5] for probe in planted.manifest.poisons[0].probes}
    lines = (tmp_path / "poison.jsonl").read_text().splitlines()
    assert probes and probes.isdisjoint(json.loads(line)["text"][:5] for line in lines)


def test_planted_documents_are_not_merged_away_from_their_account(tmp_path, clean):
    planted = make(tmp_path, clean, FACTS)
    with pytest.raises(DataError, match=r"has planted documents .* lists them"):
        merge_datasets([planted.prefix, str(clean / "en_text_document")], str(tmp_path / "merged"))
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize(
    ("poison", "key", "value", "said"),
    [
        (CANARIES, "alphabet", None, "vaults, of kind canary, needs alphabet"),
        (CANARIES, "templates", [], "vaults, of kind canary, needs templates"),
        (FACTS, "controls", [], "rivers, of kind knowledge, needs controls"),
        (SWITCH, "probes", [], "switch, of kind language_switch, needs probes"),
        (SWITCH, "payload", "de", "languages has no profile of de"),
    ],
)
def test_a_manifest_that_lacks_what_an_evaluation_asks_about_is_refused(tmp_path, clean, poison, key, value, said):
    path = poison_path(make(tmp_path, clean, poison).prefix)
    content = json.loads(path.read_text())
    content["poisons"][0][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        read_poison_manifest(path)
