# SAEs over stored activations, several a job; the only rule that runs one.
rule reconstructions:
    input:
        inputs("reconstructions"),
    output:
        BATCHES["reconstructions"],
    log:
        "results/logs/reconstructions/{model}/{corpus}/{shard}/{batch}.log",
    benchmark:
        "results/benchmarks/reconstructions/{model}/{corpus}/{shard}/{batch}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
    params:
        job=as_json("reconstructions"),
    shell:
        "python -m pipeline.reconstructions --out {output:q} --threads {threads} --device {resources.device} <<< {params.job:q} > {log:q} 2>&1"
