# The same for the interventions that need no SAE, once per hook; several hooks a job.
rule ablations:
    input:
        inputs("ablations"),
    output:
        BATCHES["ablations"],
    log:
        "results/logs/ablations/{experiment}/{model}/{corpus}/{shard}/{batch}.log",
    benchmark:
        "results/benchmarks/ablations/{experiment}/{model}/{corpus}/{shard}/{batch}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
        logits_mib=256,
    params:
        job=as_json("ablations"),
    shell:
        "python -m pipeline.ablations --out {output:q} --threads {threads} --device {resources.device} --budget {resources.logits_mib} <<< {params.job:q} > {log:q} 2>&1"
