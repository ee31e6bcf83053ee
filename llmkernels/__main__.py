"""python -m llmkernels: the command line where the script is not on the PATH."""

from llmkernels.cli import main

main()
