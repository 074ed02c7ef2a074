"""Text to token ids and back, and chat templates, from a Hugging Face directory.

It owns what transformers does around a `tokenizer.json`: which tokens are special, which chat
template applies and what that template may see. It refuses to know models, requests and streaming,
and every other format: a `tokenizer.model` alone is an error with advice.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from checkpoints.errors import CheckpointError
from checkpoints.files import read_json, require_directory

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class Tokenizer:
    """A fast tokenizer and its chat template; encodes and decodes as transformers does."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        named_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        source: str = "tokenizer",
    ):
        """`named_tokens`: `bos_token`, `eos_token`, … -> text. `chat_templates`: name -> template;
        the usual one is called "default".
        """
        self._backend = backend
        self._named = dict(named_tokens or {})
        self._templates = dict(chat_templates or {})
        self._compiled: dict[str, jinja2.Template] = {}
        self._source = source
        backend.no_truncation()
        backend.no_padding()
        special = {
            id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special
        }
        named = {backend.token_to_id(text) for text in self._named.values()}
        self.special_ids: frozenset[int] = frozenset(
            special | {id_ for id_ in named if id_ is not None}
        )
        """Ids that `decode` skips unless told otherwise."""

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
        """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

        Only the first is needed; its post-processor alone decides about BOS and EOS, as in
        transformers (`add_bos_token` of `tokenizer_config.json` has no say). Raises
        `CheckpointError`.
        """
        path = require_directory(directory, "a tokenizer")
        backend = _read_backend(path)
        config = _optional_json(path / "tokenizer_config.json")
        named = _named_tokens(_optional_json(path / "special_tokens_map.json"), config)
        _add_missing_tokens(backend, config, named)
        return cls(
            backend,
            named_tokens=named,
            chat_templates=_read_chat_templates(path, config),
            source=str(path),
        )

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`, None if the tokenizer names none."""
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`, None if the tokenizer names none."""
        return self._id_of("eos_token")

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a model's own vocabulary may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return bool(self._templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return token ids. Special tokens written out in `text` become their ids.

        `add_special_tokens` adds BOS (and EOS) where the tokenizer does so; say False for text that
        `apply_chat_template` made, which has them already.
        """
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return text. Ids without a token give nothing, bytes that are no UTF-8 give U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Return `messages` (`[{"role": …, "content": …}, …]`) as one prompt string.

        `tools` are JSON schemas; further keywords become variables of the template, which runs
        sandboxed. Raises `CheckpointError` if there is no template or if it refuses the messages.
        """
        if kwargs.pop("tokenize", False) or kwargs.pop("continue_final_message", False):
            raise TypeError("tokenize=True and continue_final_message=True are not supported here.")
        template = self._template("tool_use" if tools else "default")
        variables = {
            **self._named,
            **_plain(kwargs),
            "messages": _plain(messages),
            "tools": _plain(tools),
            "documents": _plain(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(variables)
        except Exception as error:  # a template is code: it raises what it likes
            raise CheckpointError(
                f"{self._source}: the chat template fails on these messages: {error}"
            ) from error

    def _id_of(self, name: str) -> int | None:
        text = self._named.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._templates:
            name = "default"
        if name not in self._templates:
            there = f" called 'default' (only {sorted(self._templates)})" if self._templates else ""
            raise CheckpointError(
                f"{self._source}: the tokenizer has no chat template{there}; use an "
                "instruction-tuned model, add a chat_template.jinja, or pass prompts as plain text."
            )
        if name not in self._compiled:
            try:
                self._compiled[name] = _template_environment().from_string(self._templates[name])
            except Exception as error:  # jinja2 lets RecursionError and others through
                raise CheckpointError(
                    f"{self._source}: the chat template is no valid Jinja: {error}"
                ) from error
        return self._compiled[name]


def require_tokenizer(source: str | os.PathLike[str]) -> None:
    """`CheckpointError` where there is no tokenizer to copy: the directory is gone, say."""
    if not (Path(source).expanduser() / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{source}: the model was read from there, and its tokenizer.json is not there any "
            "more: put it back, so that it can be copied."
        )


def copy_tokenizer(source: str | os.PathLike[str], directory: Path) -> None:
    """Copy those of a tokenizer's files that `source` has; `CheckpointError` where that fails."""
    try:
        for name in _FILES:
            if (Path(source).expanduser() / name).exists():
                shutil.copyfile(Path(source).expanduser() / name, directory / name)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error}.") from error


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer for models of random weights: it encodes each byte as one id from 0 to 255.

    The other ids below `vocab_size` decode to a space and their number: as with trained models
    there is text for each token, on which the time of decoding depends.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = [f"Ġ{token_id}" for token_id in range(len(alphabet), vocab_size)]
    return Tokenizer(build_byte_level_bpe([*alphabet, *numbers], []), source="one token a byte")


def build_byte_level_bpe(
    tokens: Sequence[str],
    merges: Sequence[tuple[str, str]],
    *,
    special: Sequence[str] = (),
    added: Sequence[str] = (),
    split_digits: bool = False,
    bos: str | None = None,
) -> tokenizers.Tokenizer:
    """A GPT-2 style tokenizer: `tokens[id]` in the byte alphabet, `merges` in order of priority.

    `special` and `added` are tokens (of `tokens`) matched whole before anything else; only the
    special ones are skipped by `decode`. `split_digits` makes each digit a word of its own. `bos`
    (of `tokens`) is put before every encoded text.
    """
    vocab = {token: id_ for id_, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    if split_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_added_token(text, special=True) for text in special])
    backend.add_tokens([_added_token(text, special=False) for text in added])
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, vocab[bos])]
        )
    return backend


def _added_token(text: str, *, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(text, special=special, normalized=False)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists():
        if (path / "tokenizer.model").exists():
            raise CheckpointError(
                f"{path}: has only tokenizer.model (SentencePiece), which is not read; convert it "
                "(transformers: AutoTokenizer.from_pretrained(path).save_pretrained(path))."
            )
        raise CheckpointError(f"{path}: has no tokenizer.json.")
    read_json(file)  # names a missing, unreadable or non-JSON file better than the library does
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise CheckpointError(
            f"{file}: not a valid tokenizer ({error}); fetch it again."
        ) from error


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _text(token: Any) -> str | None:
    """A token in a config is a string or an object with its `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _named_tokens(*configs: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, … -> text; later configs win."""
    named = {}
    for config in configs:
        for name in _NAMED:
            text = _text(config.get(name))
            if text is not None:
                named[name] = text
    return named


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Tokens that `tokenizer_config.json` declares and `tokenizer.json` lacks, as transformers."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    for token in declared.values() if isinstance(declared, dict) else ():
        text = _text(token)
        if text is not None and text not in known:
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            options = {flag: bool(token[flag]) for flag in flags if flag in token}
            backend.add_tokens([tokenizers.AddedToken(text, **options)])
            known.add(text)
    for text in named.values():
        if text not in known:
            backend.add_special_tokens([_added_token(text, special=True)])
            known.add(text)


def _read_chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> template; `.jinja` files win over `tokenizer_config.json`."""
    files = {file.stem: file for file in (path / "additional_chat_templates").glob("*.jinja")}
    if (path / "chat_template.jinja").exists():
        files["default"] = path / "chat_template.jinja"
    if files:
        return {name: _read_text(file) for name, file in files.items()}
    template = config.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    templates = {}
    for entry in template if isinstance(template, list) else [None]:
        name, text = (
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (0, 0)
        )
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(
                f"{path / 'tokenizer_config.json'}: chat_template must be a string or a list of "
                '{"name": …, "template": …}.'
            )
        templates[name] = text
    return templates


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from error


def _template_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that transformers gives to templates; templates rely on each of its parts."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks words for training; here it is only content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        """Replace the block by its content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _plain(value: Any) -> Any:
    """Rebuild template input out of JSON types: no method of a user's object is in its reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for base in (str, int, float):
        if isinstance(value, base):  # a subclass: back to its base
            return base(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise CheckpointError(
        f"chat messages must be made of JSON types, found {type(value).__name__}."
    )
