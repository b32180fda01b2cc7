# Activations at a hook, and the stream to resume from.
rule activations:
    input:
        inputs("activations"),
    output:
        PATTERNS["activations"],
    log:
        "results/logs/activations/{model}/{corpus}/{hook}/{shard}.log",
    benchmark:
        "results/benchmarks/activations/{model}/{corpus}/{hook}/{shard}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
    params:
        job=as_json("activations"),
    shell:
        "python -m pipeline.activations --job {params.job:q} --in {input:q} --out {output:q} --threads {threads} --device {resources.device} > {log:q} 2>&1"
