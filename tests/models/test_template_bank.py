from dataclasses import dataclass, field

import pytest
import torch

from edgetrack.models.template_bank import (
    choose_templates,
    enter_template,
    first_clock,
    first_history,
)


@dataclass
class SlowBank:
    """All templates of a video, and the few that a bank of ``num_places`` would still have."""

    num_places: int
    count: int = 1
    stride: int = 1
    kept: list[int] = field(default_factory=lambda: [0])

    def enter(self) -> None:
        number, self.count = self.count, self.count + 1
        if number % self.stride == 0 and len(self.kept) == self.num_places:
            self.kept, self.stride = self.kept[::2], self.stride * 2
        if number % self.stride == 0:
            self.kept.append(number)

    def wanted(self, num_chosen: int) -> list[int]:
        """The paper's choice, of all templates."""
        n = self.count
        if n < num_chosen:
            return [0] * (num_chosen - n) + list(range(n))
        middle = [int((n - 1) * (1 - 0.7**i)) for i in range(1, num_chosen - 1)]
        return [0, *middle, n - 1][-num_chosen:] if num_chosen > 1 else [0]

    def choose(self, num_chosen: int) -> list[int]:
        *older, latest = self.wanted(num_chosen)
        found = [max(k for k in self.kept if k <= number) for number in older]
        return [*found, latest]


class Bank:
    """The bank under test, on the numbers of templates in the place of their tokens."""

    def __init__(self, num_places: int, *, batch: int = 1) -> None:
        number = torch.zeros(batch, 1, dtype=torch.float64)
        self.history, self.clock = first_history(number, num_places), first_clock(number)
        self.latest = number

    def enter(self) -> None:
        self.latest = self.clock[:, :1].double() + 1
        self.history, self.clock = enter_template(self.history, self.clock, self.latest)

    def choose(self, num_chosen: int) -> list[int]:
        chosen = choose_templates(self.history, self.clock, self.latest, num_chosen)
        return [int(v) for v in chosen[0, :, 0]]


@pytest.mark.parametrize(("num_places", "num_chosen"), [(16, 5), (2, 5), (6, 4), (16, 2), (4, 1)])
def test_the_bank_equals_a_slow_twin_over_thousands_of_frames(
    num_places: int, num_chosen: int
) -> None:
    bank, twin = Bank(num_places), SlowBank(num_places)
    assert bank.choose(num_chosen) == twin.choose(num_chosen)

    for _ in range(3000):
        bank.enter()
        twin.enter()
        assert bank.choose(num_chosen) == twin.choose(num_chosen)
        assert bank.clock[0].tolist() == [twin.count - 1, twin.stride]
    assert bank.history.shape == (1, num_places, 1)


def test_until_the_bank_is_full_the_choice_is_the_papers() -> None:
    bank, twin = Bank(16), SlowBank(16)

    for _ in range(15):
        bank.enter()
        twin.enter()
        assert bank.choose(5) == twin.wanted(5)


def test_the_first_and_the_latest_stay_and_others_are_at_most_a_stride_too_old() -> None:
    bank, twin = Bank(16), SlowBank(16)

    for number in range(1, 2000):
        bank.enter()
        twin.enter()
        first, *middle, latest = bank.choose(5)
        assert (first, latest) == (0, number)
        for got, wanted in zip(middle, twin.wanted(5)[1:-1], strict=True):
            assert wanted - twin.stride < got <= wanted


@pytest.mark.parametrize("number", [3_276_801, 123_456_789, 2**29 + 12345])
def test_a_long_video_has_exact_frame_numbers(number: int) -> None:
    places, stride = 16, 1
    while number >= stride * places:
        stride *= 2
    history = torch.arange(places, dtype=torch.float64)[None, :, None] * stride
    clock = torch.tensor([[number, stride]], dtype=torch.int32)

    chosen = choose_templates(history, clock, torch.full((1, 1), float(number)).double(), 5)

    thousandths = (0, 300, 510, 657)
    expected = [number * share // 1000 // stride * stride for share in thousandths]
    assert chosen[0, :-1, 0].tolist() == expected


def test_the_clock_stands_before_it_overflows_and_the_bank_still_works() -> None:
    history = torch.arange(16, dtype=torch.float64)[None, :, None] * 2**26
    clock = torch.tensor([[2**30 - 1, 2**26]], dtype=torch.int32)

    for _ in range(3):
        latest = torch.ones(1, 1, dtype=torch.float64)
        history, clock = enter_template(history, clock, latest)
        chosen = choose_templates(history, clock, latest, 5)

    assert clock[0].tolist() == [2**30, 2**27]
    assert chosen[0, 0, 0] == 0
    assert chosen[0, -1, 0] == 1


def test_samples_of_a_batch_keep_their_own_time() -> None:
    bank = Bank(4, batch=2)
    bank.enter()
    late = torch.tensor([[1, 1], [7, 2]], dtype=torch.int32)
    numbers = torch.tensor([[0, 1, 0, 0], [0, 2, 4, 6]], dtype=torch.float64)[..., None]

    history, clock = enter_template(numbers, late, torch.tensor([[2.0], [8.0]]).double())

    assert clock.tolist() == [[2, 1], [8, 4]]
    assert history[0, :3, 0].tolist() == [0, 1, 2]
    assert history[1, :3, 0].tolist() == [0, 4, 8]
