"""Detokenisation against decoding everything at once, over the kinds of tokenizers that exist."""

from collections.abc import Callable, Sequence

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from slora_jax.detokenizer import IncrementalDetokenizer

SENTENCES = [
    "Hello, world! The quick brown fox jumps over the lazy dog.\n\n",
    "你好，世界。今天天气很好，我们去公园吧！龘龘",
    "Καλημέρα κόσμε, привет мир, こんにちは世界 🌍",
    "family: 👨‍👩‍👧‍👦, flag: 🇨🇭, thumbs: 👍🏽👍🏿, café naïve \u200d e\u0301",
    "  two  spaces,\ttabs, def f(x):\n    return x\n",
]


class Vocabulary:
    """A tokenizer, and what the tests do to it."""

    def __init__(self, name: str, tokenizer: tokenizers.Tokenizer, special_id: int):
        self.name = name
        self.tokenizer = tokenizer
        self.special_id = special_id

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def __repr__(self) -> str:
        return self.name


def byte_level() -> Vocabulary:
    """As GPT-2, Llama 3, SmolLM: tokens are bytes, whatever characters they cut."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # One pre-token for all, so that merges cross words and characters.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 2, trainer)
    return Vocabulary("byte_level", tokenizer, 0)


FIRST_BYTE_ID = 3


def _byte_fallback_vocabulary() -> dict[str, int]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [*"Helo,wrdTqickbfxjmpsvthazyg好世界", "▁", "▁▁", "▁Hello", "Hello", "▁world", "▁the"]
    return {piece: k for k, piece in enumerate(dict.fromkeys(pieces + words))}


def byte_fallback() -> Vocabulary:
    """As Llama 2: pieces with their spaces, bytes for what is no piece, no space at the start."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE(_byte_fallback_vocabulary(), [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # type: ignore
    tokenizer.decoder = decoders.Sequence(  # type: ignore
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Vocabulary("byte_fallback", tokenizer, 1)


def metaspace() -> Vocabulary:
    """As T5 and others: the first piece loses its space."""
    pieces = {piece: k for k, piece in enumerate(["<unk>", "<s>", "▁", "▁a", "a", "b", "▁cd", "é"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Metaspace()  # type: ignore
    return Vocabulary("metaspace", tokenizer, 1)


VOCABULARIES = [byte_level(), byte_fallback(), metaspace()]
BYTE_LEVEL, BYTE_FALLBACK, _ = VOCABULARIES
every_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=repr)


def common_prefix(a: str, b: str) -> str:
    differ = (k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return a[: next(differ, min(len(a), len(b)))]


def whole_text(vocabulary: Vocabulary, prompt: list[int], output: list[int]) -> str:
    """What the output adds to the prompt's text, all decoded at once.

    The prompt's text is that of its finished characters, before up to 3 tokens of another.
    """
    after = vocabulary.decode(prompt + output)
    before = (vocabulary.decode(prompt[: max(0, len(prompt) - n)]) for n in range(4))
    return after[max(len(common_prefix(text, after)) for text in before) :]


def has_torn_run(vocabulary: Vocabulary, ids: list[int]) -> bool:
    """Whether some run of byte tokens is no UTF-8, all of which byte fallback then takes back."""
    if vocabulary.name != "byte_fallback":
        return False
    run = b""
    for token in [*ids, 0]:
        if FIRST_BYTE_ID <= token < FIRST_BYTE_ID + 256:
            run += bytes([token - FIRST_BYTE_ID])
        elif token not in (1, 2):  # Special tokens end no run, being skipped.
            try:
                run.decode()
            except UnicodeDecodeError:
                return True
            run = b""
    return False


def first_stop(text: str, stop: Sequence[str], start: int = 0) -> tuple[str, str | None]:
    """The text cut before the stop string that is completed first, at a character from start on."""
    for end in range(start + 1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def feed(
    decode: Callable[[Sequence[int]], str],
    prompt: list[int],
    output: list[int],
    stop: Sequence[str] = (),
    min_tokens: int = 0,
) -> tuple[IncrementalDetokenizer, list[str]]:
    """Append the output to its end or a stop; the detokenizer and what it showed at each step."""
    detokenizer = IncrementalDetokenizer(decode, prompt, tuple(stop), min_tokens)
    shown = [detokenizer.stream_text]
    for token in output:
        stopped = detokenizer.append(token)
        assert stopped == (detokenizer.stop_reason is not None)
        shown.append(detokenizer.stream_text)
        assert shown[-1].startswith(shown[-2])
        assert detokenizer.text.startswith(shown[-1])
        if stopped:
            break
    assert detokenizer.finish() == detokenizer.text == detokenizer.stream_text
    shown.append(detokenizer.stream_text)
    assert shown[-1].startswith(shown[-2])
    return detokenizer, shown


@st.composite
def token_lists(draw, vocabulary: Vocabulary, max_size: int = 60) -> list[int]:
    """Texts, bits of texts, any tokens, long runs of one."""
    ids: list[int] = []
    any_id = st.integers(0, vocabulary.size - 1)
    text = st.one_of(st.sampled_from(SENTENCES), st.text(max_size=8))
    for kind in draw(st.lists(st.sampled_from(["text", "cut", "any", "run"]), max_size=5)):
        if kind == "any":
            ids += draw(st.lists(any_id, max_size=12))
        elif kind == "run":
            ids += [draw(any_id)] * draw(st.integers(1, 30))
        else:
            part = vocabulary.encode(draw(text))
            ids += part if kind == "text" else part[draw(st.integers(0, 8)) :][:12]
    return ids[:max_size]


# -- text -----------------------------------------------------------------------------------------


@every_vocabulary
@hypothesis.given(data=st.data())
def test_text_is_that_of_decoding_everything_at_once(vocabulary, data):
    prompt = data.draw(token_lists(vocabulary), label="prompt")
    output = data.draw(token_lists(vocabulary), label="output")
    detokenizer, _ = feed(vocabulary.decode, prompt, output)
    if not has_torn_run(vocabulary, prompt + output):
        assert detokenizer.text == whole_text(vocabulary, prompt, output)


@hypothesis.given(data=st.data())
def test_text_is_right_after_each_token(data):
    prompt = data.draw(token_lists(BYTE_LEVEL), label="prompt")
    output = data.draw(token_lists(BYTE_LEVEL), label="output")
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL.decode, prompt)
    for n, token in enumerate(output, start=1):
        detokenizer.append(token)
        text = whole_text(BYTE_LEVEL, prompt, output[:n])
        assert detokenizer.text == text
        # What is shown trails by what may be unfinished, and by no more.
        assert detokenizer.stream_text.rstrip("\ufffd") == text.rstrip("\ufffd")


@every_vocabulary
@hypothesis.given(data=st.data())
def test_text_does_not_depend_on_when_it_is_looked_at(vocabulary, data):
    prompt = data.draw(token_lists(vocabulary), label="prompt")
    output = data.draw(token_lists(vocabulary), label="output")
    looks = data.draw(st.sets(st.integers(1, len(output) + 1)), label="looks")
    each, now_and_then = (IncrementalDetokenizer(vocabulary.decode, prompt) for _ in range(2))
    for n, token in enumerate(output, start=1):
        each.append(token)
        shown = each.stream_text, each.text
        now_and_then.append(token)
        if n in looks:
            assert (now_and_then.stream_text, now_and_then.text) == shown
    assert now_and_then.finish() == each.finish()


def test_many_tokens_are_decoded_at_once():
    calls = []

    def decode(ids):
        calls.append(len(ids))
        return characters(ids)

    text = "some words, " * 100
    detokenizer = IncrementalDetokenizer(decode, [])
    for character in text:
        detokenizer.append(ord(character))
    assert detokenizer.text == text
    assert len(calls) < 12
    detokenizer.append(ord("x"))
    assert detokenizer.finish() == text + "x"
    assert calls[-1] < 20  # what went before is not decoded again


@hypothesis.given(data=st.binary(max_size=60), split=st.integers(0, 60))
def test_any_bytes_decode_as_python_decodes_them(data, split):
    def decode(ids):
        return bytes(ids).decode(errors="replace")

    prompt, output = list(data[:split]), list(data[split:])
    detokenizer, _ = feed(decode, prompt, output)
    before, after = decode(prompt), decode(data)
    assert detokenizer.text == after[len(common_prefix(before, after)) :]


@every_vocabulary
@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences_come_back(vocabulary, sentence):
    if vocabulary.name == "metaspace":
        sentence = "a b cd"
    ids = vocabulary.encode(sentence)
    assert feed(vocabulary.decode, [], ids)[0].text == vocabulary.decode(ids)


@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, BYTE_FALLBACK], ids=repr)
def test_no_part_of_a_character_is_shown(vocabulary):
    ids = vocabulary.encode("a👨‍👩‍👧b龘")
    _, shown = feed(vocabulary.decode, [], ids)
    assert not any("\ufffd" in text for text in shown)
    assert len(set(shown)) > 5  # And it does stream.


def test_a_space_is_written_where_something_stands_before_it():
    prompt, output = BYTE_FALLBACK.encode("Hello"), BYTE_FALLBACK.encode("Hello world the")
    assert vocabulary_text(BYTE_FALLBACK, prompt, output) == " Hello world the"
    assert vocabulary_text(BYTE_FALLBACK, [], output) == "Hello world the"
    # Special tokens have no text, at the start of the text or later.
    special = [BYTE_FALLBACK.special_id] * 40
    assert vocabulary_text(BYTE_FALLBACK, special, special + output) == "Hello world the"
    assert vocabulary_text(BYTE_FALLBACK, prompt + special, output) == " Hello world the"
    spread = [token for each in output for token in (*special[:11], each)]
    assert vocabulary_text(BYTE_FALLBACK, prompt, spread) == " Hello world the"


def vocabulary_text(vocabulary: Vocabulary, prompt: list[int], output: list[int]) -> str:
    text = feed(vocabulary.decode, prompt, output)[0].text
    assert text == whole_text(vocabulary, prompt, output)
    return text


def test_a_character_begun_in_the_prompt_is_the_outputs_if_it_is_finished():
    start, *middle, end = BYTE_FALLBACK.encode("a龘")[-3:]
    hello = BYTE_FALLBACK.encode("Hello")
    assert vocabulary_text(BYTE_FALLBACK, [*hello, start], [*middle, end]) == "龘"
    assert vocabulary_text(BYTE_FALLBACK, [*hello, start], middle) == "\ufffd"
    assert vocabulary_text(BYTE_FALLBACK, [*hello, start], hello) == " Hello"


def test_broken_characters_stay_broken():
    text, shown = feed(BYTE_FALLBACK.decode, [], [FIRST_BYTE_ID + 0xE9, FIRST_BYTE_ID + 0xBE])
    assert text.text == "\ufffd\ufffd"
    assert shown[:3] == ["", "", ""]
    broken = [FIRST_BYTE_ID + 0xFF] * 50
    assert vocabulary_text(BYTE_FALLBACK, [], broken) == "\ufffd" * 50
    assert len(feed(BYTE_FALLBACK.decode, [], broken)[1][-2]) > 40  # Shown before the end.


def test_valid_characters_stay_where_byte_fallback_would_take_them_back():
    valid = BYTE_FALLBACK.encode("龘")[-3:]
    broken = FIRST_BYTE_ID + 0xE9
    a = BYTE_FALLBACK.tokenizer.token_to_id("a")
    assert BYTE_FALLBACK.decode([a, *valid, broken, a]) == "a\ufffd\ufffd\ufffd\ufffda"
    assert feed(BYTE_FALLBACK.decode, [a], [*valid, broken, a])[0].text == "龘\ufffda"


def test_no_tokens_no_text():
    assert IncrementalDetokenizer(BYTE_LEVEL.decode, BYTE_LEVEL.encode("Hello")).finish() == ""


# -- stop strings ---------------------------------------------------------------------------------


@every_vocabulary
@hypothesis.given(data=st.data())
def test_stop_strings_are_found_at_their_first_occurrence(vocabulary, data):
    prompt = data.draw(token_lists(vocabulary, 12), label="prompt")
    output = data.draw(token_lists(vocabulary), label="output")
    hypothesis.assume(not has_torn_run(vocabulary, prompt + output))
    text = whole_text(vocabulary, prompt, output)
    hypothesis.assume("\ufffd" not in text)
    starts = st.integers(0, max(0, len(text) - 1))
    stop = [
        text[start : start + data.draw(st.integers(1, 12), label="length")] or "zz"
        for start in data.draw(st.lists(starts, max_size=3), label="starts")
    ]
    stop += data.draw(st.lists(st.text("ab \n", min_size=1, max_size=3), max_size=2), label="more")
    min_tokens = data.draw(st.integers(0, len(output)), label="min_tokens")

    detokenizer, shown = feed(vocabulary.decode, prompt, output, stop, min_tokens)
    # The finished characters of the first min_tokens tokens.
    early = (whole_text(vocabulary, prompt, output[:n]) for n in range(min_tokens + 1))
    start = max(len(common_prefix(text, part.rstrip("\ufffd"))) for part in early)
    want, reason = first_stop(text, stop, start)
    assert (detokenizer.text, detokenizer.stop_reason) == (want, reason)
    for part in shown[:-1]:
        assert want.startswith(part)
    # Held back is what a stop string may still begin with, and nothing else.
    if reason is None and shown[-2] != text:
        held = text[len(shown[-2]) :]
        assert any(s.startswith(held) for s in stop)


def characters(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def show(text: str, stop: Sequence[str], min_tokens: int = 0) -> tuple[list[str], str | None]:
    """What is shown of a text that comes by single characters."""
    detokenizer, shown = feed(characters, [], [ord(c) for c in text], stop, min_tokens)
    return shown[1:], detokenizer.stop_reason


def test_the_beginning_of_a_stop_string_waits():
    assert show("ab<en<end>x", ["<end>"]) == (
        ["a", "ab", "ab", "ab", "ab", "ab<en", "ab<en", "ab<en", "ab<en", "ab<en", "ab<en"],
        "<end>",
    )
    assert show("aab", ["aaab"]) == (["", "", "aab", "aab"], None)
    assert show("ab", ["bc"])[0] == ["a", "a", "ab"]  # The end shows what waited.


def test_of_several_stop_strings_the_first_to_be_completed_wins():
    assert show("xabcd", ["abcd", "bc"])[1] == "bc"
    assert show("xabcd", ["bc", "abc"]) == (["x", "x", "x", "x", "x"], "abc")
    assert show("aaab", ["aab", "ab"]) == (["", "", "a", "a", "a"], "aab")


def test_a_stop_string_inside_one_token_or_over_several():
    words = ["say ", "foo END bar", "E", "N", "D"]

    def decode(ids):
        return "".join(words[i] for i in ids)

    assert feed(decode, [], [0, 1], ["END"])[0].text == "say foo "
    detokenizer, shown = feed(decode, [], [0, 2, 3, 4], ["END"])
    assert (detokenizer.text, detokenizer.stop_reason) == ("say ", "END")
    assert shown == ["", "say ", "say ", "say ", "say ", "say "]


def test_stop_strings_are_not_looked_for_in_the_prompt():
    def run(prompt, output):
        detokenizer, _ = feed(
            characters, [ord(c) for c in prompt], [ord(c) for c in output], ["ab"]
        )
        return detokenizer.text, detokenizer.stop_reason

    assert run("xab", "c") == ("c", None)
    assert run("xa", "b") == ("b", None)
    assert run("xa", "ab") == ("", "ab")


def test_min_tokens():
    assert show("abab", ["ab"], 0)[0][-1] == ""
    assert show("abab", ["ab"], 1) == (["", "", ""], "ab")  # Completed by the second token.
    assert show("abab", ["ab"], 2) == (["", "ab", "ab", "ab", "ab"], "ab")
    assert show("abab", ["ab"], 4) == (["", "ab", "ab", "abab", "abab"], None)


def test_nothing_is_added_after_a_stop():
    detokenizer = IncrementalDetokenizer(characters, [], ("b",))
    assert [detokenizer.append(ord(c)) for c in "abc"] == [False, True, True]
    assert detokenizer.text == detokenizer.finish() == "a"


# -- cost -----------------------------------------------------------------------------------------


def misaligned_bytes(length: int) -> list[int]:
    """Tokens of 3 bytes, each from the middle of one character to the middle of the next."""
    return [*"€".encode()[:1], *range(1000, 1000 + length)]


def decode_misaligned(ids: Sequence[int]) -> str:
    tail = "€".encode()
    data = b"".join(tail[1:] + tail[:1] if i >= 1000 else bytes([i]) for i in ids)
    return data.decode(errors="replace")


COSTS = {
    "text": (BYTE_LEVEL.decode, BYTE_LEVEL.encode("".join(SENTENCES) * 20)),
    "byte fallback": (BYTE_FALLBACK.decode, BYTE_FALLBACK.encode("Hello 龘你" * 300)),
    "only bytes": (BYTE_FALLBACK.decode, BYTE_FALLBACK.encode("龘你" * 300)[1:]),
    "broken": (lambda ids: bytes(ids).decode(errors="replace"), [0x80] * 2000),
    "broken byte fallback": (BYTE_FALLBACK.decode, [FIRST_BYTE_ID + 0xFF] * 2000),
    "misaligned": (decode_misaligned, misaligned_bytes(2000)),
    "silent": (BYTE_LEVEL.decode, [BYTE_LEVEL.special_id] * 2000),
    "one token": (BYTE_FALLBACK.decode, [BYTE_FALLBACK.tokenizer.token_to_id("▁")] * 2000),
}


@pytest.mark.parametrize("name", COSTS)
def test_decoded_tokens_are_linear_in_the_output(name):
    decode, output = COSTS[name]
    decoded = 0

    def counting_decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    detokenizer = IncrementalDetokenizer(counting_decode, output[:0])
    for token in output:
        detokenizer.append(token)
    assert decoded < 20 * len(output)
    assert detokenizer.finish() == decode(output)


def test_tokens_without_text_cost_a_prompt_little():
    hello = BYTE_FALLBACK.encode("Hello")
    prompt = [*hello, *range(10_000, 14_000)]  # ids that the vocabulary has no token for
    output = BYTE_FALLBACK.encode("Hello world") * 20
    decoded = []

    def counting_decode(ids):
        decoded.append(len(ids))
        return BYTE_FALLBACK.decode(ids)

    detokenizer = IncrementalDetokenizer(counting_decode, prompt, stop=["none"])
    assert sum(decoded) < 6 * len(prompt)
    decoded.clear()
    for token in output:
        detokenizer.append(token)
    assert max(decoded) < 40
    assert detokenizer.finish() == whole_text(BYTE_FALLBACK, hello, output)
