"""What remains of reconstructions when the vectors are dropped."""

import json

import h5py
import numpy as np
from tables import arrays, call

from pipeline import scores


def test_all_but_the_vectors_is_kept_as_it_was_with_where_it_is_from(tmp_path):
    generator = np.random.default_rng(0)
    path, per_token = tmp_path / "made.h5", {name: generator.normal(size=(6, 5)).astype("f4") for name in ("l0", "eps")}
    labels = {"sae": "early", "model": "tiny", "write": "blocks.1.hook_resid_pre", "first": 8, "d_in": 3}
    given = {"x_hat": np.zeros((6, 5, 3), "f4"), "bias": np.zeros(3, "f4"), "feature_count": np.arange(7)} | per_token
    axes = dict.fromkeys(per_token, "seq pos") | {"x_hat": "seq pos d", "bias": "d", "feature_count": "feature"}
    arrays(path, axes, given, packages={"torch": "1.0"}, **labels)
    scores.work([call([tmp_path / "kept.h5"], {"reconstructions": [path]}, {"sae": "early"})])
    with h5py.File(tmp_path / "kept.h5") as kept:
        assert set(kept) == {"l0", "eps", "feature_count"}
        for name in kept:
            assert (kept[name].dtype, kept[name].attrs["axes"]) == (given[name].dtype, axes[name])
            np.testing.assert_array_equal(kept[name], given[name])
        assert {name: kept.attrs[name] for name in labels} == labels
        # The versions that the numbers were made with, not those that copied them.
        assert json.loads(kept.attrs["packages"]) == {"torch": "1.0"}
        assert kept.attrs["fingerprint"] == "f00d"
