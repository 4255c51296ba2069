"""Masking of personal data: what a checksum or a form tells."""

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from datatrove.pipeline.formatters.base import BaseFormatter

_IBAN_LENGTHS = {
    "AT": 20, "BE": 16, "CH": 21, "DE": 22, "ES": 24, "FR": 27, "GB": 22, "IE": 22, "IT": 27, "LU": 20, "MC": 27,
    "NL": 18, "PT": 25,
}  # fmt: skip
"""Characters of a country's account numbers (ISO 13616)."""

_BLANK = "[ \u00a0\u2009\u202f]"  # French typography sets narrow and no-break ones
_GAP = "[ \u00a0\u2009\u202f.-]"

_EMAIL = (  # bounded, and so linear: datatrove's pattern takes hours for a picture in base64
    r"\b\w[\w.+%-]{0,63}+@"
    r"(?:\w[\w-]{0,62}+\.){1,8}(?:xn--\w{1,59}|[^\W\d_]{2,63})"  # no versions, as in react@18.2.0
)
_IBAN = "|".join(rf"{country}\d\d(?:{_BLANK}?[A-Z0-9]){{{size - 4}}}" for country, size in _IBAN_LENGTHS.items())
_CARD = rf"[3-6]\d{{3}}((?:{_BLANK}|-)?)\d{{4}}\1\d{{4}}\1\d{{4}}|3[47]\d\d((?:{_BLANK}|-)?)\d{{6}}\2\d{{5}}"
_NIR = r"[12]_?\d\d_?(?:0[1-9]|1[0-2])_?(?:\d\d|2[AB])_?\d{3}_?\d{3}_?\d\d".replace("_", _BLANK)
_IPV4 = r"(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_IPV6 = r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,33}[0-9A-Fa-f]"  # 2000::/3, the global addresses
_PHONE = (
    rf"(?:\+|00)33{_GAP}?(?:\(0\){_GAP}?)?[1-9](?:{_GAP}?\d\d){{4}}"  # France, from abroad
    rf"|0[1-9]({_GAP}|/)\d\d(?:\1\d\d){{3}}|0[1-9]\d\d({_BLANK})\d\d(?:\2\d\d){{2}}"  # France, and overseas
    r"|\(?0(?:2\d\)? \d{4} \d{4}|1\d1\)? \d{3} \d{4}|1\d{3}\)? \d{5,6}|7\d{3} ?\d{6})"  # United Kingdom
    r"|(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])\d{3}[.-]\d{4}|1 [2-9]\d\d \d{3} \d{4}"  # North America
    rf"|\+[1-9]\d{{0,2}}{_GAP}(?:\(0\){_GAP}?)?\(?\d{{1,4}}\)?(?:{_GAP}\d{{2,8}}){{1,5}}|\+[1-9]\d{{9,14}}"
)
_CALLED = (  # any number, if it is said to be one
    r"(?P<label>\b(?:t[eé]l(?:[eé]phone|[eé]copie)?|phone|fax|gsm|whatsapp|(?:mobile|portable|cell(?= ?:)))\b"
    r"[\s.:]{0,4}+)[+(]?\d(?:[\s().\/-]{0,2}\d){7,14}"
)


def _luhn(number: str) -> bool:
    """The checksum of payment cards (ISO/IEC 7812-1, annex B)."""
    digits = [int(digit) for digit in reversed(re.sub(r"\D", "", number))]
    doubled = [divmod(2 * digit, 10) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(tens + ones for tens, ones in doubled)) % 10 == 0


def _iban(number: str) -> bool:
    """Remainder 1 modulo 97 with the first four characters at the end, letters as 10 to 35 (ISO 7064)."""
    compact = re.sub(r"\s", "", number)
    return int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1


def _nir(number: str) -> bool:
    """The key of the French social security number: 97 less the number modulo 97, Corsica's 2A and 2B as 19 and 18."""
    compact = re.sub(r"\s", "", number)
    digits = compact[:-2].replace("2A", "19").replace("2B", "18")
    return digits.isdigit() and 97 - int(digits) % 97 == int(compact[-2:])


def _is_somebodys(address: str) -> bool:
    """Addresses of documentation (RFC 2606) are nobody's."""
    return not re.search(r"@(?:[\w-]+\.)*example(?:\.(?:com|org|net))?$|\.(?:invalid|test)$", address, re.IGNORECASE)


def _is_global(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _is_address(numbers: str) -> bool:
    """Four numbers below 32 are a section's or a version's: of addresses one in 4,096 is like that."""
    return _is_global(numbers) and any(int(number) >= 32 for number in numbers.split("."))


def _is_phone(number: str) -> bool:
    """Not an amount: +20 500 000, or one whose national part starts with 0 (E.164; Italy's may)."""
    if not number.startswith("+"):
        return True
    digits = re.sub(r"\(0\)|\D", "", number)
    national = digits[1:] if digits[0] in "17" else digits[2:]
    if digits[0] == "1" and (len(digits) != 11 or digits[1] in "01"):
        return False
    return 9 <= len(digits) <= 15 and (national[0] != "0" or digits.startswith("39"))


def _alone(pattern: str) -> str:
    """Not within a longer number."""
    return rf"(?<![\w+-])(?<!\d\.)(?:{pattern})(?![\w-]|\.\d)"


@dataclass(frozen=True)
class _Form:
    kind: str
    regex: "re.Pattern[str]"
    replacement: str
    valid: Callable[[str], bool] = lambda found: True


_FORMS = (
    _Form("email", re.compile(_EMAIL), "email@example.com", _is_somebodys),
    _Form("iban", re.compile(_alone(_IBAN)), "<IBAN>", _iban),
    _Form("card", re.compile(_alone(_CARD)), "<CARD>", _luhn),
    _Form("nir", re.compile(_alone(_NIR)), "<NIR>", _nir),
    _Form("ip", re.compile(_alone(_IPV4)), "192.0.2.1", _is_address),
    _Form("ip", re.compile(rf"(?<![\w:.]){_IPV6}(?![\w:])"), "2001:db8::1", _is_global),
    _Form("phone", re.compile(_alone(_PHONE)), "<PHONE>", _is_phone),
    _Form("phone", re.compile(rf"{_CALLED}(?![\w-])", re.IGNORECASE), "<PHONE>"),
)
"""In the order in which they are masked: the more certain first."""

KINDS = tuple(dict.fromkeys(form.kind for form in _FORMS))


class PiiMasker(BaseFormatter):
    """Replaces what looks like personal data of ``kinds``; statistics count each, and documents with any."""

    name = "📞 PII"

    def __init__(self, kinds: Sequence[str] = KINDS) -> None:
        super().__init__()
        self.kinds = list(kinds)

    def format(self, text: str) -> str:
        masked = text
        for form in _FORMS:
            if form.kind in self.kinds:
                masked = form.regex.sub(partial(self._replaced, form), masked)
        if masked != text:
            self.stat_update("documents_masked")
        return masked

    def _replaced(self, form: _Form, found: "re.Match[str]") -> str:
        if not form.valid(found[0]):
            return found[0]
        self.stat_update(f"masked_{form.kind}")
        return found.groupdict().get("label", "") + form.replacement


def mask(text: str, kinds: Sequence[str] = KINDS) -> str:
    """``text`` with personal data of ``kinds`` replaced."""
    masked: str = PiiMasker(kinds).format(text)
    return masked
