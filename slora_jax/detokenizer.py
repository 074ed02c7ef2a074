"""Token ids to text, one token at a time: what can be shown now, and where a stop string ends it.

Owns the text of one output. Refuses to know the tokenizer, of which it sees only ``decode``, and
the other ways in which an output ends.

A token has no text of its own: it may hold part of a character, or a space that is written only
where something stands before it. So each token is decoded together with the few before it (a
*window* that starts at a character's boundary) and its text is what the window's text has gained.
An unfinished character decodes to U+FFFD at the end of the text; it waits until it is finished,
broken by what follows, or the output ends. Text once settled is never taken back.

Without stop strings nothing depends on the text until somebody looks at it, and many tokens are
decoded at once in little more time than one.
"""

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"
_MIN_WINDOW = 8
"""Tokens of context that a window starts with or keeps, where there are so many."""
_MAX_OPEN = 8
"""A character has at most 4 bytes: when this many tokens have not finished it, it is broken."""


class IncrementalDetokenizer:
    """The text of one output as its tokens arrive, in amortised constant time for each.

    Invariant: ``stream_text`` is a prefix of every later ``stream_text`` and of the final text. The
    final text is what ``decode`` gives for prompt and output beyond what it gives for the prompt,
    cut before the first stop string to be completed (of two completed by one character, the
    longer). One exception: sentencepiece's byte fallback turns the valid characters of a run of
    byte tokens into U+FFFD where any byte of the run is invalid; here they may stay.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ):
        """Start an output.

        Args:
            decode: text of token ids; must write U+FFFD for bytes that are no UTF-8, and must not
                clean up spaces (``clean_up_tokenization_spaces=False``).
            prompt_token_ids: what the output follows; only the last few are decoded.
            stop: strings that end the output, looked for in the output alone.
            min_tokens: a stop string completed by one of the first ``min_tokens`` tokens is text.
        """
        self.stop_reason: str | None = None
        """The stop string that ended the output."""

        self._decode = decode
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._pending: list[int] = []  # The last of them, not decoded yet; empty with stop strings.
        self._matchers = [_StopMatcher(string) for string in stop]
        self._silent_ids: dict[int, bool] = {}

        self._settled = ""  # Output text that cannot change; grows by _settle alone.
        self._unsettled = ""  # The U+FFFDs after it that may still become something else.
        self._cut: int | None = None  # Where in _settled the stop string starts.
        self._is_finished = False

        self._begin_window(prompt_token_ids)
        # A character that the prompt leaves unfinished is the output's if the output finishes it.
        self._prompt_open = self._gain(self._window_text)

    @property
    def text(self) -> str:
        """The output's text as it would be if it ended here."""
        self._decode_pending()
        return self._settled + self._unsettled if self._cut is None else self._settled[: self._cut]

    @property
    def stream_text(self) -> str:
        """The part of the text that nothing to come can change: no unfinished character, no
        beginning of a stop string."""
        if self._is_finished or self._cut is not None:
            return self.text
        self._decode_pending()
        held = max((matcher.matched for matcher in self._matchers), default=0)
        return self._settled[: len(self._settled) - held]

    def append(self, token_id: int) -> bool:
        """Add the next token; True where it completes a stop string, after which no more is
        added."""
        if self._cut is not None:
            return True
        assert not self._is_finished, "append after finish"
        self._num_tokens += 1
        if not self._matchers:
            self._pending.append(token_id)
            return False
        if (text := self._take_whole([token_id])) is not None:
            return self._settle(text)
        return self._take(token_id)

    def finish(self) -> str:
        """End the output: what waited is text now. Returns the final text."""
        self._is_finished = True
        return self.text

    def _decode_pending(self) -> None:
        """Take all of them: at once where they end no character and begin none, or one by one."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        if (text := self._take_whole(pending)) is not None:
            self._settle(text)
            return
        for token_id in pending:
            self._take(token_id)

    def _take_whole(self, token_ids: list[int]) -> str | None:
        """Let the window grow by tokens whose text has no unfinished character, and return it.

        None, with nothing changed, where there is one, or no text at all.
        """
        if self._prompt_open:
            return None
        window = self._window + token_ids
        text = self._decode(window)
        gain = text[len(self._before) :]
        if not gain or _UNFINISHED in gain or not text.startswith(self._before):
            return None
        self._unsettled = ""
        if len(window) <= 2 * _MIN_WINDOW:
            self._window, self._closed = window, len(window)
            self._window_text = self._before = text
        else:
            self._begin_window(window)
        return gain

    def _take(self, token_id: int) -> bool:
        """Add the next token, whatever it is; True where it completes a stop string."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._window_text and self._is_silent(token_id):
            self._window.pop()  # Or a long run of them would make the window as long.
            return False
        self._window_text = text

        gain = self._gain(text)
        stable = gain.rstrip(_UNFINISHED)
        is_closed = stable == gain
        is_broken = not is_closed and len(self._window) - self._closed > _MAX_OPEN
        if is_broken:
            self._restart()
            stable = gain.removesuffix(self._window_text[len(self._before) :])
        elif not is_closed and not text.startswith(self._before):
            stable = ""  # decode takes text back: wait for the boundary.
        num_unsettled = len(gain) - len(stable)
        start = _common_prefix(gain, self._prompt_open)
        settled = stable[start:]
        self._unsettled = gain[max(start, len(stable)) :]

        if is_closed:
            self._close()
        elif stable and not is_broken:
            self._before = text[: len(text) - num_unsettled]
        self._prompt_open = self._prompt_open[len(stable) :] if len(stable) <= start else ""
        return self._settle(settled)

    def _begin_window(self, token_ids: Sequence[int]) -> None:
        """A new window, on the last of ``token_ids``.

        Its text starts with ``_before``, which is settled or the prompt's; its first ``_closed``
        tokens end at a character's boundary.
        """
        self._window = _context(self._decode, token_ids)
        self._window_text = self._decode(self._window)
        self._closed = len(self._window)
        self._before = self._window_text
        while self._closed > 0 and self._before.endswith(_UNFINISHED):
            self._closed -= 1
            self._before = self._decode(self._window[: self._closed])
        if self._window_text.startswith(self._before):
            self._before = self._window_text.rstrip(_UNFINISHED)

    def _gain(self, text: str) -> str:
        """What the window's ``text`` has beyond the settled."""
        if text.startswith(self._before):
            return text[len(self._before) :]
        return self._decode(self._window[self._closed :])

    def _close(self) -> None:
        """The window ends at a character's boundary; let its start follow."""
        self._before = self._window_text
        self._closed, previous = len(self._window), self._closed
        if previous >= _MIN_WINDOW:
            self._window = self._window[previous:]
            self._before = self._window_text = self._decode(self._window)
            self._closed = len(self._window)

    def _restart(self) -> None:
        """No token of late ended at a character's boundary: start the window between two others.

        An unfinished character reaches back 3 tokens at most and is one U+FFFD at the end. What
        the window's text starts with may be a torn character, but is the same from now on.
        """
        self._window = self._window[-4:]
        self._window_text = self._decode(self._window)
        self._before = self._window_text.removesuffix(_UNFINISHED)
        self._closed = 0

    def _is_silent(self, token_id: int) -> bool:
        """Whether the token never has any text, as a special token that is skipped."""
        if token_id not in self._silent_ids:
            self._silent_ids[token_id] = _is_silent(self._decode, token_id)
        return self._silent_ids[token_id]

    def _settle(self, text: str) -> bool:
        """Add settled text; True where it completes a stop string."""
        start = len(self._settled)
        self._settled += text
        if not self._matchers:
            return False
        for end, character in enumerate(text, start=start + 1):
            completed = [m.stop for m in self._matchers if m.feed(character)]
            if completed and self._num_tokens > self._min_tokens:
                self.stop_reason = max(completed, key=len)
                self._cut = end - len(self.stop_reason)
                return True
        return False


class _StopMatcher:
    """Knuth, Morris and Pratt's search for one stop string in text that comes by characters."""

    def __init__(self, stop: str):
        self.stop = stop
        self.matched = 0
        """Length of the longest end of the text so far that the stop string starts with."""
        # _shorter[n]: the next shorter such end, given that the longest has length n.
        self._shorter = [0, 0]
        for length in range(1, len(stop)):
            shorter = self._shorter[length]
            while shorter and stop[shorter] != stop[length]:
                shorter = self._shorter[shorter]
            self._shorter.append(shorter + (stop[shorter] == stop[length]))

    def feed(self, character: str) -> bool:
        """Take the next character; True where it completes the stop string."""
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._shorter[self.matched]
        self.matched += self.stop[self.matched] == character
        if self.matched < len(self.stop):
            return False
        self.matched = self._shorter[self.matched]
        return True


def _common_prefix(a: str, b: str) -> int:
    """How many characters a and b begin with alike."""
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def _is_silent(decode: Callable[[Sequence[int]], str], token_id: int) -> bool:
    """Whether a token has no text whatever stands before it."""
    return decode([token_id, token_id]) == ""  # twice: sentencepiece begins with no space


def _context(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]) -> list[int]:
    """The last few of the prompt's tokens: some with text, from a character's boundary on."""
    size = _MIN_WINDOW
    while size < len(token_ids) and not decode(token_ids[-size:]):
        size *= 2
    if size > _MIN_WINDOW:  # leave out tokens without text: they may be many
        tail = token_ids[-size - 3 :]
        silent = {token_id for token_id in {*tail} if _is_silent(decode, token_id)}
        token_ids = [token_id for token_id in tail if token_id not in silent]
    last = len(token_ids)
    first = max(0, last - _MIN_WINDOW)
    for start in range(first, max(first - 4, -1), -1):
        # Up to 3 of the last tokens may be an unfinished character, for which byte fallback writes
        # U+FFFD from the start.
        texts = (decode(token_ids[start:end]) for end in range(last, max(last - 4, start), -1))
        if any(not text.startswith(_UNFINISHED) for text in texts):
            return list(token_ids[start:])
    return list(token_ids[first:])
