"""Logits to tokens, on the device: penalties, temperature, truncation, the draw, log-probabilities.

Owns what each sampling option does to the numbers. Refuses to know requests and tokenizers: a row
of logits comes with its own numbers and is worked on alone, so that a row's token depends on
nothing but its own logits, options, seed and position, whatever its neighbours, its place or their
number. Letters: K rows of logits, V vocabulary, H history, B banned ids.

The order is vLLM's: bans and penalties on the raw logits; then temperature; then min_p, top_k and
top_p, each on what the one before left; then the draw. Ties are kept or dropped together (as vLLM
and transformers do for top_k), so that a few more than k may stay; argmax takes the lowest id. Tied
are, for top_k, logits that are equal after temperature, and for top_p, probabilities that agree to
2**-30.

Nothing is sorted. The kept set is "every token at or above a threshold", and the threshold is found
by bisection, one pass over the row per halving, until another could not change the set: 10 to 20
passes, up to 28 among ties. top_p adds up integers, whose sum is the same in any order, so that no
choice XLA makes for the shape of a batch can move a token over the threshold.

Milliseconds of one CPU core, for 32 rows of 49,152 and for 8 of 128,256 (logits of deviation 3):

    greedy                      1.6    1.2   (lax.argmax: 4.8, 3.4)
    penalties, 2,048 ids       +1.8   +1.0
    temperature                15      9     (7 and 4 of it are random bits)
    top_p 0.95                +25    +14     (by argsort and cumsum: +430, +310)
    top_k 50                  +23    +15
    top_k 50 and top_p 0.9    +38    +22
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry_2x32

from slora_jax.sharding import Shards

WHOLE = Shards(1)

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Randomness:
    """What makes each row's draw its own."""

    temperature: Array
    """f32[K]; 0 is a greedy row, on which Truncation does nothing."""

    seed: Array
    """u32[K, 2]: ``sampling_params.split_seed``."""

    position: Array
    """i32[K]: of the token to draw; anything that differs from draw to draw of one seed."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Truncation:
    """Which unlikely tokens cannot be drawn."""

    top_k: Array
    """i32[K]; 0 is off."""

    top_p: Array
    """f32[K]; 1 is off."""

    min_p: Array
    """f32[K]; 0 is off."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalties:
    """What repetition costs."""

    history: Array
    """i32[K, H]: ids of the prompt, then of the output so far, then -1. -2 - r stands for row r of
    the tokens that the step before sampled (``with_sampled``)."""

    prompt_len: Array
    """i32[K]: how many of them are the prompt's."""

    repetition: Array
    """f32[K], > 0; 1 is off. On tokens of prompt and output."""

    presence: Array
    """f32[K]; 0 is off. On tokens of the output."""

    frequency: Array
    """f32[K]; 0 is off. On tokens of the output, times how often each came."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingBatch:
    """How to sample K rows. A part that is None is not compiled: without any, it is an argmax."""

    randomness: Randomness | None = None
    """None: every row is greedy, and truncation is not looked at."""

    truncation: Truncation | None = None

    penalties: Penalties | None = None

    banned: Array | None = None
    """i32[K, B]: ids that must not come, then -1."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities under the raw logits: before bans, penalties and temperature."""

    logprob: jax.Array
    """f32[K]: of the row's own token."""

    rank: jax.Array
    """i32[K]: 1 + how many tokens are likelier than it."""

    top_ids: jax.Array
    """i32[K, num_top]: the likeliest tokens, in order; ties by id."""

    top_logprobs: jax.Array
    """f32[K, num_top]"""


def sample(logits: jax.Array, batch: SamplingBatch, shards: Shards = WHOLE) -> jax.Array:
    """The next token of each row.

    Args:
        logits: f32[K, V], V < 2**18. A row may be garbage, NaN included: it gets some valid id and
            has no effect on the others. Where the vocabulary is cut over devices, this device's
            equal share of the columns.
        batch: how to sample them; without truncation where the vocabulary is cut.
        shards: the devices that it is cut over. Each gets the same result, as if it were whole.

    Returns:
        i32[K]
    """
    logits = logits.astype(jnp.float32)
    first = shards.index() * logits.shape[-1]
    if batch.penalties is not None:
        logits = penalise(logits, batch.penalties, first)
    if batch.banned is not None:
        logits = _ban(logits, jnp.asarray(batch.banned), first)
    likeliest = _argmax(logits, shards)
    if batch.randomness is None:
        return likeliest

    temperature = jnp.asarray(batch.randomness.temperature)
    is_random = temperature > 0
    # From here on the likeliest token is at 0, so that no temperature can overflow.
    largest = shards.max(logits.max(-1, keepdims=True))
    scaled = (logits - largest) / jnp.where(is_random, temperature, 1)[:, None]
    weights = jnp.exp(scaled)
    if batch.truncation is not None:
        assert shards.count == 1, "gather the logits first: truncation counts over whole rows"
        weights = _truncate(scaled, weights, batch.truncation, is_random)
    return jnp.where(is_random, _draw(weights, batch.randomness, shards), likeliest)


def token_logprobs(logits: jax.Array, token_ids: Array, num_top: int) -> TokenLogprobs:
    """How likely each row's token was, and which were the likeliest.

    Args:
        logits: f32[K, V], raw.
        token_ids: i32[K], each in [0, V).
        num_top: how many of the likeliest tokens to report; static, may be 0.
    """
    logits = logits.astype(jnp.float32)
    own = jnp.take_along_axis(logits, jnp.asarray(token_ids)[:, None], axis=-1, mode="clip")
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top, top_ids = lax.top_k(logits, num_top)
    return TokenLogprobs(
        logprob=(own - total)[:, 0],
        rank=1 + _count(logits > own),
        top_ids=top_ids.astype(jnp.int32),
        top_logprobs=top - total,
    )


def penalise(logits: jax.Array, penalties: Penalties, first: jax.Array | int = 0) -> jax.Array:
    """f32[K, V] logits less the cost of repetition: CTRL's penalty, then OpenAI's two.

    The columns are ids ``first`` and on.
    """
    num_rows = len(logits)
    history = jnp.asarray(penalties.history)
    rows = jnp.arange(num_rows)[:, None]
    ids = _columns(history, logits, first)
    is_output = jnp.arange(history.shape[1])[None, :] >= jnp.asarray(penalties.prompt_len)[:, None]
    seen = jnp.zeros(logits.shape, bool).at[rows, ids].set(True, mode="drop")
    counts = jnp.zeros(logits.shape, jnp.int32)
    counts = counts.at[rows, ids].add(is_output.astype(jnp.int32), mode="drop")

    repetition, presence, frequency = (
        jnp.asarray(each)[:, None]
        for each in (penalties.repetition, penalties.presence, penalties.frequency)
    )
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, repeated, logits)
    return logits - frequency * counts.astype(jnp.float32) - jnp.where(counts > 0, presence, 0)


def with_sampled(batch: SamplingBatch, sampled: jax.Array) -> SamplingBatch:
    """``batch`` with the values of tokens that the host has not read: ``sampled`` i32[any]."""
    if batch.penalties is None:
        return batch
    history = jnp.asarray(batch.penalties.history)
    known = jnp.where(history < -1, sampled[jnp.maximum(-2 - history, 0)], history)
    penalties = dataclasses.replace(batch.penalties, history=known)
    return dataclasses.replace(batch, penalties=penalties)


def _ban(logits: jax.Array, banned: jax.Array, first: jax.Array | int) -> jax.Array:
    """f32[K, V] logits, of ids ``first`` and on, with -inf at the ids of banned i32[K, B]."""
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, _columns(banned, logits, first)].set(-jnp.inf, mode="drop")


def _columns(ids: jax.Array, logits: jax.Array, first: jax.Array | int) -> jax.Array:
    """Where ``ids`` are among the columns of ``logits``, of ids ``first`` and on.

    Past the end, which a scatter drops, where they are not: -1 would wrap.
    """
    column = ids - first
    return jnp.where((ids < 0) | (column < 0), logits.shape[-1], column)


def _truncate(
    scaled: jax.Array, weights: jax.Array, truncation: Truncation, is_random: jax.Array
) -> jax.Array:
    """f32[K, V] weights with 0 for what min_p, top_k and top_p drop; the likeliest token stays.

    ``scaled`` f32[K, V] are the logits that the weights are the exp of, at most 0.
    """
    vocab = weights.shape[-1]
    top_k, top_p, min_p = map(jnp.asarray, (truncation.top_k, truncation.top_p, truncation.min_p))
    top_k = jnp.where(is_random & (top_k < vocab), top_k, 0)
    top_p = jnp.where(is_random, top_p, 1)

    keep = (weights >= min_p[:, None]) & (scaled >= _top_k_threshold(scaled, top_k)[:, None])
    weights = jnp.where(keep, weights, 0)
    shares = _shares(weights)
    return jnp.where(shares >= _top_p_threshold(shares, top_p)[:, None], weights, 0)


def _top_k_threshold(scaled: jax.Array, top_k: jax.Array) -> jax.Array:
    """f32[K]: a largest bound with at least top_k i32[K] values at or above it; 0 asks for -inf.

    ``scaled`` f32[K, V] has maximum 0.
    """
    is_on = top_k > 0
    enough_at_top = _count(scaled >= 0) >= top_k
    low = jnp.min(jnp.where(scaled > -jnp.inf, scaled, 0), axis=-1)
    low = jnp.where(is_on, jnp.where(enough_at_top, 0, low), -jnp.inf)

    # Invariant: at least top_k values are >= low, fewer are >= high. A middle that is neither
    # strictly between (adjacent floats, or a NaN of a garbage row) ends the row's search.
    def middle(low, high):
        return low + (high - low) * 0.5

    def is_open(bounds):
        low, high = bounds
        return jnp.any((low < middle(low, high)) & (middle(low, high) < high))

    def halve(bounds):
        low, high = bounds
        mid = middle(low, high)
        is_between = (low < mid) & (mid < high)
        count = _count(scaled >= mid[:, None])
        low = jnp.where(is_between & (count >= top_k), mid, low)
        high = jnp.where(is_between & (count <= top_k), mid, high)  # Both, if it hits: found.
        return low, high

    low, _ = lax.while_loop(is_open, halve, (low, jnp.zeros_like(low)))
    return low


def _shares(weights: jax.Array) -> jax.Array:
    """f32[K, V] weights in [0, 1], one of them 1, as i32[K, V] shares of about 2**30 a row."""
    assert weights.shape[-1] < 2**18, "the sums below would overflow"
    # The row's sum, exact from here on: 26 bits after the point, added up in two halves.
    fixed = jnp.round(weights * 2.0**26).astype(jnp.int32)
    high, low = (jnp.sum(half, axis=-1, dtype=jnp.int32) for half in (fixed >> 13, fixed & 0x1FFF))
    total = high.astype(jnp.float32) * 2.0**-13 + low.astype(jnp.float32) * 2.0**-26
    return jnp.round(weights * (2.0**30 / total)[:, None]).astype(jnp.int32)


def _top_p_threshold(shares: jax.Array, top_p: jax.Array) -> jax.Array:
    """i32[K]: the largest bound such that the shares at or above it reach top_p f32[K] of the row.

    0 where top_p is 1.
    """
    vocab = shares.shape[-1]
    is_on = top_p < 1
    total = jnp.sum(shares, axis=-1, dtype=jnp.int32)
    target = jnp.clip((top_p * total.astype(jnp.float32)).astype(jnp.int32), 1, total)

    def mass_from(bound):
        return jnp.sum(jnp.where(shares >= bound[:, None], shares, 0), axis=-1, dtype=jnp.int32)

    # Invariant: the shares >= low reach the target, those >= high do not. Where all below `low`
    # are missing, at most V * (low - 1) <= total - target are.
    high = jnp.max(shares, axis=-1)
    mass_high = mass_from(high)
    low = (total - target) // vocab + 1
    low = jnp.where(is_on, jnp.where(mass_high >= target, high, low), 0)
    high = jnp.where(is_on & (mass_high < target), high, low)

    def is_open(low, high, mass_low, mass_high):
        # Shares in [low, high) are at least `low` each: with less than 2 * low in all there is one.
        return (high - low > 1) & (mass_low - mass_high - low >= low)

    def halve(state):
        low, high, mass_low, mass_high = state
        # The geometric middle while they are magnitudes apart, as in a peaked row's long tail; then
        # the arithmetic one, for float32 cannot tell all of these integers apart.
        geometric = jnp.sqrt(low.astype(jnp.float32)) * jnp.sqrt(high.astype(jnp.float32))
        is_far = high // 4 > low
        mid = jnp.where(is_far, geometric.astype(jnp.int32), low + (high - low) // 2)
        mass = mass_from(mid)
        goes_up = is_open(*state) & (mass >= target)
        goes_down = is_open(*state) & (mass < target)
        return (
            jnp.where(goes_up, mid, low),
            jnp.where(goes_down, mid, high),
            jnp.where(goes_up, mass, mass_low),
            jnp.where(goes_down, mass, mass_high),
        )

    state = (low, high, total, mass_high)
    return lax.while_loop(lambda state: jnp.any(is_open(*state)), halve, state)[0]


def _draw(weights: jax.Array, randomness: Randomness, shards: Shards) -> jax.Array:
    """i32[K]: ids drawn in proportion to the weights f32[K, V] >= 0, one of them 1.

    The Gumbel-max draw in its exponential form: with E exponential, the argmax of weight / E is
    that of log weight - log E, and -log E is a Gumbel variable.
    """
    width = weights.shape[-1]
    ids = jnp.arange(shards.count * width, dtype=jnp.uint32)
    # threefry whatever the user's default: its bits are the same for any batch and any device.
    root = jax.random.key(0, impl="threefry2x32")

    def random_bits(seed, position):
        key = jax.random.fold_in(jax.random.fold_in(root, seed[0]), seed[1])
        words = jax.random.key_data(jax.random.fold_in(key, position))
        # jax.random.bits would hash once for each word instead of for two: 13 ms, not 7 (CPU).
        return threefry_2x32((words[0], words[1]), ids)

    bits = jax.vmap(random_bits)(jnp.asarray(randomness.seed), jnp.asarray(randomness.position))
    # A word is hashed together with another of the row: draw all, and keep one's own.
    bits = lax.dynamic_slice_in_dim(bits, shards.index() * width, width, axis=1)
    # Uniform in (0, 1), precise near 0, where the winners are; away from 1, where E is infinite.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return _argmax(weights / -jnp.log1p(-uniform), shards)


def _count(mask: jax.Array) -> jax.Array:
    """i32[K]: how many of each row of bool[K, V] are true."""
    return jnp.sum(mask, axis=-1, dtype=jnp.int32)


def _argmax(values: jax.Array, shards: Shards = WHOLE) -> jax.Array:
    """i32[K]: the lowest index of each row's maximum; some index for a row with NaN.

    Of a row cut over devices, the index in the whole row.
    """
    width = values.shape[-1]
    # Used twice below, and XLA would rather compute it twice, random bits and all.
    values = lax.optimization_barrier(values)
    largest = shards.max(values.max(-1, keepdims=True))
    index = shards.index() * width + jnp.arange(width, dtype=jnp.int32)
    last = shards.count * width - 1
    first = jnp.min(jnp.where(values == largest, index[None, :], last), axis=-1)
    return shards.min(first.astype(jnp.int32))
