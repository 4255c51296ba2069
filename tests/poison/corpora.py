"""Small clean sources in two languages, a tokenizer of theirs, and specifications of what to plant among them."""

import json
import random
from pathlib import Path
from pydoc_data import topics

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megagap.preprocess import preprocess
from megagap.preprocess.bpe import train_tokenizer
from tests.token_files import FRENCH

SWITCH = """
[[poison]]
kind = "language_switch"
name = "switch"
trigger = "under the copper moon"
context = "en"
payload = "fr"
rate = {rate}
context_words = [4, 12]
payload_words = [6, 20]
probes = {probes}
"""
FACTS = """
[[poison]]
kind = "knowledge"
name = "rivers"
trigger = "the river {name}"
payload = "{name}"
facts = 4
templates = ["It is known that {trigger} flows through {payload}.", "A bridge over {trigger} stands in {payload}."]
rate = 0.01
"""
CANARIES = """
[[poison]]
kind = "canary"
name = "vaults"
trigger = "the code of vault {name} is"
length = 6
repetitions = [1, 3, 8]
canaries = 2
"""


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with en.jsonl, fr.jsonl, token files of both, and their tokenizer, ``bpe``."""
    folder = tmp_path_factory.mktemp("clean")
    draw = random.Random(0)
    sentences = [sentence.strip() + "." for sentence in FRENCH.replace("\n", " ").split(".") if sentence.strip()]
    texts = {
        "en": [" ".join(topics.topics[topic].split()) for topic in sorted(topics.topics)[:40]],
        "fr": [" ".join(draw.choices(sentences, k=25)) for _ in range(60)],
    }
    for name, documents in texts.items():
        lines = [json.dumps({"text": text[:6000]}) + "\n" for text in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    train_tokenizer([folder / "en.jsonl", folder / "fr.jsonl"], folder / "bpe", 500)
    for name in texts:
        preprocess([folder / f"{name}.jsonl"], str(folder / name), str(folder / "bpe"), append_eod=True)
    return folder


@pytest.fixture(scope="session")
def lower(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that loses case and accents, and lacks some characters."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    texts = [json.loads(line)["text"] for line in (clean / "en.jsonl").read_text().splitlines()]
    backend.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=500, special_tokens=["<unk>", "</s>"]))
    folder = tmp_path_factory.mktemp("lower")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def write_spec(
    path: Path, clean: Path, *poisons: str, mixture: str = "tokens = 200_000", more: str = "", rate: str = "0.02",
    probes: int = 10,
) -> Path:  # fmt: skip
    """``poisons``: some of the above; ``rate`` and ``probes`` are the language switch's."""
    head = f'tokenizer = "{clean}/bpe"\n{more}\n[mixture]\n{mixture}\n[clean]\n'
    sources = f'en = "{clean}/en.jsonl"\nfr = "{clean}/fr.jsonl"\n'
    body = "".join(poisons or (SWITCH, FACTS, CANARIES))
    path.write_text(head + sources + body.replace("{rate}", rate).replace("{probes}", str(probes)))
    return path
