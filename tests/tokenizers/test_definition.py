"""Every field of a tokenizer.json is checked; an error names the file and the field."""

from __future__ import annotations

import json

import pytest

from streaming_rwkv.tokenizer import (
    TokenizerError,
    load_tokenizer,
)

GOOD = {
    "model": {"type": "BPE", "vocab": {"</s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"]},
    "added_tokens": [
        {"id": 0, "content": "</s>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ],
}


def changed(field: str, value: object) -> dict[str, object]:
    """Return GOOD with another value at `field`, a path such as model.vocab."""
    definition = json.loads(json.dumps(GOOD))
    place = definition
    *path, last = field.split(".")
    for key in path:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    return definition


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("added_tokens", None, "added_tokens: found None, expected a list"),
        ("added_tokens", {"a": 1}, "added_tokens: found {'a': 1}, expected a list"),
        ("added_tokens", ["</s>"], r'added_tokens\[0\]: found \'</s>\', expected a mapping with "id" and "content"'),
        ("added_tokens", [{"content": "</s>"}], r"added_tokens\[0\]\.id: found None, expected a number"),
        ("added_tokens", [{"id": True, "content": "</s>"}], r"added_tokens\[0\]\.id: found True, expected a number"),
        ("added_tokens", [{"id": 0, "content": 7}], r"added_tokens\[0\]\.content: found 7, expected a text"),
        ("added_tokens.0.special", "yes", r"added_tokens\[0\]\.special: found 'yes', expected true or false"),
        (
            "added_tokens",
            [{"id": 2**31, "content": "</s>"}],
            r"added_tokens\[0\]\.id: found 2147483648, expected an id",
        ),
        ("added_tokens", [{"id": -1, "content": "</s>"}], r"added_tokens\[0\]\.id: found -1, expected an id from 0"),
        ("added_tokens", [{"id": 1, "content": "</s>"}], r"added_tokens\[0\]\.id: id 1 belongs to 'a' and to '</s>'"),
        (
            "added_tokens",
            [{"id": 9, "content": "</s>"}],
            r"added_tokens\[0\]\.id: found 9, expected 0, the id of '</s>'",
        ),
        ("model.vocab", None, "model.vocab: found None, expected a mapping"),
        ("model.vocab", "abc", "model.vocab: found 'abc', expected a mapping"),
        ("model.vocab", {"</s>": "0"}, r"model\.vocab\['</s>'\]: found '0', expected an id"),
        ("model.vocab", {"</s>": 0, "a": 0}, r"model\.vocab\['a'\]: id 0 belongs to '</s>' and to 'a'"),
        ("model.vocab", {"</s>": 2**62}, r"model\.vocab\['</s>'\]: found 4611686018427387904, expected an id"),
        ("model.vocab", ["</s>"], r"model\.vocab\[0\]: found '</s>', expected \[token, score\]"),
        (
            "model.max_input_chars_per_word",
            10**18,
            "model.max_input_chars_per_word: found 1000000000000000000, expected",
        ),
        (
            "model.continuing_subword_prefix",
            "#" * 99,
            "model.continuing_subword_prefix: found '##.*, expected a text of",
        ),
        ("model.merges", 3, "model.merges: found 3, expected a list"),
        ("model.merges", {"a": "b"}, "model.merges: found {'a': 'b'}, expected a list"),
        ("model.merges", [["a", "b", "c"]], r"model\.merges\[0\]: found \['a', 'b', 'c'\], expected"),
        ("model.merges", [["a", "b"], "a b"], r"model\.merges\[1\]: found 'a b', expected .* the same in all"),
        ("decoder", [], r"decoder: found \[\], expected a mapping"),
        ("decoder", {"type": "Sequence", "decoders": ["x"]}, r"decoder.decoders\[0\]: found"),
        ("model", [], "no Hugging Face tokenizer: it has no 'model'"),
    ],
)
def test_a_malformed_tokenizer_json_names_the_field(tmp_path, field, value, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(field, value)))
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json: {message}"):
        load_tokenizer(tmp_path, eos_token="</s>")


def test_the_form_that_malformed_ones_differ_from_is_fine(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOOD))
    assert load_tokenizer(tmp_path, eos_token="</s>").encode("abba").tolist() == [3, 2, 1]


def test_tokens_that_are_too_much_together_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("streaming_rwkv.tokenizers.definition.MOST_CHARACTERS", 8)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    for field, value in (
        ("model.vocab", {"</s>": 0, "a" * 5: 1}),
        ("model.vocab", [["</s>", 0.0], ["a" * 5, 0.0]]),
        ("added_tokens.0.content", "</s>aaaaa"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed(field, value)))
        with pytest.raises(TokenizerError, match=r": found more, expected at most 8 characters of all tokens together"):
            load_tokenizer(tmp_path)
