"""Adapters by which engines call llmkernels.  Each one imports its engine, so import the one that you need."""
