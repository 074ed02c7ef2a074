"""Sampling against NumPy statements of each definition, torch and transformers."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slora_jax import sampling
from slora_jax.sampling import (
    Penalties,
    Randomness,
    SamplingBatch,
    TokenLogprobs,
    Truncation,
    penalise,
    sample,
    token_logprobs,
)
from slora_jax.sampling_params import split_seed

VOCAB = 211  # No power of two, no multiple of a vector.
jit_sample = jax.jit(sample)
jit_truncate = jax.jit(sampling._truncate)


# -- what is meant, in NumPy ----------------------------------------------------------------------


def numpy_penalise(logits, prompt, output, repetition, presence, frequency):
    """One row: logits f64[V], the ids so far, the three penalties."""
    result = logits.astype(np.float64)
    for token in set(prompt) | set(output):
        value = result[token]
        result[token] = value / repetition if value > 0 else value * repetition
    for token in set(output):
        result[token] -= frequency * output.count(token) + presence
    return result


def numpy_kept(logits, temperature, min_p, top_k, top_p):
    """One row: the ids that may be drawn, and the float64 probabilities that top_p saw."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    kept = probabilities >= min_p * probabilities.max()
    if top_k > 0:
        kth = np.sort(probabilities * kept)[::-1][min(top_k, len(logits)) - 1]
        kept &= probabilities >= kth
    probabilities = np.where(kept, probabilities, 0) / probabilities[kept].sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    if top_p < 1:
        kept[order[before >= top_p]] = False
    return kept, probabilities


# -- helpers --------------------------------------------------------------------------------------


def column(values, dtype):
    return np.asarray(values, dtype)


def random_rows(rng, num_rows, vocab=VOCAB, scale=3.0):
    return (rng.normal(size=(num_rows, vocab)) * scale).astype(np.float32)


def randomness(num_rows, temperature=1.0, seed=0, position=0):
    return Randomness(
        temperature=np.broadcast_to(column(temperature, np.float32), num_rows),
        seed=np.broadcast_to(column(split_seed(seed), np.uint32), (num_rows, 2)),
        position=np.broadcast_to(column(position, np.int32), num_rows),
    )


def truncation(num_rows, top_k=0, top_p=1.0, min_p=0.0):
    return Truncation(
        top_k=np.broadcast_to(column(top_k, np.int32), num_rows),
        top_p=np.broadcast_to(column(top_p, np.float32), num_rows),
        min_p=np.broadcast_to(column(min_p, np.float32), num_rows),
    )


def penalties(rows, width, repetition=1.0, presence=0.0, frequency=0.0):
    """Of (prompt ids, output ids) for each row."""
    history = np.full((len(rows), width), -1, np.int32)
    for history_row, (prompt, output) in zip(history, rows, strict=True):
        history_row[: len(prompt) + len(output)] = [*prompt, *output]
    return Penalties(
        history=history,
        prompt_len=column([len(prompt) for prompt, _ in rows], np.int32),
        repetition=np.broadcast_to(column(repetition, np.float32), len(rows)),
        presence=np.broadcast_to(column(presence, np.float32), len(rows)),
        frequency=np.broadcast_to(column(frequency, np.float32), len(rows)),
    )


DRAWS = 4096


@functools.partial(jax.jit, static_argnums=2)
def _drawn_many(logits, truncation_of_one, draws, temperature, seed, banned=None):
    one = jax.tree.map(lambda x: jnp.broadcast_to(x, (draws, *x.shape[1:])), truncation_of_one)
    batch = SamplingBatch(
        Randomness(
            jnp.full(draws, temperature, jnp.float32),
            jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), (draws, 2)),
            jnp.arange(draws, dtype=jnp.int32),
        ),
        one,
        banned=None if banned is None else jnp.broadcast_to(banned, (draws, *banned.shape[1:])),
    )
    return sample(jnp.broadcast_to(logits, (draws, logits.shape[-1])), batch)


def drawn_ids(logits, draws=DRAWS, temperature=1.0, seed=(0, 1), **options):
    """The ids drawn from one row at ``draws`` positions."""
    banned = options.pop("banned", None)
    return np.asarray(
        _drawn_many(
            logits[None], truncation(1, **options), draws, np.float32(temperature), seed, banned
        )
    )


# -- greedy ---------------------------------------------------------------------------------------


def test_nothing_asked_is_argmax_with_ties_to_the_lowest_id(rng):
    logits = np.round(random_rows(rng, 64, scale=1.0))  # Ties at the top, in most rows.
    assert np.array_equal(jit_sample(logits, SamplingBatch()), logits.argmax(-1))


def test_a_greedy_batch_compiles_to_no_random_bits_and_no_loop():
    text = jit_sample.lower(np.zeros((4, VOCAB), np.float32), SamplingBatch()).as_text()
    assert "while" not in text
    assert "threefry" not in text


def test_greedy_rows_of_a_random_batch_take_the_argmax_and_ignore_truncation(rng):
    logits = random_rows(rng, 8)
    temperature = column([0, 1] * 4, np.float32)
    got = jit_sample(
        logits,
        SamplingBatch(randomness(8, temperature), truncation(8, top_k=2, top_p=0.1, min_p=0.9)),
    )
    assert np.array_equal(np.asarray(got)[::2], logits.argmax(-1)[::2])


def test_greedy_rows_take_the_argmax_of_the_penalised_logits(rng):
    logits = random_rows(rng, 3)
    ranked = np.argsort(-logits, axis=-1)
    history = penalties([([], [int(row[0])]) for row in ranked], 8, frequency=100.0)
    assert np.array_equal(jit_sample(logits, SamplingBatch(penalties=history)), ranked[:, 1])


# -- penalties and bans ---------------------------------------------------------------------------

token_lists = st.lists(st.integers(0, VOCAB - 1), max_size=24)


@hypothesis.given(
    rows=st.lists(st.tuples(token_lists, token_lists), min_size=3, max_size=3),
    repetition=st.floats(0.1, 5),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_penalties(rows, repetition, presence, frequency, seed):
    logits = random_rows(np.random.default_rng(seed), 3)
    options = [column([value, value / 2, neutral], np.float32)
               for value, neutral in ((repetition, 1), (presence, 0), (frequency, 0))]  # fmt: skip
    got = jax.jit(penalise)(logits, penalties(rows, 48, *options))
    want = [
        numpy_penalise(logits[k], *rows[k], *(float(option[k]) for option in options))
        for k in range(3)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_penalties_leave_banned_tokens_banned(rng):
    logits = random_rows(rng, 1)
    best = int(logits.argmax())
    got = jit_sample(
        logits,
        SamplingBatch(
            penalties=penalties([([best], [best])], 8, repetition=0.5, presence=-2.0),
            banned=np.asarray([[best, -1]], np.int32),
        ),
    )
    assert np.asarray(got)[0] != best


def test_banned_ids_are_never_drawn_and_padding_bans_nothing(rng):
    logits = random_rows(rng, 1)[0]
    ranked = np.argsort(-logits)
    banned = np.asarray([[ranked[0], ranked[2], -1, -1]], np.int32)
    greedy = jit_sample(logits[None], SamplingBatch(banned=banned))
    assert np.asarray(greedy)[0] == ranked[1]
    ids = set(drawn_ids(logits, temperature=0.3, banned=banned).tolist())
    assert ids.isdisjoint(ranked[[0, 2]].tolist())
    last = np.full((1, VOCAB), -1, np.float32)
    last[0, -1] = 1  # The id that -1 would mean, were it not padding.
    nothing = np.full((1, 4), -1, np.int32)
    assert np.asarray(jit_sample(last, SamplingBatch(banned=nothing)))[0] == VOCAB - 1


# -- truncation -----------------------------------------------------------------------------------


def check_kept(logits, temperature, min_p, top_k, top_p):
    """The kept set is NumPy's, but for ties to float32 or 2**-30 and sums that just reach top_p."""
    temperature, min_p, top_p = (float(np.float32(x)) for x in (temperature, min_p, top_p))
    want, probabilities = numpy_kept(logits, temperature, min_p, top_k, top_p)
    got = _kept(logits, temperature, min_p, top_k, top_p)
    differ = probabilities[got != want]
    if differ.size:
        edge = probabilities[want].min()
        ties = np.abs(differ - edge) <= 2e-9 + 2e-6 * edge
        assert ties.all() or abs(probabilities[want].sum() - top_p) < 1e-6 + edge * 1e-3


def _kept(logits, temperature, min_p, top_k, top_p):
    """bool[V]: what `sample` may draw. Draws alone would not show a set of thousands."""
    scaled = (logits - logits.max()) / np.float32(temperature)
    weights = jit_truncate(
        scaled[None],
        jnp.exp(scaled)[None],
        truncation(1, top_k=top_k, top_p=top_p, min_p=min_p),
        np.ones(1, bool),
    )
    return np.asarray(weights)[0] > 0


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 3.0, 10.0]),
    temperature=st.floats(0.3, 2),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.one_of(st.just(1.0), st.floats(1e-3, 1)),
)
def test_kept_set(seed, scale, temperature, min_p, top_k, top_p):
    logits = random_rows(np.random.default_rng(seed), 1, scale=scale)[0]
    check_kept(logits, temperature, min_p, top_k, top_p)


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.integers(1, VOCAB),
    top_p=st.floats(0.05, 0.999),
)
def test_ties_are_kept_or_dropped_together(seed, top_k, top_p):
    logits = np.round(random_rows(np.random.default_rng(seed), 1, scale=1.5)[0])
    kth = np.sort(logits)[::-1][top_k - 1]
    assert np.array_equal(_kept(logits, 1.0, 0.0, top_k, 1.0), logits >= kth)
    kept = _kept(logits, 1.0, 0.0, 0, top_p)
    edge = logits[kept].min()
    assert np.array_equal(kept, logits >= edge)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    assert probabilities[logits >= edge].sum() >= top_p - 1e-6
    assert probabilities[logits > edge].sum() < top_p + 1e-6


def test_near_ties_are_told_apart():
    """Top tokens a float32 step apart, and a top_p that needs all, some or one of them."""
    logits = np.full(VOCAB, -20, np.float32)
    logits[:4] = [0, -1e-6, -2e-6, -3e-6]
    for count in (1, 2, 3, 4):
        kept = _kept(logits, 1.0, 0.0, 0, count / 4 - 0.1)
        assert np.flatnonzero(kept).tolist() == list(range(count))


@pytest.mark.parametrize("vocab", [1, 2])
def test_smallest_vocabularies(rng, vocab):
    logits = random_rows(rng, 1, vocab)[0]
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert set(drawn_ids(logits, 64, **options).tolist()) == {int(logits.argmax())}


def test_extremes_keep_the_likeliest_token(rng):
    logits = random_rows(rng, 1)[0]
    best = {int(logits.argmax())}
    for options in (
        {"top_k": 1},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"top_k": 1, "top_p": 1e-9, "min_p": 1.0},
    ):
        assert set(drawn_ids(logits, 256, temperature=2.0, **options).tolist()) == best
    for temperature in (1e-5, 1e-30):
        assert set(drawn_ids(logits, 256, temperature=temperature).tolist()) == best
    huge = logits * np.float32(1e30)
    assert set(drawn_ids(huge, 64, top_k=5, top_p=0.9).tolist()) == best


def test_off_values_change_nothing(rng):
    logits = random_rows(rng, 32)
    how = randomness(32, 0.8, seed=5, position=np.arange(32))
    plain = jit_sample(logits, SamplingBatch(how))
    off = jit_sample(logits, SamplingBatch(how, truncation(32)))
    whole = jit_sample(logits, SamplingBatch(how, truncation(32, top_k=VOCAB)))
    assert np.array_equal(plain, off)
    assert np.array_equal(plain, whole)


def test_top_k_counts_what_bans_left(rng):
    logits = random_rows(rng, 1)[0]
    ranked = np.argsort(-logits)
    banned = ranked[: VOCAB - 3][None].astype(np.int32)
    ids = set(drawn_ids(logits, 512, temperature=2.0, banned=banned, top_k=50).tolist())
    assert ids == set(ranked[-3:].tolist())


@pytest.mark.parametrize("vocab", [49152, 128256])
def test_kept_set_of_real_vocabularies(rng, vocab):
    flat = random_rows(rng, 1, vocab, scale=1e-3)[0]
    peaked = random_rows(rng, 1, vocab, scale=4.0)[0]
    tail = np.full(vocab, -17.0, np.float32)  # Half of the mass, in shares of 2**-24.
    tail[:3] = [0.0, -0.5, -1.0]
    for logits in (flat, peaked, tail):
        for options in ((0.0, 0, 0.9), (0.0, 0, 0.9999), (0.0, 1000, 1.0), (0.01, 50, 0.5)):
            check_kept(logits, 0.7, *options)


@pytest.mark.oracle
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.floats(0.3, 2),
    top_k=st.integers(1, VOCAB),
    top_p=st.floats(0.05, 0.999),
    min_p=st.floats(0.001, 0.9),
)
def test_kept_set_equals_transformers(seed, temperature, top_k, top_p, min_p):
    import torch
    from transformers.generation import logits_process as hf

    logits = random_rows(np.random.default_rng(seed), 1)
    scores = hf.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))  # type: ignore
    scores = hf.MinPLogitsWarper(min_p)(None, scores)  # type: ignore
    scores = hf.TopKLogitsWarper(top_k)(None, scores)  # type: ignore
    scores = hf.TopPLogitsWarper(top_p)(None, scores)  # type: ignore
    kept = torch.isfinite(scores).numpy()[0]
    if not np.array_equal(kept, _kept(logits[0], temperature, min_p, top_k, top_p)):
        check_kept(logits[0], temperature, min_p, top_k, top_p)  # A borderline, or wrong.


@pytest.mark.oracle
def test_repetition_penalty_equals_transformers(rng):
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = random_rows(rng, 4)
    history = rng.integers(0, VOCAB, size=(4, 30)).astype(np.int32)
    want = RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor(history, dtype=torch.long), torch.tensor(logits)
    )
    rows = [(row[:20].tolist(), row[20:].tolist()) for row in history]
    got = jax.jit(penalise)(logits, penalties(rows, 32, repetition=1.3))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


# -- the draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(rng, options):
    logits = random_rows(rng, 1, vocab=32, scale=1.0)[0]
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    kept, _ = numpy_kept(logits, how["temperature"], how["min_p"], how["top_k"], how["top_p"])
    weights = np.where(kept, np.exp(logits.astype(np.float64) / how["temperature"]), 0)
    expected = 65536 * weights / weights.sum()
    counts = np.bincount(drawn_ids(logits, 65536, **options), minlength=32)
    assert np.all(counts[~kept] == 0)
    chi_square = np.sum((counts - expected)[kept] ** 2 / expected[kept])
    freedom = kept.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)  # 5 standard deviations; seeds fixed.


def test_draws_of_seeds_follow_the_distribution(rng):
    logits = random_rows(rng, 1, vocab=16, scale=1.0)
    draws = 16384
    seeds = np.asarray([split_seed(int(s)) for s in rng.integers(0, 2**63, draws)], np.uint32)
    batch = SamplingBatch(Randomness(np.ones(draws, np.float32), seeds, np.zeros(draws, np.int32)))
    counts = np.bincount(jit_sample(np.broadcast_to(logits, (draws, 16)), batch), minlength=16)
    expected = draws * np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert np.sum((counts - expected) ** 2 / expected) < 15 + 5 * np.sqrt(30)


def test_rare_tokens_come_as_often_as_they_should():
    logits = np.zeros(200, np.float32)
    logits[7] = np.log(50_000)  # The other 199 share 4e-3 of the mass.
    ids = drawn_ids(logits, 16384)
    assert 25 < np.sum(ids != 7) < 105  # 65 expected, 5 standard deviations are 40.
    assert len(set(ids.tolist())) > 20


def test_positions_and_both_words_of_the_seed_matter(rng):
    logits = np.zeros((1, VOCAB), np.float32)
    seen = set()
    for seed in (0, 1, 2**32, 2**32 + 1, 2**63 - 1):
        ids = [
            int(jit_sample(logits, SamplingBatch(randomness(1, 1.0, seed, position)))[0])
            for position in range(12)
        ]
        seen.add(tuple(ids))
        assert len(set(ids)) > 6
    assert len(seen) == 5


def test_draws_do_not_depend_on_the_default_prng(rng):
    logits = random_rows(rng, 4)
    batch = SamplingBatch(randomness(4, 1.0, 3, np.arange(4)))
    want = jit_sample(logits, batch)
    with jax.default_prng_impl("rbg"):
        got = jax.jit(lambda *args: sample(*args))(logits, batch)
    assert np.array_equal(got, want)


# -- a row is on its own --------------------------------------------------------------------------


def mixed_batch(rng, num_rows, vocab):
    """Every kind of row, at random."""

    def choice(*values):
        return rng.choice(np.asarray(values), num_rows)

    width = 64
    lengths = rng.integers(1, width, num_rows)
    history = rng.integers(0, vocab, (num_rows, width))
    history = np.where(np.arange(width) < lengths[:, None], history, -1).astype(np.int32)
    banned = rng.integers(0, vocab, (num_rows, 4)).astype(np.int32)
    banned[rng.random(num_rows) < 0.5] = -1
    return SamplingBatch(
        Randomness(
            temperature=choice(0.0, 0.3, 1.0, 1.5).astype(np.float32),
            seed=rng.integers(0, 2**32, (num_rows, 2), dtype=np.uint32),
            position=rng.integers(0, 4096, num_rows).astype(np.int32),
        ),
        Truncation(
            top_k=choice(0, 1, 40, 500).astype(np.int32),
            top_p=choice(1.0, 0.95, 0.5).astype(np.float32),
            min_p=choice(0.0, 0.05).astype(np.float32),
        ),
        Penalties(
            history=history,
            prompt_len=rng.integers(0, lengths).astype(np.int32),
            repetition=choice(1.0, 1.2).astype(np.float32),
            presence=choice(0.0, 0.7).astype(np.float32),
            frequency=choice(0.0, 0.3).astype(np.float32),
        ),
        banned,
    )


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [VOCAB, 5000])
def test_a_row_alone_in_any_batch_and_at_any_index_gets_the_same_token(rng, vocab):
    num_rows = 24
    logits = random_rows(rng, num_rows, vocab)
    batch = mixed_batch(rng, num_rows, vocab)
    tokens = np.asarray(jit_sample(logits, batch))
    for size in (1, 3, 40):
        rows = rng.integers(0, num_rows, size)
        part = jax.tree.map(lambda x: x[rows], batch)  # noqa: B023
        assert np.array_equal(jit_sample(logits[rows], part), tokens[rows]), size


def test_a_row_that_needs_less_gets_the_same_token_from_a_batch_with_fewer_parts(rng):
    logits = random_rows(rng, 6)
    how = randomness(6, 0.9, 11, np.arange(6))
    plain = jit_sample(logits, SamplingBatch(how))
    full = SamplingBatch(
        how, truncation(6), penalties([([1, 2], [3])] * 6, 8), np.full((6, 8), -1, np.int32)
    )
    assert np.array_equal(jit_sample(logits, full), plain)


def test_garbage_rows_leave_the_others_alone(rng):
    logits = random_rows(rng, 24)
    batch = mixed_batch(rng, 24, VOCAB)
    want = np.asarray(jit_sample(logits, batch))
    for garbage in (np.nan, np.inf, -np.inf, 3e38):
        spoilt = logits.copy()
        spoilt[::3] = garbage
        got = np.asarray(jit_sample(spoilt, batch))
        others = np.arange(24) % 3 != 0
        assert np.array_equal(got[others], want[others])
        assert np.all((got >= 0) & (got < VOCAB))


@pytest.mark.slow
def test_jit_changes_nothing(rng):
    logits = random_rows(rng, 24)
    batch = mixed_batch(rng, 24, VOCAB)
    assert np.array_equal(sample(jnp.asarray(logits), batch), jit_sample(logits, batch))


def test_same_parts_compile_once(rng):
    count = jit_sample._cache_size()
    for num_rows in (9, 9, 9):
        jit_sample(random_rows(rng, num_rows, 77), mixed_batch(rng, num_rows, 77))
    assert jit_sample._cache_size() == count + 1


# -- log-probabilities ----------------------------------------------------------------------------


def numpy_logprobs(logits, token_ids, num_top) -> TokenLogprobs:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    logprobs = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :num_top]
    own = np.take_along_axis(logits, token_ids[:, None], -1)
    return TokenLogprobs(
        logprob=np.take_along_axis(logprobs, token_ids[:, None], -1)[:, 0],  # type: ignore
        rank=1 + np.sum(logits > own, -1),
        top_ids=order,  # type: ignore
        top_logprobs=np.take_along_axis(logprobs, order, -1),  # type: ignore
    )


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_token_logprobs(rng, num_top, scale):
    logits = random_rows(rng, 16, 1500, scale)
    token_ids = rng.integers(0, 1500, 16).astype(np.int32)
    got = jax.jit(token_logprobs, static_argnums=2)(logits, token_ids, num_top)
    want = numpy_logprobs(logits, token_ids, num_top)
    np.testing.assert_allclose(got.logprob, want.logprob, atol=2e-5, rtol=1e-6)
    np.testing.assert_allclose(got.top_logprobs, want.top_logprobs, atol=2e-5, rtol=1e-6)
    assert np.array_equal(got.rank, want.rank)
    assert np.array_equal(got.top_ids, want.top_ids)
    assert got.rank.dtype == got.top_ids.dtype == np.int32
    assert got.top_ids.shape == got.top_logprobs.shape == (16, num_top)


def test_ranks_and_top_ids_of_ties(rng):
    logits = np.asarray([[1, 3, 3, 2, 3]], np.float32)
    got = token_logprobs(jnp.asarray(logits), np.asarray([4], np.int32), 5)
    assert got.rank.tolist() == [1]
    assert got.top_ids.tolist() == [[1, 2, 4, 3, 0]]


def test_logprobs_of_a_garbage_row_leave_the_others_alone(rng):
    logits = random_rows(rng, 3)
    token_ids = np.asarray([5, 6, 7], np.int32)
    want = token_logprobs(jnp.asarray(logits), token_ids, 4)
    logits[1] = np.nan
    got = token_logprobs(jnp.asarray(logits), token_ids, 4)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[::2], b[::2]), got, want)


@pytest.mark.oracle
def test_token_logprobs_equal_torch(rng):
    import torch

    logits = random_rows(rng, 8, 49152)
    token_ids = rng.integers(0, 49152, 8).astype(np.int32)
    got = token_logprobs(jnp.asarray(logits), token_ids, 20)
    want = torch.log_softmax(torch.tensor(logits), -1)
    own = want[torch.arange(8), torch.tensor(token_ids, dtype=torch.long)]
    np.testing.assert_allclose(got.logprob, own.numpy(), atol=1e-5)
    np.testing.assert_allclose(got.top_logprobs, want.topk(20).values.numpy(), atol=1e-5)


@pytest.fixture
def rng():
    return np.random.default_rng(20261122)
