import math

import torch
from tolerances import FROM_TWIN
from torch import Tensor
from torch.testing import assert_close

from edgetrack.models.coordinates import (
    CoordinateVocabulary,
    decode_coordinates,
    expected_corners,
    quantise_corners,
)

BINS = 600


def sharp_logits(words: list[int]) -> Tensor:
    """One sample that is sure of four words."""
    logits = torch.zeros(1, 4, BINS + 5)
    logits[0, range(4), words] = 200.0
    return logits


def test_coordinates_quantise_as_in_the_released_code() -> None:
    values = [-0.5, -0.1, 0.0, 0.25, 0.5, 1.0, 1.4999]

    words = quantise_corners(torch.tensor(values), BINS)

    assert words.tolist() == [int((value + 0.5) * 299) for value in values]


def test_coordinates_beyond_the_range_get_its_ends() -> None:
    words = quantise_corners(torch.tensor([-3.0, 7.0]), BINS)

    assert words.tolist() == [0, 598]


def test_a_sure_answer_is_the_mean_of_both_decodings_of_its_words() -> None:
    words = [100, 200, 300, 450]

    answer = decode_coordinates(sharp_logits(words), BINS)

    values = [((w + 0.5) / 299 - 0.5 + w / 300 - 0.5) / 2 for w in words]
    x1, y1, x2, y2 = values
    expected = torch.tensor([[(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]])
    assert_close(answer["bbox_cxcywh"], expected, atol=FROM_TWIN["float32"], rtol=0)
    assert_close(answer["score"], torch.ones(1))
    assert_close(answer["uncertainty"], torch.zeros(1))


def test_a_quantised_coordinate_comes_back_within_two_bins() -> None:
    """The published code rounds down by 299 bins a unit and expects by 300.

    The likeliest bin is read at its middle, half a bin off at most; the expectation is off by the
    bin that rounding cut off and by the two scales, which part by one more over the whole range.
    """
    corners = torch.linspace(-0.4, 1.4, 50_000)[:, None].expand(-1, 4)

    words = quantise_corners(corners, BINS)

    logits = torch.nn.functional.one_hot(words, BINS + 5) * 200.0
    got = decode_coordinates(logits, BINS)["bbox_cxcywh"]
    bound = (0.5 + 1 + 2) / 2 / 299
    assert_close(got[:, 0], corners[:, ::2].mean(1), atol=bound, rtol=0)
    assert_close(got[:, 1], corners[:, 1::2].mean(1), atol=bound, rtol=0)


def test_uniform_words_are_as_uncertain_as_can_be() -> None:
    answer = decode_coordinates(torch.zeros(2, 4, BINS + 5), BINS)

    assert_close(answer["uncertainty"], torch.ones(2))
    assert (answer["score"] < 0.05).all()


def test_an_answer_equals_a_slow_twin() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, BINS + 5) * 4

    answer = decode_coordinates(logits, BINS)

    for row in range(3):
        corners, entropies, masses = [], [], []
        for token in range(4):
            weights = [math.exp(v) for v in logits[row, token, :BINS].double().tolist()]
            probs = [w / sum(weights) for w in weights]
            best = max(range(BINS), key=lambda k: probs[k])
            soft = sum(p * (-0.5 + k / 300) for k, p in enumerate(probs))
            corners.append(((best + 0.5) / 299 - 0.5 + soft) / 2)
            entropies.append(-sum(p * math.log(p) for p in probs) / math.log(BINS))
            near = [abs(-0.5 + k / 300 - corners[-1]) <= 1 / 32 for k in range(BINS)]
            masses.append(sum(p for p, is_near in zip(probs, near, strict=True) if is_near))
        x1, y1, x2, y2 = corners
        size = [max(x2 - x1, 1e-3), max(y2 - y1, 1e-3)]
        expected = {
            "bbox_cxcywh": [(x1 + x2) / 2, (y1 + y2) / 2, *size],
            "score": sum(masses) / 4,
            "uncertainty": sum(entropies) / 4,
        }
        for name, value in expected.items():
            got = answer[name][row]
            assert_close(got, torch.tensor(value), atol=FROM_TWIN["float32"], rtol=0)


def test_special_words_are_no_coordinates() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, BINS + 5)
    loud = logits.clone()
    loud[..., BINS:] = 1e4

    for name, value in decode_coordinates(logits, BINS).items():
        assert torch.equal(decode_coordinates(loud, BINS)[name], value)
    assert torch.equal(expected_corners(loud, BINS), expected_corners(logits, BINS))


def test_swapped_corners_make_a_small_box_not_a_negative_one() -> None:
    answer = decode_coordinates(sharp_logits([300, 300, 100, 100]), BINS)

    assert (answer["bbox_cxcywh"][:, 2:] > 0).all()


def test_commands_are_the_words_behind_the_bins_with_their_positions() -> None:
    vocabulary = CoordinateVocabulary(BINS, 8)

    commands = vocabulary.commands()

    words = vocabulary.word_embeddings[600:604]
    assert torch.equal(commands, words + vocabulary.position_embeddings)


def test_logits_compare_hidden_states_with_every_word() -> None:
    vocabulary = CoordinateVocabulary(6, 3)
    torch.nn.init.normal_(vocabulary.output_bias)
    hidden = torch.randn(1, 4, 3)

    logits = vocabulary(hidden)

    for token in range(4):
        for word in range(11):
            product = hidden[0, token] @ vocabulary.word_embeddings[word]
            assert_close(logits[0, token, word], product + vocabulary.output_bias[word])
