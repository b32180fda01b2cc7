"""Reading ahead keeps the order, reads what is wanted next and no more, and hands on what goes wrong."""

import threading

import pytest
import torch

from pipeline.batches import BATCH, ahead, filled, ranges


def test_places_come_in_order_whichever_is_read_first():
    gates = {place: threading.Event() for place in range(4)}
    gates[3].set()  # the last can be read at once

    def read(place):
        assert gates[place].wait(5)
        if place:
            gates[place - 1].set()
        return 10 * place

    assert list(ahead(read, range(4), workers=4)) == [0, 10, 20, 30]


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_every_place_is_read_once(workers, count):
    asked = []
    assert list(ahead(lambda place: asked.append(place) or -place, range(count), workers)) == [-i for i in range(count)]
    assert sorted(asked) == list(range(count))


@pytest.mark.parametrize("workers", [1, 3])
def test_while_one_is_worked_on_the_next_are_read_and_none_beyond(workers):
    asked = []

    def places():
        for place in range(10):
            asked.append(place)
            yield place

    found = ahead(lambda place: place, places(), workers)
    for done in range(3):
        assert next(found) == done
        assert len(asked) == done + 1 + workers
    found.close()


def test_what_goes_wrong_in_a_reader_is_raised_at_its_place():
    def read(place):
        if place == 2:
            raise ValueError("a torn page")
        return place

    found = ahead(read, range(5))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="a torn page"):
        next(found)


def test_micro_batches_are_cut_at_multiples_of_the_batch():
    assert list(ranges(BATCH, 2 * BATCH + 3)) == [(BATCH, 2 * BATCH), (2 * BATCH, 2 * BATCH + 3)]
    assert list(ranges(5, 5)) == []


@pytest.mark.parametrize("count", [1, 3, BATCH])
def test_a_short_batch_is_filled_up_with_its_first_sequence(count):
    rows = torch.arange(float(count * 2)).view(count, 2)
    full = filled(rows)
    assert torch.equal(full[:count], rows)
    assert torch.equal(full[count:], rows[:1].expand(BATCH - count, 2))
