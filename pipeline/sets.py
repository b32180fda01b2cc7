"""Sets of SAEs in a model that runs: what each SAE writes where, given what those before it have changed."""

from dataclasses import dataclass, field
from functools import partial

import torch

from pipeline import decoder, engine, interventions, saes
from pipeline.hooks import WRITE_SITES, Hook, parse_hook
from pipeline.registry import unknown
from pipeline.types import Acts, Residual

# Arguments that an intervention may have here, and those of them that are normal vectors.
NORMAL = ("noise", "act_noise")
ARGUMENTS = ("x", "x_hat", *NORMAL)


@dataclass(frozen=True)
class Member:
    """An SAE, where it reads and where it writes; a transcoder's two hooks differ."""

    id: str
    read: Hook
    write: Hook
    sae: saes.Autoencoder

    def x_hat(self, x_in: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What the SAE makes of `x_in`, to stand in the place of `x`. ValueError where it has another shape."""
        x_hat = self.sae(x_in).x_hat
        if x_hat.shape != x.shape:
            raise ValueError(
                f"SAE '{self.id}' gives {list(x_hat.shape)}, but '{self.write.name}' holds {list(x.shape)}."
            )
        return x_hat.to(x.dtype)


@dataclass(frozen=True)
class Compound:
    """A set of SAEs; no two of them write at the same hook."""

    name: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Shared:
    """What all runs of a micro-batch share: its noise by (intervention, argument, hook), and each SAE's error on the
    clean activation, by SAE, where they are asked to encode that."""

    batch: engine.Batch
    noise: dict[tuple[str, str, Hook], torch.Tensor]
    errors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """A set under an intervention on a micro-batch. It remembers what transcoders read, so it is good for one pass."""

    compound: Compound
    intervention: str
    shared: Shared
    seen: dict[Hook, torch.Tensor] = field(default_factory=dict)

    def final(self, model: decoder.Decoder) -> Residual:
        """The final residual stream. ValueError where it is not finite."""
        writes = {member.write: member for member in self.compound.members}
        reads = set() if self.shared.errors else {each.read for each in writes.values() if each.read != each.write}
        edits = {hook: partial(self._at, hook, writes.get(hook), hook in reads) for hook in {*writes, *reads}}
        final = model.run(self.shared.batch.tokens, edits)
        if not final.isfinite().all():
            row = int((~final.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"The run of set '{self.compound.name}' under '{self.intervention}' is not finite (micro-batch at "
                f"sequence {self.shared.batch.first}, row {row}): together its SAEs make the model overflow. Check "
                "each alone, and its normalisation."
            )
        return final

    def _at(self, hook: Hook, writer: Member | None, is_read: bool, x: Acts) -> Acts:
        """What stands at a hook after this run was there. Special tokens keep what they have."""
        if writer is not None:
            x = torch.where(self.shared.batch.kept[..., None], x, self._x_new(writer, x))
        if is_read:
            self.seen[hook] = x
        return x

    def _x_new(self, member: Member, x: Acts) -> Acts:
        noise, name = self.shared.noise, self.intervention
        sources = {argument: partial(noise.get, (name, argument, member.write)) for argument in NORMAL}
        return interventions.x_new(name, sources | {"x": lambda: x, "x_hat": lambda: self._x_hat(member, x)})

    def _x_hat(self, member: Member, x: Acts) -> Acts:
        if member.id in self.shared.errors:
            return x + self.shared.errors[member.id]
        if member.read == member.write:
            return member.x_hat(x, x)
        if member.read not in self.seen:
            raise ValueError(
                f"SAE '{member.id}' reads at '{member.read.name}', which does not come before '{member.write.name}', "
                "where it writes."
            )
        return member.x_hat(self.seen[member.read], x)


def load(settings: dict, layers: int, device: str) -> list[Compound]:
    """The sets as configured, each SAE loaded once. ValueError for an unknown SAE, an empty set, and one in which two
    SAEs write at the same hook."""
    given = {each["id"]: each for each in settings["saes"]}
    wanted = dict.fromkeys(name for each in settings["sets"] for name in each["saes"])
    for name in wanted:
        if name not in given:
            raise ValueError(unknown("SAE", name, given))
    members = {name: _member(given[name], layers, device) for name in wanted}
    compounds = [Compound(each["name"], tuple(members[name] for name in each["saes"])) for each in settings["sets"]]
    for compound in compounds:
        hooks = [member.write.name for member in compound.members]
        if not hooks or len(set(hooks)) < len(hooks):
            raise ValueError(
                f"The SAEs of set '{compound.name}' write at {', '.join(hooks) or 'no hook'}: expected at least one "
                "SAE, and each at a hook of its own."
            )
    return compounds


def _member(given: dict, layers: int, device: str) -> Member:
    read, write = parse_hook(given["read"], layers), parse_hook(given["write"], layers, WRITE_SITES)
    return Member(given["id"], read, write, saes.load(given, device))
