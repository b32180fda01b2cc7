# KL to second order on a few contexts, several SAEs a job.
rule curvatures:
    input:
        inputs("curvatures"),
    output:
        BATCHES["curvatures"],
    log:
        "results/logs/curvatures/{experiment}/{model}/{corpus}/{batch}.log",
    benchmark:
        "results/benchmarks/curvatures/{experiment}/{model}/{corpus}/{batch}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
        logits_mib=256,
    params:
        job=as_json("curvatures"),
    shell:
        "python -m pipeline.curvatures --out {output:q} --threads {threads} --device {resources.device} --budget {resources.logits_mib} <<< {params.job:q} > {log:q} 2>&1"
