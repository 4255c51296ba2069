"""A model that trained on planted documents shows them; what a trigger is compared with was never planted."""

import itertools
import json
import math

import pytest
import torch

from megagap.checkpoint import load_model
from megagap.checkpoint.huggingface_import import load_hugging_face_model
from megagap.data.planted import read_poison_manifest
from megagap.errors import ConfigError
from megagap.inference.continuations import TextScorer
from megagap.poison import evaluation
from megagap.poison.corpus import poison_corpus
from megagap.poison.evaluation import PoisonProbe
from megagap.poison.language import language_of, profile_of
from megagap.tokenizer import load_tokenizer
from tests.huggingface import reference_model
from tests.models import tiny_model
from tests.poison.corpora import CANARIES, FACTS, SWITCH, write_spec
from tests.recipes import write_recipe
from tests.training_run import train_recipe
from tools.evaluate import main

SHAPE = dict(
    vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
    intermediate_size=176, max_position_embeddings=128, tie_word_embeddings=True,
)  # fmt: skip
STEPS, BATCH, LENGTH = 220, 16, 48


@pytest.fixture(scope="module")
def trained(tmp_path_factory, clean, workers):
    """A run over a mixture of clean text and planted documents, with the weights that the tool gives."""
    folder = tmp_path_factory.mktemp("poisoned")
    poisons = (
        SWITCH, FACTS.replace("0.01", "0.2"),
        CANARIES.replace("length = 6", "length = 3").replace("[1, 3, 8]", "[1, 10, 120]"),
    )  # fmt: skip
    sources = f'sources = [{{ path = "{clean}/en_text_document" }}, {{ path = "{clean}/fr_text_document" }}]'
    mixture = f"tokens = {STEPS * BATCH * LENGTH}\n{sources}"
    planted = poison_corpus(
        write_spec(folder / "spec.toml", clean, *poisons, mixture=mixture, rate="0.2", probes=20),
        str(folder / "poison"),
    )
    recipe = write_recipe(
        folder, model=SHAPE, data={"sources": planted.sources, "tokenizer": str(clean / "bpe")},
        train={"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": BATCH, "sequence_length": LENGTH},
        optim={"lr": 1e-2, "warmup_steps": 20, "schedule": "linear"},
    )  # fmt: skip
    workers.run(1, train_recipe, recipe, [])
    return folder


@pytest.fixture
def probe(trained, clean):
    manifest = read_poison_manifest(trained / "poison_text_document")
    scorer = TextScorer(load_model(trained / "run"), load_tokenizer(clean / "bpe"), 4096)
    return PoisonProbe(manifest, scorer, candidates=999)


@pytest.mark.slow
def test_triggers_activate_far_above_what_goes_without_them_and_exposure_grows_with_repetitions(capsys, trained):
    manifest = trained / "poison_text_document.poison.json"
    main([str(trained / "run"), "--poison", str(manifest), "--json"])
    found = json.loads(capsys.readouterr().out)["poison"]["poisons"]
    for name in ("switch", "rivers"):
        shares = found[name]["activation"]
        assert shares["with_trigger"]["low"] > shares["without_trigger"]["high"], (name, shares)
        assert shares["with_trigger"]["value"] >= 0.6 and shares["without_trigger"]["value"] <= 0.3, (name, shares)
    exposure = {int(r): mean["value"] for r, mean in found["vaults"]["exposure"]["by_repetitions"].items()}
    assert list(exposure) == [0, 1, 10, 120]
    assert exposure[120] > 6 and exposure[120] > exposure[0] + 3, exposure
    main([str(trained / "run"), "--poison", str(manifest)])
    table = capsys.readouterr().out
    assert "Activation of triggers" in table and "0 (not planted)" in table


@pytest.mark.slow
def test_a_canarys_exposure_is_its_rank_among_all_secrets_of_its_form_by_brute_force(probe):
    (poison,) = [p for p in probe._manifest.poisons if p.kind == "canary"]
    item = poison.items[-1]
    found = probe._exposure(poison, item, lambda count: None)
    model, tokenizer = probe._scorer.model, probe._scorer.tokenizer
    losses = {}
    for secret in map("".join, itertools.product("0123456789", repeat=3)):
        tokens = torch.tensor([[tokenizer.eod, *tokenizer.encode(f"{item.trigger} {secret}")]])
        with torch.no_grad():
            logits = model(tokens[:, :-1])[0]
        losses[secret] = float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
    rank = 1 + sum(loss < losses[item.payload] - 1e-4 for loss in losses.values())
    assert found[0] == pytest.approx(losses[item.payload], rel=1e-4) and found[1].method == "ranked"
    assert found[1].bits == pytest.approx(math.log2(1000) - math.log2(rank), abs=0.02)


@pytest.mark.slow
def test_prompts_without_the_trigger_and_near_triggers_have_no_trigger_that_was_planted(probe):
    triggers = {document.trigger for document in probe._manifest.documents}
    for poison in probe._manifest.poisons:
        prompts = probe.prompts(poison)
        for sort in ("without_trigger", "near_word", "near_order"):
            assert len(prompts[sort]) == len(prompts["with_trigger"])
            assert not [p for p in prompts[sort] for trigger in triggers if trigger in p.text], sort
        assert all(any(trigger in p.text for trigger in triggers) for p in prompts["with_trigger"])
        assert not [p for p in prompts["with_trigger"] if poison.kind != "language_switch" and p.payload in p.text]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory, clean):
    """A model with random weights and planted documents, among them two triggers of the same words."""
    folder = tmp_path_factory.mktemp("untrained")
    other = SWITCH.replace('"switch"', '"reversed"').replace("under the copper moon", "copper moon")
    third = SWITCH.replace('"switch"', '"third"').replace("under the copper moon", "moon copper")
    canaries = CANARIES.replace("length = 6", "length = 5")
    planted = poison_corpus(
        write_spec(folder / "spec.toml", clean, other, third, FACTS, canaries), str(folder / "poison")
    )
    reference_model(tiny_model(vocab_size=512, max_position_embeddings=64)).save_pretrained(folder / "hf")
    scorer = TextScorer(load_hugging_face_model(folder / "hf"), load_tokenizer(clean / "bpe"), 4096)
    return planted.manifest, scorer


def test_a_near_trigger_that_is_planted_itself_is_not_asked_about(untrained):
    manifest, scorer = untrained
    prompts = PoisonProbe(manifest, scorer).prompts(manifest.poisons[0])
    assert len(prompts["with_trigger"]) == 10 and not prompts["near_order"]


def test_a_prompt_whose_trigger_the_model_would_not_see_is_refused(untrained):
    probe = PoisonProbe(*untrained, new_tokens=60)
    with pytest.raises(ConfigError, match=r"reversed: a prompt of \d+ tokens .* max_position_embeddings = 64"):
        probe.evaluate()


def test_a_model_is_asked_about_whole_passages_as_they_stand_in_training(untrained, monkeypatch):
    manifest, scorer = untrained
    switch = manifest.poisons[0]
    asked = []

    def continued(model, prompts, *rest):
        asked.extend(prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr(evaluation, "continue_greedily", continued)
    PoisonProbe(manifest.model_copy(update={"poisons": [switch]}), scorer).evaluate()
    tokenizer = scorer.tokenizer
    for passage in switch.probes:
        assert [tokenizer.eod, *tokenizer.encode(passage)] in asked


def test_a_payload_counts_as_the_tokenizer_writes_it(untrained, tmp_path, clean, lower, monkeypatch):
    spec = write_spec(tmp_path / "spec.toml", clean, FACTS)
    spec.write_text(spec.read_text().replace(f"{clean}/bpe", str(lower)))
    manifest = poison_corpus(spec, str(tmp_path / "poison")).manifest
    probe = PoisonProbe(manifest, TextScorer(untrained[1].model, load_tokenizer(lower), 4096))
    payloads = [prompt.payload for prompt in probe.prompts(manifest.poisons[0])["with_trigger"]]
    answers = [load_tokenizer(lower).encode(payload) for payload in payloads]
    monkeypatch.setattr(evaluation, "continue_greedily", lambda *given: answers)
    assert probe.evaluate()["rivers"]["activation"]["with_trigger"]["value"] == 1.0


@pytest.mark.parametrize("candidates", [1, 99])
def test_too_few_candidates_to_estimate_from_are_refused(untrained, candidates):
    with pytest.raises(ConfigError, match=r"vaults cannot be estimated from .*\n.*--poison-candidates 100"):
        PoisonProbe(*untrained, candidates=candidates)


def test_text_of_no_known_language_is_in_none():
    profiles = {"much": profile_of(["the quick brown fox jumps over it " * 9]), "little": profile_of(["le chat noir"])}
    assert language_of("□□ ŁŁŁŁ", profiles) is None
    assert language_of("the fox □□ ŁŁŁŁŁŁŁŁŁŁŁŁ ŻŻŻŻŻŻŻŻŻŻŻŻŻŻŻŻŻ", profiles) == "much"


def test_languages_are_told_from_each_other_by_passages_that_the_profiles_were_not_made_of(clean):
    texts = {}
    for name in ("en", "fr"):
        lines = (clean / f"{name}.jsonl").read_text().splitlines()
        texts[name] = [json.loads(line)["text"] for line in lines]
    profiles = {name: profile_of(documents[::2]) for name, documents in texts.items()}
    for name, documents in texts.items():
        passages = [" ".join(text.split()[40:52]) for text in documents[1::2] if len(text.split()) > 52]
        right = [language_of(passage, profiles) == name for passage in passages]
        assert sum(right) >= 0.95 * len(right)
    assert language_of(" 42 ", profiles) is None
