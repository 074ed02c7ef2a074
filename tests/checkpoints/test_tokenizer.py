"""The tokenizer and its chat template do what transformers does."""

import datetime
import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints import CheckpointError
from checkpoints.synthetic import EOS_TOKEN_ID, write_synthetic_llama
from checkpoints.tokenizer import Tokenizer, byte_tokenizer

TEXTS = [
    "Hello, world!",
    "",
    " leading and  double  spaces \n\n\tand tabs",
    "naïve café – 漢字 – 😀👩‍👩‍👧",
    "<|im_start|>user\nhi<|im_end|>",
    "12345.678",
    "\x00\x7f\ufffd",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>hi</b> & 'bye'\n"},
    {"role": "assistant", "content": "é"},
]
VARIANTS = {
    "as it is": {},
    "add_bos_token has no say": {"add_bos_token": True, "add_eos_token": True},
    "no bos named": {"bos_token": None},
    "tokens as objects": {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}},
    "token that tokenizer.json lacks": {"unk_token": "<unk>"},
    "declared tokens": {
        "added_tokens_decoder": {
            "384": {"content": "[A]", "special": True, "normalized": False},
            "385": {"content": "[B]", "special": False, "lstrip": True},
        }
    },
}


@pytest.fixture
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_directory(model)


@pytest.mark.oracle
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_transformers(model: Path, edit, variant: str):
    transformers = pytest.importorskip("transformers")
    edit(model / "tokenizer_config.json", **VARIANTS[variant])
    ours = Tokenizer.from_directory(model)
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    for text in [*TEXTS, "[A] and [B]"]:
        for add in (True, False):
            ids = ours.encode(text, add_special_tokens=add)
            assert ids == theirs.encode(text, add_special_tokens=add), text
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_ids == set(theirs.all_special_ids) | ours.special_ids


@pytest.mark.oracle
def test_bos_equals_transformers(tmp_path: Path, edit):
    transformers = pytest.importorskip("transformers")
    write_synthetic_llama(tmp_path, add_bos_token=True)
    edit(tmp_path / "tokenizer_config.json", add_bos_token=False)
    ours = Tokenizer.from_directory(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("Hi") == theirs.encode("Hi") == [256, 72, 105]
    assert ours.encode("Hi", add_special_tokens=False) == [72, 105]


@pytest.mark.oracle
def test_chat_template_equals_transformers(model: Path, edit):
    transformers = pytest.importorskip("transformers")
    template = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{{ m | tojson }} {{ m | tojson(indent=1) }}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}\n"
        "{% endfor %}{% set ns = namespace(n=0) %}{% set ns.n = 3 %}{{ ns.n }}\n"
        "{% if tools %}{{ tools }}{% endif %}{{ strftime_now('%Y') }} {{ pad_token }} {{ extra }}\n"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    edit(model / "tokenizer_config.json", chat_template=template)
    ours = Tokenizer.from_directory(model)
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    tools = [{"name": "f", "parameters": {"type": "object"}}]
    for options in ({}, {"tools": tools}, {"extra": [1, None, "x"]}, {"bos_token": "other"}):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(
                CHAT, tokenize=False, add_generation_prompt=prompt, **options
            )
            assert ours.apply_chat_template(CHAT, prompt, **options) == expected
    assert str(datetime.datetime.now().year) in ours.apply_chat_template(CHAT)


def test_every_text_survives(tokenizer: Tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode("<|im_start|>user")) == "user"
    ids = tokenizer.encode("é")
    assert len(ids) == 2
    assert tokenizer.decode(ids[:1]) == "�"
    assert tokenizer.decode(np.array([72, 105])) == "Hi"
    assert tokenizer.decode([100_000]) == ""


def test_ids(tokenizer: Tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, EOS_TOKEN_ID)
    assert tokenizer.vocab_size == 384
    assert tokenizer.special_ids == {256, 257, 258, 259, 260}
    assert tokenizer.has_chat_template


def test_truncation_and_padding_in_the_file_are_switched_off(model: Path, edit):
    edit(
        model / "tokenizer.json",
        truncation={
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 260,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
    )
    assert len(Tokenizer.from_directory(model).encode("a, b, c")) == 7


def test_names_in_special_tokens_map(model: Path, edit):
    edit(model / "tokenizer_config.json", eos_token=...)
    (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert Tokenizer.from_directory(model).eos_token_id == 259


def test_only_tokenizer_json_is_needed(model: Path):
    (model / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_directory(model)
    assert tokenizer.encode("Hi") == [72, 105]
    assert tokenizer.eos_token_id is None
    assert not tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match="has no chat template"):
        tokenizer.apply_chat_template(CHAT)


def test_where_templates_come_from(model: Path, edit):
    file = model / "tokenizer_config.json"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    edit(file, chat_template=named)
    tokenizer = Tokenizer.from_directory(model)
    assert tokenizer.apply_chat_template(CHAT) == "d"
    assert tokenizer.apply_chat_template(CHAT, tools=[{"name": "f"}]) == "t"
    edit(file, chat_template=named[1:])
    with pytest.raises(CheckpointError, match=r"called 'default' \(only \['tool_use'\]\)"):
        Tokenizer.from_directory(model).apply_chat_template(CHAT)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("from another file")
    (model / "chat_template.jinja").write_text("from the file")
    tools = Tokenizer.from_directory(model).apply_chat_template(CHAT, tools=[{"name": "f"}])
    assert tools == "from another file"
    assert Tokenizer.from_directory(model).apply_chat_template(CHAT) == "from the file"


@pytest.mark.parametrize(
    "template", [3, [1], [{"name": "default"}], [{"name": "a", "template": 1}]]
)
def test_malformed_template_entries(model: Path, edit, template):
    edit(model / "tokenizer_config.json", chat_template=template)
    with pytest.raises(CheckpointError, match="chat_template must be a string or a list"):
        Tokenizer.from_directory(model)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "is no valid Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].role }}", "fails on these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails on these messages"),
        ("{{ messages.append(1) }}", "fails on these messages"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails on these messages"),
    ],
)
def test_templates_that_fail_or_attack(model: Path, edit, template: str, message: str):
    edit(model / "tokenizer_config.json", chat_template=template)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_directory(model).apply_chat_template(CHAT)


def test_messages_that_are_no_json(tokenizer: Tokenizer):
    with pytest.raises(CheckpointError, match="must be made of JSON types, found object"):
        tokenizer.apply_chat_template([{"role": "user", "content": object()}])
    with pytest.raises(TypeError, match="not supported"):
        tokenizer.apply_chat_template(CHAT, tokenize=True)


def test_bad_files(model: Path, tmp_path: Path):
    file = model / "tokenizer.json"
    good = file.read_text()
    file.write_text(good[:1000])
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not valid JSON"):
        Tokenizer.from_directory(model)
    file.write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a valid tokenizer"):
        Tokenizer.from_directory(model)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        Tokenizer.from_directory(model)
    (model / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only tokenizer.model .*AutoTokenizer"):
        Tokenizer.from_directory(model)
    with pytest.raises(CheckpointError, match="no such directory"):
        Tokenizer.from_directory(tmp_path / "nowhere")


def test_vocabulary_too_small_for_the_bytes(tmp_path: Path):
    with pytest.raises(CheckpointError, match="vocab_size=100 is below 261"):
        write_synthetic_llama(tmp_path / "x", vocab_size=100)


def test_random_weights_have_text_for_each_token():
    tokenizer = byte_tokenizer(1000)
    assert tokenizer.decode(tokenizer.encode("wörld 300")) == "wörld 300"
    assert all(tokenizer.encode("~ 300 \x00")[k] < 256 for k in range(7))
    assert [tokenizer.decode([k]) for k in (256, 999, 1000)] == [" 256", " 999", ""]
