# The clean run of a model, stored once.
rule clean:
    input:
        inputs("clean"),
    output:
        PATTERNS["clean"],
    log:
        "results/logs/clean/{model}/{corpus}/{shard}.log",
    benchmark:
        "results/benchmarks/clean/{model}/{corpus}/{shard}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
        logits_mib=256,
    params:
        job=as_json("clean"),
    shell:
        "python -m pipeline.clean --out {output:q} --threads {threads} --device {resources.device} --budget {resources.logits_mib} <<< {params.job:q} > {log:q} 2>&1"
