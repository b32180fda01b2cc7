# KL and cross-entropy per token, for every intervention that needs the SAE.
rule effects:
    input:
        inputs("effects"),
    output:
        PATTERNS["effects"],
    log:
        "results/logs/effects/{experiment}/{sae}/{corpus}/{shard}.log",
    benchmark:
        "results/benchmarks/effects/{experiment}/{sae}/{corpus}/{shard}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
    params:
        job=as_json("effects"),
    shell:
        "python -m pipeline.effects --job {params.job:q} --in {input:q} --out {output:q} --threads {threads} --device {resources.device} > {log:q} 2>&1"
