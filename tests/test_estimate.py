"""What a study takes, before it runs."""

import numpy as np
import pytest
from fakes import every_kind, study

from pipeline import config, estimate
from pipeline.hooks import Geometry
from pipeline.plan import Plan

SMALL = Geometry(n_layers=3, d_model=16, n_heads=2, d_head=8, n_ctx=32, d_vocab=50, d_mlp=64)


def planned(configuration, **changes):
    return Plan(config.load(configuration | changes))


def by_stage(plan):
    return {row["stage"]: row for row in estimate.rows(plan)}


def test_a_token_costs_its_products_from_the_block_that_it_starts_at():
    """2 for each weight of the blocks (4 d d + 2 d d_mlp) and the unembedding; attention sees half of the context."""
    block = 2 * (4 * 16 * 16 + 2 * 16 * 64) + 4 * 8 * 16
    assert estimate.passes(SMALL, context=16) == 3 * block + 2 * 16 * 50
    assert estimate.passes(SMALL, context=16, first=2) == block + 2 * 16 * 50


def test_every_job_is_counted_once(tmp_path):
    plan = planned(every_kind(tmp_path))
    rows = by_stage(plan)
    assert sum(row["files"] for row in rows.values()) == len(plan.jobs)
    assert sum(row["jobs"] for row in rows.values()) == len(plan.steps)


def test_effects_cost_by_interventions_tokens_and_layers_left(tmp_path):
    given = study(tmp_path)
    given["corpora"][0]["contexts"] = 40
    one, geometry = planned(given), config.load(given).models["tiny"].geometry
    rows = 3 * 40 * 16  # the control, the SAE, a random direction
    expected = rows * (estimate.passes(geometry, 16, 1) + estimate.passes(geometry, 16, 2))
    assert by_stage(one)["effects"]["flop"] == expected
    assert by_stage(planned(given, shards=2))["effects"]["flop"] == expected
    given["experiments"][0]["draws"] = 3
    assert by_stage(planned(given))["effects"]["flop"] == expected * 5 / 3


@pytest.mark.parametrize(("contexts", "expected"), [(40, 40 * 16), (None, 8 * 16)])
def test_a_corpus_is_as_long_as_its_contexts_or_its_file(tmp_path, contexts, expected):
    given = study(tmp_path)
    np.save(tmp_path / "ids.npy", np.zeros((40 if contexts else 8, 16), np.int32))
    given["corpora"] = [{"id": "ids", "path": str(tmp_path / "ids.npy"), "context": 16}]
    if contexts:
        given["corpora"][0]["contexts"] = contexts
    plan = planned(given)
    assert estimate.tokens_of(plan.study.corpora["ids"]) == expected
    assert by_stage(plan)["tokens"]["disk"] == 5 * expected


def test_the_table_has_a_line_per_stage_and_their_sum(tmp_path):
    plan = planned(study(tmp_path))
    lines = estimate.text(plan).splitlines()
    stages = [row["stage"] for row in estimate.rows(plan)]
    assert [line.split()[0] for line in lines[1 : len(stages) + 2]] == [*stages, "all"]
    assert lines[len(stages) + 1].split()[1:3] == [str(len(plan.steps)), str(len(plan.jobs))]
    assert lines[-1].startswith("No `contexts` for story")
