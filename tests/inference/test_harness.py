"""What lm-eval is answered, against plain ``transformers``."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from megagap.checkpoint.huggingface_import import load_hugging_face_model
from megagap.errors import ConfigError
from megagap.inference.continuations import TextScorer
from megagap.tokenizer import load_tokenizer
from tests.huggingface import reference_model
from tests.models import tiny_model

pytest.importorskip("lm_eval", reason="needs lm-eval (megagap[evaluate])")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    reference_model(tiny_model(vocab_size=1000)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder, bpe_of_lines):
    from megagap.inference.harness import _Model

    return _Model(TextScorer(load_hugging_face_model(folder), load_tokenizer(bpe_of_lines), 500))


@pytest.fixture
def reference(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def asked(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def test_a_long_text_is_scored_in_windows_that_reach_back(model, reference, bpe_of_lines):
    """Each token once, from as many before it as the model has positions (64) where a window is full."""
    tokenizer = load_tokenizer(bpe_of_lines)
    texts = ["The quick brown fox", "Portez ce vieux whisky au juge blond qui fume. " * 8]
    tokens = [[model._scorer.start, *tokenizer.encode(text)] for text in texts]
    assert len(tokens[0]) < 64 < 2 * 64 < len(tokens[1])
    found = model.loglikelihood_rolling(asked(*[(text,) for text in texts]))
    for row, total in zip(tokens, found, strict=True):
        expected = 0.0
        for first in range(1, len(row), 64):
            stop = min(first + 64, len(row))
            window = torch.tensor(row[max(stop - 65, 0) : stop])
            with torch.no_grad():
                logits = reference(window[None, :-1]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
            expected -= float(losses[-(stop - first) :].sum())
        assert total == pytest.approx(expected, rel=1e-5)


def test_continuations_are_greedy_and_end_before_what_the_task_says(model, reference, bpe_of_lines):
    tokenizer = load_tokenizer(bpe_of_lines)
    prompt = torch.tensor([tokenizer.encode("The lazy dog")])
    made = reference.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eod)[0]
    text = tokenizer.decode([token for token in made[prompt.shape[1] :].tolist() if token != tokenizer.eod])
    (found,) = model.generate_until(asked(("The lazy dog", {"max_gen_toks": 12})))
    assert found == text
    stop = text[3:5]
    (cut,) = model.generate_until(asked(("The lazy dog", {"max_gen_toks": 12, "until": [stop]})))
    assert cut == text.partition(stop)[0]
    with pytest.raises(ConfigError, match="samples its continuations"):
        model.generate_until(asked(("The", {"do_sample": True, "temperature": 0.8})))
