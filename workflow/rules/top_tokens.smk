# The most probable next tokens at the worst and best tokens, several SAEs a job.
rule top_tokens:
    input:
        inputs("top_tokens"),
    output:
        BATCHES["top_tokens"],
    log:
        "results/logs/top_tokens/{experiment}/{model}/{corpus}/{batch}.log",
    benchmark:
        "results/benchmarks/top_tokens/{experiment}/{model}/{corpus}/{batch}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
        logits_mib=256,
    params:
        job=as_json("top_tokens"),
    shell:
        "python -m pipeline.top_tokens --out {output:q} --threads {threads} --device {resources.device} --budget {resources.logits_mib} <<< {params.job:q} > {log:q} 2>&1"
