"""Masking of personal data: datatrove's e-mail and IP addresses, and numbers that a checksum or a form tells."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from datatrove.pipeline.formatters.base import BaseFormatter
from datatrove.pipeline.formatters.pii import PIIFormatter, PIIReplacer

_IBAN_LENGTHS = {
    "AT": 20, "BE": 16, "CH": 21, "DE": 22, "ES": 24, "FR": 27, "GB": 22, "IE": 22, "IT": 27, "LU": 20, "MC": 27,
    "NL": 18, "PT": 25,
}  # fmt: skip
"""Characters of a country's account numbers (ISO 13616)."""

_IBAN = "|".join(rf"{country}\d\d(?: ?[A-Z0-9]){{{length - 4}}}" for country, length in _IBAN_LENGTHS.items())
_CARD = r"[3-6]\d{3}([ -]?)\d{4}\1\d{4}\1\d{4}|3[47]\d\d([ -]?)\d{6}\2\d{5}"
_NIR = r"[12] ?\d\d ?(?:0[1-9]|1[0-2]) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d"
_PHONE = (
    r"(?:\+|\b00)33[ .]?(?:\(0\)[ .]?)?[1-9](?:[ .-]?\d\d){4}"  # France, from abroad
    r"|\b0[1-9]([ .-])\d\d(?:\1\d\d){3}"  # France
    r"|\+(?!33)[1-9]\d{0,2}[ .-]\(?\d{1,4}\)?(?:[ .-]\d{2,4}){2,4}"  # other countries
    r"|\(\d{3}\) \d{3}-\d{4}|\b\d{3}-\d{3}-\d{4}"  # North America
)


def _luhn(number: str) -> bool:
    """The checksum of payment cards (ISO/IEC 7812-1, annex B)."""
    digits = [int(digit) for digit in reversed(re.sub(r"\D", "", number))]
    doubled = [divmod(2 * digit, 10) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(tens + ones for tens, ones in doubled)) % 10 == 0


def _iban(number: str) -> bool:
    """Remainder 1 modulo 97 with the first four characters at the end, letters as 10 to 35 (ISO 7064)."""
    compact = number.replace(" ", "")
    return int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1


def _nir(number: str) -> bool:
    """The key of the French social security number: 97 less the number modulo 97, Corsica's 2A and 2B as 19 and 18."""
    compact = number.replace(" ", "")
    digits = compact[:-2].replace("2A", "19").replace("2B", "18")
    return digits.isdigit() and 97 - int(digits) % 97 == int(compact[-2:])


def _no_example(address: str) -> bool:
    """Addresses of documentation (RFC 2606) are nobody's."""
    return not re.search(r"@(?:[\w-]+\.)*example(?:\.(?:com|org|net))?$|\.(?:invalid|test)$", address, re.IGNORECASE)


def _alone(pattern: str) -> str:
    """Not within a longer number."""
    return rf"(?<![\w.+-])(?:{pattern})(?![\w-]|\.\d)"


def _patterns() -> "dict[str, tuple[str, str, Callable[[str], bool] | None]]":
    theirs = PIIFormatter()
    return {
        "email": (theirs.emails_replacer.regex.pattern, "email@example.com", _no_example),
        "iban": (_alone(_IBAN), "<IBAN>", _iban),
        "card": (_alone(_CARD), "<CARD>", _luhn),
        "nir": (_alone(_NIR), "<NIR>", _nir),
        "phone": (_alone(_PHONE), "<PHONE>", None),
        "ip": (_alone(theirs.ip_replacer.regex.pattern), "192.0.2.1", theirs.ip_replacer.validator),
    }


KINDS = ("email", "iban", "card", "nir", "phone", "ip")
"""In the order in which they are masked: the more certain first."""


class PiiMasker(BaseFormatter):
    """Replaces what looks like personal data of ``kinds``; statistics count each, and documents with any."""

    name = "📞 PII"

    def __init__(self, kinds: Sequence[str] = KINDS) -> None:
        super().__init__()
        patterns = _patterns()
        self.replacers = [
            PIIReplacer(patterns[kind][0], patterns[kind][1], partial(self._accept, kind, patterns[kind][2]))
            for kind in KINDS
            if kind in kinds
        ]

    def _accept(self, kind: str, valid: "Callable[[str], bool] | None", found: str) -> bool:
        if valid is not None and not valid(found):
            return False
        self.stat_update(f"masked_{kind}")
        return True

    def format(self, text: str) -> str:
        masked = text
        for replacer in self.replacers:
            masked = replacer.replace(masked)
        if masked != text:
            self.stat_update("documents_masked")
        return masked


def mask(text: str, kinds: Sequence[str] = KINDS) -> str:
    """``text`` with personal data of ``kinds`` replaced."""
    masked: Any = PiiMasker(kinds).format(text)
    return str(masked)
