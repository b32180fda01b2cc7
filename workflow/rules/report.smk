# The page for readers.
rule report:
    input:
        inputs("report"),
    output:
        PATTERNS["report"],
        "results/headline.txt",
    log:
        "results/logs/report/report.log",
    benchmark:
        "results/benchmarks/report/report.tsv"
    conda:
        "../envs/faithful.yaml"
    params:
        job=as_json("report"),
    shell:
        "python -m pipeline.report --out {output:q} <<< {params.job:q} > {log:q} 2>&1"
