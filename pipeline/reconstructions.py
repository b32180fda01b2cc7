"""Stage `reconstructions`: an SAE over the stored activations. The only stage that runs an SAE."""

import torch
from torch import Tensor

from pipeline import batches, moments, saes, store
from pipeline.progress import tracked
from pipeline.stage import Call, log, run_batch
from pipeline.types import Acts

PER_TOKEN = ("l0", "l1", "norm", "sae_norm", "eps", "cos", "dense")
# A feature is dense if it fires on more than this share of the ordinary tokens of the corpus's first contexts.
DENSE = 0.1
AXES = {"x_hat": "seq pos d", "feature_count": "feature", **dict.fromkeys(PER_TOKEN, "seq pos")}
BIAS_AXES = {True: {"bias": "seq pos d"}, False: {"bias": "d"}}  # by whether it is each token's own


def per_token(x: Acts, x_hat: Acts, features: Tensor, dense: Tensor) -> dict[str, Tensor]:
    """L0 and L1 of the features, |x|, |x_hat|, |x_hat - x|, cos(x, x_hat) and how many of the `dense` features fire,
    each `seq pos`."""
    norm, sae_norm = x.norm(dim=-1), x_hat.norm(dim=-1)
    cos = (x * x_hat).sum(-1) / (norm * sae_norm).clamp_min(torch.finfo(x.dtype).tiny)
    l0, l1 = (features != 0).sum(-1).float(), features.abs().sum(-1)
    return {
        "l0": l0,
        "l1": l1,
        "norm": norm,
        "sae_norm": sae_norm,
        "eps": (x_hat - x).norm(dim=-1),
        "cos": cos.clamp(-1, 1),
        "dense": (features[..., dense] != 0).sum(-1).float(),
    }


def dense_features(sae: saes.Autoencoder, call: Call) -> Tensor:
    """The numbers of the dense features, ` feature`."""
    counts, tokens = torch.zeros(sae.d_sae, dtype=torch.int64, device=call.device), 0
    contexts = call.settings["dense_contexts"]
    for first, x in moments.batches(call.inputs["density"], "activation"):
        for start, stop in batches.ranges(0, min(len(x), contexts - first)):
            features = sae.encode(batches.filled(torch.from_numpy(x[start:stop]).to(call.device)))
            ordinary = _ordinary(call, first + start, first + stop)
            counts += (features[: stop - start][ordinary] != 0).sum(0)
            tokens += int(ordinary.sum())
        if first + len(x) >= contexts:
            break
    return (counts > DENSE * tokens).nonzero().squeeze(1)


def work(calls: list[Call]) -> None:
    for call in calls:
        make(call)


def make(call: Call) -> None:
    """One SAE over its shard."""
    torch.set_num_threads(call.threads)
    sae = saes.load(call.settings, call.device)
    axes = {"activation": "seq pos d"}
    with store.arrays(call.input("read"), axes) as read, store.arrays(call.input("write"), axes) as write:
        x_in, x_out, first = read["activation"], write["activation"], int(read.attrs["first"])
        ordinary = _ordinary(call, first, first + len(x_in))
        shapes = {
            "x_hat": x_out.shape,
            "feature_count": ((sae.d_sae,), "int64"),
            "bias": x_out.shape if sae.scales_each_token else x_out.shape[2:],
            **dict.fromkeys(PER_TOKEN, x_out.shape[:2]),
        }
        counts = torch.zeros(sae.d_sae, dtype=torch.int64, device=call.device)
        attributes = (
            call.settings
            | call.key
            | {"first": first, "architecture": sae.module.cfg.architecture(), "d_in": x_in.shape[2]}
        )
        dense = dense_features(sae, call)
        axes = AXES | BIAS_AXES[sae.scales_each_token]
        with store.new_arrays(call.output, call.fingerprint, axes, shapes, **attributes) as file:
            ranges = list(batches.ranges(0, len(x_in)))
            for start, stop in tracked(ranges, [(stop - start) * x_in.shape[1] for start, stop in ranges]):
                x = batches.filled(torch.from_numpy(x_out[start:stop]).to(call.device))
                read_x = batches.filled(torch.from_numpy(x_in[start:stop]).to(call.device))
                made = sae(read_x)
                _check(made.x_hat, x, call, first + start)
                counts += (made.features[: stop - start][ordinary[start:stop]] != 0).sum(0)
                for name, value in {"x_hat": made.x_hat, **per_token(x, made.x_hat, made.features, dense)}.items():
                    file[name][start:stop] = value[: stop - start].cpu().numpy()
                if sae.scales_each_token:
                    file["bias"][start:stop] = sae.bias(read_x)[: stop - start].cpu().numpy()
            if not sae.scales_each_token:
                file["bias"][:] = sae.bias(read_x)[0, 0].cpu().numpy()
            file["feature_count"][:] = counts.cpu().numpy()
    log.info(
        "%s: %d sequences, %d of %d features fired",
        call.key["sae"],
        shapes["x_hat"][0],
        int((counts > 0).sum()),
        sae.d_sae,
    )


def _ordinary(call: Call, start: int, stop: int) -> Tensor:
    """Which tokens of the shard are not special, `seq pos`."""
    with store.arrays(call.input("tokens"), {"special": "seq pos"}) as tokens:
        return ~torch.from_numpy(tokens["special"][start:stop]).to(call.device)


def _check(x_hat: Tensor, x: Tensor, call: Call, first: int) -> None:
    if x_hat.shape != x.shape:
        raise ValueError(
            f"SAE '{call.key['sae']}' gives {list(x_hat.shape)}, but '{call.settings['write']}' holds {list(x.shape)}."
        )
    bad = (~torch.isfinite(x_hat).all(-1)).nonzero()
    if len(bad):
        raise ValueError(
            f"The reconstruction of SAE '{call.key['sae']}' is not finite at sequence "
            f"{first + int(bad[0, 0])}, position {int(bad[0, 1])}."
        )


def main() -> None:
    with torch.inference_mode():
        run_batch("reconstructions", work)


if __name__ == "__main__":
    main()
