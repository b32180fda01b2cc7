"""What interventions are called and what they ask for. Light, so that planning needs no torch."""

import re

# What an intervention may ask for, by the names of its arguments, and what that is made from beside the activation:
# stages, the seed, or a grid of the experiment.
ARGUMENTS = {
    "x": (),
    "x_hat": ("reconstructions",),
    "bias": ("reconstructions",),
    "mean": ("moments",),
    "noise": ("seed",),
    "act_noise": ("moments", "seed"),
    "other": ("moments", "seed"),
    "another": ("moments", "seed"),
    "error_noise": ("errors", "seed"),
    "other_error": ("errors", "moments", "seed"),
    "linear_error": ("errors",),
    "simple_error": ("errors",),
    "alpha": ("alphas",),
    "cosine": ("cosines",),
    "head": ("heads",),
}
# An intervention that is made from one of these belongs to an SAE; all others belong to a hook.
OF_AN_SAE = ("reconstructions", "errors")
# The SAE, and what it is compared with: the interventions of which a study looks at single tokens.
PAIR = ("sae", "eps_random")
# Interventions that have figures and tables of their own: experiments with these stay out of the general ones.
LADDER = ("error_cov_random", "act_cov_random", "real_difference", "shuffled_error", "flipped_error")
DOSES = ("error_scaled", "eps_random_scaled", "act_cov_random_scaled")
TURNS = ("theta_random_at", "theta_error_at")
RESTORED = ("shrinkage_restored", "linear_error_restored", "nonlinear_error_restored")
SPECIAL_PURPOSE = (*LADDER, *DOSES, *TURNS, *RESTORED)
# What the atlas ablates, and at which site; of attention's z one head at a time, by interventions of their own.
COMPONENTS = {name: f"hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")}
COMPONENTS["z"] = "attn.hook_z"
OF_A_HEAD = {name: f"{name}_head" for name in ("zero", "mean", "resample")}


def label(name: str, strength: float | int | None = None) -> str:
    """The label of an intervention: `error_scaled`, 0.5 -> `error_scaled(0.5)`. It keeps every digit of the strength:
    that of the label is the one that is run."""
    return name if strength is None else f"{name}({repr(strength + 0.0).removesuffix('.0')})"


def parsed(text: str) -> tuple[str, float | None]:
    """`error_scaled(0.5)` -> ("error_scaled", 0.5); ("sae", None) for one without a strength."""
    found = re.fullmatch(r"(\w+)\((-?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\)", text)
    return (found[1], float(found[2])) if found else (text, None)
