# `snakemake plan`: what the whole study takes, before anything of it runs.
localrules:
    plan,


rule plan:
    log:
        "results/logs/plan.log",
    conda:
        "../envs/faithful.yaml"
    params:
        text=lambda wildcards: estimate.text(PLAN),
    shell:
        "printf '%s\\n' {params.text:q} | tee {log:q}"
