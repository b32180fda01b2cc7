# Faithful: how faithful is a sparse autoencoder? The stages are in pipeline/, their rules in workflow/rules/.
from snakemake.utils import min_version

min_version("9.27")


configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/tokens.smk"
include: "workflow/rules/weights.smk"
include: "workflow/rules/clean.smk"
include: "workflow/rules/activations.smk"
include: "workflow/rules/moments.smk"
include: "workflow/rules/reconstructions.smk"
include: "workflow/rules/scores.smk"
include: "workflow/rules/errors.smk"
include: "workflow/rules/effects.smk"
include: "workflow/rules/ablations.smk"
include: "workflow/rules/compounds.smk"
include: "workflow/rules/curvatures.smk"
include: "workflow/rules/extremes.smk"
include: "workflow/rules/top_tokens.smk"
include: "workflow/rules/checks.smk"
include: "workflow/rules/summary.smk"
include: "workflow/rules/analyses.smk"
include: "workflow/rules/paper.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/plan.smk"


onsuccess:
    drop([job.told for job in PLAN.jobs.values()])
    if HEADLINE.exists() and state(REPORT.as_posix()) == "current":
        print(f"\nReport: {REPORT.resolve()}\n{HEADLINE.read_text()}")


# The items are listed beside the report: one that is lost or stale is made again even where the report looks finished.
rule all:
    default_target: True
    input:
        list(dict.fromkeys(PLAN.step(job).path for job in PLAN.targets)),
