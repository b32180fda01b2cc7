"""What sae_lens says of SAEs before their weights are read: `python -m pipeline.describe ASKED FILE`.

ASKED is JSON, {release: [SAE, ...]} or {folder: null}; the answer goes to the file: {release: {"repo", "commit",
"saes": {SAE: its configuration}}}, {folder: its configuration}, or {"error": message}. Planning starts this in a
process of its own, because importing sae_lens takes seconds and half a gigabyte.
"""

import json
import sys
from pathlib import Path

from pipeline import saes


def main() -> None:
    asked, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    try:
        answer = {name: saes.described(name, saes_of_it) for name, saes_of_it in asked.items()}
    except ValueError as error:
        answer = {"error": str(error)}
    out.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
