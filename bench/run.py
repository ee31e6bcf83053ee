"""python bench/run.py --op rms_norm --peers:  `llmkernels bench` from a source tree, without an installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.argv.insert(1, "bench")

from llmkernels.cli import main  # noqa: E402

main()
