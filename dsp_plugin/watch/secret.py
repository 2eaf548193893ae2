"""What two ranks know and a stranger does not, though all that they tell each other first goes through an open store.

Diffie-Hellman's exchange: each puts a public half into torch's store, to which nobody has to prove anything, and makes
the same key of its own half and the other's. Who only reads the store, or only reaches a port, cannot. Who can write to
it can put halves in the ranks' places, and can ruin the run in many other ways; a token of the user's keeps out even
those. No collective is involved: a rank that takes another way than the others holds nobody up.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets

TOKEN = "DSP_PLUGIN_WATCH_TOKEN"
"""Environment variable: a secret of the user's, the same on every rank, that goes into the keys."""

# The 2048-bit group of RFC 3526, with generator 2.
_PRIME = int(
    "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DDEF9519B3CD3A431B"
    "302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7EDEE386BFB5A899FA5AE9F24117C4B1FE6"
    "49286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F83655D23DCA3AD961C62F356208552BB9ED529077096966D"
    "670C354E4ABC9804F1746C08CA18217C32905E462E36CE3BE39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF695581718"
    "3995497CEA956AE515D2261898FA051015728E5A8AACAA68FFFFFFFFFFFFFFFF",
    16,
)
_DIGITS = len(f"{_PRIME:x}")


class Half:
    """A rank's half of the keys that it shares with others.

    Attributes:
        public: what the others need of it, hexadecimal.
    """

    def __init__(self) -> None:
        self._exponent = secrets.randbits(256)
        self._token = os.environ.get(TOKEN, "").encode()
        self.public = f"{pow(2, self._exponent, _PRIME):x}"

    def key_with(self, public: str) -> bytes | None:
        """The key that this rank shares with the one of this public half; None if there can be no such half."""
        try:
            theirs = int(public, 16) if len(public) <= _DIGITS else 0
        except ValueError:
            return None
        # With the others, anybody would know what is shared.
        if not 1 < theirs < _PRIME - 1:
            return None
        shared = pow(theirs, self._exponent, _PRIME).to_bytes(_PRIME.bit_length() // 8, "big")
        return hmac.digest(self._token, shared, "sha256")


def challenge() -> str:
    """A word that nobody has proven anything for yet."""
    return secrets.token_hex(16)


def proof(key: bytes, *words: str | int) -> str:
    """What only who has the key can say to these words."""
    return hmac.new(key, json.dumps(words).encode(), hashlib.sha256).hexdigest()
