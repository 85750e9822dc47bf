from __future__ import annotations

import random
import string
import time

import pytest

from dwindle.data.curation.personal_data import PersonalData, scrubbed
from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document
from dwindle.errors import RecipeError


def drawn(seed: int, length: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=length))


KEYS = [
    "AKIA" + drawn(1, 16, string.ascii_uppercase + string.digits), "ghp_" + drawn(2, 36), "github_pat_" + drawn(3, 60),
    "glpat-" + drawn(4, 20), "xoxb-" + drawn(5, 24), "AIza" + drawn(6, 35), "sk_live_" + drawn(7, 24),
    "sk-" + drawn(8, 48), "sk-ant-" + drawn(9, 60), "hf_" + drawn(10, 34), "npm_" + drawn(11, 36),
    "pypi-" + drawn(12, 60), "SG." + drawn(13, 22) + "." + drawn(14, 43), "SK" + drawn(15, 32, "0123456789abcdef"),
    "eyJ" + drawn(16, 20) + ".eyJ" + drawn(17, 40) + "." + drawn(18, 43),
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[:6])
def test_keys_of_services(key: str) -> None:
    assert scrubbed(f"use {key}, or not\nk='{key}'") == ("use <KEY>, or not\nk='<KEY>'", {"key": 2})


def test_private_keys_whole_or_cut_off() -> None:
    block = (
        "-----BEGIN RSA PRIVATE KEY-----\n"
        + "\n".join(drawn(i, 64) for i in range(5))
        + "\n-----END RSA PRIVATE KEY-----"
    )
    assert scrubbed(f"a\n{block}\nb {block}")[0] == "a\n<KEY>\nb <KEY>"
    assert scrubbed(f"a\n{block[:200]}")[0] == "a\n<KEY>"
    assert scrubbed("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----")[1] == {}


def test_assigned_secrets_and_passwords_in_urls() -> None:
    secret = drawn(20, 24) + "7a"
    for line in (f'API_KEY = "{secret}"', f"'client_secret': '{secret}'", f'password="{secret}"'):
        assert scrubbed(line) == (line.replace(secret, "<KEY>"), {"key": 1})
    assert scrubbed("postgres://ann:s3cret@db.host.io/x")[0] == "postgres://ann:<KEY>@db.host.io/x"
    for harmless in ("token = 'the_name_of_a_token'", "password = 'correct horse'", "key = 'aaaaaaaaaaaaaaaaaaa1'",
                     "tokens=['<pad>', 'word123']", "sk-learn and ghost_word", "eyJust a word"):  # fmt: skip
        assert scrubbed(harmless) == (harmless, {})


@pytest.mark.parametrize("address", ["ada@lovelace.org", "a.b+c_d%e@mail.sub.domain.co.uk", "x-1@a-b.info"])
def test_addresses(address: str) -> None:
    assert scrubbed(f"<{address}>, {address}.") == ("<<EMAIL>>, <EMAIL>.", {"email": 2})


@pytest.mark.parametrize("text", ["user@example.com", "me@mail.example.org", "x@host.invalid", "a @ b.com", "@decorator.com", "x = a@b",
                                  "git@github", "1@2.3"])  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    assert scrubbed(text) == (text, {})


@pytest.mark.parametrize("number", ["+49 30 1234567", "+1-202-555-0143", "+44 (20) 7946 0958", "(202) 555-0143", "202-555-0143",
                                    "1-202-555-0143", "202.555.0143", "+12025550143", "+33 1 23 45 67 89"])  # fmt: skip
def test_phone_numbers(number: str) -> None:
    assert scrubbed(f"Call {number}, please.") == ("Call <PHONE>, please.", {"phone": 1})


@pytest.mark.parametrize("text", ["1234567890", "3.14159265", "2024-01-15 10:20", "x = +1234", "192.168.100.200", "10.1000/182-555-0143",
                                  "ISBN 978-3-16-148410-0", "1999-2000-2001", "+1 + 2 + 3", "a+12025550143b", "555-0143"])  # fmt: skip
def test_what_is_no_phone_number(text: str) -> None:
    assert scrubbed(text) == (text, {})


def test_the_stage_counts_and_says_so() -> None:
    count = StageCount("personal_data")
    out = PersonalData().edit(
        Document("ada@lovelace.org and bob@boole.org, +49 30 1234567", "s", how={"kind": "prose"}), count
    )
    assert out is not None
    assert out.text == "<EMAIL> and <EMAIL>, <PHONE>"
    assert out.how == {"kind": "prose", "scrubbed": {"email": 2, "phone": 1}}
    assert count.changes == {"email replaced": 2, "phone replaced": 1, "documents changed": 1}
    only = PersonalData(kinds=("phone",)).edit(Document("ada@lovelace.org", "s"), count)
    assert only is not None
    assert only.text == "ada@lovelace.org"
    with pytest.raises(RecipeError, match="needed: some of key, email, phone"):
        PersonalData(kinds=("address",))  # type: ignore[arg-type]


def test_a_text_of_beginnings_of_keys_costs_no_minutes() -> None:
    began = time.process_time()
    assert scrubbed("sk-" * 5000) == ("sk-" * 5000, {})
    assert time.process_time() - began < 1  # the length of the text for every beginning would be 15 s
