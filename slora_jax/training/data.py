"""Examples → batches of rows, packed or padded, in an order that the seed alone decides.

NumPy only. The stream of batches is a function of its arguments, so a resumed run skips what it has
seen and goes on with the very same batches. Refuses to know models and devices.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from slora_jax.errors import TrainingError
from slora_jax.loading import LoadedModel, render_chat


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt and what should follow it. The loss counts the completion's tokens only."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    completion: tuple[int, ...]
    """Token ids, at least one; with the token that ends it, if it is to be learnt."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def chat_example(base: LoadedModel, messages: Sequence[Mapping[str, str]]) -> Example:
    """A conversation whose last message is the assistant's: the completion to learn.

    The prompt is what ``LLM.chat`` makes of the other messages, so serving sees the same tokens;
    the completion ends with the model's end-of-turn token.

    Raises:
        InvalidRequestError: the messages cannot be rendered by the model's chat template.
        TrainingError: the last message is not the assistant's, or has no text.
    """
    last = messages[-1] if isinstance(messages, Sequence) and messages else None
    if (
        not isinstance(last, Mapping)
        or last.get("role") != "assistant"
        or not isinstance(last.get("content"), str)
    ):
        raise TrainingError(
            "an example ends with the assistant's message, whose content is the completion to learn"
        )
    tokenizer = base.tokenizer
    prompt = tokenizer.encode(render_chat(tokenizer, messages[:-1]), add_special_tokens=False)
    completion = tokenizer.encode(last["content"], add_special_tokens=False)
    end = tokenizer.eos_token_id
    end = base.eos_token_ids[0] if end is None else end
    return Example(tuple(prompt), (*completion, end))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Rows of equal length: B rows of S tokens, one or more examples in each, then padding."""

    token_ids: np.ndarray
    """i32[B, S]; 0 where padded."""
    positions: np.ndarray
    """i32[B, S]: within the example; 0 where padded."""
    segment_ids: np.ndarray
    """i32[B, S]: which example of the row, from 1; 0 where padded."""
    targets: np.ndarray
    """i32[B, S]: the next token of the same example."""
    loss_mask: np.ndarray
    """bool[B, S]: the target is a token of a completion."""

    @property
    def num_tokens(self) -> int:
        """Tokens of examples: padding does not count."""
        return int(np.count_nonzero(self.segment_ids))


def batches(
    examples: Sequence[Example], *, batch_size: int, max_length: int, packing: bool, seed: int
) -> Iterator[TrainingBatch]:
    """Epoch after epoch without end, shuffled anew each time.

    Args:
        examples: at least one, each at most ``max_length`` long.
        batch_size: rows.
        max_length: tokens of a row.
        packing: put an example into the first row of the batch that has room, and start a new batch
            when none has; else one example a row.
        seed: decides the order.

    Raises:
        TrainingError: there are no examples, or one is empty or too long.
    """
    _check(examples, max_length)
    return _batches(examples, batch_size, max_length, packing, seed)


def _batches(
    examples: Sequence[Example], batch_size: int, max_length: int, packing: bool, seed: int
) -> Iterator[TrainingBatch]:
    rows: list[list[Example]] = [[] for _ in range(batch_size)]
    for epoch in itertools.count():
        for index in np.random.default_rng([seed, epoch]).permutation(len(examples)):
            example = examples[index]
            row = _first_with_room(rows, len(example), max_length, packing)
            if row is None:
                yield _to_batch(rows, max_length)
                rows = [[] for _ in range(batch_size)]
                row = rows[0]
            row.append(example)


def _first_with_room(
    rows: list[list[Example]], length: int, max_length: int, packing: bool
) -> list[Example] | None:
    for row in rows:
        if not row or (packing and sum(map(len, row)) + length <= max_length):
            return row
    return None


def _to_batch(rows: list[list[Example]], max_length: int) -> TrainingBatch:
    shape = len(rows), max_length
    token_ids, positions, segment_ids, targets = (np.zeros(shape, np.int32) for _ in range(4))
    loss_mask = np.zeros(shape, bool)
    for row, examples in enumerate(rows):
        first = 0
        for segment, example in enumerate(examples, start=1):
            tokens, end = (*example.prompt, *example.completion), first + len(example)
            token_ids[row, first:end] = tokens
            positions[row, first:end] = np.arange(len(tokens))
            segment_ids[row, first:end] = segment
            targets[row, first : end - 1] = tokens[1:]
            loss_mask[row, first + len(example.prompt) - 1 : end - 1] = True
            first = end
    return TrainingBatch(
        token_ids=token_ids,
        positions=positions,
        segment_ids=segment_ids,
        targets=targets,
        loss_mask=loss_mask,
    )


def _check(examples: Sequence[Example], max_length: int) -> None:
    if not isinstance(examples, Sequence):
        raise TrainingError(f"the examples are {examples!r:.80}: give a list of Example")
    if not examples:
        raise TrainingError("there are no examples to train on")
    for index, example in enumerate(examples):
        if not isinstance(example, Example) or not all(
            isinstance(ids, Sequence) and ids for ids in (example.prompt, example.completion)
        ):
            raise TrainingError(
                f"example {index} is {example!r:.80}: give an Example with at least one token of "
                "prompt and one of completion"
            )
        if len(example) > max_length:
            raise TrainingError(
                f"example {index} has {len(example)} tokens, a row has max_length={max_length}: "
                "raise max_length or leave it out"
            )
