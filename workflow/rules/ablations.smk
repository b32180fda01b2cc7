# The same for interventions that need no SAE.
rule ablations:
    input:
        inputs("ablations"),
    output:
        PATTERNS["ablations"],
    log:
        "results/logs/ablations/{experiment}/{model}/{corpus}/{hook}/{shard}.log",
    benchmark:
        "results/benchmarks/ablations/{experiment}/{model}/{corpus}/{hook}/{shard}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
    params:
        job=as_json("ablations"),
    shell:
        "python -m pipeline.ablations --job {params.job:q} --in {input:q} --out {output:q} --threads {threads} --device {resources.device} > {log:q} 2>&1"
