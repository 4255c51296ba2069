"""Fixtures of texts, small token files and tokenizers."""

import inspect
import json
import random
import textwrap
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics

import pytest
from sentencepiece import SentencePieceTrainer

from megagap.data.indexed import IndexedDatasetWriter
from megagap.preprocess.bpe import train_tokenizer
from megagap.timeline import Source
from tests.few import WriteTokens, numbered

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Portez ce vieux whisky au juge blond qui fume.\n\n  Déjà vu?",
    "def f(x):\n    return [x ** 2 for _ in range(1024)]\n",
    "It's 3.14159, isn't it? 你好 🙂",
]

# La Fontaine, Fables, I, 1–2 (1668); Descartes, Discours de la méthode, I (1637).
FRENCH = """
La Cigale, ayant chanté tout l'été, se trouva fort dépourvue quand la bise fut venue : pas un seul petit morceau de
mouche ou de vermisseau. Elle alla crier famine chez la Fourmi sa voisine, la priant de lui prêter quelque grain pour
subsister jusqu'à la saison nouvelle. « Je vous paierai, lui dit-elle, avant l'août, foi d'animal, intérêt et
principal. » La Fourmi n'est pas prêteuse : c'est là son moindre défaut. « Que faisiez-vous au temps chaud ? dit-elle à
cette emprunteuse. — Nuit et jour à tout venant je chantais, ne vous déplaise. — Vous chantiez ? j'en suis fort aise. Eh
bien ! dansez maintenant. » Maître Corbeau, sur un arbre perché, tenait en son bec un fromage. Maître Renard, par
l'odeur alléché, lui tint à peu près ce langage : « Hé ! bonjour, Monsieur du Corbeau. Que vous êtes joli ! que vous me
semblez beau ! Sans mentir, si votre ramage se rapporte à votre plumage, vous êtes le Phénix des hôtes de ces bois. » Le
bon sens est la chose du monde la mieux partagée ; car chacun pense en être si bien pourvu, que ceux même qui sont les
plus difficiles à contenter en toute autre chose n'ont point coutume d'en désirer plus qu'ils en ont. Ainsi, l'œuvre
naïve d'un garçon à Noël, où qu'elle mène, coûte 1 234,50 €.
"""


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """English, French, code, and other scripts."""
    return TEXTS


@pytest.fixture(scope="session")
def lines() -> list[str]:
    """5,000 lines: the language's own documentation, French in varied order, and code, with spaces and line ends."""
    draw = random.Random(0)
    words = FRENCH.split()
    french = [" ".join(draw.sample(words, draw.randint(1, 30))) for _ in range(1500)] + FRENCH.splitlines() * 20
    english = "\n".join(topics.topics[topic] for topic in sorted(topics.topics)).splitlines(keepends=True)
    code = "".join(map(inspect.getsource, (inspect, json, random, textwrap))).splitlines(keepends=True)
    return french[:1700] + english[:1700] + code[:1600]


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Path:
    """A sentencepiece BPE of 1,000 ids, with single bytes for unknown characters."""
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    with open(file, "wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=1000, model_type="bpe", byte_fallback=True,
            minloglevel=2, num_threads=1,
        )  # fmt: skip
    return file


@pytest.fixture(scope="session")
def bpe_of_lines(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Path:
    """A Hugging Face BPE of 1,000 ids: two special tokens, then bytes and pairs."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "lines.txt").write_text("".join(lines))
    train_tokenizer([folder / "lines.txt"], folder / "bpe", 1000)
    return folder / "bpe"


@pytest.fixture(scope="session")
def rank_file(tmp_path_factory: pytest.TempPathFactory, bpe_of_lines: Path) -> Path:
    """The bytes and pairs of ``bpe_of_lines`` in tiktoken's form: ranks are its ids less 2."""
    vocabulary = json.loads((bpe_of_lines / "tokenizer.json").read_text())["model"]["vocab"]
    # GPT-2's way to write bytes as characters: as themselves where these are visible, else from 256 on.
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    byte_of = {chr(byte): byte for byte in visible}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*visible}))}
    tokens = sorted(((i, token) for token, i in vocabulary.items() if i >= 2))
    encoded = ((b64encode(bytes(byte_of[character] for character in token)).decode(), i) for i, token in tokens)
    file = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    file.write_text("".join(f"{token} {i - 2}\n" for token, i in encoded))
    return file


@pytest.fixture
def write_tokens(tmp_path: Path) -> WriteTokens:
    """Writes documents of token ids and returns their prefix."""

    def write(name: str, documents: Sequence[Sequence[int]]) -> str:
        prefix = str(tmp_path / name)
        with IndexedDatasetWriter(prefix, "uint16") as writer:
            for document in documents:
                writer.add_document(document)
        return prefix

    return write


@pytest.fixture
def sources(write_tokens: WriteTokens) -> list[Source]:
    """Three sources, the second of two shards; every token of theirs is different."""
    return [
        Source("en", (write_tokens("en", numbered(20)),), 0.5),
        Source("fr", (write_tokens("fr0", numbered(9, 5, 1000)), write_tokens("fr1", numbered(8, 5, 1045))), 0.3),
        Source("code", (write_tokens("code", numbered(6, 11, 2000)),), 0.2),
    ]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 3))
    train_tokenizer([text], folder / "bpe", 300)
    return folder / "bpe"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """JSON lines of the sample texts many times over, including an empty document and a blank line."""
    lines = [json.dumps({"id": i, "text": TEXTS[i % len(TEXTS)] + str(i)}) for i in range(200)]
    lines[7:7] = ['{"text": ""}', ""]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
