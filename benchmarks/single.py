"""One position replaced, the effects read at it and the positions after it: ours resumes from the clean prefix."""

from functools import partial

import torch

from benchmarks import shapes
from benchmarks.measure import Options, Table, agreement, interleaved, ratios, scale, scaled
from benchmarks.shapes import Subject
from pipeline import engine
from pipeline.hooks import Hook

POSITION, HORIZON = 64, 16
PLAIN_DRAWS = 8  # the plain way is timed for as many


def run(options: Options) -> list[Table]:
    subject = shapes.subject(options.small)
    hooks = [Hook(layer, "hook_resid_pre") for layer in ((0, 1) if options.small else (1, 6, 11))]
    with_interventions = [_interventions(subject, hook, options.turns(5)) for hook in hooks]
    draws = 8 if options.small else 500
    with_draws = [_draws(subject, hook, horizon, draws, options.turns(3)) for hook in hooks for horizon in (16, 0)]
    sequences, length = subject.tokens.shape
    return [
        Table(
            f"One position: position {POSITION}, horizon {HORIZON}, {sequences} x {length} tokens, 7 interventions of "
            "one draw. Ours with the clean prefix made again every time: all in one call, and a call for each.",
            with_interventions,
        ),
        Table(
            f"Draws: {draws} draws at position {POSITION} of one sequence, with the prefix, per draw, against a plain "
            f"forward pass per draw ({PLAIN_DRAWS} were timed), and against {PLAIN_DRAWS} draws in one plain pass.",
            with_draws,
        ),
    ]


def _interventions(subject: Subject, hook: Hook, rounds: int) -> dict[str, object]:
    batch, site = shapes.stored(subject.decoder, subject.tokens, hook)
    x_news = torch.stack([x_new[:, POSITION] for x_new in shapes.ordinary(site.x)], dim=1)  # seq intervention d
    span = slice(POSITION, POSITION + HORIZON + 1)
    writes = [shapes.writing_at(POSITION, x_new) for x_new in x_news.unbind(1)]
    forms = {
        "together": partial(_ours, subject, batch, site, HORIZON, x_news, x_news.shape[1]),
        "each": partial(_ours, subject, batch, site, HORIZON, x_news, 1),
        "plain": partial(shapes.plain, subject.model, subject.tokens, hook.name, writes, span),
    }
    times, results = interleaved(forms, rounds)
    found = [results[name]["kl"].transpose(0, 1) for name in ("together", "each")]
    return {
        "layer": hook.layer,
        **ratios("plain / together", times["plain"], times["together"]),
        **ratios("plain / each", times["plain"], times["each"]),
        **scale(times["together"], "together"),
        "KL differs by": max(agreement(kl, results["plain"]["kl"]) for kl in found),
    }


def _ours(
    subject: Subject, batch: engine.Batch, site: engine.Site, horizon: int, x_news: torch.Tensor, together: int
) -> dict[str, torch.Tensor]:
    """The prefix, then the effects of `x_news` `seq draw d`, `together` draws in a call."""
    substitution = engine.Substitution(subject.decoder)
    prefix = subject.decoder.prefix(site.hook, site.stream, site.x, POSITION)
    found = [
        substitution.effects_at(batch, site, prefix, POSITION, horizon, part) for part in x_news.split(together, dim=1)
    ]
    return {name: torch.cat([part[name] for part in found], dim=1) for name in found[0]}


def _draws(subject: Subject, hook: Hook, horizon: int, draws: int, rounds: int) -> dict[str, object]:
    tokens = subject.tokens[:1]
    batch, site = shapes.stored(subject.decoder, tokens, hook)
    x = site.x[:, POSITION].expand(draws, -1)
    x_new = shapes.noisy(x, 0.2, seed=0)
    span = slice(POSITION, POSITION + horizon + 1)
    log_p = subject.model(tokens)[:, span].log_softmax(-1)

    def plain(together: int) -> torch.Tensor:
        """The first draws, so many in a pass: `draw pos`."""
        found = []
        for part in x_new[:PLAIN_DRAWS].split(together):
            rows, clean = tokens.expand(len(part), -1), log_p.expand(len(part), -1, -1)
            write = shapes.writing_at(POSITION, part)
            found.append(shapes.plain_values(subject.model, rows, hook.name, write, clean, span)["kl"])
        return torch.cat(found)

    forms = {
        "ours": partial(_ours, subject, batch, site, horizon, x_new[None], draws),
        "alone": partial(plain, 1),
        "batched": partial(plain, PLAIN_DRAWS),
    }
    times, results = interleaved(forms, rounds)
    ours = scaled(times["ours"], 1 / draws)
    alone, batched = (scaled(times[name], 1 / PLAIN_DRAWS) for name in ("alone", "batched"))
    return {
        "layer": hook.layer,
        "horizon": horizon,
        **ratios("plain / ours", alone, ours),
        **ratios("plain batched / ours", batched, ours),
        **scale(scaled(ours, 1000), unit="ms"),
        "KL differs by": agreement(results["ours"]["kl"][:, :PLAIN_DRAWS], results["alone"][None]),
    }
