"""Token ids and the supervised mask are what the processor and the answers say (PITFALLS 1, 4, 8, 11, 12)."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

from vlmtune.batching import encode
from vlmtune.batching.encode import Encoder
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import EncodingError, NothingSupervisedError, TooLongError
from vlmtune.models.families import FAMILIES

GEMMA = FAMILIES["gemma3"]
CONVERSATIONS = {
    "one turn": ([0], [("What color is the shape?", "red")]),
    "answer with spaces": ([1], [("Describe this image.", "  a dog  and a cat \n")]),
    "two turns": ([2], [("What color is the shape?", "red"), ("Is there a dog?", "no")]),
    "same answer twice": ([3], [("Is there a dog?", "no"), ("no?", "no")]),
    "three images": ([0, 1, 2], [("Describe this image.", "a red circle")]),
    "text only": ([], [("What color is red?", "red")]),
    "unicode": ([4], [("Что это? 形は？", "une forme à côté — 🟥 ünknown")]),
}


def _decode(processor, sample, encoder) -> str:
    encoded = encoder(sample)
    kept = [token for token, flag in zip(encoded.input_ids, encoded.supervised, strict=True) if flag]
    return processor.tokenizer.decode(kept)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_supervised_is_answer_and_terminator(name, system, make_sample, encoder, processor) -> None:
    images, turns = CONVERSATIONS[name]
    sample = make_sample(name, images, turns, system)
    expected = "".join(answer.strip() + "<end_of_turn>" for _, answer in turns)
    assert _decode(processor, sample, encoder) == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_equal_the_processors_own(name, make_sample, encoder, processor) -> None:
    images, turns = CONVERSATIONS[name]
    sample = make_sample(name, images, turns)
    conversation, pictures = [], iter([Image.open(ref.path).convert("RGB") for ref in sample.images])
    for message in sample.messages:
        content = [
            {"type": "image", "image": next(pictures)} if part.type == "image" else part.to_template()
            for part in message.parts
        ]
        conversation.append({"role": message.role, "content": content})
    whole = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
    encoded = encoder(sample)
    assert encoded.input_ids == list(whole["input_ids"][0])
    assert encoded.token_type_ids == list(whole["token_type_ids"][0])
    # What generation is given is the same ids, cut before the last answer.
    prompt = processor.apply_chat_template(
        conversation[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert encoder.prompt(sample).input_ids == list(prompt["input_ids"][0])
    first_of_last_answer = len(prompt["input_ids"][0])
    assert encoded.input_ids[:first_of_last_answer] == list(prompt["input_ids"][0])
    assert encoded.supervised[first_of_last_answer]


def test_exactly_one_bos_and_no_special_token_supervised(make_sample, encoder, processor) -> None:
    encoded = encoder(make_sample("a", [0, 1], [("What?", "red"), ("And?", "blue")], system="Be brief."))
    tokenizer = processor.tokenizer
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    supervised = {token for token, flag in zip(encoded.input_ids, encoded.supervised, strict=True) if flag}
    forbidden = {tokenizer.bos_token_id, tokenizer.pad_token_id, *processor.image_token_ids}
    assert not supervised & forbidden


def test_bos_is_added_when_the_template_does_not(make_sample, processor) -> None:
    template = processor.chat_template.replace("{{ bos_token }}", "")
    assert template != processor.chat_template
    original = processor.chat_template
    processor.chat_template = template
    try:
        encoded = Encoder(processor, GEMMA)(make_sample("a", [0], [("What?", "red")]))
    finally:
        processor.chat_template = original
    # The tokenizer is asked to add it; Gemma's adds none by itself in the tiny one, so at most one is there.
    assert encoded.input_ids.count(processor.tokenizer.bos_token_id) <= 1


def test_token_types_mark_image_tokens(make_sample, encoder, processor) -> None:
    encoded = encoder(make_sample("a", [0, 1], [("What?", "red")]))
    image_id = processor.image_token_ids[0]
    assert encoded.token_type_ids == [int(token == image_id) for token in encoded.input_ids]
    assert sum(encoded.token_type_ids) == 2 * processor.image_seq_length
    assert len(encoded.image_inputs["pixel_values"]) == 2


def test_text_needs_no_pixels(make_sample, encoder) -> None:
    sample = make_sample("a", [0, 1], [("What?", "red")])
    assert encoder(sample, pixels=False).input_ids == encoder(sample).input_ids


@pytest.mark.parametrize("token", ["<start_of_image>", "<image_soft_token>", "<end_of_turn>", "<eos>", "<bos>"])
@pytest.mark.parametrize("role", ["question", "answer"])
def test_control_tokens_in_text_are_refused(token, role, make_sample, encoder) -> None:
    turn = (f"What {token}?", "red") if role == "question" else ("What?", f"red {token}")
    with pytest.raises(EncodingError, match=f"'planted'.*{token}"):
        encoder(make_sample("planted", [0], [turn]))


def test_html_like_text_is_text(make_sample, encoder, processor) -> None:
    sample = make_sample("a", [0], [("What is <image>?", "a <b>tag</b>")])
    assert _decode(processor, sample, encoder) == "a <b>tag</b><end_of_turn>"


def test_images_must_match_places(make_sample, encoder) -> None:
    sample = make_sample("short", [0, 1], [("What?", "red")])
    broken = dataclasses.replace(sample, images=sample.images[:1])
    with pytest.raises(EncodingError, match=r"'short'.*2 image place.*1 image"):
        encoder(broken)


def test_nothing_supervised_is_refused_by_id(encoder, image_folder) -> None:
    sample = Sample("quiet", (ImageRef(str(image_folder / "0.jpg")),), (Message.make("user", "What?", images=1),))
    with pytest.raises(NothingSupervisedError, match="'quiet'"):
        encoder(sample)


class TestLength:
    """``max_length`` never cuts an image."""

    def test_error_names_sample_and_counts(self, make_sample, processor) -> None:
        encoder = Encoder(processor, GEMMA, max_length=20)
        sample = make_sample("long", [0], [("What color is the shape?", "red")])
        with pytest.raises(TooLongError, match=r"'long' has \d+ tokens \(4 of them image tokens\).*max_length 20"):
            encoder(sample)

    def test_truncation_cuts_text_from_the_end(self, make_sample, processor) -> None:
        sample = make_sample("long", [0], [("What?", "red green blue black gray teal brown yellow")])
        whole = Encoder(processor, GEMMA)(sample)
        limit = len(whole.input_ids) - 5
        cut = Encoder(processor, GEMMA, max_length=limit, on_too_long="truncate_text")(sample)
        assert cut.input_ids == whole.input_ids[:limit]
        assert cut.supervised == whole.supervised[:limit]

    def test_truncation_refuses_to_cut_an_image(self, make_sample, processor) -> None:
        sample = make_sample("images", [0, 1], [("What?", "red")])
        ids = Encoder(processor, GEMMA)(sample).input_ids
        second_image_ends = max(i for i, token in enumerate(ids) if token in processor.image_token_ids)
        encoder = Encoder(processor, GEMMA, max_length=second_image_ends, on_too_long="truncate_text")
        with pytest.raises(TooLongError, match="would cut an image"):
            encoder(sample)

    def test_truncation_to_nothing_supervised_is_refused(self, make_sample, processor) -> None:
        sample = make_sample("prompt", [0], [("What color is the shape?", "red")])
        prompt_length = len(Encoder(processor, GEMMA).prompt(sample).input_ids)
        encoder = Encoder(processor, GEMMA, max_length=prompt_length, on_too_long="truncate_text")
        with pytest.raises(NothingSupervisedError, match="'prompt'"):
            encoder(sample)


def test_template_that_rewrites_history_is_refused(make_sample, processor, monkeypatch: pytest.MonkeyPatch) -> None:
    # Answers vanish once a later turn follows, as templates that strip reasoning have it.
    stripping = "{{ (part.text | trim) if role == 'user' or messages | length < 3 else '' }}"
    template = processor.chat_template.replace("{{ part.text | trim }}", stripping)
    assert template != processor.chat_template
    monkeypatch.setattr(processor, "chat_template", template)
    encoder = Encoder(processor, GEMMA)
    assert encoder(make_sample("short", [0], [("What?", "red")])).n_supervised
    with pytest.raises(EncodingError, match=r"'long'.*renders earlier turns differently"):
        encoder(make_sample("long", [0], [("What?", "red"), ("And?", "blue")]))


def test_what_a_template_refuses_is_named(make_sample, processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published Gemma-3's template takes no two turns of one role, as conversations of people have them."""
    strict = "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
    strict += "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
    monkeypatch.setattr(processor, "chat_template", strict + processor.chat_template)
    encoder = Encoder(processor, GEMMA)
    sample = make_sample("twice", [0], [("What?", "red")])
    assert encoder(sample).n_supervised
    asked = dataclasses.replace(
        sample, messages=(sample.messages[0], Message.make("user", "Well?"), sample.messages[1])
    )
    with pytest.raises(EncodingError, match="'twice' cannot be rendered for gemma3: Conversation roles must alternate"):
        encoder(asked)


def test_prompts_in_memory_are_few_and_of_the_template_of_the_day(make_sample, encoder, processor, monkeypatch) -> None:
    monkeypatch.setattr(encode, "PROMPTS_KEPT", 3)
    samples = [make_sample(f"{n}", [], [(f"Question {n}?", "red")]) for n in range(8)]
    first = [encoder(sample).input_ids for sample in samples]
    assert len(encoder._prompts) <= 3
    assert [encoder(sample).input_ids for sample in samples] == first
    monkeypatch.setattr(processor, "chat_template", processor.chat_template.replace("<start_of_turn>", "red "))
    changed = [encoder(sample).input_ids for sample in samples]
    assert all(one != other for one, other in zip(changed, first, strict=True))
