"""Likelihoods and greedy continuations, against plain ``transformers``, one text at a time."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from megagap.checkpoint.huggingface_import import load_hugging_face_model
from megagap.errors import DataError
from megagap.inference.continuations import Continuation, TextScorer, continue_greedily, score_continuations
from megagap.tokenizer import load_tokenizer
from tests.huggingface import reference_model
from tests.models import tiny_model

POSITIONS = tiny_model().max_position_embeddings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuations")
    reference_model(tiny_model(vocab_size=300)).save_pretrained(folder)
    return folder


def drawn(count: int, longest: int) -> list[Continuation]:
    draw = random.Random(0)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(300) for _ in range(draw.randint(1, most)))

    return [Continuation(tokens(longest), tokens(9)) for _ in range(count)]


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_scores_are_those_of_transformers_whatever_the_batches(folder, batch_tokens):
    asked = drawn(24, longest=POSITIONS + 20)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # The first also with what the model itself would say.
    with torch.no_grad():
        best = int(reference(torch.tensor([asked[0].context[-POSITIONS:]])).logits[0, -1].argmax())
    asked.append(Continuation(asked[0].context[-POSITIONS:], (best,)))
    done: list[int] = []
    model = load_hugging_face_model(folder)
    scores = score_continuations(model, asked, batch_tokens, done.append)
    assert sum(done) == len(asked) and scores[-1].is_greedy
    for one, score in zip(asked, scores, strict=True):
        row = torch.tensor((*one.context, *one.tokens)[-POSITIONS - 1 :])
        with torch.no_grad():
            logits = reference(row[None, :-1]).logits[0, -len(one.tokens) :]
        targets = row[-len(one.tokens) :]
        assert score.nats == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")))
        assert score.is_greedy == bool((logits.argmax(-1) == targets).all())
        assert score.tokens == len(one.tokens)


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_greedy_continuations_are_those_of_transformers(folder, batch_tokens):
    prompts = [one.context[:20] for one in drawn(12, longest=30)]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for prompt in prompts:
        made = reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        expected.append(made[0, len(prompt) :].tolist())
    model = load_hugging_face_model(folder)
    assert continue_greedily(model, prompts, 8, batch_tokens) == expected
    stop = {expected[0][3]}
    cut = [next((row[:i] for i, token in enumerate(row) if token in stop), row) for row in expected]
    assert continue_greedily(model, prompts, 8, batch_tokens, stop) == cut


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (Continuation((1,), ()), "has no tokens"),
        (Continuation((1,), (2,) * (POSITIONS + 1)), "more than the model's max_position_embeddings = 64"),
        (Continuation((300,), (2,)), "the token id 300, and the model's vocab_size is 300"),
    ],
)
def test_what_a_model_cannot_score_is_refused(folder, one, said):
    with pytest.raises(DataError, match=said):
        score_continuations(load_hugging_face_model(folder), [one], 100)


def test_a_text_is_encoded_with_its_context_and_owns_the_blanks_before_it(folder, bpe_of_lines):
    scorer = TextScorer(load_hugging_face_model(folder), load_tokenizer(bpe_of_lines), 100)
    encode = scorer.tokenizer.encode
    assert scorer.continuation("the lazy ", "dog") == scorer.continuation("the lazy", " dog")
    one = scorer.continuation("the lazy", " dog")
    assert [*one.context] == encode("the lazy") and [*one.context, *one.tokens] == encode("the lazy dog")
    assert scorer.continuation("", "dog").context == (scorer.start,)
