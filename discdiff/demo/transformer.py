r"""A transformer for blockwise generation: autoregression and diffusion in one network, with one cache.

Clean tokens attend causally, so their cached keys and values stay valid for every block size. The noisy tokens of a
block attend to the clean tokens before the block, and to each other. Let start(i) be the first position of the block
of i:

    i sees j          j clean          j noisy
    i clean           j <= i           never
    i noisy           j < start(i)     start(j) = start(i)

A noisy block of one site is an autoregressive step, p(x_i | x_{<i}). At alpha = 0 a noisy token carries no information
on the data. Its embedding is left out there, so the step needs neither a mask nor a random token.

References: BlockGen (Deschenaux and Gulcehre, 2026, https://arxiv.org/abs/2606.02241); attention by
``scaled_dot_product_attention``, rotary positions (Su et al., 2021, https://arxiv.org/abs/2104.09864).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Cache", "Transformer"]

FREQUENCIES = 16
_HEAD = 32
_CHUNK = 64  # tokens of a prompt that are processed at once
_NEVER = 1 << 40  # the position of padding, beyond every start, so that no token attends to it


@dataclass(frozen=True)
class Places:
    """Positions of tokens, the starts of their blocks and which tokens are noisy, (B, N) each.

    For a clean token the start is its position plus 1.
    """

    position: Int[Tensor, "B N"]
    start: Int[Tensor, "B N"]
    noisy: Bool[Tensor, "B N"]

    def then(self, other: "Places") -> "Places":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Places(*(torch.cat(pair, 1) for pair in pairs))

    def sees(self, keys: "Places") -> Bool[Tensor, "B 1 N M"]:
        """Return whether token i of ``self`` attends to token j of ``keys``, (B, 1, N, M).

        A clean key j is seen if position(j) < start(i), a noisy key j only if i is noisy too and start(i) = start(j).
        """
        before = keys.position[:, None] < self.start[..., None]
        together = self.noisy[..., None] & keys.noisy[:, None] & (self.start[..., None] == keys.start[:, None])
        return ((before & ~keys.noisy[:, None]) | together)[:, None]


def clean_at(position: Int[Tensor, "B N"]) -> Places:
    return Places(position, position + 1, torch.zeros_like(position, dtype=torch.bool))


def noisy_at(position: Int[Tensor, "B N"], start: Int[Tensor, "B N"]) -> Places:
    return Places(position, start, torch.ones_like(position, dtype=torch.bool))


@dataclass
class Cache:
    """Keys and values of the clean tokens of a batch, and the clean tokens still to be added.

    Attributes:
        kept: keys and values of each layer, (B, H, C, D), for H heads of width D and C columns.
        position: (B, C) the position of the token in each column; ``_NEVER`` for an empty column.
        length: (B,) the number of clean tokens in each row, without pending ones.
        pending: (B, n) clean tokens that the next call adds to the cache, so that they need no call of their own.
        used: the number of columns in use.
    """

    kept: list[tuple[Tensor, ...]]
    position: Int[Tensor, "B C"]
    length: Int[Tensor, " B"]
    pending: Int[Tensor, "B n"]
    used: int = 0

    def select(self, rows: Int[Tensor, " R"]) -> "Cache":
        """Return the cache of the rows with indices (R,); an index may occur several times."""
        kept = [tuple(part[rows] for part in pair) for pair in self.kept]
        return Cache(kept, self.position[rows], self.length[rows], self.pending[rows], self.used)

    def room(self, count: int) -> None:
        """Enlarge the cache if fewer than ``count`` columns are free after those in use."""
        missing = self.used + count - self.position.shape[1]
        if missing > 0:
            more = (0, max(missing, 64))
            self.position = functional.pad(self.position, more, value=_NEVER)
            self.kept = [tuple(functional.pad(part, (0, 0, *more)) for part in pair) for pair in self.kept]

    def keep(self, count: int, position: Int[Tensor, "B n"]) -> None:
        """Count the first ``count`` free columns as used, and move their contents directly behind each row's tokens.

        ``position`` (B, n) holds the positions of the tokens in these columns.
        """
        row = torch.arange(len(position), device=position.device)[:, None]
        columns = self.length[:, None] + torch.arange(count, device=position.device)
        if bool((self.length != self.used).any()):
            for part in (part for pair in self.kept for part in pair):
                part[row, :, columns] = part[:, :, self.used : self.used + count].transpose(1, 2).clone()
        self.position[row, columns] = position
        self.used += count


class Transformer(nn.Module):
    """Transformer over clean and noisy tokens.

    Clean tokens attend causally. The noisy tokens of a block attend to the clean tokens before the block, and to each
    other.

    Shapes: states of a sequence (B, L), of a block (B, n), of a prefix (B, P) with lengths (B,); alpha (B,), (B, L) or
    (B, n); block sizes (B, 1); logits (B, L, V) or (B, n, V).

    Args:
        vocab_size: V, the columns of its output.
        states: the number of input ids: V, plus one for the mask if there is one.
        width: the width of a token, a multiple of 32; each head has width 32.
        depth: the number of layers.
        sees_alpha: whether the survival probability alpha is an input. If not, the noise must be visible in the tokens,
            as masks are.

    Raises:
        ValueError: for a width that is not a multiple of 32.
    """

    def __init__(self, vocab_size: int, states: int, width: int, depth: int, sees_alpha: bool) -> None:
        super().__init__()
        if width % _HEAD:
            raise ValueError(f"Transformer: width must be a multiple of {_HEAD}, got {width}")
        self.token: nn.Embedding = nn.Embedding(states, width)
        self.noisy: nn.Parameter = nn.Parameter(torch.zeros(width))
        features = nn.Linear(2 * FREQUENCIES, width)
        self.time: nn.Sequential | None = (
            nn.Sequential(features, nn.SiLU(), nn.Linear(width, width)) if sees_alpha else None
        )
        self.layers: nn.ModuleList = nn.ModuleList(_Layer(width) for _ in range(depth))
        self.norm: nn.LayerNorm = nn.LayerNorm(width)
        self.head: nn.Linear = nn.Linear(width, vocab_size)

    def forward(self, x: Int[Tensor, "B L"], alpha: Float[Tensor, "B *L"] | None = None) -> Float[Tensor, "B L V"]:
        """Return the logits for whole sequences, each processed as one noisy block."""
        position = torch.arange(x.shape[1], device=x.device)[None]
        whole = noisy_at(position, torch.zeros_like(position))
        return self._logits(x, alpha, whole, x[:, :0], clean_at(position[:, :0]))

    def blocks_at_once(
        self,
        x0: Int[Tensor, "B L"],
        x_t: Int[Tensor, "B L"],
        alpha: Float[Tensor, "B *L"] | None,
        block: int | Int[Tensor, "B 1"],
    ) -> Float[Tensor, "B L V"]:
        """Return the logits of all noisy blocks in one call, each given the clean blocks before it; used in training.

        ``block`` is the block size: one number for all rows, or (B, 1) for each row.
        """
        position = torch.arange(x0.shape[1], device=x0.device)[None]
        start = position // block * block
        position = position.expand_as(start)
        return self._logits(x_t, alpha, noisy_at(position, start), x0, clean_at(position))

    # --- with a cache ---

    def prefill(self, tokens: Int[Tensor, "B P"], length: Int[Tensor, " B"], capacity: int) -> Cache:
        """Make a cache of the first ``length`` tokens of each row, with columns for ``capacity`` tokens.

        The cache grows if more tokens are added.
        """
        batch, width = tokens.shape
        head = self.head.weight
        shape = batch, head.shape[1] // _HEAD, max(capacity, width), _HEAD
        kept = [tuple(head.new_zeros(shape) for _ in range(2)) for _ in self.layers]
        never = torch.full((batch, shape[2]), _NEVER, device=tokens.device)
        cache = Cache(kept, never, torch.zeros_like(length), tokens[:, :0])
        for begin in range(0, width, _CHUNK):  # so that the attention mask is not quadratic in the prompt's length
            part = tokens[:, begin : begin + _CHUNK]
            columns = begin + torch.arange(part.shape[1], device=tokens.device).expand_as(part)
            self._run(self._embedded(part, None, noisy=False), clean_at(columns), cache)
            cache.keep(part.shape[1], torch.where(columns < length[:, None], columns, _NEVER))
            cache.length = cache.length + part.shape[1]
        cache.length = length
        return cache

    def extend(self, cache: Cache, tokens: Int[Tensor, "B n"]) -> None:
        """Append a clean block to the prefix; the next call of the network adds it to the cache."""
        cache.pending = torch.cat([cache.pending, tokens], 1)

    def evaluate(
        self, cache: Cache, x: Int[Tensor, "B n"], alpha: Float[Tensor, "B *n"] | None
    ) -> Float[Tensor, "B n V"]:
        """Return the logits of a noisy block that follows the prefix in the cache."""
        begin = (cache.length + cache.pending.shape[1])[:, None]
        position = begin + torch.arange(x.shape[1], device=x.device)
        return self._after(cache, x[:, :0], x, alpha, noisy_at(position, begin.expand_as(position)))

    def score(self, cache: Cache, x: Int[Tensor, "B n"]) -> Float[Tensor, "B n V"]:
        """Return the autoregressive logits of p(. | prefix, x_{<i}) for a clean block.

        All n sites are computed in one call with 2n queries.
        """
        position = (cache.length + cache.pending.shape[1])[:, None] + torch.arange(x.shape[1], device=x.device)
        blank = torch.full_like(x, self.token.num_embeddings - 1)  # the mask, or any token, unused at alpha = 0
        alpha = None if self.time is None else torch.zeros(len(x), device=x.device)
        return self._after(cache, x, blank, alpha, noisy_at(position, position))

    def _after(self, cache: Cache, clean: Tensor, x: Tensor, alpha: Tensor | None, places: Places) -> Tensor:
        n = cache.pending.shape[1]
        clean = torch.cat([cache.pending, clean], 1)
        columns = cache.length[:, None] + torch.arange(clean.shape[1], device=x.device)
        logits = self._logits(x, alpha, places, clean, clean_at(columns), cache)
        if n:
            cache.keep(n, columns[:, :n])
            cache.length, cache.pending = cache.length + n, x[:, :0]
        return logits

    # --- one pass ---

    def _logits(
        self,
        x: Tensor,
        alpha: Tensor | None,
        places: Places,
        clean: Tensor,
        clean_places: Places,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the logits of noisy tokens x, which are processed together with clean tokens."""
        shown = None if alpha is None else alpha.expand_as(x) if alpha.ndim == 2 else alpha[:, None].expand_as(x)
        h = torch.cat([self._embedded(clean, None, noisy=False), self._embedded(x, shown, noisy=True)], 1)
        h = self._run(h, clean_places.then(places), cache)
        return self.head(self.norm(h[:, clean.shape[1] :]))

    def _embedded(self, x: Tensor, alpha: Tensor | None, noisy: bool) -> Tensor:
        """Embed tokens, their survival probabilities and whether they are noisy; at alpha = 0 omit the token."""
        h = self.token(x)
        if alpha is not None:
            h = h * (alpha > 0)[..., None]
        if self.time is not None:
            survival = torch.ones(x.shape, dtype=h.dtype, device=x.device) if alpha is None else alpha.to(h.dtype)
            h = h + self.time(survival_features(survival))
        return h + self.noisy if noisy else h

    def _run(self, h: Tensor, places: Places, cache: Cache | None) -> Tensor:
        """Run all layers; if there is a cache, write the tokens' keys and values to it, after the columns in use."""
        used, keys = 0, places
        if cache is not None:
            cache.room(h.shape[1])
            used, keys = cache.used, clean_at(cache.position[:, : cache.used]).then(places)
        seen, turn = places.sees(keys), _rotation(places.position, _HEAD)
        for n, layer in enumerate(self.layers):
            h = layer(h, seen, turn, None if cache is None else cache.kept[n], used)
        return h


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.middle = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self, h: Tensor, seen: Tensor, turn: tuple[Tensor, Tensor], kept: tuple[Tensor, ...] | None, used: int
    ) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, _HEAD)).transpose(1, 2)
            for part in self.queries_keys_values(self.before(h)).chunk(3, -1)
        )
        q, k = _turned(q, *turn), _turned(k, *turn)
        if kept is not None:
            end = used + k.shape[2]
            for part, new in zip(kept, (k, v), strict=True):
                part[:, :, used:end] = new
            k, v = (part[:, :, :end] for part in kept)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return h + self.mlp(self.middle(h))


def survival_features(alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape K"]:
    """Return sines and cosines of alpha at 16 frequencies, from half a period to 219 periods over [0, 1]."""
    angle = alpha[..., None] * (math.pi * 1.5 ** torch.arange(FREQUENCIES, device=alpha.device))
    return torch.cat([angle.sin(), angle.cos()], -1)


def _rotation(position: Tensor, width: int) -> tuple[Tensor, Tensor]:
    rate = 10_000.0 ** (-torch.arange(0, width, 2, device=position.device) / width)
    angle = position[:, None, :, None] * rate
    return angle.cos(), angle.sin()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
