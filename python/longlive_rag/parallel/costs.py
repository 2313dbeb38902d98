"""What a video on several ranks costs each of them, by formula: the tests hold these to what ranks really do.

All of one pass over a block of F latent frames of T tokens, for B videos.
"""

from __future__ import annotations

from dataclasses import dataclass


def check_ranks(name: str, ranks: int, heads: int) -> None:
    """
    Args:
        name: of what says the number of ranks, for the error.

    Raises:
        ValueError: the ranks do not divide the heads.
    """
    if ranks < 1 or heads % ranks:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(f"{name} a number of ranks that divides the {heads} attention heads ({divisors}), got {ranks}")


def token_counts(tokens: int, ranks: int) -> list[int]:
    """How many of a latent frame's tokens each rank holds: as even as it can be, the first ranks one more.

    Raises:
        ValueError: there are fewer tokens than ranks.
    """
    if tokens < ranks:
        raise ValueError(f"group must have at most as many ranks as a latent frame has tokens, {tokens}, got {ranks}")
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]


@dataclass(frozen=True)
class Pass:
    """One pass of the transformer over a block, on one of the ranks.

    Args:
        videos: B.
        frames: F.
        tokens: T, of a latent frame.
        heads, head_dim: of the backbone as a whole.
        itemsize: bytes of a number.
        ranks: that make the video; they divide the heads.
        rank: the one that is spoken of.
    """

    videos: int
    frames: int
    tokens: int
    heads: int
    head_dim: int
    itemsize: int
    ranks: int
    rank: int = 0

    @property
    def own(self) -> int:
        """Tokens of a latent frame that the rank holds."""
        return token_counts(self.tokens, self.ranks)[self.rank]

    def _bytes(self, numbers: int) -> int:
        """Of so many numbers for each latent frame."""
        return self.videos * self.frames * numbers * self.itemsize

    @property
    def layer_bytes(self) -> int:
        """That the rank sends in one layer's exchange: three tensors there, one back.

        Of its own tokens the heads of the others, of its own heads the tokens of the others. With even shares that is
        4 * B * F * T * H * D * itemsize * (ranks - 1) / ranks**2.
        """
        there, back = 3 * self.own * (self.ranks - 1), self.tokens - self.own
        return self._bytes((there + back) * self.heads // self.ranks * self.head_dim)

    def sent_bytes(self, layers: int, channels: int) -> int:
        """That the rank sends in the whole pass: all layers, and its share of the result to each other rank.

        Args:
            channels: numbers that a token of the result has; ranks with a token less send as many as the others.
        """
        return layers * self.layer_bytes + self._bytes((self.ranks - 1) * self._most * channels)

    def buffer_bytes(self, channels: int) -> int:
        """Of the buffers that the exchanges of a video keep: four tensors sent and four received, and the result's."""
        if self.ranks == 1:
            return 0
        heads = 4 * self.own * self.heads + 4 * self.tokens * self.heads // self.ranks
        return self._bytes(heads * self.head_dim + (self._most + self.ranks * self._most) * channels)

    def activation_bytes(self, ffn_dim: int) -> int:
        """At most at once, without what attention itself works with: in the first layer's feed-forward, the embedded
        tokens, timesteps and modulation (of a model that is not fused), which every rank has whole, and of its own
        tokens the residual, the normalised and two hidden tensors.

        Args:
            ffn_dim: width of the hidden tensors.
        """
        dim = self.heads * self.head_dim
        return self._bytes((self.tokens + 15) * dim + self.own * (2 * dim + 2 * ffn_dim))

    @property
    def _most(self) -> int:
        return token_counts(self.tokens, self.ranks)[0]
