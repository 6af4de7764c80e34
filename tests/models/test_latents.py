"""Latent messages at the model: written from what was read, read in the place of embeddings, quantised, saved."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from preconcert.core import Latent, ModelError
from preconcert.models import (
    Fill,
    Fills,
    GenerateRequest,
    LatentCodec,
    LatentSettings,
    Placed,
    ScoreRequest,
    SpeakRequest,
    TransformersModel,
    quantised,
)

PROMPT = (5, 6, 7, 8, 9, 10)
OTHER = (5, 6, 7, 11, 9, 10)
SETTINGS = LatentSettings(tokens=2, dims=3, levels=5)


@pytest.fixture
def talking(model: TransformersModel) -> TransformersModel:
    """A model whose two adapters have codecs of one shape."""
    for seed, name in enumerate(("red", "blue")):
        model.add_codec(name, SETTINGS, seed)
    return model


def say(model: TransformersModel, ids: tuple[int, ...], adapter: str = "red", seed: int = 0, **more: object) -> Latent:
    return model.speak([SpeakRequest(ids, adapter, seed, **more)])[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8])
def test_quantised_numbers_take_exactly_the_levels_and_let_the_gradient_through(levels: int) -> None:
    numbers = torch.linspace(-4, 4, 2001, requires_grad=True)
    found = quantised(numbers, levels)
    expected = torch.linspace(-1, 1, levels)
    assert torch.allclose(found.detach().unique(), expected)
    found.sum().backward()
    assert numbers.grad is not None
    assert float(numbers.grad[1000]) > 0.5  # it is that of the bounded number


def test_without_levels_numbers_are_only_bounded() -> None:
    numbers = torch.tensor([-20.0, 0.3, 20.0])
    assert torch.equal(quantised(numbers, 0), torch.tanh(numbers))


def test_bits_are_those_of_the_levels_or_the_full_width() -> None:
    values = ((0.0, 0.5, 1.0), (0.0, 0.5, -1.0))
    assert Latent(values, 5).bits == pytest.approx(6 * math.log2(5))
    assert Latent(values).bits == 6 * 32


def test_a_message_depends_on_what_was_read_and_on_its_seed_alone(talking: TransformersModel) -> None:
    one = say(talking, PROMPT)
    assert len(one.values) == 2
    assert all(len(vector) == 3 for vector in one.values)
    assert all(number in (-1.0, -0.5, 0.0, 0.5, 1.0) for vector in one.values for number in vector)
    assert say(talking, OTHER, temperature=0.0).drawn != say(talking, PROMPT, temperature=0.0).drawn
    assert say(talking, PROMPT, seed=1).drawn != one.drawn
    longer = (*PROMPT, 4, 5, 6)
    batch = talking.speak([SpeakRequest(longer, "blue", 3), SpeakRequest(PROMPT, "red", 0)])
    assert torch.allclose(torch.tensor(batch[1].drawn), torch.tensor(one.drawn), atol=1e-5)
    assert batch[1].values == one.values


def test_what_was_drawn_has_the_density_that_the_codec_says(talking: TransformersModel) -> None:
    mean = torch.tensor(say(talking, PROMPT, temperature=0.0).drawn)
    drawn = torch.tensor(say(talking, PROMPT).drawn)
    codec = talking.codecs["red"]
    gaussian = torch.distributions.Normal(mean, codec.deviation())
    assert torch.allclose(codec.logprob(drawn[None], mean[None])[0], gaussian.log_prob(drawn).sum(-1), atol=1e-4)


def test_a_received_message_changes_what_is_written_and_only_through_its_own_row(talking: TransformersModel) -> None:
    heard = (Placed(1, say(talking, PROMPT)),)
    deaf, hearing = (
        ScoreRequest(PROMPT, (10, 11), "blue", latents=latents) for latents in ((), heard)
    )
    alone = talking.score([deaf])[0]
    together = talking.score([hearing, deaf, hearing])
    assert together[1] == pytest.approx(alone, abs=1e-5)
    assert together[0] == pytest.approx(together[2], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(together[0], alone, strict=True)) > 1e-4


def test_generation_reads_messages_as_scoring_does(talking: TransformersModel) -> None:
    heard = (Placed(1, say(talking, PROMPT)),)
    requests = [
        GenerateRequest(PROMPT, seed=4, adapter="blue", max_tokens=6, latents=latents) for latents in ((), heard)
    ]
    for request, completion in zip(requests, talking.generate(requests), strict=True):
        scored = talking.score([ScoreRequest(PROMPT, completion.ids, "blue", latents=request.latents)])[0]
        assert completion.logprobs == pytest.approx(scored, abs=1e-4)


def test_a_truncated_message_fills_the_first_places_only(talking: TransformersModel) -> None:
    whole = say(talking, PROMPT)
    cut = Latent(whole.values[:1], whole.levels)
    embed = talking.base.get_input_embeddings()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        plain = embed(ids)
        with talking._speech.fills(["blue"], [(Placed(1, cut),)]):
            filled = embed(ids)
    differs = (plain != filled).any(-1)[0].tolist()
    assert differs == [False, True, False, False, False, False]


def test_gradients_reach_the_sender_through_a_message(talking: TransformersModel) -> None:
    """Straight through the quantisation, the receiver's codec and its model."""
    base, codec = talking.base, talking.codecs["red"]
    drawn = torch.zeros(1, 2, 3, requires_grad=True)
    vectors = talking.codecs["blue"].embedded(codec.sent(drawn))
    with Fills(base, [Fill(torch.tensor([0, 0]), torch.tensor([1, 2]), vectors[0])]):
        base.base_model(input_ids=torch.tensor([PROMPT])).last_hidden_state.square().sum().backward()
    assert drawn.grad is not None
    assert bool((drawn.grad != 0).all())
    base.zero_grad()
    assert not base.get_input_embeddings()._forward_hooks


def test_codecs_are_saved_copied_and_deleted_with_their_adapters(talking: TransformersModel, tmp_path: Path) -> None:
    before = say(talking, PROMPT)
    talking.save_adapter("red", tmp_path / "red")
    talking.add_adapter("green", 0, "red")
    assert say(talking, PROMPT, "green") == before
    talking.delete_adapter("green")
    assert "green" not in talking.codecs
    with torch.no_grad():
        talking.codecs["red"].queries.zero_()
    parameter = talking.codecs["red"].queries
    assert say(talking, PROMPT) != before
    talking.load_adapter("red", tmp_path / "red")
    assert say(talking, PROMPT) == before
    assert talking.codecs["red"].queries is parameter  # what an optimizer holds stays the same tensor
    talking.add_adapter("wordy", 0)
    talking.save_adapter("wordy", tmp_path / "wordy")
    talking.load_adapter("red", tmp_path / "wordy")
    assert "red" not in talking.codecs, "a folder without a codec is an adapter without one"


def test_training_free_messages_are_embeddings(model: TransformersModel) -> None:
    model.add_codec("red", LatentSettings(tokens=3, method="aligned", levels=0), 0)
    message = say(model, PROMPT)
    lengths = torch.tensor(message.values).norm(dim=1)
    expected = model.base.get_input_embeddings().weight.norm(dim=1).mean()
    assert len(message.values) == 3
    assert torch.allclose(lengths, expected.expand(3), rtol=1e-4)
    assert message.bits == 3 * 32 * model.base.config.hidden_size
    assert not list(model.codecs["red"].parameters())
    requests = [ScoreRequest(PROMPT, (11,), "red", latents=held) for held in ((), (Placed(0, message),))]
    deaf, hearing = model.score(requests)
    assert deaf != hearing


def test_new_adapters_leave_codecs_alone(talking: TransformersModel) -> None:
    """peft looks for linear layers everywhere in the model; a codec has none."""
    talking.add_adapter("late", 0)
    assert not [name for name, _ in talking.base.named_modules() if "latent_codecs" in name and "lora" in name]
    assert isinstance(talking.codecs["red"], LatentCodec)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (SpeakRequest(PROMPT, "green", 0), "'green' has no codec"),
        (SpeakRequest((), "red", 0), "empty"),
        (SpeakRequest(PROMPT, "red", 0, latents=(Placed(0, Latent(((0.0,),), 5)),)), "does not fit the codec"),
    ],
)
def test_bad_requests_are_refused(talking: TransformersModel, request_: SpeakRequest, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        talking.speak([request_])


def test_shapes_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="levels=1"):
        LatentSettings(levels=1)
    with pytest.raises(ValueError, match="levels=0"):
        LatentSettings(method="aligned", levels=4)
