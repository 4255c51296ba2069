"""A bidirectional encoder of transformers (XLM-R, or a small one made here) with one linear layer per head."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megagap.curate.quality.labels import HEADS, LEVELS
from megagap.errors import DataError, library_errors
from megagap.files import require_fetched

ADVICE = (
    "fetch the files of https://huggingface.co/FacebookAI/xlm-roberta-base (config.json, model.safetensors, "
    "tokenizer.json, tokenizer_config.json, sentencepiece.bpe.model) into one folder and give it as --encoder; or "
    "leave --encoder out, for a small encoder trained here."
)


MIN_LENGTH = 16
"""Tokens of a text, the least that it is judged by."""


class EncoderModel(nn.Module):
    """``network``: transformers' model for sequence classification with heads × levels outputs.

    Of a text longer than ``max_length`` tokens, the first three quarters of them are read from its start, the rest
    from its end: how a text ends tells whether it is whole. Blanks and line ends count as one blank, as they do for
    XLM-R's tokenizer: a text is judged whatever its layout.
    """

    def __init__(self, network: Any, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.max_length = max_length

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text between the tokenizer's two special tokens."""
        room = self.max_length - 2
        head = room - room // 4
        result = []
        # Not more of a long text than can be read: tokens have about four characters, hardly ever more than 16.
        plain = [" ".join(text.split()) for text in texts]
        short = [t if len(t) <= 32 * room else t[: 16 * room] + t[-16 * room :] for t in plain]
        for ids in self.tokenizer(short, add_special_tokens=False)["input_ids"]:
            ids = ids if len(ids) <= room else ids[:head] + ids[head - room :]
            result.append([self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id])
        return result

    def forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Logits [texts, heads, levels] of what :meth:`encode` gives."""
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        padded = torch.tensor([[*line, *[pad] * (longest - len(line))] for line in ids])
        mask = torch.tensor([[1] * len(line) + [0] * (longest - len(line)) for line in ids])
        outputs = self.network(input_ids=padded, attention_mask=mask).logits
        return outputs.unflatten(-1, (len(HEADS), len(LEVELS)))

    def logits(self, texts: Sequence[str]) -> Tensor:
        """[texts, heads, levels]"""
        return self(self.encode(texts))


def load_encoder(folder: Path, max_length: int) -> EncoderModel:
    """An encoder's folder: its weights, with new output layers unless it was trained by megagap.

    Raises :class:`DataError` for a folder that is missing, is no model, or is one that reads from left to right.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} is no encoder: it has no config.json\n  {ADVICE}")
    with library_errors(f"{folder} is no encoder that transformers knows"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False):
        raise DataError(
            f"{folder} is no encoder: its model_type is {config.model_type!r}, which reads from left to right or is "
            f"no text model\n  {ADVICE}"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise DataError(f"{folder} has no weights as safetensors (other formats may run code)\n  {ADVICE}")
    for path in weights:
        require_fetched(path)
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)  # of output layers that are new, as they should be
    try:
        with library_errors(f"the encoder in {folder} cannot be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network, loaded = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=len(HEADS) * len(LEVELS),
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    finally:
        logging.getLogger("transformers").setLevel(level)
    body = f"{network.base_model_prefix}."
    if missing := sorted(name for name in loaded["missing_keys"] if name.startswith(body)):  # else left as drawn
        raise DataError(f"the weights in {folder} lack {missing[0]} ({len(missing)} are missing)\n  {ADVICE}")
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
        raise DataError(
            f"the tokenizer in {folder} lacks an encoder's special tokens (begin, end, padding)\n  {ADVICE}"
        )
    if len(tokenizer) > network.config.vocab_size:
        raise DataError(
            f"the tokenizer in {folder} has {len(tokenizer):,} ids, the encoder {network.config.vocab_size:,}: they do "
            f"not belong together\n  {ADVICE}"
        )
    positions = network.config.max_position_embeddings - 2
    if positions < MIN_LENGTH:
        raise DataError(f"the encoder in {folder} reads {positions} tokens, fewer than {MIN_LENGTH}\n  {ADVICE}")
    return EncoderModel(network, tokenizer, min(max_length, positions))


def small_encoder(texts: Sequence[str], max_length: int, *, hidden: int = 64, layers: int = 2) -> EncoderModel:
    """XLM-R's architecture at a small size, untrained, with a byte-level BPE of 4,096 entries made from ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaForSequenceClassification

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", cls_token="<s>", pad_token="<pad>", eos_token="</s>", sep_token="</s>",
        unk_token="<unk>", mask_token="<mask>",
    )  # fmt: skip
    config = XLMRobertaConfig(
        vocab_size=bpe.get_vocab_size(), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * hidden, max_position_embeddings=max_length + 2, type_vocab_size=1, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(f"{head}: {level}" for head in HEADS for level in LEVELS)),
    )  # fmt: skip
    network = XLMRobertaForSequenceClassification(config)
    positions = network.roberta.embeddings.position_embeddings.weight
    with torch.no_grad():
        positions.copy_(_sinusoids(*positions.shape) * config.initializer_range * 2**0.5)
    return EncoderModel(network, tokenizer, max_length)


def _sinusoids(length: int, width: int) -> Tensor:
    """Vaswani et al. 2017, section 3.5: from these, heads learn to look at neighbours in far fewer texts."""
    angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
