"""Nine interventions at every token: ours from the stored stream, the plain way, and the floor.

The floor is the time of the products that cannot be avoided, at the speed of one large product in the same round: the
blocks from the hook on and the unembedding for each of the seven ordinary interventions, and the clean unembedding.
"""

from functools import cache, partial
from statistics import median

import torch

from benchmarks import shapes
from benchmarks.measure import Options, Table, agreement, interleaved, ratios, scale, scaled, total
from benchmarks.shapes import Subject
from pipeline import engine
from pipeline.hooks import Hook

ORDINARY = 1 + len(shapes.NOISES)
PRODUCTS = 3  # in one sample of the machine's speed


def run(options: Options) -> list[Table]:
    subject = shapes.subject(options.small)
    layers, rounds = options.layers or list(range(subject.layers)), options.turns(3)
    forms = {}
    for layer in layers:
        forms |= {(layer, name): form for name, form in layer_forms(subject, layer).items()}
    times, results = interleaved(forms, rounds, warm=[key for key in forms if key[0] == layers[-1]])

    rows, floors = [], {}
    for layer in layers:
        ours, plain, product = (times[layer, name] for name in ("ours", "plain", "product"))
        floors[layer] = scaled(product, floor(subject, layer) / (PRODUCTS * product_flop(subject)))
        worst = agreement(results[layer, "ours"]["kl"], results[layer, "plain"]["kl"])
        rows.append(_row(str(layer), plain, ours, floors[layer], worst))
    sums = [total(times[layer, name] for layer in layers) for name in ("plain", "ours")]
    rows.append(_row("sum", *sums, total(floors.values()), max(row["KL differs by"] for row in rows)))
    kls = results[layers[-1], "ours"]["kl"].flatten(1).mean(1).tolist()
    peak = [PRODUCTS * product_flop(subject) / each.wall / 1e9 for layer in layers for each in times[layer, "product"]]
    caption = (
        f"All tokens: {_shape(subject)}, hook_resid_pre, {ORDINARY} ordinary interventions and 2 constants, "
        f"{len(layers)} of {subject.layers} layers, {rounds} rounds. Floor at {median(peak):.0f} GFLOP/s, by torch.mm "
        f"of the unembedding's shape. Mean KLs at layer {layers[-1]}: {', '.join(f'{kl:.2g}' for kl in kls)} nats."
    )
    return [Table(caption, rows)]


def layer_forms(subject: Subject, layer: int) -> dict:
    hook = Hook(layer, "hook_resid_pre")
    batch, site = shapes.stored(subject.decoder, subject.tokens, hook)
    x_news = shapes.ordinary(site.x) + shapes.constants(site.x)
    hooks = [shapes.writing(x_new) for x_new in x_news]
    d, vocabulary = subject.model.cfg.d_model, subject.model.cfg.d_vocab
    return {
        "ours": partial(engine.Substitution(subject.decoder).effects, batch, [(site, x_new) for x_new in x_news]),
        "plain": partial(shapes.plain, subject.model, subject.tokens, hook.name, hooks),
        "product": partial(_products, *_operands(subject.tokens.numel(), d, vocabulary)),
    }


def _products(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """The machine's speed: large products into memory that is there already."""
    for _ in range(PRODUCTS):
        torch.mm(x, weight, out=out)


@cache
def _operands(tokens: int, d: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(tokens, d), torch.randn(d, vocabulary), torch.zeros(tokens, vocabulary)


def product_flop(subject: Subject) -> float:
    """Of one unembedding of all tokens."""
    return 2.0 * subject.tokens.numel() * subject.model.cfg.d_model * subject.model.cfg.d_vocab


def floor(subject: Subject, layer: int) -> float:
    """FLOPs that cannot be avoided at a layer; a token's attention is to itself and the tokens before it only."""
    cfg, length = subject.model.cfg, subject.tokens.shape[1]
    width = cfg.n_heads * cfg.d_head
    block = 2 * cfg.d_model * (4 * width + 2 * cfg.d_mlp) + 2 * width * (length + 1)
    blocks = subject.tokens.numel() * (subject.layers - layer) * block
    return ORDINARY * (blocks + product_flop(subject)) + product_flop(subject)


def _row(layer: str, plain: list, ours: list, floor: list, worst: float) -> dict[str, object]:
    return {
        "layer": layer,
        **ratios("plain / ours", plain, ours),
        **ratios("ours / floor", ours, floor),
        **scale(ours),
        "KL differs by": worst,
    }


def _shape(subject: Subject) -> str:
    cfg = subject.model.cfg
    sequences, length = subject.tokens.shape
    return f"{cfg.n_layers} layers, d {cfg.d_model}, vocabulary {cfg.d_vocab}, {sequences} x {length} tokens"
