"""What one request asks of generation: the user's options, validated once, never changed.

Owns the names, the defaults and the allowed ranges of every option, in vLLM's words and with its
meanings, and the error that each bad value gets. Refuses to know arrays, models, tokenizers and
requests: how an option acts is written in ``sampling`` (tokens), ``detokenizer`` (text) and the
scheduler (lengths).
"""

import dataclasses
import difflib
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from slora_jax.errors import InvalidRequestError

GREEDY_BELOW = 1e-5
"""A temperature under this is greedy, as in vLLM."""

MAX_LOGPROBS = 20
MAX_N = 16384
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 256

SEED_BITS = 63
"""Seeds are in 0 <= seed < 2**63; the device gets all of it, see ``split_seed``."""

_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Options of one request, with vLLM's names, defaults and meanings.

    Frozen and hashable; lists become tuples, numpy scalars Python numbers. A bad value raises
    ``InvalidRequestError``, which names the field, the allowed range and what was given.
    """

    n: int = 1
    """How many outputs to generate for the prompt, 1..16384; must be 1 when greedy, for all n
    would be the same."""

    temperature: float = 1.0
    """Logits are divided by it. 0 (anything below 1e-5) is greedy decoding, which also turns
    top_k, top_p and min_p off."""

    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches this; in (0, 1]."""

    top_k: int = 0
    """Keep the k likeliest tokens; 0 (or -1, stored as 0) keeps all."""

    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the likeliest one; in [0, 1]."""

    seed: int | None = None
    """Makes sampling repeatable, whatever else is being served; 0 <= seed < 2**63. None draws a
    fresh one for each request."""

    max_tokens: int | None = 16
    """Most tokens to generate; None is as many as the model and the pool allow."""

    min_tokens: int = 0
    """No end-of-sequence, stop token or stop string among the first this many tokens."""

    stop: Sequence[str] = ()
    """One string, or a list or tuple of up to 16: generation ends when the output contains one of
    them, and the text is cut before it. Stored as a tuple; None is none."""

    stop_token_ids: Sequence[int] = ()
    """A list or tuple of up to 256 token ids: generation ends when one of them is generated.
    Stored as a tuple; None is none."""

    ignore_eos: bool = False
    """Keep generating past the model's end-of-sequence token."""

    logprobs: int | None = None
    """For each generated token, its log-probability and those of this many likeliest tokens,
    0..20. Taken from the raw logits, before penalties and temperature."""

    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the output
    (CTRL); > 0, 1 is off."""

    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the output contains; in [-2, 2]."""

    frequency_penalty: float = 0.0
    """Subtracted once for each time that the output contains the token; in [-2, 2]."""

    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        put = self._put
        put("n", _integer("n", self.n, 1, MAX_N))
        put("temperature", _number("temperature", self.temperature, least=0.0))
        put("top_p", _number("top_p", self.top_p, above=0.0, most=1.0))
        top_k = _integer("top_k", self.top_k, -1, _INT32_MAX, note="0 or -1 keeps all tokens")
        put("top_k", max(top_k, 0))
        put("min_p", _number("min_p", self.min_p, least=0.0, most=1.0))
        put("seed", _optional(_integer, "seed", self.seed, 0, 2**SEED_BITS - 1))
        put("max_tokens", _optional(_integer, "max_tokens", self.max_tokens, 1, _INT32_MAX))
        put("min_tokens", _integer("min_tokens", self.min_tokens, 0, _INT32_MAX))
        put("stop", _stop_strings(self.stop))
        put("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        put("ignore_eos", _boolean("ignore_eos", self.ignore_eos))
        put("logprobs", _optional(_integer, "logprobs", self.logprobs, 0, MAX_LOGPROBS))
        put(
            "prompt_logprobs",
            _optional(_integer, "prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS),
        )
        put("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, above=0.0))
        for name in ("presence_penalty", "frequency_penalty"):
            put(name, _number(name, getattr(self, name), least=-2.0, most=2.0))
        put("skip_special_tokens", _boolean("skip_special_tokens", self.skip_special_tokens))

        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"SamplingParams.min_tokens must be at most max_tokens ({self.max_tokens}), "
                f"got {self.min_tokens}"
            )
        if self.is_greedy and self.n > 1:
            raise InvalidRequestError(
                f"SamplingParams.n must be 1 when temperature is {self.temperature:g} (greedy: "
                f"every output would be the same), got {self.n}; set temperature > 0 for "
                "different outputs"
            )

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "SamplingParams":
        """SamplingParams from a mapping of option names, as parsed from JSON or YAML."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise InvalidRequestError(
                    f"SamplingParams has no option {name!r}; {hint}It has: {', '.join(names)}"
                )
        return cls(**options)

    @property
    def is_greedy(self) -> bool:
        """Each token is the likeliest one; no randomness and no truncation."""
        return self.temperature < GREEDY_BELOW

    @functools.cached_property
    def is_argmax(self) -> bool:
        """Each token is the likeliest one by the raw logits, which nothing changes."""
        return self.is_greedy and not self.has_penalties and not self.min_tokens

    @property
    def has_truncation(self) -> bool:
        """top_k, top_p or min_p removes tokens."""
        on = self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0
        return on and not self.is_greedy

    @property
    def has_penalties(self) -> bool:
        """A penalty needs the ids of the tokens so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def split_seed(seed: int) -> tuple[int, int]:
    """A seed of up to 64 bits as the two 32-bit words (high, low) that ``sampling`` takes."""
    return seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF


def _refuse(name: str, allowed: str, value: Any) -> InvalidRequestError:
    kind = type(value).__name__
    return InvalidRequestError(f"SamplingParams.{name} must be {allowed}, got {value!r} ({kind})")


def _optional(check: Any, name: str, value: Any, *limits: Any) -> Any:
    return None if value is None else check(name, value, *limits, note="or None")


def _integer(name: str, value: Any, least: int, most: int, note: str = "") -> int:
    allowed = f"an integer from {least} to {most}" + (f" ({note})" if note else "")
    if isinstance(value, bool):
        raise _refuse(name, allowed, value)
    try:
        number = operator.index(value)  # Also numpy integers; no float, however whole.
    except TypeError:
        raise _refuse(name, allowed, value) from None
    if not least <= number <= most:
        raise _refuse(name, allowed, value)
    return number


def _number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
) -> float:
    low = f">= {least:g}" if least > -math.inf else f"> {above:g}"
    allowed = f"a finite number {low}" + (f" and <= {most:g}" if most < math.inf else "")
    if isinstance(value, (bool, str, bytes)):
        raise _refuse(name, allowed, value)
    try:
        number = float(value)  # Also numpy scalars.
    except (TypeError, ValueError, OverflowError):
        raise _refuse(name, allowed, value) from None
    if not (math.isfinite(number) and number >= least and number > above and number <= most):
        raise _refuse(name, allowed, value)
    return number


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, "True or False", value)
    return value


def _stop_strings(value: Any) -> tuple[str, ...]:
    allowed = f"a non-empty string or at most {MAX_STOP_STRINGS} of them"
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or len(strings) > MAX_STOP_STRINGS:
        raise _refuse("stop", allowed, value)
    if not all(isinstance(string, str) and string for string in strings):
        raise _refuse("stop", allowed, value)
    return tuple(dict.fromkeys(strings))


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or len(value) > MAX_STOP_TOKEN_IDS:
        raise _refuse("stop_token_ids", f"a list of at most {MAX_STOP_TOKEN_IDS} ids", value)
    ids = (_integer("stop_token_ids", each, 0, _INT32_MAX, note="each") for each in value)
    return tuple(dict.fromkeys(ids))
