"""Labels keep every digit of a strength, and every intervention is known by what it is made from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import fingerprint, labels

KNOWN = fingerprint.registered("interventions", "INTERVENTIONS")


@given(st.floats(-10, 10))
def test_a_label_is_read_as_the_strength_that_it_was_made_of(strength):
    assert labels.parsed(labels.label("error_scaled", strength)) == ("error_scaled", strength)


@pytest.mark.parametrize(("strength", "text"), [(1.0, "1"), (-2.0, "-2"), (0.1, "0.1"), (0.9999999, "0.9999999")])
def test_a_strength_is_written_as_short_as_it_can_be(strength, text):
    assert labels.label("error_scaled", strength) == f"error_scaled({text})"


def test_zero_has_no_sign():
    assert labels.label("error_scaled", -0.0) == "error_scaled(0)"


@pytest.mark.parametrize("text", ["sae", "error_scaled()", "error_scaled(1.2.3)", "error_scaled(a)", "error_scaled(.)"])
def test_what_has_no_number_in_brackets_has_no_strength(text):
    assert labels.parsed(text) == (text, None)


@pytest.mark.parametrize("text", ["x(0.5)", "x(.5)", "x(5e-1)", "x(0.50)"])
def test_a_number_may_be_written_in_several_ways(text):
    assert labels.parsed(text) == ("x", 0.5)


def test_everything_that_an_intervention_asks_for_is_known():
    assert {argument for arguments in KNOWN.values() for argument in arguments} <= set(labels.ARGUMENTS)


def test_everything_is_made_from_a_stage_the_seed_or_a_grid():
    sources = {source for made_from in labels.ARGUMENTS.values() for source in made_from}
    assert sources == {"reconstructions", "moments", "errors", "seed", "alphas", "cosines", "heads"}


def test_the_interventions_of_special_purposes_exist():
    assert {*labels.SPECIAL_PURPOSE, *labels.PAIR} <= set(KNOWN)
    assert not set(labels.SPECIAL_PURPOSE) & set(labels.PAIR)
