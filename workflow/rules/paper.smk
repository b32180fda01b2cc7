# The summary table that a paper prints.
rule paper:
    input:
        inputs("paper"),
    output:
        PATTERNS["paper"],
        "results/paper/saes.csv",
        "results/paper/saes.md",
        "results/paper/saes.tex",
    log:
        "results/logs/paper/paper.log",
    benchmark:
        "results/benchmarks/paper/paper.tsv"
    conda:
        "../envs/faithful.yaml"
    params:
        job=as_json("paper"),
    shell:
        "python -m pipeline.paper --out {output:q} <<< {params.job:q} > {log:q} 2>&1"
