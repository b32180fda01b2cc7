# Sets of SAEs in the model at once.
rule compounds:
    input:
        inputs("compounds"),
    output:
        PATTERNS["compounds"],
    log:
        "results/logs/compounds/{experiment}/{model}/{corpus}/{shard}.log",
    benchmark:
        "results/benchmarks/compounds/{experiment}/{model}/{corpus}/{shard}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
        logits_mib=256,
    params:
        job=as_json("compounds"),
    shell:
        "python -m pipeline.compounds --out {output:q} --threads {threads} --device {resources.device} --budget {resources.logits_mib} <<< {params.job:q} > {log:q} 2>&1"
