# KL and cross-entropy per token, for every intervention that needs the SAE; several SAEs a job.
rule effects:
    input:
        inputs("effects"),
    output:
        BATCHES["effects"],
    log:
        "results/logs/effects/{experiment}/{model}/{corpus}/{shard}/{batch}.log",
    benchmark:
        "results/benchmarks/effects/{experiment}/{model}/{corpus}/{shard}/{batch}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
        logits_mib=256,
    params:
        job=as_json("effects"),
    shell:
        "python -m pipeline.effects --out {output:q} --threads {threads} --device {resources.device} --budget {resources.logits_mib} <<< {params.job:q} > {log:q} 2>&1"
