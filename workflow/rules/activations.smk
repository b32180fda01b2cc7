# Activations at several hooks in one forward pass, and the streams from which patched runs resume.
rule activations:
    input:
        inputs("activations"),
    output:
        BATCHES["activations"],
    log:
        "results/logs/activations/{model}/{corpus}/{shard}/{batch}.log",
    benchmark:
        "results/benchmarks/activations/{model}/{corpus}/{shard}/{batch}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
    params:
        job=as_json("activations"),
    shell:
        "python -m pipeline.activations --out {output:q} --threads {threads} --device {resources.device} <<< {params.job:q} > {log:q} 2>&1"
