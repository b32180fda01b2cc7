# An SAE over stored activations; the only rule that runs one.
rule reconstructions:
    input:
        inputs("reconstructions"),
    output:
        PATTERNS["reconstructions"],
    log:
        "results/logs/reconstructions/{sae}/{corpus}/{shard}.log",
    benchmark:
        "results/benchmarks/reconstructions/{sae}/{corpus}/{shard}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
    params:
        job=as_json("reconstructions"),
    shell:
        "python -m pipeline.reconstructions --job {params.job:q} --in {input:q} --out {output:q} --threads {threads} --device {resources.device} > {log:q} 2>&1"
