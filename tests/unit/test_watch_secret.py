"""The keys that two ranks share, and the proofs of having one."""

from __future__ import annotations

import pytest

from dsp_plugin.watch import secret
from dsp_plugin.watch.door import Greeting


def test_a_proof_is_for_one_challenge_and_one_rank() -> None:
    first, second = secret.Half(), secret.Half()
    key = first.key_with(second.public)
    assert key is not None
    assert key == second.key_with(first.public)
    assert key != first.key_with(secret.Half().public)
    greeting = Greeting(1, "host", 2, "", "mine", "")
    proof = greeting.proven(key, "yours")
    assert Greeting(1, "host", 2, "", "mine", proof).proves(key, "yours")
    assert not Greeting(1, "host", 2, "", "mine", proof).proves(key, "another")
    assert not Greeting(2, "host", 2, "", "mine", proof).proves(key, "yours")
    assert not Greeting(1, "host", 2, "", "mine", "é\ud800").proves(key, "yours")
    # What rank 0 says in return is no proof for a rank.
    assert greeting.answer(key, "yours")["welcome"] != proof


def test_the_group_is_that_of_rfc_3526() -> None:
    """A prime whose half is one, too: nobody can choose a public half that leaves few keys."""
    prime = secret._PRIME
    half = prime // 2
    assert prime.bit_length() == 2048
    assert hash(prime) == hash(int(f"{prime:x}", 16))
    for base in (3, 5, 7):
        assert pow(base, prime - 1, prime) == 1
        assert pow(base, half - 1, half) == 1


@pytest.mark.parametrize(
    "public", ["", "0", "1", f"{secret._PRIME - 1:x}", f"{secret._PRIME:x}", "f" * 5000, "-5", "x"]
)
def test_a_half_that_leaves_no_secret_is_none(public: str) -> None:
    assert secret.Half().key_with(public) is None
